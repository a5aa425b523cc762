"""The kernels in Triton against their references: in its interpreter where there is no GPU.

What `torch.empty` gives is poisoned, so that nothing which is not written passes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tenuto.numerics import QTensor, float8, integer_codes
from tenuto.numerics.scheme import Format, schemes
from tenuto.runtime import kernels
from tenuto.runtime.kernels import (
    column_rounding,
    int4_fused,
    int8_conv2d,
    int8_conv2d_fused,
    int8_fused,
    int8_linear,
    quantize_input,
    trial,
)
from tenuto.runtime.kernels.int8_linear import IntLinear
from tenuto.runtime.kernels.quantize_input import LONG, WIDEST
from tenuto.runtime.layers import QConv2d, QLinear
from tenuto.sampling import Clock

HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative: half a step; the interpreter cuts fp32 off to bf16.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if HERE == "cpu":
    ROUNDING[torch.bfloat16] *= 2
ROWS = [(1, 1), (3, 7), (2, 3, 130), (2, 1153)]
FILTERS: list[Any] = [  # input, taps, outputs, stride, padding, dilation
    ((2, 16, 5, 4), (3, 3), 5, (1, 1), (1, 1), (1, 1)),
    ((1, 48, 4, 3), (1, 1), 17, (1, 1), (0, 0), (1, 1)),
    ((2, 32, 7, 6), (2, 3), 3, (2, 1), (0, 2), (1, 2)),
]
PRODUCTS = [(1, 1, 1), (17, 33, 40), (64, 5, 32), (70, 21, 48), (33, 24, 32)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this platform"
)


def codes_match(found: Tensor, wanted: Tensor, case: Any = None) -> None:
    """Equal, up to rounding where a quotient lies on an edge. case: named in the failure."""
    gap = (quantize_input.counted(found) - wanted.float()).abs()
    most, where = float(gap.max()), int(gap.argmax())
    seen = found.flatten()[where], wanted.flatten()[where]
    assert found.shape == wanted.shape and most <= 1, (case, most, where, *seen)
    assert float(gap.sum()) <= 1 + 2e-3 * gap.numel()


def floats_match(found: Tensor, wanted: Tensor, exact: Tensor) -> None:
    """8-bit floats: each as near to the exact number as the wanted one, whichever side of a tie.

    The interpreter of Triton (3.6 to 3.9) loses the carry where a mantissa is rounded up to 2, and
    cuts the smallest off.
    """
    found, wanted, exact = found.double(), wanted.double(), exact.double()
    if HERE == "cpu":
        lost = found == wanted / 2
        assert float((found != wanted).sum()) <= 1 + 0.1 * found.numel()
        assert torch.allclose(found[~lost], wanted[~lost], rtol=0.126, atol=2**-9)
        return
    assert ((found - exact).abs() <= (wanted - exact).abs() + 1e-5 * exact.abs()).all()


def check_rows() -> None:
    """Whole codes and 8-bit floats of a range a row."""
    from tenuto.runtime.kernels import quantize_input_triton as fused

    for shape, dtype in itertools.product(ROWS, DTYPES):
        x = (torch.randn(shape, device=HERE) * 3).to(dtype)
        some = fused.whole_rows(shape[-1])
        assert any(t.k for t in some) == (shape[-1] > 127), "of other widths two parts are no gain"
        codes, scale = fused.per_row(x)
        if some[-1].k:  # in two parts
            parts = fused.per_row(x, "int", some[-1])
            assert torch.allclose(parts[1], scale, rtol=1e-6)
            codes_match(parts[0], quantize_input.counted(codes))
        wanted, their = quantize_input.reference_per_row(x)
        assert codes.dtype is torch.int8 and scale.shape == their.shape
        assert torch.allclose(scale, their, rtol=1e-6)
        codes_match(codes, wanted)
        values, scale = fused.per_row(x, "e4m3", some[-1])
        near, their = float8.per_row(x)
        assert values.dtype is torch.float8_e4m3fn and torch.allclose(scale, their, rtol=1e-6)
        floats_match(values, near, x.double() / their)
    wide = torch.randn(4, 5, 96, device=HERE)
    part = wide[..., 32:64]
    assert torch.equal(fused.per_row(part)[0], fused.per_row(part.contiguous())[0])
    wide[1, 2] = 0
    wide[2, 3, 4] = float("nan")
    codes, scale = fused.per_row(wide)
    assert not codes[1, 2].any(), "zeros stay zeros"
    assert scale.isnan().sum() == 1 and scale[2, 3].isnan().all(), "NaN is seen, in its row alone"


def check_images() -> None:
    """A range an image, in both layouts."""
    from tenuto.runtime.kernels import quantize_input_triton as fused

    for shape, dtype in itertools.product([(1, 1, 1, 1), (3, 5, 7, 4), (2, 16, 17, 19)], DTYPES):
        x = (torch.randn(shape, device=HERE) * 3).to(dtype)
        x[0] = 0
        for form in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=form)
            codes, scale = fused.per_image(given)
            wanted, their = quantize_input.reference_per_row(x, (1, 2, 3))
            assert torch.allclose(scale, their, rtol=1e-6) and codes.stride() == given.stride()
            codes_match(codes, wanted)
            assert not codes[0].any(), "zeros stay zeros"


def check_stored() -> None:
    """One of several stored ranges, chosen by an index that stays on the device."""
    from tenuto.runtime.kernels import quantize_input_triton as fused

    scales = (torch.rand(5, device=HERE) + 0.2) / 20
    zeros = torch.randint(0, 256, (5,), device=HERE).float()
    for shape, dtype in itertools.product([*ROWS, (2, 3, 5, 4)], DTYPES):
        x = (torch.randn(shape, device=HERE) * 3).to(dtype)
        forms = [x, x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else [x]
        for given, one in itertools.product(forms, (0, 4)):
            index = torch.tensor([one], device=HERE)
            codes, scale, zero = fused.stored(given, scales, zeros, index)
            pair = scales[one : one + 1], zeros[one : one + 1]
            assert torch.equal(scale, pair[0]) and torch.equal(zero, pair[1].int())
            codes_match(codes, quantize_input.reference_per_tensor(given, *pair))
            assert codes.stride() == given.stride()
            values = fused.stored(given, scales, zeros, index, "e4m3")[0]
            floats_match(values, float8.per_tensor(given, pair[0]), given.double() / pair[0])


def check_trials() -> None:
    """What a card is asked once is true where the kernels work."""
    assert quantize_input.rows_are_right(torch.device(HERE))
    assert column_rounding.columns_are_right(torch.device(HERE))


def tilings() -> Iterator[Any]:
    """What is chosen, and tiles that make several of a small product, by every way of loading."""
    from tenuto.runtime.kernels.tiles_triton import Tiles

    yield from (None, Tiles(16, 16, 32, group=2), Tiles(16, 32, 32, persistent=True, group=3))
    yield from (Tiles(32, 16, 32, tma=True), Tiles(16, 16, 64, tma=True, persistent=True))


def check_product() -> None:
    """Odd shapes, with a bias and without, every way of loading tiles."""
    from tenuto.runtime.kernels import product_triton as fused

    for (m, n, k), tiles in itertools.product(PRODUCTS, tilings()):
        if tiles is not None and tiles.tma and k % 16:
            continue
        x = torch.randint(-128, 128, (m, k), device=HERE).to(torch.int8)
        codes = torch.randint(-127, 128, (n, k), device=HERE).to(torch.int8)
        packed = IntLinear(codes, torch.rand(n, device=HERE) + 0.5)
        zero = torch.tensor([37], dtype=torch.int32, device=HERE)
        every = itertools.product((None, zero), (0, 1, 1)) if tiles is None else [(None, 1)]
        for number, (zero, biased) in enumerate(every):
            dtype = DTYPES[number % 3 if tiles is None else 1]
            bias = torch.randn(n, device=HERE).to(dtype) if biased else None
            scale = torch.rand((m, 1) if number % 2 else (1,), device=HERE) / k
            given = codes, packed.scale, packed.sums, bias, dtype, tiles
            found = fused.linear(x, scale, zero, *given)
            middle = 128 if zero is None else zero
            wanted = int8_linear.reference(x, scale, middle, codes, packed.scale, bias)
            near(found, wanted, dtype)


def check_sums_after_products() -> None:
    """A gate an image or of all, and what is added, in parts of wider tensors; e4m3, too."""
    from tenuto.runtime.kernels import finished_product_triton, product_triton
    from tenuto.runtime.kernels.finished_product import reference
    from tenuto.runtime.kernels.tiles_triton import Tiles

    few = (Tiles(16, 32, 32), Tiles(32, 32, 32, persistent=True, group=2))
    turns = itertools.cycle(itertools.product(few, (0, 1, 2), (True, False)))
    for (images, rows, n, k), dtype in itertools.product(
        [(2, 17, 40, 33), (3, 5, 24, 64), (1, 1, 1, 1)], DTYPES
    ):
        tiles, gates, whole = next(turns)
        m, wide = images * rows, torch.randn(images, rows, 2 * n, device=HERE).to(dtype)
        rest = torch.randn(images, 1, 3 * n, device=HERE).to(dtype)
        residual, gate = wide[..., n:], (None, rest[..., n : 2 * n], rest[0, 0, :n])[gates]
        x = torch.randint(-127, 128, (m, k), device=HERE).to(torch.int8)
        codes = torch.randint(-127, 128, (n, k), device=HERE).to(torch.int8)
        if not whole:
            x, codes = (t.float().div(32).to(torch.float8_e4m3fn) for t in (x, codes))
        scale, w_scale = torch.rand(m, 1, device=HERE) / k, torch.rand(n, device=HERE) / 9 + 0.1
        bias = torch.randn(n, device=HERE).to(dtype)
        sums = codes.sum(1, dtype=torch.int32) if whole else None
        then = product_triton.after(gate, residual)
        given = x, scale, None, codes, w_scale, sums, bias, dtype, tiles
        y = (x.double() @ codes.double().T * w_scale * scale + bias.double()).float()
        wanted = reference(y, gate, residual).view(m, n).double()
        near(product_triton.linear(*given, then), wanted, dtype)
        near(product_triton.linear(*given), y.double(), dtype)
        y = y.to(dtype)
        wanted = reference(y, gate, residual).view(m, n).double()
        near(finished_product_triton.gated(y, then), wanted, dtype)


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Equal to the rounding of `dtype` and the noise of fp32; NaN never passes."""
    assert found.dtype is dtype and found.shape == wanted.shape and found.is_contiguous()
    gap = (found.double() - wanted).abs() - ROUNDING[dtype] * wanted.abs()
    assert float(gap.max()) <= 3e-6 * float(wanted.abs().max()) + 1e-6


