"""What an artifact has step by step: its route, the activation ranges, the temporal errors.

From header and tensors as they are in the file. A forged one gives a ValueError, a LookupError or
a TypeError, which the command turns into one sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caching import MOST, SHORTEST, CacheSchedule, Facts, Programme, RouterScores, about_db
from ..errors import ArtifactError, TenutoError
from ..model import WHOLE
from ..numerics import Format, Scheme, ends
from ..sampling import OutputKernel
from .artifact import Artifact
from .forecast import at_one, scores_of

KINDS = {  # what a branch is called last, and what it is
    **dict.fromkeys(("attn1", "attn", "self_attn", "attention"), "attention"),
    **dict.fromkeys(("attn2", "cross_attn", "cross_attention"), "cross-attention"),
    **dict.fromkeys(("ff", "mlp", "ffn", "feed_forward", "ff_context"), "feed-forward"),
    "resnets": "residual block",
}
LIMIT = 4096  # steps or branches: more cannot be seen


@dataclass(frozen=True)
class StepMap:
    """What is computed at which step. table: bool (T, N), True computes. timesteps: T."""

    table: Tensor
    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    policy: str

    @property
    def reused(self) -> float:
        """The share of the cells that are reused."""
        return 1 - float(self.table.float().mean())

    def blocks(self) -> list[str]:
        """The block of every branch: what its name says less the kind."""
        parts = (name.rpartition(".") for name in self.branches)
        found = ("".join(p) if p[2].isdigit() or not p[0] else p[0] for p in parts)
        return [name or WHOLE.kind for name in found]

    def kinds(self) -> list[str]:
        """The kind of every branch: its last word that is no number, put plainly."""
        parts = (name.split(".") for name in self.branches)
        last = [next((w for w in reversed(p) if not w.isdigit()), "") or WHOLE.kind for p in parts]
        return [KINDS.get(word, word) for word in last]


@dataclass(frozen=True)
class Band:
    """The stored input range of one layer at every step. low, high: fp64 (T,)."""

    layer: str
    low: Tensor
    high: Tensor
    timesteps: tuple[float, ...]
    note: str


@dataclass(frozen=True)
class Gaps:
    """1 - cosine of time-only features to full precision at every step. mean, worst: fp64 (T,)."""

    mean: Tensor
    worst: Tensor
    timesteps: tuple[float, ...]
    note: str


@dataclass(frozen=True)
class Curve:
    """What a forecast costs. errors: predicted, by the number of calls that are skipped.

    predicted: the PSNR in dB that goes with them; measured: that of held-out images.
    """

    errors: dict[int, float]
    steps: int
    note: str
    predicted: dict[int, float]
    measured: dict[int, float]


def step_map(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StepMap | None:
    """The route of an artifact, or None where it has none."""
    facts, table = header.get("route"), tensors.get("route/table")
    if not facts or table is None:
        return None
    times, branches = _times(facts), tuple(str(name) for name in facts["branches"])
    if tuple(table.shape) != (len(times), len(branches)) or not table.numel():
        raise ValueError("the route's table does not fit its steps and branches")
    if len(branches) > LIMIT:
        raise TenutoError(f"A cache schedule over {len(branches)} branches is too large to plot.")
    return StepMap(table.bool(), times, branches, str(facts.get("policy", "route")))


def band(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], layer: str | None = None
) -> Band | None:
    """The ranges of `layer`, else of the one whose range changes most; None where there are none.

    Change is how far the two ends move over the steps, as a share of the mean width.
    """
    times = _times(header["schedule"])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, scale in tensors.items():
        name = key.removeprefix("ranges/").removesuffix(".scale")
        if key != f"ranges/{name}.scale" or tuple(scale.shape) != (len(times),) or not times:
            continue
        scale, zero = scale.double(), tensors[f"ranges/{name}.zero_point"].double()
        if zero.shape != scale.shape or not bool((zero * scale + scale).isfinite().all()):
            raise ValueError(f"the range of {name} is none")
        bottom, top = ends(_activation(header, name))
        found[name] = (bottom - zero) * scale, (top - zero) * scale
    if layer is not None and layer not in found:
        raise TenutoError(f"The artifact has no activation range per step for the layer {layer!r}.")
    if not found:
        return None
    note = "the layer that was asked for"
    if layer is None:
        layer = max(found, key=lambda name: _change(*found[name]))
        note = f"of {len(found)} layers with a range per step, the one that changes most"
    return Band(layer, *found[layer], times, note)


def gaps(header: Mapping[str, Any]) -> Gaps | None:
    """The temporal errors in an artifact's header, or None where it has none."""
    modules = (header.get("temporal") or {}).get("modules") or {}
    if not modules:
        return None
    times = _times(header["schedule"])
    rows = [[float(e) for e in facts["cosine_error"]] for facts in modules.values()]
    errors = torch.tensor(rows, dtype=torch.float64)  # (modules, T)
    if errors.shape[1] != len(times) or not bool(errors.isfinite().all()):
        raise ValueError("the temporal errors do not fit the steps")
    kinds = Counter(str(facts["kind"]) for facts in modules.values())
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    note = f"{len(rows)} module{'s' if len(rows) > 1 else ''} ({said})"
    return Gaps(errors.mean(0), errors.amax(0), times, note)


