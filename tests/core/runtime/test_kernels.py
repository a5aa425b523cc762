"""Every kernel equals its reference on inputs made from what it declares to take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.numerics import integer_codes
from tenuto.numerics.scheme import Format, Scheme, schemes
from tenuto.runtime import kernels
from tenuto.runtime.kernels import (
    Case,
    Kernel,
    epilogue,
    input_memo,
    int8_conv2d,
    int8_cpu,
    int8_linear,
    quantize_input,
)
from tests.core.runtime.exact import for_int_mm

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CODES = ("random", "extreme", "halfway")


def weights(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """int8 codes; "extreme" are ±127, "halfway" at most 64, where any processor is exact."""
    top = 64 if name == "halfway" else 127
    if name == "random":
        return torch.randint(-top, top + 1, shape, generator=draw).to(torch.int8)
    signs = (
        torch.randint(0, 4, shape, generator=draw) > 0
    )  # mostly +: sums grow, and would overflow
    return torch.where(signs, top, -top).to(torch.int8)


def inputs(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """uint8 codes; "extreme" and "halfway" are 0 and 255."""
    if name == "random":
        return torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
    return torch.where(torch.rand(shape, generator=draw) < 0.8, 255, 0).to(torch.uint8)


def zero_points(device: str) -> list[Any]:
    """An int, or one int32 element as a stored range has it."""
    stored = [torch.tensor([z], dtype=torch.int32, device=device) for z in (0, 37, 255)]
    return [0, 1, 128, 255, *stored]


def close(found: Tensor, expected: Tensor, size: float) -> None:
    """Equal up to fp32; `size`: what the largest sum could be."""
    assert found.shape == expected.shape
    assert found.dtype is torch.float32
    worst = float((found - expected).abs().max())
    assert worst <= 2e-6 * size, f"off by {worst / size:.1e} of the largest possible sum"


LINEAR = [((1,), 16, 8), ((5,), 64, 33), ((3, 7), 17, 5), ((2, 3, 4), 256, 40), ((64,), 1, 1),
          ((1, 1), 3, 2), ((33,), 1153, 16), ((40,), 128, 512)]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("lead", "k", "n"), LINEAR)
def test_linear(device: str, name: str, lead: tuple[int, ...], k: int, n: int) -> None:
    if not int8_linear.supported(torch.device(device), (n, k)):
        assert device != "cpu"
        return
    draw = torch.Generator().manual_seed(k + n)
    x = inputs(name, (*lead, k), draw).to(device)
    codes = weights(name, (n, k), draw).to(device)
    w_scale = (torch.rand(n, generator=draw) + 0.5).to(device)
    bias = torch.randn(n, generator=draw).to(device)
    packed = int8_linear.pack(codes, w_scale)
    for x_scale in (
        torch.rand(1, generator=draw) + 0.5,
        torch.rand(*lead, 1, generator=draw) + 0.5,
    ):
        for zero in zero_points(device):
            for b in (None, bias):
                args = (x, x_scale.to(device), zero)
                found = int8_linear.int8_linear(*args, packed, b)
                close(found, int8_linear.reference(*args, codes, w_scale, b), 255 * 127 * k * 2.25)


@pytest.mark.parametrize("name", CODES)
def test_linear_by_library_matmul(name: str) -> None:
    """What a GPU computes; `torch._int_mm` runs on the CPU too."""
    draw = torch.Generator().manual_seed(0)
    for rows in (1, 16, 17, 40):
        x, codes = inputs(name, (2, rows, 64), draw), for_int_mm(weights(name, (24, 64), draw))
        scale, x_scale = torch.rand(24, generator=draw), torch.rand(2, rows, 1, generator=draw)
        packed = int8_linear.IntLinear(codes, scale)
        for zero in zero_points("cpu"):
            found = int8_linear.int8_linear(x, x_scale, zero, packed, None)
            expected = int8_linear.reference(x, x_scale, zero, codes, scale, None)
            close(found, expected, 255 * 127 * 64)


def test_linear_takes_any_strides() -> None:
    draw = torch.Generator().manual_seed(0)
    wide, codes = inputs("random", (6, 40), draw), weights("random", (32, 8), draw).t()
    for x in (wide[:, 3:35], wide[::2, :32], wide.t()[:32].t(), wide[:, :32].unsqueeze(0)):
        packed = int8_linear.pack(codes, torch.ones(8))  # a transposed view
        one = torch.ones(1)
        found = int8_linear.int8_linear(x, one, 128, packed, None)
        expected = int8_linear.reference(x, one, 128, codes, torch.ones(8), None)
        close(found, expected, 255 * 127 * 32)


# stride, padding, dilation, groups
CONV = [
    ((2, 8, 9, 9), (16, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((1, 3, 8, 6), (5, 3, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ((3, 4, 8, 8), (8, 4, 2, 2), ((2, 2), (0, 0), (1, 1), 1)),
    ((2, 8, 10, 7), (12, 4, 3, 3), ((2, 1), (1, 2), (1, 1), 2)),
    ((2, 16, 9, 9), (8, 4, 3, 5), ((1, 1), (2, 2), (2, 1), 4)),
    ((1, 64, 5, 5), (4, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((2, 16, 6, 5), (8, 16, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((2, 2, 12, 12), (3, 2, 5, 5), ((3, 3), (4, 4), (1, 1), 1)),
]


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("shape", "weight", "geometry"), CONV)
def test_conv2d(
    name: str, shape: tuple[int, ...], weight: tuple[int, ...], geometry: tuple[Any, ...]
) -> None:
    """Padding is zeros of the values, which is the zero point of the codes."""
    assert int8_conv2d.supported(torch.device("cpu"), weight)
    draw = torch.Generator().manual_seed(sum(weight))
    x, codes = inputs(name, shape, draw), weights(name, weight, draw)
    w_scale = torch.rand(len(codes), generator=draw) + 0.5
    bias = torch.randn(len(codes), generator=draw)
    packed = int8_conv2d.pack(codes, w_scale, geometry)
    size = 255 * 127 * 2.25 * codes[0].numel()
    for x_scale in (torch.rand(1, generator=draw), torch.rand(len(x), 1, 1, 1, generator=draw)):
        for zero in zero_points("cpu"):
            for b in (None, bias):
                for form in (torch.contiguous_format, torch.channels_last):
                    given = x.contiguous(memory_format=form)  # type: ignore[call-overload]
                    found = int8_conv2d.int8_conv2d(given, x_scale, zero, packed, b)
                    expected = int8_conv2d.reference(x, x_scale, zero, codes, w_scale, b, geometry)
                    close(found, expected, size)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("shape", "weight", "geometry"), [c for c in CONV if c[2][3] == 1])
def test_conv2d_by_library_matmul(
    name: str, shape: tuple[int, ...], weight: tuple[int, ...], geometry: tuple[Any, ...]
) -> None:
    """What a GPU computes: patches of codes, whatever the sizes."""
    draw = torch.Generator().manual_seed(sum(weight))
    x, codes = inputs(name, shape, draw), for_int_mm(weights(name, weight, draw))
    w_scale, bias = torch.rand(len(codes), generator=draw), torch.randn(len(codes), generator=draw)
    packed = int8_conv2d.IntConv2d(codes, w_scale, geometry)
    assert torch.equal(packed.codes(), codes)
    size = 255 * 127 * 2.25 * codes[0].numel()
    for x_scale in (torch.rand(1, generator=draw), torch.rand(len(x), 1, 1, 1, generator=draw)):
        for zero in zero_points("cpu"):
            for form in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=form)  # type: ignore[call-overload]
                found = int8_conv2d.int8_conv2d(given, x_scale, zero, packed, bias)
                expected = int8_conv2d.reference(x, x_scale, zero, codes, w_scale, bias, geometry)
                close(found, expected, size)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_is_rounded_once_and_laid_out_as_the_input(
    dtype: torch.dtype, form: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece or in many, with the scale in the operator or after it."""
    draw = torch.Generator().manual_seed(0)
    x, codes = inputs("random", (5, 8, 6, 6), draw), weights("random", (16, 8, 3, 3), draw)
    w_scale, bias = torch.rand(16, generator=draw), torch.randn(16, generator=draw)
    geometry: Any = ((1, 1), (1, 1), (1, 1), 1)
    packed, given = int8_conv2d.pack(codes, w_scale, geometry), x.contiguous(memory_format=form)
    dense, rows = int8_linear.pack(codes.flatten(1), w_scale), inputs("random", (3, 7, 72), draw)
    one = torch.rand(1, generator=draw)
    for piece in (2**20, 16 * 36 * 2):
        monkeypatch.setattr(epilogue, "PIECE", piece)
        for scale, zero in ((one, torch.tensor([7], dtype=torch.int32)), (one.expand(5, 1), 128)):
            per_picture = scale.reshape(-1, 1, 1, 1) if len(scale) > 1 else scale
            args = (given, per_picture, zero)
            found = int8_conv2d.int8_conv2d(*args, packed, bias, dtype)
            expected = int8_conv2d.reference(x, *args[1:], codes, w_scale, bias, geometry)
            assert found.dtype is dtype and found.is_contiguous(memory_format=form)
            near(found, expected, dtype)
            token = torch.rand(3, 7, 1, generator=draw) if len(scale) > 1 else scale
            found = int8_linear.int8_linear(rows, token, zero, dense, bias, dtype)
            expected = int8_linear.reference(rows, token, zero, codes.flatten(1), w_scale, bias)
            assert found.dtype is dtype and found.is_contiguous()
            near(found, expected, dtype)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype, noise: float = 3e-6) -> None:
    """Equal to half a step of `dtype`, and the noise of a sum, by default that of fp32."""
    half = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    slack = noise * float(expected.abs().max())
    fits = expected.abs() < torch.finfo(dtype).max
    gap = (found.float() - expected).abs() - half * 2 * expected.abs()
    assert float(gap[fits].max()) <= slack