def check_operation() -> None:
    """What the layers call: any leading dimensions, uint8 too; whole in a graph."""
    x = torch.randint(0, 256, (2, 3, 40), device=HERE).to(torch.uint8)
    codes = torch.randint(-127, 128, (24, 40), device=HERE).to(torch.int8)
    w_scale, bias = torch.rand(24, device=HERE), torch.randn(24, device=HERE)
    packed, scale = IntLinear(codes, w_scale), torch.rand(2, 3, 1, device=HERE) / 40

    def call(x: Tensor, zero: Any) -> Tensor:
        return int8_fused.fused_linear(x, scale, zero, packed, bias, torch.bfloat16)

    for zero in (128, 5, torch.tensor([200], dtype=torch.int32, device=HERE)):
        wanted = int8_linear.reference(x, scale, zero, codes, w_scale, bias)
        near(call(x, zero), wanted, torch.bfloat16)
        near(call((x ^ 128).view(torch.int8), zero), wanted, torch.bfloat16)
        compiled: Any = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, zero), call(x, zero))
    rows = x.view(6, 40).view(torch.int8)
    more = (packed.scale, packed.sums, bias, torch.bfloat16)
    args = (rows, scale.view(6, 1), None, packed.weight, *more)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tenuto.int8_fused.default, args, test_utils=tests)


