"""Stored activation ranges: min-max over the recorded calls, one for all steps or one a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import tensors_in, watched
from ..numerics import Format, covering
from ..progress import Progress
from ..resume import Work
from ..sampling import Call, Trajectory, processes
from .replay import arguments

NOTE = "activation ranges"


def activation_ranges(
    denoiser: nn.Module,
    forms: Mapping[str, Format],
    trajectory: Trajectory,
    device: Any,
    work: Work,
    on_progress: Progress | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(scale, zero_point) of the input of every layer in `forms`, fp32 (T,) per step, else (1,).

    A step that did not call a layer (an expert) has the range of all that did; a layer that none
    called has none.
    What was seen is a unit of `work` of its own, and the recording is replayed once.
    """
    if not forms:
        return {}
    kept = work.load("ranges")
    if kept is None:
        kept = extremes(denoiser, list(forms), trajectory, device, on_progress)
        work.save("ranges", kept)
    found = {}
    for name, form in forms.items():
        low, high = kept[f"{name}.low"], kept[f"{name}.high"]
        least, most = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        if least > most:
            continue
        idle = low > high
        low, high = low.where(~idle, least), high.where(~idle, most)
        if not form.per_step:
            low, high = least, most
        found[name] = covering(low, high, form)
    return found


@torch.no_grad()
def extremes(
    denoiser: nn.Module,
    names: Sequence[str],
    trajectory: Trajectory,
    device: Any,
    on_progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Smallest and largest input of each layer at each step: NAME.low and NAME.high, fp32 (T,)."""
    steps = len(trajectory.timesteps)
    found = {f"{n}.low": torch.full((steps,), torch.inf) for n in names}
    found |= {f"{n}.high": torch.full((steps,), -torch.inf) for n in names}

    def seen(call: Call) -> dict[str, list[float]]:
        ends: dict[str, list[float]] = {}

        def note(name: str, args: Any, kwargs: Any) -> None:
            low, high = torch.aminmax(next(tensors_in((args, kwargs))).detach())
            least, most = ends.get(name, (torch.inf, -torch.inf))
            ends[name] = [min(least, float(low)), max(most, float(high))]

        with watched(denoiser, names, before=note):
            denoiser(**arguments(denoiser, call, device))
        return ends

    calls = trajectory.calls
    for done, (call, ends) in enumerate(zip(calls, processes().each(calls, seen), strict=True), 1):
        if on_progress is not None:
            on_progress(done, len(calls), NOTE)
        for name, (low, high) in ends.items():
            lows, highs = found[f"{name}.low"], found[f"{name}.high"]
            lows[call.row] = min(float(lows[call.row]), low)
            highs[call.row] = max(float(highs[call.row]), high)
    return found