def test_what_is_not_supported_is_said() -> None:
    """Depthwise convolutions are slower than float; no kernel runs on a device of no kind."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert not int8_conv2d.supported(cpu, (8, 1, 3, 3))
    assert not int8_conv2d.supported(meta, (8, 8, 3, 3))
    assert not int8_linear.supported(meta, (8, 8))


@pytest.mark.parametrize("zero", [0, 1, 3, 128, 255, torch.tensor([201], dtype=torch.int32)])
def test_halves_add_up(zero: Any) -> None:
    x = torch.arange(256, dtype=torch.uint8)
    parts = int8_cpu._halves(x, zero)
    assert torch.equal(sum(p.int() for p, _ in parts), x.int())
    assert sum(int(z) for _, z in parts) == int(zero)
    assert all(int(p.max()) <= 128 and p.dtype is torch.uint8 for p, _ in parts)


def test_both_ways_of_summing_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without VNNI needs the halves, another must not be wrong if it takes them."""
    draw = torch.Generator().manual_seed(0)
    x, codes = inputs("extreme", (4, 256), draw), weights("extreme", (8, 256), draw)
    y = torch.nn.functional.pad(x, (0, 0)).view(4, 4, 8, 8)
    kernel = codes.view(8, 4, 8, 8)
    for split in {True, int8_cpu.saturates()}:
        monkeypatch.setattr(int8_cpu, "saturates", lambda split=split: split)
        linear, geometry = int8_linear.pack(codes, torch.ones(8)), ([1, 1], [0, 0], [1, 1], 1)
        conv = int8_conv2d.pack(kernel, torch.ones(8), tuple(geometry))
        expected = x.long() @ codes.long().t()
        assert torch.equal(linear(x, 0), expected.float())
        assert torch.equal(conv(y, 0).flatten(1), expected.float())


