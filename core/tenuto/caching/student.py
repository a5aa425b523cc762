"""One training step of a router inside a sampling run: teacher, student, loss, slope, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..clock import Clock
from .mixing import Mixer
from .rollout import Guide


class Student:
    """The denoiser's forward in training; what it returns is the student's output.

    rows: the weights r (N,) of a step. learn(row, loss, slope): the update; slope (N,) is the
    gradient of the mean squared error to r. The first step computes everything and learns nothing.
    The teacher gets the same inputs as the student, and neither reads nor writes what is held.
    """

    mixer: Mixer

    def __init__(
        self,
        rows: Callable[[int], Tensor],
        learn: Callable[[int, float, Tensor], None],
        guide: Guide,
    ) -> None:
        self.rows, self.learn, self.guide = rows, learn, guide

    def attend(self, clock: Clock) -> Callable[..., Any]:
        """The forward, for `override_`."""

        def forward(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode(False):
                args, kwargs = usable(args), usable(kwargs)
                if clock.row > 0:
                    return self._step(clock.row, original, args, kwargs)
                with torch.no_grad():
                    self.mixer.set(torch.ones_like(self.rows(0)))
                    return original(*args, **kwargs)

        return forward

    def _step(self, row: int, original: Any, args: Any, kwargs: Any) -> Any:
        mixer = self.mixer
        with torch.no_grad():
            mixer.apart = True
            target = self.guide(original(*args, **kwargs), args, kwargs).float()
            mixer.apart = False
        with torch.enable_grad():
            weights = self.rows(row).to(target.device).requires_grad_()
            mixer.set(weights)
            out = original(*args, **kwargs)
            loss = (self.guide(out, args, kwargs).float() - target).square().mean()
        if loss.requires_grad:  # not so where nothing was held yet
            (slope,) = torch.autograd.grad(loss, weights)
            self.learn(row, float(loss.detach()), slope.cpu())
        return detached(out)


def usable(value: Any) -> Any:
    """Tensors of inference mode copied, so that they can take part in a graph."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: usable(v) for k, v in value.items()}
    return type(value)(usable(v) for v in value) if isinstance(value, list | tuple) else value


def detached(value: Any) -> Any:
    """A denoiser's output without its graph, of the same type."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return type(value)(**{k: detached(v) for k, v in value.items()})
    return type(value)(detached(v) for v in value) if isinstance(value, list | tuple) else value