def check_four_bits() -> None:
    """Two codes a byte, with groups and without, odd widths: codes, product, graph."""
    from tenuto.runtime.kernels import int4_fused_triton as fused

    forms = [Format(b, symmetric=False, group=g) for b in (3, 4) for g in (0, 8, 32)]
    for (n, k), form in itertools.product([(3, 7), (9, 80), (2, 2051)], [*forms, Format(4)]):
        q = QTensor.nearest(torch.randn(n, k, device=HERE), form)
        assert q.zero_point is not None
        found = fused.unpacked(q.qdata, q.zero_point, q.step, k, q.group)
        assert torch.equal(found, q.codes()), (n, k, form)
    q = QTensor.nearest(torch.randn(24, 80, device=HERE), Format(4, symmetric=False, group=32))
    x = torch.randint(0, 256, (2, 3, 80), device=HERE).to(torch.uint8)
    scale, bias = torch.rand(2, 3, 1, device=HERE) / 80, torch.randn(24, device=HERE)
    packed = int4_fused.KERNEL.pack(q, None)
    assert torch.equal(packed.codes(), q.codes())
    assert sum(t.nbytes for t in packed.tensors()) < 0.8 * 24 * 80, "it stays packed"

    def call(x: Tensor, zero: Any) -> Tensor:
        return int4_fused.KERNEL.call(x, scale, zero, packed, bias, torch.bfloat16)

    for zero in (128, torch.tensor([200], dtype=torch.int32, device=HERE)):
        wanted = int4_fused.KERNEL.reference(x, scale, zero, q, bias, None)
        near(call(x, zero), wanted, torch.bfloat16)
        compiled: Any = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, zero), call(x, zero))


