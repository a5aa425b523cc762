"""The 8-bit float e4m3 against its definition, computed in float64."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.calibration.algorithms import algorithm
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.errors import SchemeError
from tenuto.numerics import float8
from tenuto.numerics.grid import Grid, covering, ends
from tenuto.numerics.qtensor import QTensor, layout
from tenuto.numerics.scheme import Format, Recipe, Rule, Scheme, schemes

E4M3 = Format(dtype="e4m3")
TOKEN = Format(dtype="e4m3", granularity="token")
STEP = Format(dtype="e4m3", granularity="tensor", per_step=True)


def defined(byte: int) -> float:
    """The value of a code as the standard has it."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = [defined(byte) for byte in range(256)]
FINITE = sorted({v for v in VALUES if not math.isnan(v)})  # -0.0 is 0.0


def nearest(x: float) -> float:
    """The value nearest to x in float64; of two equally near ones that with an even mantissa."""
    best = min(abs(v - x) for v in FINITE)
    found = [v for v in FINITE if abs(v - x) == best]
    return next(v for v in found if len(found) == 1 or VALUES.index(v) % 2 == 0)


def test_all_codes() -> None:
    """256 bytes: 253 values, two zeros, two that are no number; every level there and back."""
    bits = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor(VALUES, dtype=torch.float64)
    level, valid = float8.level_of(bits), ~expected.isnan()
    assert torch.equal(float8.codes_of(bits).double()[valid], expected[valid])
    assert torch.equal(float8.values(level).double()[valid], expected[valid])
    assert torch.equal(float8.reference_values(level).double()[valid], expected[valid])
    assert torch.equal(float8.numbers(bits).double()[valid], expected[valid])
    assert float8.values(level)[~valid].isnan().all() and int((~valid).sum()) == 2
    assert level[valid].min() == -float8.HIGHEST and level[valid].max() == float8.HIGHEST
    some = valid & (bits != 128)  # -0 is stored as 0
    assert torch.equal(float8.bytes_of(level)[some], bits[some])
    assert torch.equal(float8.bits_of(float8.codes_of(bits)), bits)
    order = float8.values(torch.arange(-126, 127)).tolist()
    assert order == FINITE and max(FINITE) == float8.MOST


def hard() -> Tensor:
    """Every value, every tie between two, what lies just beside them, what lies beyond."""
    values = torch.tensor(FINITE)
    ties = (values[1:] + values[:-1]) / 2  # exact in fp32
    far = torch.tensor([464.0, 1e9, -1e9, torch.inf, -torch.inf, 1e-30, -1e-40, 0.0, -0.0])
    near = [torch.nextafter(t, torch.tensor(e)) for t in (values, ties) for e in (-1e9, 1e9)]
    return torch.cat([values, ties, *near, far])


def test_rounding_is_to_nearest_and_a_tie_to_even() -> None:
    """By torch's cast, and in the plain operations that a device without it takes."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=draw) * 10.0 ** torch.randint(-4, 4, (500,), generator=draw)
    x = torch.cat([hard(), x])
    clipped = x.double().clamp(-448, 448).tolist()
    expected = torch.tensor([nearest(v) for v in clipped], dtype=torch.float64)
    for levels in (float8.levels(x), float8.reference_levels(x)):
        assert torch.equal(float8.values(levels).double(), expected)
    assert torch.equal(float8.cast(x).double(), expected)
    half = x.to(torch.bfloat16)
    assert torch.equal(float8.cast(half).float(), float8.cast(half.float()).float())


@pytest.mark.parametrize("shape", [(6, 32), (5, 33), (1, 1), (4, 3, 3, 3)])
def test_a_weight_on_its_grid(shape: tuple[int, ...]) -> None:
    """A row's largest number is 448 scales; nothing is farther off than half a step of its own."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=draw)
    weight[0] *= 100
    q = RoundToNearest().weight(weight, E4M3)
    assert q.qdata.dtype is torch.uint8 and q.dtype == "e4m3"
    assert q.codes().dtype is torch.float8_e4m3fn
    rows, scale = weight.flatten(1), q.scale[:, None]
    assert torch.allclose(q.scale, rows.abs().amax(1) / 448)
    found = torch.tensor(
        [[nearest(v) for v in row] for row in (rows / scale).double().tolist()],
        dtype=torch.float64,
    )
    expected = (found.float() * scale).view(shape)
    assert torch.equal(q.dequantize(), expected)
    assert ((expected.flatten(1) - rows).abs() <= rows.abs() / 16 + scale * 2**-10).all()
    parts = {f"w.{k}": v for k, v in (("qdata", q.qdata), ("scale", q.scale))}
    assert {k: (v.dtype, tuple(v.shape)) for k, v in q.tensors("w").items()} == layout(
        "w", shape, E4M3
    )
    again = QTensor.from_tensors(parts, "w", shape, E4M3)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert torch.equal(again.qdata_of(again.codes()), q.qdata)
    assert torch.equal(QTensor.of(q.levels().float(), Grid.of(weight, E4M3)).qdata, q.qdata)


