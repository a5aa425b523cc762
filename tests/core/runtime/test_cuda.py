"""What runs on a GPU: int8 products, whole layers, moves, a choice by time. Needs torch and pytest.

python -m pytest tests/core/runtime/test_cuda.py
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.numerics import integer_codes
from tenuto.numerics.scheme import schemes
from tenuto.runtime.execution import DENSE, INT8, Chooser
from tenuto.runtime.kernels import int8_conv2d, int8_linear, quantize_input
from tenuto.runtime.layers import QConv2d, QLinear
from tenuto.sampling.clock import Clock
from tests.core import tiny_pipelines as tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MEASURED = Chooser.__call__  # a conftest may make it answer without measuring
TIMES = (999, 499, 0)
WITH_CODES = (schemes.W8A8, schemes.W4A8, schemes.W8A8_STATIC, schemes.W4A8_STATIC)

# input, weight, (stride, padding, dilation, groups)
CONV: list[Any] = [
    ((2, 64, 16, 16), (64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((1, 320, 32, 24), (128, 320, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ((3, 32, 15, 16), (48, 32, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
    ((2, 4, 16, 16), (128, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # the first one of a U-Net
    ((2, 128, 16, 16), (4, 128, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # and the last
    ((1, 3, 9, 7), (5, 3, 2, 3), ((2, 1), (0, 2), (1, 2), 1)),
]
LINEAR = [((1,), 64, 32), ((17,), 64, 8), ((4, 77), 256, 384), ((2, 1024), 320, 1280)]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    """Integers of [low, high], most of them at an end: sums grow as large as they can."""
    found = torch.randint(low, high + 1, shape, generator=draw(seed))
    ends = torch.where(torch.rand(shape, generator=draw(seed + 1)) < 0.7, high, low)
    return torch.where(torch.rand(shape, generator=draw(seed + 2)) < 0.8, ends, found)


def zeros_of(device: str) -> list[Any]:
    return [0, 128, 255, torch.tensor([37], dtype=torch.int32, device=device)]


@pytest.mark.parametrize(("lead", "k", "n"), LINEAR)
def test_linear_is_its_reference(lead: tuple[int, ...], k: int, n: int) -> None:
    x, w = codes((*lead, k), 0, 255, 1).to(torch.uint8), codes((n, k), -127, 127, 5).to(torch.int8)
    w_scale, bias = torch.rand(n, generator=draw(8)) + 0.5, torch.randn(n, generator=draw(9))
    assert int8_linear.supported(torch.device("cuda"), (n, k))
    packed = int8_linear.pack(w.cuda(), w_scale.cuda())
    assert torch.equal(packed.codes().cpu(), w)
    for scale in (torch.rand(1, generator=draw(3)), torch.rand(*lead, 1, generator=draw(4))):
        for zero in zeros_of("cuda"):
            args = (x.cuda(), scale.cuda(), zero)
            found = int8_linear.int8_linear(*args, packed, bias.cuda()).cpu()
            plain = zero.cpu() if isinstance(zero, Tensor) else zero
            expected = int8_linear.reference(x, scale, plain, w, w_scale, bias)
            assert float((found - expected).abs().max()) <= 2e-6 * 255 * 127 * k * 1.5


@pytest.mark.parametrize(("shape", "weight", "geometry"), CONV)
def test_convolution_is_its_reference(shape: Any, weight: Any, geometry: Any) -> None:
    x, w = codes(shape, 0, 255, 1).to(torch.uint8), codes(weight, -127, 127, 5).to(torch.int8)
    w_scale = torch.rand(len(w), generator=draw(8)) + 0.5
    bias = torch.randn(len(w), generator=draw(9))
    assert int8_conv2d.supported(torch.device("cuda"), weight, geometry[3])
    packed = int8_conv2d.pack(w.cuda(), w_scale.cuda(), geometry)
    assert torch.equal(packed.codes().cpu(), w)
    size = 255 * 127 * w[0].numel() * 1.5
    forms: Any = (torch.contiguous_format, torch.channels_last)
    for zero, form in itertools.product(zeros_of("cuda"), forms):
        scale = torch.rand(len(x), 1, 1, 1, generator=draw(4))
        given = x.cuda().contiguous(memory_format=form)
        found = int8_conv2d.int8_conv2d(given, scale.cuda(), zero, packed, bias.cuda())
        plain = zero.cpu() if isinstance(zero, Tensor) else zero
        expected = int8_conv2d.reference(x, scale, plain, w, w_scale, bias, geometry)
        assert found.is_contiguous(memory_format=form)
        assert float((found.cpu() - expected).abs().max()) <= 2e-6 * size


def test_groups_are_not_taken() -> None:
    cuda = torch.device("cuda")
    assert not int8_conv2d.supported(cuda, (8, 4, 3, 3), 2)
    assert not int8_linear.supported(cuda, (20, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 16, 9, 8, generator=draw(0)) * 3).to(dtype)
    for dims in ((-1,), (1, 2, 3)):
        mine, scale = quantize_input.per_row(x.cuda(), dims)
        theirs, their_scale = quantize_input.per_row(x, dims)
        gap = (quantize_input.counted(mine).cpu() - theirs.float()).abs()
        assert float(gap.max()) <= 1 and float(gap.mean()) < 1e-3  # on an edge
        assert torch.allclose(scale.cpu(), their_scale, rtol=1e-6)


# --- layers ---------------------------------------------------------------------------------------


def layer(kind: str, scheme: Any, **options: Any) -> Any:
    """A quantized Linear or Conv2d on the CPU, in fp32, weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: Any = nn.Linear(64, 48) if kind == "linear" else nn.Conv2d(16, 24, 3, padding=1)
    width = 2.0 ** torch.arange(len(TIMES))
    pair = integer_codes.affine(-width, 1.5 * width, 8, symmetric=False)
    static = not scheme.activation.dynamic
    weight = RoundToNearest().weight(base.weight, scheme.weight)
    made = QLinear if kind == "linear" else QConv2d
    return made(base, weight, scheme, Clock(TIMES), pair if static else None, **options)


