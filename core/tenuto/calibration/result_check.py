"""The result of recorded calls: how far the quantized model is off, and which layers are at fault.

A layer that was understood wrongly gives garbage without a word: nothing that is measured layer by
layer while it is quantized would show it. So some recorded calls are computed in full precision and
with the artifact as it is attached, and what differs goes into the artifact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..errors import ModelError
from ..model import Swap, key_map_of, own_kinds, private_copy, tensors_in, watched
from ..numerics import Scheme
from ..progress import Progress
from ..runtime import attach, encoder_layers
from ..sampling import Call, Clock, Follow, Trajectory, processes
from ..text import printable
from .replay import arguments

if TYPE_CHECKING:
    from .job import Job

log = logging.getLogger("tenuto")

# Relative errors, at 8 bits or more and below: from the first on there is a warning, from the
# second on the artifact is refused. Random models of all families are at 0.003 to 0.07 and at 0.01
# to 0.35; an answer that has nothing to do with the right one is at 1 and above.
LIMITS = {8: (0.15, 0.5), 0: (0.5, 1.0)}
NAMED = 3  # layers in a sentence


def with_result(job: Job, artifact: Artifact, on_progress: Progress | None = None) -> Artifact:
    """`artifact`, of that job, with the header's `check`, and `left_in_float`, unknown classes."""
    denoiser, trajectory = job.denoiser, job.trajectory
    note = on_progress or (lambda done, total, words: None)
    note(0, 1, "checking the result")
    kinds = own_kinds(denoiser)
    elsewhere = any(parameter.is_meta for parameter in denoiser.parameters())
    if elsewhere or key_map_of(denoiser) is not None:  # a host's, before its names are canonical
        found = processes().once(lambda: checked_by_block(job, artifact))
    else:
        found = processes().once(lambda: checked(denoiser, artifact, trajectory, job.device))
    artifact.header |= {"check": found} if found else {}
    artifact.header |= {"left_in_float": kinds} if kinds else {}
    note(1, 1, "checked")
    return artifact


@torch.no_grad()
def checked(
    denoiser: nn.Module, artifact: Artifact, trajectory: Trajectory, device: Any
) -> dict[str, Any]:
    """The header's `check`: {"timestep", "relative_error"} of the worst of three recorded calls.

    Of the first, the middle and the last step. The relative error is |y' - y| / |y|, y being all
    that the denoiser returns and y' the same with the artifact's codes, ranges and tables. Empty
    where the model's own output is zero or not finite. ModelError names the layers at fault where
    y' is useless; a warning in the log does where it is merely far off. Costs one copy of the
    model; `denoiser` itself stays as it is.
    """
    twin = private_copy(denoiser).float().to(device).eval()
    calls = list(chosen(trajectory))
    plain = [answer(twin, call, device) for call in calls]
    how: Any = {"route": False, "execution": "int8", "simulate": True, "graphs": False}
    attached = attach(twin, artifact, **how)
    errors = [relative_error(answer(twin, c, device), y) for c, y in zip(calls, plain, strict=True)]
    new = {p.name: p.new for p in attached.patches if isinstance(p, Swap)}
    attached.detach()
    known = [(error, call) for error, call in zip(errors, calls, strict=True) if error is not None]
    if not known:
        return {}
    error, call = max(known, key=lambda pair: pair[0])
    step = f"of the output at timestep {call.timestep:g}"

    def faults() -> list[str]:
        return worst(twin, new, call, device, attached.clock)

    judge(error, artifact.header, f"The quantized model is off by {error:.2g} {step}", faults)
    return {"timestep": call.timestep, "relative_error": float(f"{error:.4g}")}


@torch.no_grad()
def checked_by_block(job: Job, artifact: Artifact) -> dict[str, Any]:
    """`checked` of what nothing can be attached to yet: of the weights alone, inputs in float."""
    known: list[tuple[float, Call]] = []
    plain = job.plain_copy()
    for call in chosen(job.trajectory):
        pair = (answer(model, call, job.device) for model in (job.model, plain))
        error = relative_error(*pair)
        if error is not None:
            known.append((error, call))
    if not known:
        return {}
    error, call = max(known, key=lambda pair: pair[0])
    said = f"The quantized model is off by {error:.2g} of the output at timestep {call.timestep:g}"
    judge(error, artifact.header, said, list)
    return {"timestep": call.timestep, "relative_error": float(f"{error:.4g}"), "inputs": "float"}