def test_activations_by_row_and_by_stored_range() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)) * 4
    x[0, 0] = 0
    codes, scale = float8.per_row(x)
    assert scale.shape == (3, 5, 1) and not codes.float()[0, 0].any()
    gap = (codes.float() * scale - x).abs()
    assert (gap <= x.abs() / 16 + scale * 2**-10).all()
    assert float(codes.float().abs().max()) == 448
    one = float8.per_row(x[1:2])
    assert torch.equal(one[1], scale[1:2]) and torch.equal(one[0].float(), codes[1:2].float())
    wide, zero = covering(torch.tensor([-3.0]), torch.tensor([2.0]), STEP)
    assert not zero.any() and torch.allclose(wide, torch.tensor([3 / 448]))
    assert float(float8.per_tensor(x, wide).float().abs().max()) == 448, "what is beyond is cut"
    assert ends(STEP) == (-448, 448) and ends(schemes.W8A8_STATIC.activation or STEP) == (0, 255)


@pytest.mark.parametrize("activation", [None, TOKEN, STEP], ids=["none", "token", "step"])
def test_a_scheme_that_names_it_survives_json(activation: Format | None) -> None:
    scheme = Scheme("fp8", E4M3, activation)
    rule = Rule("*", scheme, RoundToNearest())
    text = json.dumps(Recipe((rule,)).to_json())
    assert '"dtype": "e4m3"' in text
    assert Recipe.from_json(json.loads(text), algorithm) == Recipe((rule,))


def test_the_json_of_whole_codes_is_as_it_was() -> None:
    """A file of before loads, and is written in the same bytes."""
    weight = '{"bits": 8, "symmetric": true, "granularity": "channel", "per_step": false'
    token = '{"bits": 8, "symmetric": true, "granularity": "token", "per_step": false'
    rest = ', "ranges": "minmax", "group": 0}'
    text = f'{{"name": "w8a8", "weight": {weight}{rest}, "activation": {token}{rest}}}'
    assert json.dumps(schemes.W8A8.to_json()) == text
    assert Scheme.from_json(json.loads(text)) == schemes.W8A8


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Format(dtype="e5m2"),
        lambda: Format(4, dtype="e4m3"),
        lambda: Format(dtype="e4m3", symmetric=False),
        lambda: Format(dtype="e4m3", ranges="mse"),
        lambda: Format(dtype="e4m3", group=32),
        lambda: Scheme("x", E4M3, E4M3),
        lambda: Scheme("x", TOKEN),
    ],
)
def test_an_impossible_format_is_refused(wrong: Any) -> None:
    with pytest.raises(SchemeError):
        wrong()


def test_its_steps_are_unequal_so_no_algorithm_of_equal_steps_takes_it() -> None:
    block = torch.nn.Linear(8, 4)
    with pytest.raises(SchemeError, match="nearest"):
        Grid.of(block.weight, E4M3).size(8)
    with pytest.raises(SchemeError, match="nearest"):
        AdaRound()(block, {"": Scheme("x", E4M3)}, None, torch.zeros(1))  # type: ignore[arg-type]
