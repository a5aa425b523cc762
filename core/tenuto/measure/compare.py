"""`compare`: what an artifact costs and what it buys, measured.

Every number that the project shows anywhere comes from here or from what is named in `__all__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact, schedule_of
from ..errors import TenutoError
from ..model import (
    Describe,
    denoiser_of,
    describing,
    device_and_dtype,
    frozen,
    multiply_adds,
    refuse_cache,
)
from ..progress import Progress
from ..resources import prompts as shipped_prompts
from ..runtime import Latency, Tenuto, attach, check_execution, latency, percentile
from ..sampling import Sample, one_by_one
from .bf16 import NATIVE, bf16_arithmetic, bf16_floor
from .comparison import Comparison
from .encoder_states import hidden_distance
from .environment import surroundings
from .lpips import lpips
from .memory import PeakMemory, resident_weight_bytes
from .metrics import frechet_distance, kernel_distance, psnr, ssim
from .paired_runs import FirstCall, Generated, Way, distances, first_call, generate_in_turns, split
from .repeat import as_calibrated

__all__ = [
    "Comparison", "Generated", "Latency", "PeakMemory", "compare", "compare_all",
    "frechet_distance", "generate_in_turns", "kernel_distance", "latency", "lpips",
    "multiply_adds", "percentile", "psnr", "resident_weight_bytes", "ssim",
]  # fmt: skip

FIRST_SEED = 10_000  # far from the seeds of calibration
FULL, ARTIFACT, BF16 = "full precision", "artifact", "bf16"


@dataclass
class _Facts:
    """What is known beside images and times. work: multiply-adds by branch, "" the whole."""

    work: dict[str, int]
    float_bytes: int
    arithmetic: str  # of bf16
    artifact_bytes: int = 0
    calls: dict[str, list[int]] = field(default_factory=dict)  # branch: [computed, reused]
    execution: dict[str, Any] = field(default_factory=dict)
    int8_share: float | None = None
    peak: int | None = None
    peak_source: str = ""

    def note(self, attached: Tenuto, before: dict[str, list[int]], peak: PeakMemory) -> None:
        """What an attached artifact says of itself after it has generated."""
        self.execution, self.int8_share = attached.execution(), attached.int8_weight_share()
        self.artifact_bytes = resident_weight_bytes(attached.denoiser)
        for name, counts in attached.counts().items():
            known = self.calls.setdefault(name, [0, 0])
            self.calls[name] = [known[i] + counts[i] - before[name][i] for i in (0, 1)]
        if peak.bytes is not None:
            self.peak, self.peak_source = max(self.peak or 0, peak.bytes), peak.source

    def reuse(self) -> tuple[float, float]:
        """Shares that were reused: of the branch calls, and of the whole's multiply-adds."""
        reused = {name: h / max(1, c + h) for name, (c, h) in self.calls.items()}
        work = sum(share * self.work[name] for name, share in reused.items())
        return sum(reused.values()) / max(1, len(reused)), work / max(1, self.work[""])