# --- every kernel of the registry -----------------------------------------------------------------

E4M3 = Format(dtype="e4m3"), Format(dtype="e4m3", granularity="token")
SCHEMES = [
    schemes.W8A8, schemes.W8A8_STATIC, schemes.W4A8, schemes.W4A8_STATIC,
    *(Scheme(f"w{b}a8", Format(b), schemes.W8A8.activation) for b in (2, 3, 5, 7)),
    Scheme("fp8", *E4M3),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = torch.channels_last


def given(operation: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Any]]:
    """Shapes of an input and a weight, and a geometry."""
    if operation == "linear":
        yield from (((*lead, k), (n, k), None) for lead, k, n in [*LINEAR, ((2, 20), 64, 128)])
    else:
        yield from CONV


def cases(kernel: Kernel, device: str) -> Iterator[tuple[Case, tuple[int, ...]]]:
    """All cases here that it says it takes, each with the shape of an input."""
    for x, weight, geometry in given(kernel.operation):
        for scheme in SCHEMES:
            for dtype in DTYPES:
                forms, place = (scheme.weight, scheme.activation), torch.device(device)
                case = Case(kernel.operation, *forms, place, dtype, weight, geometry)
                if kernel.takes(case):
                    yield case, x


def made(case: Case, shape: tuple[int, ...], draw: torch.Generator) -> tuple[Any, ...]:
    """(x, x_scale, x_zero, weight, bias) of a case, as a layer gives them."""
    assert case.activation is not None
    weight = RoundToNearest().weight(torch.randn(case.shape, generator=draw), case.weight)
    bias = torch.randn(case.shape[0], generator=draw).to(case.device)
    x, dims = torch.randn(shape, generator=draw) * 3, (-1,) if len(case.shape) == 2 else (1, 2, 3)
    x, dtype = x.to(case.device, case.dtype), case.activation.dtype
    if case.activation.dynamic:
        codes, scale = quantize_input.PER_ROW[dtype](x, dims)
        zero: Any = quantize_input.ZERO[dtype]
    else:
        pair = torch.tensor([0.02], device=case.device), torch.tensor([77.0], device=case.device)
        codes, scale, zero = quantize_input.stored(x, *pair, dtype)
    return codes, scale, zero, weight.to(case.device), bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", kernels.kernels(), ids=lambda k: k.name)