def check_convolution() -> None:
    """Strides, borders, holes, odd sizes; both layouts; whole in a graph."""
    from tenuto.runtime.kernels import int8_conv2d_fused_triton as fused
    from tenuto.runtime.kernels.tiles_triton import Tiles

    few = (None, Tiles(16, 16, 32, group=2))
    for (size, taps, n, *sides), tiles in itertools.product(FILTERS, few):
        x = torch.randint(0, 256, size, device=HERE).to(torch.uint8)
        codes = torch.randint(-127, 128, (n, size[1], *taps), device=HERE).to(torch.int8)
        geometry: Any = (*(list(pair) for pair in sides), 1)
        packed = int8_conv2d_fused.Filters(codes, torch.rand(n, device=HERE) + 0.5, geometry)
        assert torch.equal(packed.codes(), codes)
        bias, zero = torch.randn(n, device=HERE).bfloat16(), torch.tensor([37], device=HERE).int()
        for some, scale in ((128, torch.rand(size[0], 1, 1, 1)), (zero, torch.rand(1))):
            scale = scale.to(HERE) / codes[0].numel()
            last = (x ^ 128).view(torch.int8).permute(0, 2, 3, 1)
            given = None if some == 128 else some, *packed.tensors(), bias, torch.float32
            found = fused.conv2d(last, scale, *given, geometry[:3], tiles).permute(0, 3, 1, 2)
            wanted = int8_conv2d.reference(x, scale, some, codes, packed.scale, bias, geometry)
            near(found.contiguous(), wanted, torch.float32)


def check_convolution_in_graphs() -> None:
    """Both layouts, whole in a graph."""
    x = torch.randint(0, 256, (2, 16, 5, 4), device=HERE).to(torch.uint8)
    codes, scale = torch.randint(-127, 128, (5, 16, 3, 3)).to(HERE, torch.int8), torch.rand(5)
    geometry: Any = ([1, 1], [1, 1], [1, 1], 1)
    packed = int8_conv2d_fused.Filters(codes, scale.to(HERE), geometry)
    one, zero = torch.rand(1, device=HERE) / 99, torch.tensor([37], device=HERE).int()
    wanted = int8_conv2d.reference(x, one, zero, codes, packed.scale, None, geometry)

    def call(x: Tensor) -> Tensor:
        return int8_conv2d_fused.call(x, one, zero, packed, None, torch.bfloat16)

    compiled: Any = torch.compile(call, backend="aot_eager", fullgraph=True)
    for form in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=form)
        found = call(given)
        near(found.contiguous(), wanted, torch.bfloat16)
        assert found.is_contiguous(memory_format=form) and torch.equal(compiled(given), found)


