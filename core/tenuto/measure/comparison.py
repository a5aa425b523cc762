"""`Comparison`: the result of `tenuto.compare`, as data, as JSON and as a short table."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """An artifact beside the full-precision model, at equal seeds. What was not measured is None.

    psnr_db {median, p5}, ssim (mean), lpips (mean): distance of the artifact's pictures from the
    full-precision ones; infinite PSNR means equal pictures, `identical_pictures` counts them.
    bf16_floor_psnr_db: the same for pictures drawn in bf16, None if the model is in bf16 itself.
    reuse_ratio, reuse_flops: share of the branch calls, and of the denoiser's multiply-adds, that
    was held and not computed. int8_weight_share: of the bytes of Linear and Conv2d weights.
    seconds_per_picture {float, artifact, bf16}: medians over batches; bf16 is None where it is
    computed in another way than a user would (`bf16_arithmetic`). speedup: median of float over
    artifact, batch by batch; None if any layer was simulated. resident_weight_bytes {float,
    artifact}: of the denoiser's modules. peak_memory_bytes: while the artifact drew, all else that
    the comparison holds included; `peak_memory_source` says what was read.
    execution: {"mode": ..., "layers": {"int8": n, "simulated": n, ...}}. encoders: how far the
    states of quantized text encoders are from full precision, by name; see `encoding.py`.
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

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; an infinite PSNR becomes None."""
        return _plain(asdict(self) | {"note": self.note()})

    def note(self) -> str | None:
        """One sentence if int8 was measured and is slower here than float; else None."""
        low, own = self.execution["layers"].get("int8", 0), self.seconds_per_picture["artifact"]
        if not low or own is None or self.speedup is None:
            return None
        bf16, slower = self.seconds_per_picture["bf16"], []
        if bf16 is not None and own > bf16:
            slower.append("bf16")
        if self.speedup < 1:
            slower.append(self.dtype)
        if not slower:
            return None
        return (
            f"Int8 is slower than {' and '.join(slower)} on this machine: by default, attach "
            "and generate time each layer and run in float those that int8 slows down."
        )

    def speed_note(self) -> str:
        """One sentence on the time: what was gained, or why there is no gain to speak of."""
        simulated = self.execution["layers"].get("simulated", 0)
        if self.speedup is None:
            return (
                f"{simulated} layers were simulated, not executed in low precision: "
                "this time is no gain, so no speed-up is given."
            )
        if self.speedup < 1:
            return f"Slower than {self.dtype} here: {1 / self.speedup:.2f} times the time."
        bf16, own = self.seconds_per_picture["bf16"], self.seconds_per_picture["artifact"]
        faster = f"{self.speedup:.2f} times as fast as {self.dtype}"
        if bf16 is not None and own is not None and own > bf16:
            return f"{faster}, but slower than plain bf16 here: {own / bf16:.2f} times the time."
        return f"{faster}."

    def __str__(self) -> str:
        seconds, weights = self.seconds_per_picture, self.resident_weight_bytes
        rows = [
            ("", f"{self.dtype:>12}{'artifact':>12}"),
            ("seconds a picture", f"{_number(seconds['float'])}{_number(seconds['artifact'])}"),
            ("denoiser weights, MiB", f"{_mib(weights['float'])}{_mib(weights['artifact'])}"),
            ("peak memory, MiB", f"{'':12}{_mib(self.peak_memory_bytes)}"),
            ("PSNR, dB", _decibel(self.psnr_db)),
            ("  of plain bf16", _decibel(self.bf16_floor_psnr_db)),
            ("SSIM, LPIPS", f"{_number(self.ssim, 4)}{_number(self.lpips, 4)}"),
            ("held: calls, work", f"{_share(self.reuse_ratio)}{_share(self.reuse_flops)}"),
            ("weights in int8", _share(self.int8_weight_share)),
        ]
        for name, facts in self.encoders.items():
            cosine, gap, floor = facts["cosine"]["mean"], facts["relative_l2"], facts["bf16"]
            text = f"{cosine:>12.5f}   relative L2{gap:>8.4f}; of bf16 {floor['cosine']:.5f}"
            rows.append(
                (f"{name.replace('_', ' ')} cosine", f"{text},{floor['relative_l2']:>7.4f}")
            )
        layers = ", ".join(f"{n} {kind}" for kind, n in self.execution["layers"].items() if n)
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return "\n".join(
            [
                *(f"{name:<24}{value}".rstrip() for name, value in rows),
                self.speed_note(),
                *textwrap.wrap(self.note() or "", 100),
                f"Executed as {self.execution['mode']} (layers: {layers or 'none replaced'}).",
                f"{self.count} pictures, {self.steps} steps{guidance}, {self.device}, "
                f"{self.threads} threads, torch {self.versions['torch']}",
            ]
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, digits: int = 3) -> str:
    return f"{'-':>12}" if value is None else f"{value:>12.{digits}f}"


def _mib(value: int | None) -> str:
    return f"{'-':>12}" if value is None else f"{value / 2**20:>12.1f}"


def _share(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>12.1%}"


def _decibel(value: dict[str, float] | None) -> str:
    if value is None:
        return f"{'-':>12}"
    return f"{value['median']:>12.1f}   median,{value['p5']:>6.1f} at the 5th percentile"