def test_every_kernel_is_its_reference(kernel: Kernel, device: str) -> None:
    """On every case that it takes; a new file is covered without a word here."""
    draw = torch.Generator().manual_seed(0)
    for number, (case, shape) in enumerate(cases(kernel, device)):
        x, scale, zero, weight, bias = made(case, shape, draw)
        packed = kernel.pack(weight, case.geometry)
        assert torch.equal(packed.codes().float(), weight.codes().float()), case
        assert packed.tensors()
        bias = bias if number % 3 else None
        before = [t.clone() for t in (x, scale)]
        found = kernel.call(x, scale, zero, packed, bias, case.dtype)
        expected = kernel.reference(x, scale, zero, weight, bias, case.geometry)
        assert expected.dtype is torch.float64 and found.dtype is case.dtype, case
        assert found.shape == expected.shape and found.is_contiguous(), case
        short = kernel.word == "fp8" and device == "cuda"  # a card sums products in fewer bits
        near(found, expected, case.dtype, 4e-3 if short else 3e-6)
        assert all(torch.equal(*pair) for pair in zip(before, (x, scale), strict=True))


def test_the_registry_has_an_order_and_no_two_of_a_name() -> None:
    names = [kernel.name for kernel in kernels.kernels()]
    assert len(names) == len(set(names)) and {"int8_linear", "int8_conv2d"} <= set(names)
    for kernel in kernels.kernels():
        assert kernel.operation in ("linear", "conv2d")
        nowhere = [case for case, _ in cases(kernel, "meta")]
        assert not nowhere, f"{kernel.name} says that it runs on no device"
    assert any(True for kernel in kernels.kernels() for _ in cases(kernel, "cpu"))


class Calls(torch.nn.Module):
    """A module whose forward is one call of a kernel."""

    def __init__(self, kernel: Kernel, packed: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel, self.packed, self.dtype = kernel, packed, dtype

    def forward(self, x: Tensor, scale: Tensor, zero: Any, bias: Tensor) -> Tensor:
        return self.kernel.call(x, scale, zero, self.packed, bias, self.dtype) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", kernels.kernels(), ids=lambda k: k.name)
def test_a_graph_has_it_as_one_operation(kernel: Kernel, device: str) -> None:
    """Traced whole, with shapes and strides from the operation's fake, and the same bits."""
    if kernel.name in ("fp8_linear", "int8_linear") and device == "cuda":
        pytest.skip("its plain operations are in the graph there, for Inductor to fuse")
    seen: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        seen.append([n for n in graph.graph.nodes if "tenuto" in str(n.target)])
        return aot(graph, inputs)

    aot: Any = torch._dynamo.lookup_backend("aot_eager")
    draw, done = torch.Generator().manual_seed(1), set()
    for case, shape in cases(kernel, device):
        assert case.activation is not None
        kind = case.activation.granularity, case.dtype
        if case.shape[0] % 8 or kind in done or case.dtype is torch.float16:
            continue
        done.add(kind)
        x, scale, zero, weight, bias = made(case, shape, draw)
        packed, dtype = kernel.pack(weight, case.geometry), case.dtype
        module = Calls(kernel, packed, dtype)
        forms = [x]
        if x.ndim == 4:
            forms.append(x.contiguous(memory_format=torch.channels_last))
        for given in forms:
            torch._dynamo.reset()
            args = given, scale, zero
            compiled: Any = torch.compile(module, backend=keep, fullgraph=True)
            found, expected = (m(*args, bias) for m in (compiled, module))
            assert torch.equal(found, expected) and found.stride() == expected.stride()
            (node,) = seen.pop()
            fake, real = node.meta["example_value"], module.kernel.call(*args, packed, bias, dtype)
            if fake.shape != real.shape:  # channels last in the graph, turned over outside of it
                fake, real = fake.permute(0, 3, 1, 2), real.contiguous(memory_format=LAST)
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), dtype)
    torch._dynamo.reset()


