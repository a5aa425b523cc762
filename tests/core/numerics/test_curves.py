"""Tables of steps as sums of few curves in int8."""

from __future__ import annotations

import itertools

import torch

from tenuto.numerics import Curves, half
from tenuto.numerics.curves import size


def smooth(steps: int = 20, width: int = 96) -> torch.Tensor:
    """Values that depend smoothly on the step, as features of a timestep do."""
    draw = torch.Generator().manual_seed(0)
    waves = torch.linspace(0, 3, steps)[:, None] * torch.arange(1, 7)
    return torch.cat([waves.sin(), waves.cos()], 1) @ torch.randn(12, width, generator=draw)


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_each_curve_brings_it_nearer_and_the_first_are_those_of_fewer() -> None:
    rows = smooth()
    many = Curves.of(rows, 16)
    errors = [gap(many.first(count).rows(), rows) for count in range(1, 17)]
    assert all(b < a for a, b in itertools.pairwise(errors)) and errors[-1] < 3e-3
    few = Curves.of(rows, 5)
    assert gap(few.rows(), many.first(5).rows()) < 1e-4
    assert few.nbytes == size(20, 96, 5) == sum(t.nbytes for t in few.tensors("x").values())


def test_they_are_nearer_than_a_scale_a_step_in_half_its_bytes() -> None:
    rows = smooth(width=768)
    scale = rows.abs().amax(1, keepdim=True) / 127
    plain = (rows / scale).round() * scale
    few = Curves.of(rows, 11)
    assert few.nbytes < 0.6 * rows.numel() and gap(few.rows(), rows) < gap(plain, rows)


def test_steps_that_count_more_are_nearer() -> None:
    rows, counts = smooth(), torch.ones(20)
    counts[3] = 1e4
    weighted, plain = Curves.of(rows, 3, counts).rows(), Curves.of(rows, 3).rows()
    assert gap(weighted[3], rows[3]) < gap(plain[3], rows[3]) / 5
    none = Curves.of(rows, 3, torch.zeros(20))
    assert gap(none.rows(), plain) < 1e-4


def test_shapes_zeros_and_values_beyond_half_precision() -> None:
    rows = smooth(6, 12).reshape(6, 3, 4)
    found = Curves.of(rows, 6)
    assert found.codes.shape == (6, 3, 4) and found.rows().shape == rows.shape
    back = Curves.from_tensors(found.tensors("a.0"), "a.0")
    assert all(a is b for a, b in zip(back, found, strict=True))
    nothing = Curves.of(torch.zeros(4, 5), 3)
    assert len(nothing.codes) == 1 and not nothing.rows().any() and bool((nothing.scale > 0).all())
    large = Curves.of(1e6 * rows, 6).rows()
    assert gap(large, 1e6 * rows) < 1e-2 and half(large).dtype is torch.float32