def curve(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Curve | None:
    """The predicted error of a forecast over its budget; None where an artifact has none."""
    facts, values = header.get("forecast"), tensors.get("forecast/kernel")
    if facts is None or values is None:
        return None
    kernel = OutputKernel.of(values, facts)
    steps = len(kernel.timesteps)
    if not SHORTEST <= steps <= MOST:
        return None
    found = Programme(kernel).errors
    errors = {steps - calls: error for calls, error in found.items() if calls < steps}
    images = f"{kernel.images} image{'s' if kernel.images > 1 else ''}"
    scores, one = scores_of(dict(facts)), at_one(dict(facts))
    predicted = {skipped: about_db(error, one) for skipped, error in errors.items()}
    measured = {skipped: db for skipped, (db, _) in scores.items() if skipped < steps}
    note = f"kernel of {images}, {steps} steps"
    return Curve(errors, steps, note, predicted, measured)


def _activation(header: Mapping[str, Any], layer: str) -> Format:
    """The format of the input of `layer`; whole codes where the header does not know the layer."""
    facts = (header.get("layers") or {}).get(layer)
    scheme = facts and Scheme.from_json(header["schemes"][facts["scheme"]])
    return (scheme and scheme.activation) or Format(8, symmetric=False, granularity="tensor")


def _times(facts: Mapping[str, Any]) -> tuple[float, ...]:
    times = tuple(float(t) for t in facts["timesteps"])
    if len(times) > LIMIT:
        raise TenutoError(f"{len(times)} steps are too many to plot.")
    return times


def _change(low: Tensor, high: Tensor) -> float:
    moved = (low.amax() - low.amin()) + (high.amax() - high.amin())
    return float(moved / (high - low).mean().clamp_min(1e-30))


def schedule_of(artifact: Artifact) -> CacheSchedule | None:
    """The cache schedule in the artifact's route, or None."""
    facts = artifact.header.get("route")
    table = artifact.tensors.get("route/table")
    if facts is None or table is None:
        return None
    try:
        times, branches = tuple(float(t) for t in facts["timesteps"]), tuple(facts["branches"])
        order = int(facts.get("order", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("The artifact is damaged: its route has no steps.") from error
    if not times or not branches or not table.numel():
        raise ArtifactError("The artifact is damaged: its route has no steps.")
    return CacheSchedule(table.bool(), times, branches, order)


def measured(artifact: Artifact) -> Facts | None:
    """What calibration measured for the route of an artifact; None where it has no route.

    The scores of the router are there only where that was the best.
    """
    schedule = schedule_of(artifact)
    if schedule is None:
        return None
    costs, logits = (artifact.tensors.get(f"route/{name}") for name in ("costs", "logits"))
    return Facts(
        schedule.timesteps,
        schedule.branches,
        None if costs is None else tuple(costs.tolist()),
        logits if policy_of(artifact).startswith(RouterScores.name) else None,
    )


def policy_of(artifact: Artifact) -> str:
    """The label of the policy that made the route; "" where it has none."""
    return str((artifact.header.get("route") or {}).get("policy", ""))
