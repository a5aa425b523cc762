"""Layouts of other programs' files: what is read is what was meant, bit for bit."""

from __future__ import annotations

import importlib
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.errors import SchemeError
from tenuto.numerics import Format, Grid, QTensor, float8, int8_levels, native, schemes
from tenuto.numerics.native.nvfp4 import straight, swizzled
from tenuto.numerics.rotation import both, butterfly, matrix, rotated, size_for
from tenuto.numerics.scheme import LEVELS

W4, W6 = schemes.COMFY_W4A8.weight, schemes.COMFY_W6A8.weight
INT8, NVFP4 = schemes.COMFY_INT8.weight, schemes.NVFP4.weight
FORMS = {
    "w4": W4, "w4-g32": replace(W4, group=32), "w4-g64": replace(W4, group=64),
    "w4-minmax": replace(W4, ranges="minmax"), "w6": W6, "int8": INT8,
    "int8-rows": schemes.W8A8.weight, "nvfp4": NVFP4,
}  # fmt: skip


def weight(rows: int = 48, columns: int = 512, seed: int = 0) -> Tensor:
    """Of a normal distribution, with large columns, and rows and groups of zeros."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=draw) * 0.03
    found[:, ::37] *= 8
    found[3] = 0
    found[5, :256] = 0
    return found


def table(step: Tensor, bits: int) -> Tensor:
    """Every number that a code can stand for, (..., codes), in plain words."""
    entries = torch.tensor(int8_levels.TABLE) if bits == 4 else torch.arange(-31.0, 32.0)
    return (entries * step[..., None]).round().clamp(-127, 127)


# --- the rotation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_regular_symmetric_and_its_own_inverse(size: int) -> None:
    found = matrix(size)
    place = torch.arange(size)
    wanted = torch.full((size, size), size**-0.5)
    for digit in range(size.bit_length() // 2):
        own = place // 4**digit % 4
        wanted = torch.where(own[:, None] + own == 3, -wanted, wanted)
    assert torch.equal(found, wanted)
    assert torch.equal(found, found.T)
    assert torch.equal(found @ found, torch.eye(size))


def test_groups_of_columns_are_rotated_as_large_as_divide_them() -> None:
    assert [size_for(k) for k in (4096, 1152, 48, 40)] == [256, 64, 16, 0]
    x = weight(7, 512)
    torch.testing.assert_close(butterfly(x, 256), rotated(x, 256))
    torch.testing.assert_close(rotated(rotated(x, 64), 64), x)
    turned = rotated(x, 64)
    torch.testing.assert_close(both(x.T @ x, 64), turned.T @ turned)
    with pytest.raises(ValueError, match="128"):
        butterfly(x, 128)


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 6])
def test_nearest_levels_are_the_nearest_of_all(bits: int) -> None:
    draw = torch.Generator().manual_seed(1)
    step = float8.values(torch.randint(1, 125, (4096,), generator=draw))
    x = torch.randn(4096, generator=draw) * 60
    level = int8_levels.nearest(x, step, bits)
    error = (int8_levels.number(level, step, bits) - x).abs()
    assert torch.equal(error, (table(step, bits) - x[:, None]).abs().amin(1))


@pytest.mark.parametrize("name", ["w4", "w6", "nvfp4"])
def test_a_search_of_the_steps_is_better_than_to_cover_all(name: str) -> None:
    form, w = FORMS[name], weight()
    errors = {
        ranges: float((QTensor.nearest(w, replace(form, ranges=ranges)).dequantize() - w).norm())
        for ranges in ("minmax", "mse")
    }
    assert errors["mse"] < 0.97 * errors["minmax"]


def test_of_codes_for_one_number_always_the_same_is_kept() -> None:
    q = QTensor.nearest(weight(), W4)
    codes = q.codes()
    assert codes.dtype is torch.int8
    assert torch.equal(q.qdata_of(codes), q.qdata)
    numbers = table(q.steps()[3:4, :1], 4)[0, 0]  # of a row of zeros
    assert len(numbers.unique()) < 16


# --- files ----------------------------------------------------------------------------------------


SHAPES = [(48, 512), (37, 192), (16, 64), (6, 160)]
FITTING = [(n, s) for n, form in FORMS.items() for s in SHAPES if s[1] % (form.group or 1) == 0]


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_a_reader_finds_what_was_meant_bit_for_bit(name: str, shape: tuple[int, int]) -> None:
    form = FORMS[name]
    q = QTensor.nearest(weight(*shape), form)
    layout = native.layout_of(form)
    assert layout is not None
    tensors, facts = layout.pack(q), layout.facts(q)
    assert torch.equal(layout.decode(tensors, facts, shape), q.dequantize())
    back = layout.unpack(tensors, facts, shape, form)
    for part, value in q.tensors("x").items():
        assert torch.equal(back.tensors("x")[part], value)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert native.named(facts["format"]) is layout


def test_a_scale_per_column_is_what_the_inputs_are_multiplied_by() -> None:
    form = replace(NVFP4, smooth=True)
    w, channel = weight(), torch.linspace(0.5, 3, 512)
    from tenuto.calibration.algorithms.awq import rounded

    q = rounded(w, form, channel)
    layout = native.layout_of(form)
    assert layout is not None
    tensors = layout.pack(q)
    torch.testing.assert_close(tensors["pre_quant_scale"], 1 / channel)
    read = layout.decode(tensors, layout.facts(q), w.shape)
    torch.testing.assert_close(read, q.dequantize())
    assert float((read - w).norm() / w.norm()) < 0.12


GOLDEN = {  # of each tensor of a file: the checksum of its bytes
    "w4": {
        "weight": 1624579742, "weight_s_rel": 1356608259, "weight_s_channel": 1599670156,
        "weight_codebook": 4150811267,
    },
    "w6": {"weight": 3183608836, "weight_s_rel": 766027215, "weight_s_channel": 3894041278},
    "int8": {"weight": 3416213673, "weight_scale": 3733209261},
    "nvfp4": {"weight": 3628171473, "weight_scale": 3827793435, "weight_scale_2": 1191059446},
}  # fmt: skip


def simple() -> Tensor:
    """A weight (16, 64) that no rounding on any machine disturbs."""
    place = torch.arange(16 * 64).view(16, 64)
    return ((place * 37 + place // 64 * 11) % 101 - 50) / 64


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_a_file_stay_as_they_are(name: str) -> None:
    q = QTensor.nearest(simple(), FORMS[name])
    layout = native.layout_of(FORMS[name])
    assert layout is not None
    sums = {
        key: zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for key, value in layout.pack(q).items()
    }
    assert sums == GOLDEN[name]


def test_scales_are_where_tensor_cores_read_them() -> None:
    rows, columns = 133, 7
    steps = torch.arange(rows * columns).view(rows, columns)
    found = swizzled(steps)
    assert found.shape == (256, 8)
    flat = found.flatten()
    for i, j in ((0, 0), (31, 3), (32, 0), (127, 6), (128, 4), (132, 6)):
        place = (i // 128 * 2 + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4
        assert flat[place] == steps[i, j]
    assert torch.equal(straight(found, rows, columns), steps)


def _without(tensors: dict[str, Tensor], facts: dict[str, Any], key: str) -> None:
    del tensors[key]


def _as_bytes(tensors: dict[str, Tensor], facts: dict[str, Any], key: str) -> None:
    tensors[key] = tensors[key].view(torch.uint8)


def _flat(tensors: dict[str, Tensor], facts: dict[str, Any], key: str) -> None:
    tensors[key] = tensors[key][1:]


def _rotation(tensors: dict[str, Tensor], facts: dict[str, Any], key: str) -> None:
    facts["convrot_groupsize"] = 128


def _group(tensors: dict[str, Tensor], facts: dict[str, Any], key: str) -> None:
    facts["group_size"] = 32


DAMAGE = [
    ("w4", _without, "weight"), ("w4", _without, "weight_s_rel"), ("w4", _as_bytes, "weight_s_rel"),
    ("w4", _without, "weight_s_channel"), ("w4", _flat, "weight_s_channel"), ("w4", _rotation, ""),
    ("w4", _group, ""), ("w6", _flat, "weight"), ("int8", _without, "weight_scale"),
    ("int8", _rotation, ""), ("nvfp4", _without, "weight_scale_2"),
    ("nvfp4", _as_bytes, "weight_scale"), ("nvfp4", _flat, "weight"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "key"), DAMAGE)
def test_what_a_reader_would_read_wrongly_is_refused(name: str, damage: Any, key: str) -> None:
    q = QTensor.nearest(weight(), FORMS[name])
    layout = native.layout_of(FORMS[name])
    assert layout is not None
    tensors, facts = layout.pack(q), layout.facts(q)
    damage(tensors, facts, key)
    with pytest.raises(SchemeError):
        layout.decode(tensors, facts, q.shape)


def test_a_lost_table_and_scales_of_single_rows_are_refused() -> None:
    q = QTensor.nearest(weight(), W4)
    tensors = native.named("asym_w4a8_int8").pack(q)
    del tensors["weight_codebook"]
    layout = native.named("asym_w4a8_int8")
    with pytest.raises(SchemeError, match="weight_codebook"):
        layout.unpack(tensors, layout.facts(q), q.shape, W4)
    q = QTensor.nearest(weight(), NVFP4)
    with pytest.raises(SchemeError, match="one scale"):
        native.named("nvfp4").pack(replace(q, scale=torch.rand(48) + 1))
    with pytest.raises(SchemeError, match="no codes"):
        QTensor.nearest(weight(8, 40), W4)
    assert native.layout_of(schemes.W4A8.weight) is None
    with pytest.raises(SchemeError, match="gguf"):
        native.named("gguf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": 8}, {"bits": 5}, {"symmetric": False}, {"granularity": "token"},
        {"ranges": "percentile"}, {"smooth": True}, {"dtype": "e2m1"},
        {"dtype": "int", "group": 0},
    ],
)  # fmt: skip
def test_formats_that_nobody_reads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        replace(W4, **wrong)


# --- the readers themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(48, 512), (32, 192), (37, 192)])
def test_comfy_kitchen_reads_what_was_meant(name: str, shape: tuple[int, int]) -> None:
    """0.2.40: eager code in fp32, 0.0 of difference."""
    pytest.importorskip(
        "comfy_kitchen", reason="needs comfy-kitchen, 190 MB: pip install comfy-kitchen==0.2.40"
    )
    form: Format = FORMS[name]
    q = QTensor.nearest(weight(*shape), form)
    layout = native.layout_of(form)
    assert layout is not None
    read = from_kitchen(layout.pack(q), layout.facts(q), shape)
    assert torch.equal(read, q.dequantize())


def from_kitchen(tensors: dict[str, Tensor], facts: dict[str, Any], shape: Any) -> Tensor:
    eager = "comfy_kitchen.backends.eager"
    quantization = importlib.import_module(f"{eager}.quantization")
    w4a8_int8 = importlib.import_module(f"{eager}.w4a8_int8")
    packed = importlib.import_module("comfy_kitchen.tensor.w4a8_packed")
    if facts["format"] == "asym_w4a8_int8":
        book = tensors.get("weight_codebook")
        assert book is None or torch.equal(book, packed.default_w4a8_codebook())
        return w4a8_int8.dequantize_w4a8_int8_weight(
            tensors["weight"], tensors["weight_s_rel"], tensors["weight_s_channel"], book, None,
            facts["group_size"], facts["convrot_groupsize"], torch.float32,
        )  # fmt: skip
    if facts["format"] == "int8_tensorwise":
        pair = tensors["weight"], tensors["weight_scale"]
        if facts.get("convrot"):
            return quantization.dequantize_int8_convrot_weight(*pair, facts["convrot_groupsize"])
        return quantization.dequantize_int8_simple(*pair)
    whole = quantization.dequantize_nvfp4(
        tensors["weight"], tensors["weight_scale_2"], tensors["weight_scale"], torch.float32
    )
    return whole[: shape[0], : shape[1]]


@pytest.mark.parametrize("name", ["COMFY_W4A8", "COMFY_W6A8", "NVFP4"])
def test_of_equal_numbers_the_same_codes_in_groups_as_by_columns(name: str) -> None:
    """One product, quotient or comparison after another: IEEE 754 rounds each alike everywhere."""
    form = getattr(schemes, name).weight
    weight = torch.randn(20, 320, generator=torch.Generator().manual_seed(1))
    grid = Grid.of(weight, form)
    found, kind = QTensor.nearest(weight, form), LEVELS[form.dtype]
    assert grid.step is not None
    step = grid.step.repeat_interleave(form.group, 1)
    level = grid.nearest(weight)
    wanted = kind.nearest(kind.number(level, step, form.bits), step, form.bits)
    assert torch.equal(found.qdata, kind.stored(wanted, form.bits))