def check_layers() -> None:
    """Layers compute by the kernels, eager and in a graph, and what is simulated is the same."""
    if HERE == "cpu":  # of this process alone
        quantize_input.fused = lambda x: not quantize_input.compiling()
        int8_fused.supported = lambda device: True
    for scheme, made, name in (
        (schemes.W8A8, QLinear, "int8_fused"), (schemes.W8A8_STATIC, QLinear, "int8_fused"),
        (schemes.W4A8, QLinear, "int4_fused"), (schemes.W4A8_STATIC, QLinear, "int4_fused"),
        (schemes.W8A8, QConv2d, "int8_conv2d_fused"),
        (schemes.W4A8_STATIC, QConv2d, "int8_conv2d_fused"),
    ):  # fmt: skip
        base: Any = torch.nn.Linear(48, 40) if made is QLinear else torch.nn.Conv2d(48, 40, 3)
        base = base.to(HERE, torch.bfloat16)
        weight, clock = QTensor.nearest(base.weight.float(), scheme.weight), Clock((999, 1))
        pair = integer_codes.affine(torch.tensor([-3.0, -4.0]), torch.tensor([3.0, 5.0]), 8, False)
        ranges = None if scheme is schemes.W8A8 or scheme is schemes.W4A8 else pair
        one, other = (made(base, weight, scheme, clock, ranges, simulate=s) for s in (False, True))
        clock.tick(1, range(2), HERE)
        x = torch.randn((2, 5, 48) if made is QLinear else (2, 48, 5, 4), device=HERE).bfloat16()
        with torch.no_grad():
            found, wanted = one(x), other(x)
            assert list(one._packed) == [name] and found.dtype is torch.bfloat16
            assert float((found - wanted).norm() / wanted.norm()) < 1e-2
            if scheme is schemes.W8A8:
                compiled: Any = torch.compile(one, backend="aot_eager", fullgraph=True)
                assert float((compiled(x) - found).norm() / found.norm()) < 1e-2
            before = one.qtensor().codes()
            one._unpack()
            assert torch.equal(one.qdata, weight.qdata) and torch.equal(before, weight.codes())


CHECKS = (
    check_rows, check_images, check_stored, check_product, check_sums_after_products,
    check_operation, check_four_bits,
    check_convolution, check_convolution_in_graphs, check_layers, check_trials,
)  # fmt: skip


def in_triton(name: str) -> None:
    """Run the CHECKS of a test file of this folder; memory that nobody wrote to is poisoned.

    Without a GPU in a process of its own: the interpreter is chosen when triton is imported.
    """
    code = (
        f"import torch, {name} as t{', interpreted' if HERE == 'cpu' else ''}\n"
        "from tenuto.runtime.kernels import tiles_triton\n"
        "tiles_triton.fastest = lambda *_: None\n"  # the first ones: no time is spent on others
        "torch.use_deterministic_algorithms(True, warn_only=True)\n"
        "x = torch.empty(9)\nassert x.isnan().all(), 'no poison'\n"
        "for check in t.CHECKS: check()"
    )
    folder = str(Path(__file__).parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    if HERE == "cpu":
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_the_kernels_equal_their_references() -> None:
    in_triton("test_triton_kernels")


def test_no_kernel_of_triton_runs_without_a_gpu() -> None:
    """The plain operations serve there, and the product is a candidate on no CPU."""
    assert not int8_fused.supported(torch.device("cpu"))
    assert not int8_fused.supported(torch.device("meta"))
    assert not quantize_input.fused(torch.randn(2, 8))
    assert {"int4_fused", "int8_fused"} <= {kernel.name for kernel in kernels.kernels()}
    codes, _ = quantize_input.per_row(torch.randn(2, 8))
    assert codes.dtype is torch.uint8


def test_a_range_of_a_step_is_that_of_its_index() -> None:
    x = torch.randn(3, 8)
    scales, zeros = torch.tensor([0.1, 0.02]), torch.tensor([3.0, 200.0])
    for one in (0, 1):
        index = torch.tensor([one])
        codes, scale, zero = quantize_input.stored_at(x, scales, zeros, index, "int")
        assert scale.tolist() == [float(scales[one])] and zero.tolist() == [int(zeros[one])]
        assert zero.dtype is torch.int32
        wanted = quantize_input.reference_per_tensor(x, scales[one], zeros[one])
        assert torch.equal(codes, wanted)


# --- trials ---------------------------------------------------------------------------------------


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Cards of CUDA as far as a trial asks for them; whether a graph is captured."""
    state = {"capturing": False}
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    return state


@needs_triton
@pytest.mark.parametrize(
    "error", [None, RuntimeError("no C compiler\nfound"), OSError(), ValueError]
)
def test_a_card_is_tried_once(
    cards: dict[str, bool], error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By all threads together, not while a graph is captured; what fails is said once a card."""
    tried: list[torch.device] = []

    def right(device: torch.device) -> bool:
        tried.append(device)
        time.sleep(0.05)
        if error is ValueError:
            return False
        if error is not None:
            raise error
        return True

    cards["capturing"] = True
    assert not trial.works("layers", 0, right) and not tried
    cards["capturing"] = False
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: trial.works("layers", index, right), [0, None] * 4))
    assert found == [error is None] * 8 and tried == [torch.device("cuda", 0)]
    trial.works("layers", 1, right)
    assert tried[1:] == [torch.device("cuda", 1)]
    assert len(caplog.messages) == (0 if error is None else 2)
    words = {RuntimeError: "(no C compiler)", OSError: "(OSError)", type: "numbers are wrong"}
    assert all(words[type(error)] in line and "layers" in line for line in caplog.messages)


