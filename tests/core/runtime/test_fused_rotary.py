"""Norms and rotary embeddings of queries and keys as one operation of compiled blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tenuto as tn
from tenuto.model import denoiser_of, tensors_in
from tenuto.runtime.compiler import backend
from tenuto.runtime.denoiser_call import CompiledBlocks
from tenuto.runtime.kernels import rotary
from tests.core import tiny_language
from tests.core import tiny_pipelines as tiny
from tests.core.runtime.test_fused_rows import build
from tests.core.runtime.test_triton_kernels import DTYPES, HERE, in_triton, needs_triton

TURN = torch.ops.tenuto.turn
Call = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a CPU are changed, as those of a GPU are; plain operations compute them."""
    monkeypatch.setattr(rotary, "runs_on", lambda x: x.ndim == 4)


# --- the kernel and the operation -----------------------------------------------------------------


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, shared: bool, like: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a part of a wider tensor; a weight, cos and sin. like: which dimensions angles have."""
    a, b, c, d = shape
    wide = torch.randn(a, b, 3 * c * d, device=HERE).to(dtype)
    x = wide[..., c * d : 2 * c * d].unflatten(-1, (c, d))
    sizes = [n if place in like else 1 for place, n in enumerate(shape[:3])]
    angles = torch.randn(*sizes, d // 2 if shared else d, device=HERE)
    return x, torch.rand(d, device=HERE).to(dtype) + 0.5, angles.cos(), angles.sin()


def check_turn() -> None:
    """Both kinds of pairs, with and without a norm, angles of a pair and of a column."""
    from tenuto.runtime.kernels import rotary_triton as fused

    flags = itertools.product((True, False), (True, False), (True, False))
    shapes = itertools.cycle([(2, 5, 3, 16), (1, 7, 2, 6), (3, 2, 1, 2), (1, 2, 18, 130)])
    likes = itertools.cycle([(1,), (0, 2), (), (2,), (1, 2)])
    for (norm, halves, shared), dtype in itertools.product(flags, DTYPES):
        x, weight, cos, sin = inputs(next(shapes), dtype, shared, next(likes))
        given = x, weight if norm else None, 1e-3, cos, sin, halves
        found, wanted = fused.turn(*given), rotary.reference(*given)
        assert found.shape == wanted.shape and found.is_contiguous() and found.dtype is dtype
        near = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert torch.allclose(found.float(), wanted.float(), atol=near, rtol=near)


CHECKS = (check_turn,)


@needs_triton
def test_the_kernel_is_right() -> None:
    in_triton("test_fused_rotary")


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Triton 3")  # of what its next versions do
def test_the_kernel_compiles_for_a_card(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for norm, halves, shared, alike in itertools.product((True, False), repeat=4):
        flags = {"ROWS": 8, "HALF": 64, "NORM": norm, "HALVES": halves, "SHARED": shared}
        flags |= {"ALIKE": alike}
        assert ".entry _turned" in build("rotary_triton", "_turned", flags)


def test_what_it_computes_is_a_turn() -> None:
    """By complex numbers; lengths stay as they are; the norm is torch's own."""
    x, weight, cos, sin = inputs((2, 5, 3, 8), torch.float32, True, (1,))
    numbers = torch.view_as_complex(x.reshape(2, 5, 3, 4, 2).contiguous()) * torch.complex(cos, sin)
    found = TURN(x, None, 0.0, cos, sin, False)
    assert torch.allclose(found, torch.view_as_real(numbers).flatten(3), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    normed = torch.rms_norm(x, (8,), weight, 1e-6)
    found = TURN(x, weight, 1e-6, cos, sin, True)
    assert torch.allclose(found, TURN(normed, None, 0.0, cos, sin, True), atol=1e-6)
    torch.library.opcheck(TURN, (x, weight, 1e-6, cos, sin, True))


# --- the pass -------------------------------------------------------------------------------------


def turns(module: fx.GraphModule) -> list[Any]:
    """Our operations of a graph: whether they norm."""
    called = (n for n in module.graph.nodes if n.target is TURN.default)
    return [n.args[1] is not None for n in called]


def compiled(call: Call, *args: Any) -> tuple[list[Any], Any]:
    """What is in the graph of a call, and what it gives."""
    seen: list[Any] = []

    def keep(module: fx.GraphModule, given: Any) -> Any:
        seen.extend(turns(module))
        return module.forward

    with torch.no_grad():
        return seen, torch.compile(call, backend=backend(backend=keep), fullgraph=True)(*args)


X, W = torch.randn(2, 5, 3, 8), torch.rand(8) + 0.5
COS, SIN = torch.randn(2, 5, 8)
NUMBERS = torch.polar(torch.ones(5, 4), torch.randn(5, 4))


def real(x: Tensor, dim: int = -1, cos: Tensor = COS, sin: Tensor = SIN) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    found: Any = apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=dim, sequence_dim=1)
    return found


