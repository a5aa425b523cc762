"""Group norms of images with channels last: in Triton, and in the graphs of compiled blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tenuto.runtime import fused_group_norm
from tenuto.runtime.fused_group_norm import norm
from tenuto.runtime.kernels import group_norm
from tests.core.runtime.test_triton_kernels import DTYPES, HERE, in_triton, needs_triton

OPS = torch.ops.tenuto
SHAPES = [(1, 8, 1, 3), (2, 20, 9, 15), (1, 32, 16, 17), (2, 20, 3, 4), (2, 68, 5, 5)]

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]


def images(*shape: int, dtype: torch.dtype = torch.float32, far: float = 0.0) -> Tensor:
    x = torch.randn(shape, device=HERE) * 2 + far
    return x.to(dtype).to(memory_format=torch.channels_last)


def exact(x: Tensor, plus: Any, groups: int, weight: Any, bias: Any, eps: float) -> Tensor:
    given = [None if v is None else v.double() for v in (weight, bias)]
    return F.group_norm(x.double() + (0.0 if plus is None else plus.double()), groups, *given, eps)


def check(made: Any, shapes: Any = SHAPES) -> None:
    """times and offset give the norm of odd sizes, of images far from 0 too."""
    for n, shape in enumerate(shapes):
        torch.manual_seed(n)
        dtype, far = DTYPES[n % 3], (0.0, 100.0)[n % 2]
        x = images(*shape, dtype=dtype, far=far)
        rows = (shape[0], 1)[n % 2]
        plus = torch.randn(rows, shape[1], 1, 1, device=HERE).to(dtype) if n % 3 else None
        weight = torch.randn(shape[1], device=HERE).to(dtype) if n % 4 else None
        bias = None if weight is None else weight.flip(0)
        times, offset = made(x, plus, 4, weight, bias, 1e-5)
        assert times.shape == offset.shape == (shape[0], shape[1], 1, 1)
        wanted = exact(x, plus, 4, weight, bias, 1e-5)
        found = x.double() * times.double() + offset.double()
        assert torch.allclose(found, wanted, rtol=1e-3, atol=2e-3), (shape, dtype, far)


def check_triton() -> None:
    from tenuto.runtime.kernels import group_norm_triton as own
    from tenuto.runtime.kernels.tiles_triton import Tiles

    check(own.factors)
    own.PIECES, own.AT_ONCE = (Tiles(8, 8, 0, 4),), 4  # more pieces than are added up together
    check(own.factors, SHAPES[1:2])


CHECKS = (check_triton,)


@needs_triton
def test_the_kernel() -> None:
    in_triton("test_fused_group_norm")


def test_the_reference() -> None:
    check(group_norm.reference)
    x = images(2, 8, 5, 4)
    torch.library.opcheck(OPS.group_factors, (x, None, 4, None, None, 1e-5))
    assert group_norm.last(x) and not group_norm.last(x.contiguous())


class Residual(nn.Module):
    """As diffusers' residual blocks: two norms, the second after an embedding of the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        for module in (self.norm1, self.norm2):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + temb[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(y)))


def compiled(
    monkeypatch: pytest.MonkeyPatch, call: Any, *given: Any
) -> tuple[int, list[fx.Node], Tensor]:
    """How many norms were taken, the graph's nodes afterwards, and what it gives."""
    monkeypatch.setattr(fused_group_norm, "gpu", lambda x: True)
    seen: list[Any] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        seen.extend((norm(module), list(module.graph.nodes)))
        return module.forward

    with torch.no_grad():
        out = torch.compile(call, backend=keep, fullgraph=True)(*given)
    return seen[0], seen[1], out


def convolutions(nodes: list[fx.Node]) -> list[bool]:
    """Of each convolution: whether it has a bias."""
    return [n.args[2] is not None for n in nodes if n.target in fused_group_norm.CONVOLUTIONS]


def block() -> Any:
    torch.manual_seed(3)
    return Residual().to(HERE, memory_format=torch.channels_last)  # type: ignore[call-overload]


def test_a_residual_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both norms; the first convolution's bias goes with the embedding into the second."""
    one, x, temb = block(), images(2, 16, 6, 5), torch.randn(2, 16, device=HERE)
    count, nodes, found = compiled(monkeypatch, one, x, temb)
    assert count == 2 and convolutions(nodes) == [False, True]
    assert sum(n.target is fused_group_norm.OPERATION for n in nodes) == 2
    assert not any(n.target in fused_group_norm.NORMS for n in nodes)
    with torch.no_grad():
        assert torch.allclose(found, one(x, temb), rtol=1e-4, atol=1e-4)
    assert group_norm.last(found)


def test_channels_first_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    one = block().to(memory_format=torch.contiguous_format)
    x, temb = images(2, 16, 6, 5).contiguous(), torch.randn(2, 16, device=HERE)
    count, nodes, _ = compiled(monkeypatch, one, x, temb)
    assert count == 0 and convolutions(nodes) == [True, True]


def test_what_others_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that something else reads keeps its bias, and one before a write."""
    one, x, temb = block(), images(2, 16, 6, 5), torch.randn(2, 16, device=HERE)

    def twice(x: Tensor, temb: Tensor) -> Tensor:
        y = one.conv1(x)
        return y + one.norm2(y + temb[:, :, None, None])

    def written_to(x: Tensor, temb: Tensor) -> Tensor:
        y = one.conv1(x)
        z = y + temb[:, :, None, None]
        temb += 1.0
        return one.norm2(z)

    for call in (twice, written_to):
        with torch.no_grad():
            wanted = call(x, temb.clone())
        count, nodes, found = compiled(monkeypatch, call, x, temb.clone())
        assert count == 1 and convolutions(nodes) == [True]
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_images_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, where height and width are symbols."""
    monkeypatch.setattr(fused_group_norm, "gpu", lambda x: True)
    counts: list[int] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        counts.append(norm(module))
        return module.forward

    one, temb = block(), torch.randn(2, 16, device=HERE)
    call: Any = torch.compile(one, backend=keep, fullgraph=True)
    with torch.no_grad():
        for size in (5, 7, 9):
            x = images(2, 16, size + 1, size)
            torch._dynamo.mark_dynamic(x, 2)
            torch._dynamo.mark_dynamic(x, 3)
            assert torch.allclose(call(x, temb), one(x, temb), rtol=1e-4, atol=1e-4)
    assert counts == [2]