def data(kind: str, batch: int = 3) -> Tensor:
    shape = (batch, 40, 64) if kind == "linear" else (batch, 16, 12, 12)
    return torch.randn(shape, generator=draw(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", WITH_CODES, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_executes_as_it_does_on_the_cpu(kind: str, scheme: Any, dtype: torch.dtype) -> None:
    here, there = layer(kind, scheme).to(dtype), layer(kind, scheme).to("cuda", dtype)
    x = data(kind).to(dtype)
    with torch.no_grad():
        for t in TIMES:
            for one in (here, there):
                one.clock.tick(t, range(3))
            expected, found = here(x).float(), there(x.cuda())
            assert there.execution == "int8" and found.dtype is dtype and found.is_cuda
            gap = (found.cpu().float() - expected).norm() / expected.norm()
            assert gap < (1e-3 if dtype is torch.float32 else 5e-3)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_executed_equals_simulated(kind: str) -> None:
    with torch.no_grad():
        one, other = (layer(kind, schemes.W8A8, simulate=s).cuda() for s in (False, True))
        x = data(kind).cuda()
        with_tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            gap = (one(x) - other(x)).norm() / one(x).norm()
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = with_tf32
        assert (one.execution, other.execution) == ("int8", "simulated") and gap < 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_batched_equals_split_and_copies_and_moves(kind: str) -> None:
    with torch.no_grad():
        q, x = layer(kind, schemes.W8A8).cuda(), data(kind, 4).cuda()
        x[1] *= 50
        whole = q(x)
        for rows in ([0, 1], [3], [2, 0, 1]):
            assert torch.allclose(q(x[rows]), whole[rows], rtol=1e-5, atol=1e-5)
        twin = copy.deepcopy(q)
        assert torch.equal(twin(x), whole)
        q.cpu()
        assert torch.equal(q.qdata, layer(kind, schemes.W8A8).qdata)
        gap = (q(x.cpu()) - whole.cpu()).norm() / whole.norm().cpu()
        assert gap < 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_auto_measures_once_and_computes_what_it_says(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chooser, "__call__", MEASURED)
    chooser = Chooser()
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            q = layer(kind, schemes.W8A8, wanted="auto", chooser=chooser).to("cuda", dtype)
            x = data(kind).to("cuda", dtype)
            found = q(x)
            assert q.execution in (INT8, DENSE)
            wanted = "int8" if q.execution == INT8 else "float"
            same = layer(kind, schemes.W8A8, wanted=wanted).to("cuda", dtype)
            gap = (found - same(x)).norm() / found.norm()
            assert gap < 2e-3, "another kernel of 8 bits may round otherwise"
        assert len(chooser.known) == 2
        layer(kind, schemes.W8A8, wanted="auto", chooser=chooser).to("cuda", dtype)(x)
        assert len(chooser.known) == 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_stored_range_waits_for_nothing() -> None:
    """No number goes from the device to the host: a graph can be captured."""
    with torch.no_grad():
        for kind in ("linear", "conv"):
            q, x = layer(kind, schemes.W8A8_STATIC).cuda(), data(kind).cuda()
            q.clock.tick(499, range(3), "cuda")
            expected = q(x)
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("error")
                found = q(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_of_a_run_wait_for_nothing() -> None:
    """Once a few steps have been read, the device is never waited for: not by DDIM either."""
    pipe = tiny.stable_diffusion("StableDiffusionPipeline").to("cuda")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    seen = list[int]()

    def after(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        torch.cuda.set_sync_debug_mode("error" if 4 < step < 18 else "default")
        return given

    given = {"output_type": "latent", "height": 16, "width": 16, "num_inference_steps": 20}
    with tn.attach(pipe, "w8a8", execution="int8", speedup=2):
        for _ in range(2):
            try:
                pipe("a dog", callback_on_step_end=after, **given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 40


@pytest.mark.parametrize("width", ["w4", "w8"])
def test_a_text_encoder_is_calibrated_where_the_pipeline_is(width: str) -> None:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline").to("cuda")
    found = tn.quantize_encoder(pipe, width, ["a dog", "two cats"], steps=2)
    with tn.attach(pipe, found):
        pipe("a dog", num_inference_steps=2, height=16, width=16, output_type="latent")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a8-static"])
def test_a_pipeline_is_calibrated_and_its_calls_are_skipped(scheme: str) -> None:
    pipe = tiny.flux().to("cuda")
    found = tn.quantize(pipe, scheme, tn.record(pipe, ["a", "b"], steps=10))
    with tn.attach(pipe, found, speedup=2) as attached:
        pipe("a dog", num_inference_steps=10, output_type="latent")
        assert attached.counts() == {"": [5, 5]}