def numbers(x: Tensor) -> Tensor:
    from diffusers.models.transformers import transformer_qwenimage as qwen

    found: Any = qwen.apply_rotary_emb_qwen(x, NUMBERS, use_real=False)
    return found


def normed(x: Tensor) -> Tensor:
    return torch.rms_norm(x, (8,), W.to(x.dtype), 1e-6)


def other(x: Tensor) -> Tensor:
    """The wrong sign: no turn."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([b, -a], dim=-1).flatten(3)
    cos, sin = COS[None, :, None], SIN[None, :, None]
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


CASES: dict[str, tuple[Call, list[bool]]] = {
    "neighbours": (real, [False]),
    "halves": (lambda x: real(x, -2), [False]),
    "complex": (numbers, [False]),
    "normed": (lambda x: real(normed(x)), [True]),
    "halves, normed": (lambda x: real(normed(x), -2), [True]),
    "complex, normed": (lambda x: numbers(normed(x)), [True]),
    "a query and a key": (lambda x: (real(normed(x)), real(normed(x + 1))), [True, True]),
    "half precision": (lambda x: real(normed(x.bfloat16())), [True]),
    "a norm that is read twice": (lambda x: (real(y := normed(x)), y), [False]),
    "a norm without a weight": (lambda x: real(torch.rms_norm(x, (8,), None, 1e-6)), [False]),
    "another sign": (other, []),
    "angles of other columns": (lambda x: real(x, -1, COS[..., :1], SIN[..., :1]), []),
    "wide": (lambda x: real(x.bfloat16()).float(), [False]),
}  # fmt: skip


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("case", CASES)
def test_what_is_taken_in(case: str) -> None:
    call, wanted = CASES[case]
    seen, found = compiled(call, X)
    assert seen == wanted
    near = 2e-2 if "half" in case or case == "wide" else 1e-5
    for one, exact in zip(tensors_in(found), tensors_in(call(X)), strict=True):
        assert one.dtype is exact.dtype
        assert torch.allclose(one.float(), exact.float(), atol=near, rtol=near)


@pytest.mark.usefixtures("everywhere")
def test_what_learns_stays_as_it_is() -> None:
    """The operation has no gradient."""
    seen: list[Any] = []

    def keep(module: fx.GraphModule, given: Any) -> Any:
        seen.append(turns(module))
        return module.forward

    x = X.clone().requires_grad_()
    call: Any = torch.compile(lambda x: real(x).sum(), backend=backend(backend=keep))
    call(x).backward()
    assert seen == [[]] and x.grad is not None


FUSED = {"flux": [False, False], "qwen-image": [False] * 4, "z-image": [False] * 2}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", [*FUSED, "flux2 klein"])
def test_the_blocks_of_real_models(kind: str) -> None:
    """Queries and keys of the families are taken in, and the answer stays what it was."""
    if kind == "flux2 klein":
        pipe, call = tiny_language.asked(kind)
        prompts: Any = ("a dog",)
    else:
        pipe, prompts, call = tiny.asked(kind)
    denoiser = denoiser_of(pipe)
    trajectory = tn.record(pipe, prompts and prompts[:1], steps=2, call=call, batch=1)
    given, seen = dict(trajectory.calls[0].inputs), []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        seen.append(turns(module))
        return module.forward

    with tn.attach(denoiser, "w8a16", compile=True) as attached:
        (blocks,) = (p for p in attached.patches if isinstance(p, CompiledBlocks))
        blocks.options = {"backend": keep}
        with torch.no_grad():
            wanted, found = (next(iter(tensors_in(denoiser(**given)))) for _ in range(2))
    taken = [graph for graph in seen if graph]
    assert taken and all(len(graph) % 2 == 0 for graph in taken), seen
    if kind in FUSED:
        assert taken[0] == FUSED[kind]
    else:
        assert [True, True] in taken
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())
