"""Codes, ranges and packing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenuto.numerics.integer_codes import (
    RANGES,
    affine,
    code_limits,
    dequantize,
    fake_quantize,
    minmax,
    mse,
    pack_int4,
    percentile,
    quantize,
    unpack_int4,
)

FORMATS = [(bits, symmetric) for bits in (2, 3, 4, 6, 8) for symmetric in (True, False)]


def data(name: str) -> Tensor:
    """(R, K) of several shapes of distribution."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 200, generator=draw)
    return {
        "normal": x,
        "outlier": torch.cat([x, torch.full((6, 1), 30.0)], 1),
        "positive": x.abs() + 3,
        "negative": -x.abs() - 3,
        "skewed": x.exp(),
        "tiny": x * 1e-6,
        "one": x[:, :1],
    }[name]


NAMES = ("normal", "outlier", "positive", "negative", "skewed", "tiny", "one")


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [(8, True, (-127, 127)), (8, False, (0, 255)), (4, True, (-7, 7)), (4, False, (0, 15)),
     (2, True, (-1, 1)), (2, False, (0, 3))],
)  # fmt: skip
def test_code_limits(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert code_limits(bits, symmetric) == expected


def test_quantize_by_hand() -> None:
    x = torch.tensor([-9.0, -1.0, -0.26, 0.0, 0.24, 0.5, 9.0])
    codes = quantize(x, torch.tensor(0.5), torch.tensor(3.0), 0, 15)
    assert codes.tolist() == [0, 1, 2, 3, 3, 4, 15]
    back = dequantize(codes, torch.tensor(0.5), torch.tensor(3.0))
    assert back.tolist() == [-1.5, -1, -0.5, 0, 0, 0.5, 6]


@pytest.mark.parametrize("search", RANGES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_codes_are_integers_within_limits(search: str, bits: int, symmetric: bool) -> None:
    for name in NAMES:
        _check_codes(data(name), search, bits, symmetric)


def _check_codes(x: Tensor, search: str, bits: int, symmetric: bool) -> None:
    before = x.clone()
    scale, zero = RANGES[search](x, bits, symmetric)
    assert scale.shape == zero.shape == (len(x),)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    low, high = code_limits(bits, symmetric)
    assert (zero == zero.round()).all() and (zero >= low).all() and (zero <= high).all()
    codes = quantize(x * 3, scale[:, None], zero[:, None], low, high)  # beyond the range too
    assert (codes == codes.round()).all()
    assert codes.min() >= low and codes.max() <= high
    assert torch.equal(x, before), "the input was written to"


@pytest.mark.parametrize("search", RANGES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_zero_is_a_value(search: str, bits: int, symmetric: bool) -> None:
    """Padding and masks are zeros: they must stay so, even where all data lies on one side."""
    for name in NAMES:
        scale, zero = RANGES[search](data(name), bits, symmetric)
        nothing = torch.zeros(len(scale))
        limits = code_limits(bits, symmetric)
        assert not fake_quantize(nothing, scale, zero, *limits).any(), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_minmax_covers_what_it_saw(name: str, bits: int, symmetric: bool) -> None:
    """No value is off by more than a step: half of one by rounding, half by the zero point's."""
    x = data(name)
    scale, zero = minmax(x, bits, symmetric)
    back = fake_quantize(x, scale[:, None], zero[:, None], *code_limits(bits, symmetric))
    bound = scale[:, None] * ((0.5 if symmetric else 1.0) + 1e-4)
    assert ((x - back).abs() <= bound).all()


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(3, 8)
    for search in RANGES.values():
        for symmetric in (True, False):
            scale, zero = search(x, 8, symmetric)
            back = fake_quantize(x, scale[:, None], zero[:, None], *code_limits(8, symmetric))
            assert torch.equal(back, x)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_mse_is_never_worse_than_minmax_in_its_own_measure(
    bits: int, symmetric: bool, power: float
) -> None:
    def error(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        limits = code_limits(bits, symmetric)
        back = fake_quantize(x, scale[:, None], zero[:, None], *limits)
        return (back - x).abs().pow(power).mean(1)

    for x in map(data, NAMES):
        found = error(x, *mse(x, bits, symmetric, power=power))
        assert (found <= error(x, *minmax(x, bits, symmetric))).all()


def test_mse_gives_up_an_outlier_where_bits_are_few() -> None:
    x = torch.cat([data("normal").repeat(1, 10), torch.full((6, 1), 8.0)], 1)
    assert (mse(x, 3, True)[0] < 0.8 * minmax(x, 3, True)[0]).all()


def test_percentile_gives_up_the_tail_and_share_one_is_minmax() -> None:
    x = data("outlier")
    assert (percentile(x, 8, True, share=0.98)[0] < 0.3 * minmax(x, 8, True)[0]).all()
    for mine, theirs in zip(percentile(x, 8, False, share=1.0), minmax(x, 8, False), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_are_independent() -> None:
    x = data("skewed")
    for search in RANGES.values():
        scale, zero = search(x, 4, False)
        for row in range(len(x)):
            one = search(x[row : row + 1], 4, False)
            assert torch.equal(scale[row : row + 1], one[0])
            assert torch.equal(zero[row : row + 1], one[1])


def test_ranges_of_a_convolution_span_the_kernel() -> None:
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for search in RANGES.values():
        assert torch.equal(search(w, 4, False)[0], search(w.flatten(1), 4, False)[0])


def test_affine_by_hand() -> None:
    low, high = torch.tensor([-1.0, 2.0, -4.0]), torch.tensor([3.0, 6.0, -2.0])
    scale, zero = affine(low, high, 4, symmetric=False)
    assert torch.allclose(scale * 15, torch.tensor([4.0, 6.0, 4.0]))
    assert zero.tolist() == [4, 0, 15]
    scale, zero = affine(low, high, 4, symmetric=True)
    assert torch.allclose(scale * 7, torch.tensor([3.0, 6.0, 4.0]))
    assert not zero.any()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 31, 32, 33])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_int4_round_trip(size: int, lead: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 16, (*lead, size), generator=draw, dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.dtype is torch.uint8
    assert packed.shape == (*lead, (size + 1) // 2)
    assert torch.equal(unpack_int4(packed, size), codes)


def test_int4_layout_on_disk() -> None:
    """Files hold this: low half first, an odd end padded with 0."""
    assert pack_int4(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