# --- activations to codes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_range_gives_the_codes_of_numerics(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    scale, zero = integer_codes.affine(
        torch.tensor([-4.0]), torch.tensor([7.0]), 8, symmetric=False
    )
    codes = quantize_input.per_tensor(x, scale, zero)
    assert codes.dtype is torch.uint8
    expected = integer_codes.quantize(x.float(), scale, zero, 0, 255)
    assert torch.equal(codes.float(), expected)
    assert codes.min() == 0 and codes.max() == 255, "the data reach beyond the range"


@pytest.mark.parametrize("dims", [(-1,), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_range_found_on_the_fly(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0
    codes, scale = quantize_input.per_row(x, dims)
    assert codes.dtype is torch.uint8 and scale.dtype is torch.float32
    assert scale.shape == ((3, 4, 5, 1) if dims == (-1,) else (3, 1, 1, 1))
    back = (codes.float() - quantize_input.MIDDLE) * scale
    assert ((back - x.float()).abs() <= scale * 0.5001).all(), "nothing is clipped"
    assert not back[0].any(), "zeros stay zeros"
    assert int(codes.float().sub(128).abs().max()) == 127, "the range is used to its end"


def test_an_input_is_quantized_once_while_it_stays_the_same() -> None:
    """Query, key and value share one; a write, another object, another kind of range do not."""
    memo, x = input_memo.Memo(), torch.randn(2, 3, 4, 8)
    codes, scale = memo.per_row(x)
    assert memo.per_row(x)[0] is codes
    assert memo.per_row(x.clone())[0] is not codes
    other, _ = memo.per_row(x, (1, 2, 3))
    assert torch.equal(other, quantize_input.per_row(x, (1, 2, 3))[0])
    memo.per_row(x)
    x.mul_(3)
    assert torch.equal(memo.per_row(x)[1], quantize_input.per_row(x)[1])
    assert not torch.equal(memo.per_row(x)[1], scale)
    with torch.inference_mode():
        y = torch.randn(2, 8)
        before = memo.per_row(y)[1].clone()
        y.mul_(2)
        assert torch.allclose(memo.per_row(y)[1], 2 * before)


def layouts() -> Iterator[Tensor]:
    """Inputs of every kind of stride, small and larger than a piece."""
    draw = torch.Generator().manual_seed(3)
    big, small = torch.randn(3, 40, 9, 16, generator=draw), torch.randn(2, 1, 3, 5, generator=draw)
    yield from (big, small, big[:1], big.transpose(1, 3), big[..., ::2], big.expand(3, 40, 9, 16))
    yield from (big.contiguous(memory_format=torch.channels_last), torch.zeros(2, 2, 2, 2))
    yield from (torch.arange(-64.0, 64).view(2, 4, 4, 4) / 2, torch.empty(2, 0, 3, 4))


@pytest.mark.parametrize("piece", [2**18, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_codes_are_those_of_the_reference(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, ties too; and laid out as the input, so that nothing is turned over later."""
    monkeypatch.setattr(quantize_input, "PIECE", piece)
    monkeypatch.setattr(quantize_input, "_kept", threading.local())
    for x in layouts():
        x = x.to(dtype)
        for dims in ((-1,), (1, 2, 3)):
            if not x.numel():
                continue
            found, expected = (
                quantize_input.per_row(x, dims),
                quantize_input.reference_per_row(x, dims),
            )
            assert all(map(torch.equal, found, expected))
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert not last or found[0].is_contiguous(memory_format=torch.channels_last)
        for zero in (0.0, 37.0, 255.0):
            args = (x, torch.tensor([0.5]), torch.tensor([zero]))
            assert torch.equal(
                quantize_input.per_tensor(*args), quantize_input.reference_per_tensor(*args)
            )


def test_the_kept_buffer_serves_every_mode() -> None:
    """Made inside inference mode, it is written to outside; threads have their own."""
    found: list[Tensor] = []

    def first() -> None:
        with torch.inference_mode():
            quantize_input.per_row(torch.randn(4, 8))
        found.append(quantize_input.per_row(torch.ones(2, 4))[0])

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    assert found[0].eq(255).all()


@pytest.mark.parametrize("dims", [(-1,), (1, 2, 3)])
def test_a_range_never_spans_the_batch(dims: tuple[int, ...]) -> None:
    """An image does not depend on its neighbours."""
    x = torch.randn(4, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    x[2] *= 100
    codes, scale = quantize_input.per_row(x, dims)
    for row in range(4):
        one = quantize_input.per_row(x[row : row + 1], dims)
        assert torch.equal(one[0], codes[row : row + 1])
        assert torch.equal(one[1], scale[row : row + 1])