def compare(
    model: Any,
    artifact: Artifact | str | Path,
    prompts: Sequence[str] | str | None = None,
    *,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = FIRST_SEED,
    sample: Sample | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    execution: str = "int8",
    describe: Describe | None = None,
    speedup: float | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Draw `count` images with `model`, with `artifact` attached and in bf16, at equal seeds.

    A pipeline draws `prompts` (else the shipped "evaluation" list) at the artifact's own steps and
    guidance, and is called as it was for calibration, unless `steps`, `guidance` and `call` (as in
    `record`) say otherwise; pictures have to be given again. Each frame of a video counts as an
    image, and videos come one at a time, like what is made of an image. A bare denoiser takes
    `sample(denoiser, seed, batch)`, which runs one trajectory; its steps are counted, `guidance` is
    only noted. The three take turns, a few batches each: times are compared side by side. `device`
    moves the model there for the call. `execution` is that of `attach`: "int8" measures the
    artifact's own arithmetic; so are `describe` and `speedup`. The model is as it was afterwards,
    whatever happens.
    """
    describing(model, describe)
    found, _ = compare_all(
        model, {ARTIFACT: artifact}, prompts, count=count, steps=steps, guidance=guidance,
        call=call, seed=seed, sample=sample, batch=batch, device=device, execution=execution,
        speedup=speedup, on_progress=on_progress,
    )  # fmt: skip
    return found[ARTIFACT]


def compare_all(
    model: Any,
    artifacts: Mapping[str, Artifact | str | Path],
    prompts: Sequence[str] | str | None = None,
    *,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = FIRST_SEED,
    sample: Sample | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    execution: str = "int8",
    speedup: float | None = None,
    floor: bool = True,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Comparison], dict[str, Generated]]:
    """`compare` for several artifacts of one model; full precision and bf16 are generated once.

    Steps, guidance and call are the first artifact's unless given; without `floor`, bf16 is left
    out. Returns the comparisons by name, and the images: under the same names, `FULL` and `BF16`.
    """
    if count < 1 or batch < 1:
        raise TenutoError(f"There is nothing to compare in {count} images, {batch} at a time.")
    check_execution(execution)
    refuse_cache(denoiser_of(model), "a comparison with full precision")
    known = {name: Artifact.of(artifact) for name, artifact in artifacts.items()}
    for artifact in known.values():
        artifact.check(model)
    given, lines = sample is not None, prompts or shipped_prompts("evaluation")
    lines = (lines,) if isinstance(lines, str) else tuple(lines)
    if sample is None:
        schedule = next(iter(known.values())).header["schedule"]
        steps, guidance, call, sample = as_calibrated(model, schedule, lines, steps, guidance, call)
        batch = 1 if one_by_one(model, call) else batch
    denoiser, batches = denoiser_of(model), split(seed, count, batch)
    with _on(model, device), frozen(denoiser), torch.no_grad():
        first, seen = first_call(denoiser, sample, *batches[0], whole=given)
        facts = _facts_of(denoiser, known, first)
        put_on = partial(attach, model, execution=execution, speedup=speedup)
        ways = _ways(model, known, first, facts, put_on, floor)
        generated = generate_in_turns(ways, sample, batches, on_progress)
        states = {
            n: {} if given else hidden_distance(model, a, lines, call) for n, a in known.items()
        }
        run = surroundings(denoiser) | {"steps": seen if given else steps, "guidance": guidance}
    run |= {"count": sum(map(len, generated[FULL].batches)), "batch": batch, "seed": seed}
    return {
        name: Comparison(
            **_distances(generated, name),
            **_costs(generated, name, facts[name]),
            **run,
            encoders=states[name],
        )
        for name in known
    }, generated


def _facts_of(
    denoiser: nn.Module, artifacts: Mapping[str, Artifact], call: FirstCall
) -> dict[str, _Facts]:
    """What is known of each artifact before anything is generated."""
    schedules = [schedule_of(artifact) for artifact in artifacts.values()]
    branches = {name for schedule in schedules if schedule for name in schedule.branches}
    work = multiply_adds(denoiser, *call, names=sorted(branches))
    size = resident_weight_bytes(denoiser)
    arithmetic = bf16_arithmetic(device_and_dtype(denoiser)[0])
    return {name: _Facts(work, size, arithmetic) for name in artifacts}


@contextmanager
def _on(model: Any, device: torch.device | str | None) -> Iterator[None]:
    """`model` on `device` for the time of the context."""
    before, _ = device_and_dtype(denoiser_of(model))
    if device is None or torch.device(device) == before:
        yield
        return
    try:
        model.to(device)
        yield
    finally:
        model.to(before)


def _ways(
    model: Any,
    artifacts: Mapping[str, Artifact],
    call: FirstCall,
    facts: Mapping[str, _Facts],
    put_on: Callable[[Artifact], Tenuto],
    floor: bool,
) -> dict[str, Way]:
    """The ways to generate; each makes one call on entry that is not timed: it packs weights."""
    denoiser = denoiser_of(model)
    device, dtype = device_and_dtype(denoiser)

    @contextmanager
    def attached(name: str) -> Iterator[nn.Module]:
        found = put_on(artifacts[name])
        with found, PeakMemory(device) as peak:
            denoiser(*call[0], **call[1])
            before = found.counts()
            found.clock.begin()  # that call is no part of the run that comes
            yield denoiser
            peak.read()
            facts[name].note(found, before, peak)

    @contextmanager
    def plain(module: nn.Module) -> Iterator[nn.Module]:
        module(*call[0], **call[1])
        yield module

    ways: dict[str, Way] = {FULL: lambda: plain(denoiser)}
    ways |= {name: partial(attached, name) for name in artifacts}
    if floor and dtype is not torch.bfloat16:
        twin, arithmetic = bf16_floor(denoiser, *call[:2])
        for known in facts.values():
            known.arithmetic = arithmetic
        if twin is not None:
            ways[BF16] = partial(plain, twin)
    return ways


def _distances(generated: dict[str, Generated], name: str) -> dict[str, Any]:
    """How far the artifact's images, and those in bf16, are from the full-precision ones."""
    full, mine, floor = generated[FULL], generated[name], generated.get(BF16)
    equal = distances(lambda a, b: (a == b).flatten(1).all(1), full, mine)
    return {
        "psnr_db": _spread(distances(psnr, full, mine)),
        "ssim": _mean(ssim, full, mine),
        "lpips": _mean(lpips, full, mine),
        "bf16_floor_psnr_db": None if floor is None else _spread(distances(psnr, full, floor)),
        "identical_pictures": int(sum(equal)),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": percentile(values, 50), "p5": percentile(values, 5)}


def _mean(
    distance: Callable[[Tensor, Tensor], Tensor], one: Generated, other: Generated
) -> float | None:
    """The mean of `distance`, or None where it is not defined: images too small, no network."""
    try:
        return mean(distances(distance, one, other))
    except TenutoError:
        return None


def _costs(generated: dict[str, Generated], name: str, facts: _Facts) -> dict[str, Any]:
    """Time, memory and what was really executed; a simulated time gives no speed-up."""
    simulated = facts.execution["layers"].get("simulated", 0)
    gain = None if simulated else generated[FULL].latency.over(generated[name].latency)
    ratio, work = facts.reuse()
    plain = generated.get(BF16) if facts.arithmetic == NATIVE else None  # else no time of bf16
    return {
        "reuse_ratio": ratio,
        "reuse_flops": work,
        "int8_weight_share": facts.int8_share,
        "seconds_per_picture": {
            "float": generated[FULL].per_image,
            "artifact": generated[name].per_image,
            "bf16": None if plain is None else plain.per_image,
        },
        "speedup": None if gain is None else gain.median,
        "speedup_quartiles": None if gain is None else gain.quartiles,
        "resident_weight_bytes": {"float": facts.float_bytes, "artifact": facts.artifact_bytes},
        "peak_memory_bytes": facts.peak,
        "peak_memory_source": facts.peak_source,
        "execution": facts.execution,
        "bf16_arithmetic": facts.arithmetic,
    }
