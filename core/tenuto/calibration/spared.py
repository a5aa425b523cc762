"""Layers that hold far more of the error than of the weights: they stay in float.

What a recorded call's output loses by some layers alone is measured. The errors of rounding are
independent of each other, so that their squares add up, and a few layers are found by halving:
usually the first and the last ones, and shortcuts, through which the sample itself passes. In the
demo U-Net four layers of 73, with 1 % of the weights, had 89 % of the squared error.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..artifact import Artifact
from ..model import Swap, key_map_of, private_copy
from ..numerics import Recipe, Rule
from ..progress import Progress
from ..runtime import attach
from ..sampling import Call, Follow, processes
from .result_check import answer, chosen, relative_error

if TYPE_CHECKING:
    from .job import Job

log = logging.getLogger("tenuto")

MOST = 0.02  # of the quantized weights stay in float, at most
TIMES = 30  # a layer's share of the error over its share of the weights, at least
LEAST = 0.01  # of the error, below which nothing is looked at further
WORTH = 0.3  # of the error, at least, in all that may stay in float: about 1.5 dB
TRIALS = 64  # groups of layers that are measured, at most: each in three recorded calls


def searched(job: Job, scheme: object) -> bool:
    """Whether `with_spared` looks for such layers: not where a recipe says what stays in float.

    Nor of a model on disk, all of which each of up to `TRIALS` trials would read three times, nor
    of a host's, before its names are canonical.
    """
    elsewhere = any(parameter.is_meta for parameter in job.denoiser.parameters())
    return not (isinstance(scheme, Recipe) or elsewhere or key_map_of(job.denoiser) is not None)


def with_spared(job: Job, artifact: Artifact, on_progress: Progress | None) -> Artifact:
    """`artifact`, of that job, without what is better left in float; see `heavy`.

    Layers that share an input stay together, since hosts make one of them. The header's recipe then
    says which layers these are, and `kept_in_float` how much of the error each of them had.
    """
    layers, time = artifact.header["layers"], set(job.time.layers())
    together = {name for subset in job.backbone.subsets for name in subset.linears}
    names = [name for name in layers if name not in time]
    single = [name for name in names if name not in together]
    calls = list(chosen(job.trajectory))

    def search() -> dict[str, float]:
        return heavy(job.denoiser, artifact, names, single, calls, job.device, on_progress)

    found = processes().once(search)
    if not found:
        return artifact
    for name in found:
        del layers[name]
        for start in (f"weights/{name}.", f"ranges/{name}."):
            for key in [k for k in artifact.tensors if k.startswith(start)]:
                if "." not in key[len(start) :]:
                    del artifact.tensors[key]
    log.info("%d layers stay in float: %s", len(found), ", ".join(found))
    used = {facts["scheme"] for facts in layers.values()}
    schemes = artifact.header["schemes"]
    artifact.header["schemes"] = {name: s for name, s in schemes.items() if name in used}
    kept = Recipe((*(Rule(name, None) for name in found), *job.recipe.rules))
    shares = {name: float(f"{share:.3g}") for name, share in found.items()}
    artifact.header |= {"recipe": kept.to_json(), "kept_in_float": shares}
    return artifact


@torch.no_grad()
def heavy(
    denoiser: nn.Module,
    artifact: Artifact,
    names: list[str],
    single: list[str],
    calls: list[Call],
    device: Any,
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """Layers of `single` that hold most for their weights, first the worst: share of squared error.

    names: the layers whose error is looked at, `single` among them. At most `MOST` of the quantized
    weights, each with `TIMES` its share of them, and together with `WORTH` of the error.
    """
    facts = artifact.header["layers"]
    sizes = {name: math.prod(layer["shape"]) for name, layer in facts.items()}
    weights = sum(sizes.values())
    left, found = MOST * weights, dict[str, float]()
    few = sorted((n for n in single if sizes[n] <= left), key=lambda name: sizes[name])
    if not few or len(facts) < 2:
        return {}
    trial = Trial(denoiser, artifact, calls, device, on_progress)
    shares = _single(trial, names, few, {n: TIMES * sizes[n] / weights for n in few})
    for name in sorted(shares, key=lambda name: -shares[name] / sizes[name]):
        if sizes[name] <= left:
            left -= sizes[name]
            found[name] = shares[name]
    return found if sum(found.values()) >= WORTH else {}


class Trial:
    """A copy of a denoiser with some of its layers quantized at a time.

    new: all that the artifact puts in place of its modules, by name. made: trials so far; left:
    how many more are expected.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        artifact: Artifact,
        calls: list[Call],
        device: Any,
        on_progress: Progress | None = None,
    ) -> None:
        self.made, self.left, self.on_progress = 0, TRIALS, on_progress
        self._share = 0.0
        self._tell()
        self.twin = private_copy(denoiser).float().to(device).eval()
        self.calls, self.device = calls, device
        self.plain = [answer(self.twin, call, device) for call in calls]
        how: Any = {"route": False, "execution": "int8", "simulate": True, "graphs": False}
        attached = attach(self.twin, artifact, **how)
        self.clock = attached.clock
        self.new: Mapping[str, nn.Module] = {
            p.name: p.new for p in attached.patches if isinstance(p, Swap)
        }
        attached.detach()

    def __call__(self, names: list[str]) -> float:
        """The squared relative error of the calls with these layers alone quantized, summed."""
        self._tell()
        self.made += 1
        swaps = [Swap(self.twin, name, self.new[name]) for name in names]
        follow = Follow(self.twin, self.clock, streams=False)
        try:
            found = [answer(self.twin, call, self.device) for call in self.calls]
        finally:
            follow.remove()
            for swap in reversed(swaps):
                swap.remove()
        errors = (relative_error(y, right) for y, right in zip(found, self.plain, strict=True))
        return sum(error**2 for error in errors if error is not None)

    def _tell(self) -> None:
        """The share of the trials that is done, which new ones that turn out to be needed keep."""
        self._share = max(self._share, self.made / (self.made + max(1, self.left)))
        if self.on_progress is not None:
            self.on_progress(round(1000 * self._share), 1000, "layers with most of the error")


def _single(
    trial: Trial, names: list[str], few: list[str], least: Mapping[str, float]
) -> dict[str, float]:
    """The shares of the error of the single layers of `few` that have most, by halving groups.

    names: all layers, `few` among them, by size. least: the share that a layer has at the least;
    a group whose error is under that of each of its layers is not looked at further.
    """
    trial.left = 2 + _halvings(few)
    total = trial(names)
    if not 0 < total < math.inf:
        return {}
    found, groups = dict[str, float](), list[tuple[float, int, list[str]]]()

    def measure(begin: int, group: list[str]) -> None:
        error = trial(group)
        if error >= total * max(LEAST, min(least[name] for name in group)):
            heapq.heappush(groups, (-error, begin, group))

    measure(0, few)
    if not groups or -groups[0][0] < WORTH * total:
        return {}
    while groups and trial.made + 2 <= TRIALS:
        expected = sum(_halvings(group) for _, _, group in groups)
        trial.left = min(expected, TRIALS - trial.made)
        negative, start, group = heapq.heappop(groups)
        if len(group) == 1:
            found[group[0]] = min(1.0, -negative / total)
            continue
        middle = len(group) // 2
        measure(start, group[:middle])
        measure(start + middle, group[middle:])
    found.update((group[0], min(1.0, -e / total)) for e, _, group in groups if len(group) == 1)
    return found


def _halvings(group: list[str]) -> int:
    """Trials that find one layer in a group."""
    return 2 * math.ceil(math.log2(len(group)))