@torch.no_grad()
def checked_encoder(
    encoder: nn.Module, artifact: Artifact, name: str, call: Call, device: Any
) -> dict[str, Any]:
    """The `check` of the text encoder `name`: {"relative_error"} of what it returns for one prompt.

    Over the tokens that count, and over all the states that the pipeline asks for. Otherwise as
    `checked`.
    """
    device = next(encoder.parameters()).device if device is None else device
    twin = private_copy(encoder).float().to(device).eval()
    plain = answer(twin, call, device)
    new = encoder_layers(twin, artifact, name)
    swaps = [Swap(twin, *pair) for pair in new.items()]
    found = answer(twin, call, device)
    for swap in reversed(swaps):
        swap.remove()
    error = relative_error(found, plain)
    if error is None:
        return {}

    def faults() -> list[str]:
        return worst(twin, new, call, device)

    header = artifact.header["encoders"][name]
    judge(error, header, f"The quantized {name} is off by {error:.2g} of its states", faults)
    return {"relative_error": float(f"{error:.4g}")}


def judge(error: float, header: Mapping[str, Any], said: str, faults: Any) -> None:
    """ModelError where an error is useless, a warning where it is large. faults(): layers' names.

    header: with the schemes, by whose weights an error is judged.
    """
    forms = [Scheme.from_json(scheme).weight for scheme in header.get("schemes", {}).values()]
    wide = all(form.bits >= 8 for form in forms)
    large, useless = LIMITS[8 if wide else 0]
    if error < large:
        return
    names = ", ".join(printable(name, 50) for name in faults())
    if error < useless:
        log.warning("%s; most of it by %s", said, names or "no layer by itself")
        return
    raise ModelError(f"{said}, and useless: leave {names or 'some layers'} in full precision.")


@torch.no_grad()
def worst(
    twin: nn.Module,
    new: Mapping[str, nn.Module],
    call: Call,
    device: Any,
    clock: Clock | None = None,
) -> list[str]:
    """The modules whose replacements are furthest off on the inputs of a full-precision call.

    new: the replacements by name. clock: which they read.
    """
    gaps = dict.fromkeys(new, 0.0)

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        gap = relative_error(_flat(new[name](*args, **kwargs)), _flat(out))
        gaps[name] = max(gaps[name], gap or 0.0)

    follow = None if clock is None else Follow(twin, clock)
    try:
        with watched(twin, new, after=note):
            twin(**arguments(twin, call, device))
    finally:
        if follow is not None:
            follow.remove()
    found = sorted(gaps, key=lambda name: -gaps[name])[:NAMED]
    return [name for name in found if gaps[name] > 0]


def chosen(trajectory: Trajectory) -> Iterator[Call]:
    """A recorded call of the first, the middle and the last step."""
    last = len(trajectory.timesteps) - 1
    for row in sorted({0, last // 2, last}):
        found = next((call for call in trajectory.calls if call.row == row), None)
        if found is not None:
            yield found


def answer(model: nn.Module, call: Call, device: Any) -> list[Tensor]:
    """What `model` returns for `call`: floats on the CPU, of the tokens that count."""
    found = _flat(model(**arguments(model, call, device)))
    if call.counted is None:
        return found
    mask = call.counted
    return [t * mask[..., None] if t.shape[:-1] == mask.shape else t for t in found]


def _flat(out: Any) -> list[Tensor]:
    return [t.detach().float().cpu() for t in tensors_in(out) if t.is_floating_point()]


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float | None:
    """The relative error, infinite where `found` is not finite; None where `wanted` says nothing.

    Of several tensors the largest.
    """
    errors = []
    for y, right in zip(found, wanted, strict=True):
        size = float(right.double().norm())
        if 0 < size < math.inf:
            gap = float((y.double() - right.double()).norm()) / size
            errors.append(gap if math.isfinite(gap) else math.inf)
    return max(errors, default=None)