@needs_triton
def test_a_trial_is_no_part_of_a_graph(cards: dict[str, bool]) -> None:
    """A denoiser that is compiled before its first call asks while it is traced."""
    traced: list[bool] = []

    def right(device: torch.device) -> bool:
        traced.append(quantize_input.compiling())
        return True

    def call(x: Tensor) -> Tensor:
        return x + 1 if trial.works("layers", 0, right) else x - 1

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, backend="eager")
    assert [compiled(torch.zeros(1)).item() for _ in range(3)] == [1.0] * 3
    assert traced == [False]
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", [ValueError("triton.__spec__ is None"), OSError("broken"), None])
def test_a_broken_or_absent_triton_is_none(
    cards: dict[str, bool], monkeypatch: pytest.MonkeyPatch, caplog: Any, spec: Any
) -> None:
    """Only the broken one is said."""

    def find(name: str) -> None:
        if spec is not None:
            raise spec

    monkeypatch.setattr(trial.importlib.util, "find_spec", find)
    assert not trial.works("layers", 0, lambda device: True)
    assert [str(spec) in line for line in caplog.messages] == [True] * (spec is not None)


@needs_triton
@pytest.mark.skipif(HERE == "cuda", reason="there is a GPU, on which the trials succeed")
def test_plain_operations_serve_where_triton_compiles_nothing(
    cards: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """The trials themselves, where the device is not there: both are false, each says why."""
    with FakeTensorMode():
        x = torch.empty(2, 4, device="cuda")
    assert not int8_fused.supported(x.device) and not column_rounding.supported(x)
    assert not quantize_input.triton_runs() and not quantize_input.triton_runs(0)
    assert ["quantized layers" in line for line in caplog.messages] == [True, False]


class _Operations(TorchDispatchMode):
    """Keeps what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_long_rows_stay_one_operation_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter ones are plain operations, which compilers fuse with what comes before."""
    monkeypatch.setattr(quantize_input, "compiling", lambda: True)
    for columns, whole in ((LONG - 1, False), (LONG, True), (WIDEST + 1, False)):
        for dtype, per_row in quantize_input.PER_ROW.items():
            with FakeTensorMode(), _Operations() as seen:
                x = torch.empty(2, 3, columns, device="cuda", dtype=torch.bfloat16)
                codes, scale = per_row(x)
            assert ("tenuto::quantize_rows" in seen.names) == whole, (columns, dtype)
            assert codes.shape == x.shape and scale.shape == (2, 3, 1)
            assert scale.dtype is torch.float32 and codes.device == x.device


@pytest.mark.parametrize("dtype", list(quantize_input.PER_ROW))
def test_the_operation_of_long_rows_is_the_function(dtype: str) -> None:
    x = torch.randn(2, 3, 70, device=HERE).bfloat16()
    codes, scale = torch.ops.tenuto.quantize_rows(x, dtype)
    wanted, their = quantize_input.PER_ROW[dtype](x)
    assert codes.dtype is quantize_input.TYPES[dtype]
    assert torch.allclose(scale, their, rtol=1e-6)
    if dtype == "int":
        codes_match(codes, quantize_input.counted(wanted))
    else:
        assert torch.allclose(codes.float(), wanted.float(), rtol=0.126, atol=2**-9)
    torch.library.opcheck(torch.ops.tenuto.quantize_rows, (x, dtype))


@pytest.mark.parametrize("dtype", list(quantize_input.PER_ROW))
def test_the_operation_of_long_rows_takes_any_strides(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain operations too, on a card that the kernels of Triton do not run on."""
    monkeypatch.setattr(quantize_input, "_lean", lambda x: False)
    monkeypatch.setattr(quantize_input, "triton_runs", lambda index: False)
    rows = torch.randn(2, 3, 70, device=HERE)
    wanted = torch.ops.tenuto.quantize_rows(rows, dtype)
    wide = torch.cat([rows, rows], -1)
    for x in (
        rows.mT.contiguous().mT,
        rows.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., 70:],
    ):
        codes, scale = torch.ops.tenuto.quantize_rows(x, dtype)
        assert codes.is_contiguous() and torch.allclose(scale, wanted[1], rtol=1e-6)
        near = {"atol": 1.0} if dtype == "int" else {"rtol": 0.126, "atol": 2**-9}  # on a tie
        assert torch.allclose(codes.float(), wanted[0].float(), **near)
        torch.library.opcheck(torch.ops.tenuto.quantize_rows, (x, dtype))


# --- tiles ----------------------------------------------------------------------------------------


@needs_triton
def test_the_fastest_tiles_are_kept_and_failures_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By card and version, in files of Triton's cache; a broken file is measured anew."""
    from tenuto.runtime.kernels import tiles_triton as tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "card", str)
    some = [tiles.Tiles(16, 16, k) for k in (32, 64, 128)]
    seen: list[int] = []
    first = torch.device("cuda", 0)

    def measured(run: Any) -> float:
        return float(run())

    def run(one: Any) -> float:
        seen.append(one.k)
        if one.k == 32:
            raise RuntimeError("out of resources")
        return 1.0 / one.k

    class Function:
        cache_key = "source"

    monkeypatch.setattr(tiles, "milliseconds", measured)
    assert tiles._kept(Function, (4, 8), some, first, run) == some[2] and seen == [32, 64, 128]
    assert tiles._kept(Function, (4, 8), some, first, run) == some[2] and len(seen) == 3
    tiles._kept(Function, (4, 9), some, first, run)
    assert len(seen) == 6, "another shape is measured"
    tiles._kept(Function, (4, 8), some, torch.device("cuda", 1), run)
    assert len(seen) == 9, "another card is measured"
    files = sorted(tmp_path.rglob(tiles.FILE))
    assert len(files) == 3 and all(json.loads(f.read_text()) == list(some[2]) for f in files)
    for file in files:
        file.write_text("{", encoding="utf-8")
    assert tiles._kept(Function, (4, 8), some, first, run) == some[2] and len(seen) == 12
    assert tiles._kept(Function, (5,), some[:1], first, run) is None and len(seen) == 13
    assert len(list(tmp_path.rglob(tiles.FILE))) == 3, "nothing is kept where nothing ran"
    cpu = torch.device("cpu")
    assert tiles.chosen(Function, (), some, cpu, run) == some[0] and len(seen) == 13


@needs_triton
def test_tiles_with_other_numbers_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However fast they are; a step of rounding is no other number, and the answer may be two."""
    from tenuto.runtime.kernels import tiles_triton as tiles

    some = [tiles.Tiles(16, 16, k) for k in (16, 32, 64, 128)]
    exact = torch.randint(-120, 120, (4, 9)).to(torch.int8)
    out = torch.empty_like(exact)

    def measured(call: Any) -> float:
        call()
        return 1.0 / some[turns.pop(0)].k

    def run(one: Any) -> Any:  # into the same memory every time, as kernels do
        out.copy_(exact)
        if one.k == 32:
            out[1:, 3] += 1
        if one.k == 64:
            out[2, 5] = -1 if exact[2, 5] > 0 else 90
        if one.k == 128:
            out.fill_(-1)
        return (out, scale) if pair else out

    monkeypatch.setattr(tiles, "milliseconds", measured)
    turns, scale = [0, 1, 2, 3] * 2, torch.full((4, 1), float("nan"))
    pair = True
    assert tiles.fastest(some, run) == some[1]
    pair = False
    assert tiles.fastest(some, run) == some[1]
    assert len(caplog.records) == 4 and "left out" in caplog.text


@needs_triton
def test_long_trials_are_explained_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Short ones are not; a card's name is said."""
    from tenuto.runtime.kernels import tiles_triton as tiles

    monkeypatch.setattr(tiles, "_spent", 0.0)
    monkeypatch.setattr(tiles, "card", lambda _: "Some Card")
    for seconds, said in ((3.0, 0), (1.0, 0), (2.5, 1), (60.0, 1)):
        tiles._explain(seconds, torch.device("cuda", 0))
        assert len(caplog.records) == said
    assert "Some Card" in caplog.text


@needs_triton
def test_numbers_of_rows_that_are_near_share_their_tiles() -> None:
    from tenuto.runtime.kernels.tiles_triton import bucket

    assert [bucket(m) for m in (1, 7, 8, 9, 512, 639, 640, 4608)] == [
        1, 7, 8, 8, 512, 512, 640, 4096
    ]  # fmt: skip
