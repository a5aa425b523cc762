"""`Comparison`: the result of `tenuto.compare`, as data, as JSON and as a short table."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from ..artifact.summary import counted
from .bf16 import NONE

IN_FLOAT = ("float", "simulated", "dequantized", "weight-only", "auto")  # or may


@dataclass(frozen=True)
class Comparison:
    """An artifact beside the full-precision model, at equal seeds. What was not measured is None.

    psnr_db {median, p5}, ssim (mean), lpips (mean): distance of the artifact's images from the
    full-precision ones; infinite PSNR means equal images, `identical_pictures` counts them.
    bf16_floor_psnr_db: the same for images generated in bf16, None if the model is in bf16 itself
    or cannot be run in it: then `bf16_arithmetic` has the reason.
    reuse_ratio, reuse_flops: share of the branch calls, and of the denoiser's multiply-adds, that
    was reused and not computed; whole_calls: of the denoiser's calls themselves, which a forecast
    skips. int8_weight_share: of the bytes of Linear and Conv2d weights.
    seconds_per_picture {float, artifact, bf16}: medians over batches; bf16 is None where it is
    computed in another way than a user would (`bf16_arithmetic`). speedup: median of float over
    artifact, batch by batch; None if any layer was simulated. resident_weight_bytes {float,
    artifact}: of the denoiser's modules. peak_memory_bytes: with the artifact, all else that the
    comparison keeps included; `peak_memory_source` says what was read.
    execution: {"mode": ..., "layers": {"int8": n, "simulated": n, ...}}. encoders: how far the
    states of quantized text encoders are from full precision, by name; see `encoding.py`.
    compiled, graphs: whether all ran with compiled blocks, and as CUDA graphs where those could be.
    `to_json` adds `note`.
    """

    psnr_db: dict[str, float]
    ssim: float | None
    lpips: float | None
    bf16_floor_psnr_db: dict[str, float] | None
    identical_pictures: int
    reuse_ratio: float | None
    reuse_flops: float | None
    int8_weight_share: float | None
    seconds_per_picture: dict[str, float | None]
    speedup: float | None
    speedup_quartiles: tuple[float, float] | None
    resident_weight_bytes: dict[str, int]
    peak_memory_bytes: int | None
    peak_memory_source: str
    execution: dict[str, Any]
    bf16_arithmetic: str
    dtype: str
    device: str
    threads: int
    versions: dict[str, str]
    steps: int
    guidance: float | None
    count: int
    batch: int
    seed: int
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    compiled: bool = False
    graphs: bool = False
    whole_calls: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; an infinite PSNR becomes None."""
        return _plain(asdict(self) | {"note": self.note()})

    def note(self) -> str | None:
        """One sentence if low precision was measured and is slower here than float; else None."""
        words = self.execution["layers"]
        low = [word for word in words if not any(plain in word for plain in IN_FLOAT)]
        own = self.seconds_per_picture["artifact"]
        if not low or own is None or self.speedup is None:
            return None
        bf16, slower = self.seconds_per_picture["bf16"], []
        if bf16 is not None and own > bf16:
            slower.append("bf16")
        if self.speedup < 1:
            slower.append(self.dtype)
        if not slower:
            return None
        verb, whose = ("is", "it slows") if len(low) == 1 else ("are", "they slow")
        return (
            f"{' and '.join(low).capitalize()} {verb} slower than {' and '.join(slower)} on this "
            f"machine: by default, attach and generate time each layer and run in float those that "
            f"{whose} down."
        )

    def speed_note(self) -> str:
        """One sentence on the time: against what it was gained, or why there is no gain."""
        if self.speedup is None:
            simulated = counted(self.execution["layers"].get("simulated", 0), "layer")
            return (
                f"{simulated} simulated, not executed in low precision: "
                "this time is no gain, so no speed-up is given."
            )
        gains, bf16 = {self.dtype: self.speedup}, self.seconds_per_picture["bf16"]
        own = self.seconds_per_picture["artifact"]
        if bf16 is not None and own:
            gains["plain bf16"] = bf16 / own
        faster = [f"{x:.2f} times as fast as {name}" for name, x in gains.items() if x >= 1]
        slower = [f"{name} ({1 / x:.2f} times the time)" for name, x in gains.items() if x < 1]
        parts = [" and ".join(faster)] * bool(faster)
        parts += [f"here slower than {' and '.join(slower)}"] * bool(slower)
        text = ", but ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    def __str__(self) -> str:
        seconds, weights = self.seconds_per_picture, self.resident_weight_bytes
        floor = self.bf16_floor_psnr_db
        own, plain = self.psnr_db, {} if floor is None else floor
        what, done = ("calls", "skipped") if self.whole_calls else ("branch calls", "reused")
        rows: list[tuple[str, list[str]]] = [
            ("", [self.dtype, "bf16", "artifact"]),
            ("seconds an image", [_number(seconds[k]) for k in ("float", "bf16", "artifact")]),
            ("denoiser weights, MiB", [_mib(weights["float"]), "", _mib(weights["artifact"])]),
            ("peak memory, MiB", ["", "", _mib(self.peak_memory_bytes)]),
            ("PSNR, dB: median", ["", _number(plain.get("median"), 1), _number(own["median"], 1)]),
            ("  5th percentile", ["", _number(plain.get("p5"), 1), _number(own["p5"], 1)]),
            ("SSIM", ["", "", _number(self.ssim, 4)]),
            ("LPIPS", ["", "", _number(self.lpips, 4)]),
            (f"{what} {done}", ["", "", _share(self.reuse_ratio)]),
            (f"work {done}", ["", "", _share(self.reuse_flops)]),
            ("weights in 8 bits", ["", "", _share(self.int8_weight_share)]),
        ]
        for name, facts in self.encoders.items():
            half = facts["bf16"]
            values = [(half["cosine"], facts["cosine"]["mean"], 5)]
            values += [(half["relative_l2"], facts["relative_l2"], 4)]
            first, second = (["", _number(x, n), _number(y, n)] for x, y, n in values)
            rows.append((f"{name.replace('_', ' ')}: cosine", first))
            rows.append(("  relative L2", second))
        layers = ", ".join(f"{n} {kind}" for kind, n in self.execution["layers"].items() if n)
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        said = [
            self.speed_note(),
            self.note() or "",
            f"{self.bf16_arithmetic}." if self.bf16_arithmetic.startswith(NONE) else "",
            f"Executed as {self.execution['mode']} (layers: {layers or 'none replaced'})"
            f"{', blocks compiled' * self.compiled}{', as CUDA graphs' * self.graphs}.",
            f"{counted(self.count, 'image')}, {counted(self.steps, 'step')}{guidance}, "
            f"{self.device}, {counted(self.threads, 'thread')}, torch {self.versions['torch']}",
        ]
        table = (f"{name:<28}" + "".join(f"{v:>12}" for v in values) for name, values in rows)
        lines = [*(line.rstrip() for line in table), ""]
        return "\n".join([*lines, *(part for line in said for part in textwrap.wrap(line, 80))])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
