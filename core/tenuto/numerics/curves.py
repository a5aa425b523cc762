"""A table of values at steps as a sum of few curves over the steps, in int8.

    value[t] = sum over r of mix[t, r] * (codes[r] * scale[r])

Rows of a table that is smooth over the steps are nearly sums of a few others. One curve after the
other is taken from what is left: the direction that has most of it, rounded to whole codes, then
how much of it each step has. What rounding left of a curve is taken by later ones, so that the
error goes on falling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

CODES = 127  # the largest code
ROUNDS = 24  # of the power iteration for a direction: later curves take what it missed
PARTS = {"scale": torch.float32, "mix": torch.float16}  # beside the codes, int8
SMALLEST = 1e-30  # what is left at a step or of a curve: below, it is nothing


class Curves(NamedTuple):
    """codes: int8 (R, ...). scale: fp32 (R,), above 0. mix: fp16 (T, R)."""

    codes: Tensor
    scale: Tensor
    mix: Tensor

    @staticmethod
    def of(rows: Tensor, most: int, weights: Tensor | None = None) -> Curves:
        """At least one and at most `most` curves for `rows`, float (T, ...) and finite.

        weights: (T,), how much a squared error at each step counts; None, or all 0: alike. The
        first curves of many are the same as those of few.
        """
        left = rows.detach().cpu().double().flatten(1)
        counts = torch.ones(len(left), dtype=torch.float64)
        if weights is not None and bool((weights > 0).any()):
            counts = weights.detach().cpu().double() / weights.max().cpu()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        while len(found) < most:
            direction = _main(left, counts)
            high = direction.abs().max()
            if float(high) < SMALLEST and found:
                break
            scale = (high / CODES).clamp_min(SMALLEST).float()
            codes = (direction / scale.double()).round().clamp(-CODES, CODES)
            curve = codes * scale.double()
            share = left @ curve / curve.square().sum().clamp_min(SMALLEST)
            share = share.to(torch.float16)
            left = left - share.double()[:, None] * curve
            found.append((codes.to(torch.int8), scale, share))
        codes, scales, shares = (torch.stack(part) for part in zip(*found, strict=True))
        return Curves(codes.reshape(-1, *rows.shape[1:]), scales, shares.T.contiguous())

    def first(self, count: int) -> Curves:
        """The first `count` of them."""
        return Curves(self.codes[:count], self.scale[:count], self.mix[:, :count].contiguous())

    def rows(self) -> Tensor:
        """The values, fp32 (T, ...)."""
        curves = self.codes.flatten(1).float() * self.scale[:, None]
        return (self.mix.float() @ curves).reshape(-1, *self.codes.shape[1:])

    @property
    def nbytes(self) -> int:
        """Of all three."""
        return sum(part.nbytes for part in self)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As a file has them."""
        return {name: self.codes, f"{name}.scale": self.scale, f"{name}.mix": self.mix}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], name: str) -> Curves:
        """The inverse of `tensors`."""
        return Curves(tensors[name], tensors[f"{name}.scale"], tensors[f"{name}.mix"])


def half(values: Tensor) -> Tensor:
    """fp16, or the values as they are where that has no room for them."""
    found = values.to(torch.float16)
    return found if bool(found.isfinite().all()) else values


def size(steps: int, width: int, curves: int) -> int:
    """Bytes of so many curves of `width` numbers a step."""
    return curves * (width + 4 + 2 * steps)


def _main(left: Tensor, counts: Tensor) -> Tensor:
    """The direction, (C,), with most of `left` (T, C), as long as what it has of it.

    Its largest share at a step is one, so that shares are numbers of half precision.
    """
    weighted = left * counts.sqrt()[:, None]
    shares = weighted.norm(dim=1)
    for _ in range(ROUNDS):
        length = shares.norm()
        if float(length) < SMALLEST:
            break
        shares = weighted @ (weighted.T @ (shares / length))
    direction = weighted.T @ shares
    direction = direction / direction.norm().clamp_min(SMALLEST)
    return direction * (left @ direction).abs().max()
