"""bf16 layers whose weight is packed once: what torch's own compute, up to their last rounding.

Both sum in fp32 and round once; in which order a library sums, and where it rounds, is a fact of
the processor. A sum that lies near the middle of two bf16 numbers then falls to either.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.numerics.scheme import schemes
from tenuto.runtime.kernels import packed_bf16
from tenuto.runtime.layers import QConv2d, QLayer, QLinear
from tenuto.sampling.clock import Clock

EPS = 2.0**-8  # the distance of neighbours in bf16, relative to a number's power of two

needs = pytest.mark.skipif(
    not packed_bf16.available(), reason="this processor has no fast bf16 product"
)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Neighbours in bf16 at most, twice over: the product and the sum with the bias round."""
    torch.testing.assert_close(found, wanted, rtol=2 * EPS, atol=2 * EPS)


@needs
@pytest.mark.parametrize("shape", [(3, 7, 96), (5, 384), (1, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape).bfloat16(), torch.randn(48, shape[-1]).bfloat16()
    b = torch.randn(48).bfloat16() if bias else None
    packed = packed_bf16.PackedLinear(w, x)
    for given in (x, x[:1], torch.cat([x, x])):  # whatever it was packed for
        near(packed(given, b), F.linear(given, w, b))


@needs
@pytest.mark.parametrize("kind", [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_conv2d(kind: tuple[int, int, int, int], form: torch.memory_format) -> None:
    """Stride, padding, dilation and groups; another size; memory laid out as it came."""
    torch.manual_seed(0)
    stride, padding, dilation, groups = kind
    geometry = ((stride, stride), (padding, padding), (dilation, dilation), groups)
    x = torch.randn(2, 32, 9, 9).bfloat16().contiguous(memory_format=form)
    w = torch.randn(16, 32 // groups, 3, 3).bfloat16()
    packed = packed_bf16.PackedConv2d(w, geometry, x)
    for given in (x, torch.randn(1, 32, 15, 11).bfloat16().contiguous(memory_format=form)):
        wanted = F.conv2d(given, w, None, stride, padding, dilation, groups)
        found = packed(given, None)
        near(found, wanted)
        assert found.stride() == wanted.stride()


@needs
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_in_bf16_packs_its_float_weight(kind: str) -> None:
    """Instead of keeping it: one copy is resident, none after a move, none in a deep copy."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32) if kind == "linear" else nn.Conv2d(16, 32, 3, padding=1)
    x = torch.randn(4, 64) if kind == "linear" else torch.randn(2, 16, 8, 8)
    layer, x = layer.bfloat16(), x.bfloat16()
    q = RoundToNearest().weight(layer.weight, schemes.W8A8.weight)
    cls = QLinear if kind == "linear" else QConv2d
    ours: QLayer = cls(layer, q, schemes.W8A8, Clock((1.0,)), wanted="float")
    twin = copy.deepcopy(layer)
    twin.weight.data.copy_(q.dequantize(torch.bfloat16))
    with torch.no_grad():
        near(ours(x), twin(x))
        kept = ours.packed_tensors()
        assert [t.numel() for t in kept] == [layer.weight.numel()]
        assert not copy.deepcopy(ours).packed_tensors()
        near(ours(x), twin(x))
        ours.float()
        assert not ours.packed_tensors()
    x.requires_grad_()
    ours.bfloat16()(x).sum().backward()
    assert x.grad is not None


def test_elsewhere_torchs_own_is_used() -> None:
    """In fp32, and where a gradient is wanted."""
    assert not packed_bf16.supported(torch.ones(2, 4))
    assert not packed_bf16.supported(torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True))
