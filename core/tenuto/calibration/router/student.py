"""One training step of a router inside a sampling run: teacher, student, loss, slope, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model import map_tensors
from ...sampling import Clock
from .mixing import Mixer
from .rollout import Guide


class Student:
    """The denoiser's forward in training; what it returns is the student's output.

    rows: the weights r (N,) of a step. learn(row, loss, slopes): what a step shows; slopes are the
    gradients (N,) of its mean squared error to r, by row: its own and, with `credit`, those of
    earlier steps whose outputs it reuses. The graph through the slots is cut at every step whose
    number + `offset` `credit` divides. The first step computes everything and learns nothing.
    The teacher gets the same inputs as the student, and neither reads nor writes what is stored.
    hard: the student computes where r > 1/2 and reuses elsewhere; gradients are the mixture's.
    gains: (T,), what an error of each step moves the result by: errors are added up before they are
    squared, and the loss is what a step adds to that square. free: the rows that are trained; the
    others compute all, and what is returned is the teacher's output.
    """

    mixer: Mixer

    def __init__(
        self,
        rows: Callable[[int], Tensor],
        learn: Callable[[int, float, dict[int, Tensor]], None],
        guide: Guide,
        credit: int = 0,
        offset: int = 0,
        *,
        hard: bool = False,
        gains: Sequence[float] | None = None,
        free: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.learn, self.guide = rows, learn, guide
        self.credit, self.offset = credit, offset
        self.hard, self.gains, self.free = hard, gains, free
        self.leaves: dict[int, Tensor] = {}
        self.drift: dict[Any, Tensor] = {}  # of the result, by the streams of a call

    def attend(self, clock: Clock) -> Callable[..., Any]:
        """The forward, for `override_`."""

        def forward(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode(False):
                args, kwargs = usable(args), usable(kwargs)
                if clock.step > 0 and (self.free is None or clock.step in self.free):
                    return self._step(clock, original, args, kwargs)
                with torch.no_grad():
                    self.mixer.set(torch.ones_like(self.rows(0)))
                    return original(*args, **kwargs)

        return forward

    def _step(self, clock: Clock, original: Any, args: Any, kwargs: Any) -> Any:
        mixer, row = self.mixer, clock.step
        with torch.no_grad():
            mixer.apart = True
            plain = original(*args, **kwargs)
            target = self.guide(plain, args, kwargs).float()
            mixer.apart = False
        with torch.enable_grad():
            leaf = self._leaf(row, target.device)
            mixer.set(leaf + ((leaf > 0.5).to(leaf.dtype) - leaf).detach() if self.hard else leaf)
            out = original(*args, **kwargs)
            loss = self._loss(clock, self.guide(out, args, kwargs).float() - target)
        if loss.requires_grad:  # not so where nothing was reused yet
            keep = bool(self.credit)
            slopes = torch.autograd.grad(
                loss, list(self.leaves.values()), allow_unused=True, retain_graph=keep
            )
            found = zip(self.leaves, slopes, strict=True)
            self.learn(row, float(loss.detach()), {k: s.cpu() for k, s in found if s is not None})
        return map_tensors(Tensor.detach, out if self.free is None else plain)

    def _loss(self, clock: Clock, gap: Tensor) -> Tensor:
        """The mean square of an error, or what it adds to the square of the result's."""
        if self.gains is None:
            return gap.square().mean()
        before = self.drift.get(clock.streams, torch.zeros_like(gap))
        after = before + self.gains[clock.step] * gap
        self.drift[clock.streams] = after.detach()
        return after.square().mean() - before.square().mean()

    def _leaf(self, row: int, device: torch.device) -> Tensor:
        """r of a step, one tensor for all its calls."""
        if row not in self.leaves:
            if not self.credit or (row + self.offset) % self.credit == 0:
                self.leaves.clear()
                self.mixer.forget()
            self.leaves[row] = self.rows(row).detach().to(device).requires_grad_()
            self.mixer.credit = bool(self.credit)
        return self.leaves[row]


def usable(value: Any) -> Any:
    """Tensors of inference mode copied, so that they can take part in a graph."""
    return map_tensors(lambda x: x.clone() if x.is_inference() else x, value)
