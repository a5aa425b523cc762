"""Layers that hold far more of the error than of the weights: they stay in float.

What a recorded call's output loses by some layers alone is measured. The errors of rounding are
independent of each other, so that their squares add up, and a few layers are found by halving:
usually the first and the last ones, and shortcuts, through which the sample itself passes. In a
U-Net of 97 layers four, with 1 % of the weights, had 86 % of the squared error.
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
from ..runtime import attach
from ..sampling import Call, Follow
from .result_check import answer, chosen, relative_error

if TYPE_CHECKING:
    from .job import Job

log = logging.getLogger("tenuto")

MOST = 0.02  # of the quantized weights stay in float, at most
TIMES = 10  # a layer's share of the error over its share of the weights, at least
LEAST = 0.01  # of the error, below which nothing is looked at further
WORTH = 0.2  # of the error, at least, in all that may stay in float: about 1 dB
TRIALS = 64  # groups of layers that are measured, at most: each in three recorded calls


def with_spared(job: Job, artifact: Artifact) -> Artifact:
    """`artifact`, of that job, without what is better left in float; see `heavy`.

    Of a model that is there as a whole, in diffusers; layers that share an input stay together,
    since hosts make one of them. The header's recipe then says which layers these are, and
    `kept_in_float` how much of the error each of them had.
    """
    denoiser, layers = job.denoiser, artifact.header["layers"]
    elsewhere = any(parameter.is_meta for parameter in denoiser.parameters())
    if elsewhere or key_map_of(denoiser) is not None:
        return artifact
    left = {name for subset in job.backbone.subsets for name in subset.linears}
    left.update(job.time.layers())
    names = [name for name in layers if name not in left]
    found = heavy(denoiser, artifact, names, list(chosen(job.trajectory)), job.device)
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
    denoiser: nn.Module, artifact: Artifact, names: list[str], calls: list[Call], device: Any
) -> dict[str, float]:
    """Layers of `names` that hold most for their weights, first the worst: share of squared error.

    At most `MOST` of the quantized weights, and each with `TIMES` its share of them.
    """
    facts = artifact.header["layers"]
    sizes = {name: math.prod(layer["shape"]) for name, layer in facts.items()}
    weights = sum(sizes.values())
    left, found = MOST * weights, dict[str, float]()
    few = sorted((n for n in names if sizes[n] <= left), key=lambda name: sizes[name])
    if not few or len(facts) < 2:
        return {}
    trial = Trial(denoiser, artifact, calls, device)
    shares = _single(trial, names, few, {n: TIMES * sizes[n] / weights for n in few})
    for name in sorted(shares, key=lambda name: -shares[name] / sizes[name]):
        if sizes[name] <= left:
            left -= sizes[name]
            found[name] = shares[name]
    return found if sum(found.values()) >= WORTH else {}


class Trial:
    """A copy of a denoiser with some of its layers quantized at a time.

    new: all that the artifact puts in place of its modules, by name.
    """

    def __init__(
        self, denoiser: nn.Module, artifact: Artifact, calls: list[Call], device: Any
    ) -> None:
        self.twin = private_copy(denoiser).float().to(device).eval()
        self.calls, self.device = calls, device
        self.plain = [answer(self.twin, call, device) for call in calls]
        attached = attach(self.twin, artifact, route=False, execution="int8", simulate=True)
        self.clock = attached.clock
        self.new: Mapping[str, nn.Module] = {
            p.name: p.new for p in attached.patches if isinstance(p, Swap)
        }
        attached.detach()

    def __call__(self, names: list[str]) -> float:
        """The squared relative error of the calls with these layers alone quantized, summed."""
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


def _single(
    trial: Trial, names: list[str], few: list[str], least: Mapping[str, float]
) -> dict[str, float]:
    """The shares of the error of the single layers of `few` that have most, by halving groups.

    names: all layers, `few` among them, by size. least: the share that a layer has at the least;
    a group whose error is under that of each of its layers is not looked at further.
    """
    total = trial(names)
    if not 0 < total < math.inf:
        return {}

    def promising(group: list[str], error: float) -> bool:
        return error >= total * max(LEAST, min(least[name] for name in group))

    def ranked(begin: int, group: list[str]) -> tuple[float, int, list[str]]:
        return -trial(group), begin, group

    found, groups, count = dict[str, float](), [ranked(0, few)], 2
    if -groups[0][0] < WORTH * total:
        return {}
    while groups and count + 2 <= TRIALS:
        negative, start, group = heapq.heappop(groups)
        if len(group) == 1:
            found[group[0]] = min(1.0, -negative / total)
            continue
        middle = len(group) // 2
        parts = [ranked(start, group[:middle]), ranked(start + middle, group[middle:])]
        count += 2
        for part in parts:
            if promising(part[2], -part[0]):
                heapq.heappush(groups, part)
    found.update((group[0], min(1.0, -e / total)) for e, _, group in groups if len(group) == 1)
    return found
