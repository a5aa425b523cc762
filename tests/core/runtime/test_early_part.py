"""What a block makes of a step alone is a part of its own, on a stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tenuto as tn
from tenuto.model import denoiser_of, tensors_in
from tenuto.runtime import compiler, early_part, side_branch
from tenuto.runtime.denoiser_call import CompiledBlocks
from tests.core import tiny_pipelines as tiny

pytestmark = pytest.mark.usefixtures("fresh")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
HERE = "cuda" if torch.cuda.is_available() else "cpu"


class Modulated(nn.Module):
    """A block as DiT has them: shift, scale and gate by products of what an image has."""

    def __init__(self, width: int = 32, wide: int = 3) -> None:
        super().__init__()
        self.time, self.moves = nn.Linear(8, width), nn.Linear(width, wide * width)
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, S, K), t (B, 8)."""
        made = self.moves(nn.functional.silu(self.time(t)))[:, None]
        shift, scale, gate = made.chunk(3, dim=-1)
        return x + gate * self.inner(x * (1 + scale) + shift)


class Model(nn.Module):
    """Four of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Modulated() for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """All blocks are given the same t."""
        t = t.sin()
        for block in self.blocks:
            x = block(x, t)
        return x


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The two parts of what is compiled, as graphs; those of a CPU too."""
    found: list[Any] = []

    def noted(module: fx.GraphModule, inputs: Sequence[Any], finish: Any) -> Any:
        made: list[fx.GraphModule] = []

        def kept(part: fx.GraphModule, given: Sequence[Any]) -> Any:
            made.append(part)
            return finish(part, given)

        both = early_part.compiled_apart(module, inputs, kept)
        found.append(made)
        return both

    monkeypatch.setattr(compiler, "gpu", lambda x: True)
    monkeypatch.setattr(compiler, "compiled_apart", noted)
    return found


def compiled(model: nn.Module, backend: Any = "eager") -> None:
    """Its blocks, by our backend."""
    ours = compiler.backend(backend=backend)
    for block in model.get_submodule("blocks").children():
        block.compile(backend=ours)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(2, 20, 32, device=HERE), torch.randn(2, 8, device=HERE)


def names(module: fx.GraphModule, op: str = "placeholder") -> list[str]:
    return [str(n.target).lower() for n in module.graph.nodes if n.op == op]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method", "ignore:TensorFloat32")  # Inductor
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_block_is_parted_and_computes_the_same(parts: list[Any], backend: str) -> None:
    """The first part has no token; the rest takes what it made, and divides that itself."""
    model, (x, t) = Model().to(HERE), inputs()
    with torch.no_grad():
        wanted = model(x, t)
        compiled(model, backend)
        assert torch.allclose(model(x, t), wanted, atol=1e-5)
    first, rest = parts[0]
    assert any("l_t_" in n for n in names(first)) and not any("l_x_" in n for n in names(first))
    assert any("l_x_" in n for n in names(rest)) and not any("l_t_" in n for n in names(rest))
    assert [n for n in names(rest) if "ahead_" in n] == ["ahead_linear_1", "ahead_add"]
    assert not any("moves" in n or "time" in n for n in names(rest))
    assert len(parts) == 1, "one compilation serves equal blocks"


class Written(Modulated):
    """Tokens are written to in place, which nobody outside sees."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As there."""
        x = x.clone()
        x.add_(1)
        return super().forward(x, t)


class Given(Modulated):
    """What all blocks are given is written to."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As there."""
        t.add_(1)
        return super().forward(x, t)


class Late(Modulated):
    """What was made of a step is written to after its tokens were."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As there."""
        made = self.moves(nn.functional.silu(self.time(t)))[:, None]
        made[..., :32].add_(x.mean(1, keepdim=True))
        shift, scale, gate = made.chunk(3, dim=-1)
        return x + gate * self.inner(x * (1 + scale) + shift)


class Tokens(Modulated):
    """The modulation is each token's own."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As there."""
        made = self.moves(nn.functional.silu(self.time(x[..., :8])))
        shift, scale, gate = made.chunk(3, dim=-1)
        return x + gate * self.inner(x * (1 + scale) + shift)


class Drawn(Modulated):
    """Numbers are drawn for the step."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As there."""
        return super().forward(x, t + torch.rand_like(t))


@pytest.mark.parametrize("kind", [Written, Given, Late, Tokens, Drawn])
def test_what_stays_in_one_part(parts: list[Any], kind: type[nn.Module]) -> None:
    """With the same numbers; what is written in place to tokens alone is no reason for it."""
    model, (x, t) = Model(), inputs()
    model.blocks = nn.ModuleList(kind() for _ in range(2))
    model.to(HERE)
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = model(x, t)
        compiled(model)
        torch.manual_seed(1)
        assert torch.allclose(model(x, t), wanted, atol=1e-5)
    assert len(parts[0]) == (2 if kind is Written else 0)


def test_tokens_without_images_are_no_step(parts: list[Any]) -> None:
    """(S, K) in place of (B, S, K): nothing of the block is apart from its tokens."""

    class Packed(Modulated):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            shift, scale, gate = self.moves(nn.functional.silu(self.time(t))).chunk(3, dim=-1)
            return x + gate * self.inner(x * (1 + scale) + shift)

    model, (x, t) = Model(), inputs()
    model.blocks = nn.ModuleList(Packed() for _ in range(2))
    model.to(HERE)
    with torch.no_grad():
        wanted = model(x[0], t[:1])
        compiled(model)
        assert torch.allclose(model(x[0], t[:1]), wanted, atol=1e-5)
    assert parts[0] == []


def test_what_is_large_is_not_made_ahead(parts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it stays in memory until a call ends."""
    monkeypatch.setattr(early_part, "MOST", 100)
    model, given = Model().to(HERE), inputs()
    with torch.no_grad():
        wanted = model(*given)
        compiled(model)
        assert torch.allclose(model(*given), wanted, atol=1e-5)
    assert not any("moves" in n for p in parts[0][:1] for n in names(p))


def dit() -> Any:
    """Its blocks embed the timestep and the class themselves."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    t, labels = torch.tensor([500, 500]), torch.tensor([1, 2])
    call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": t, "class_labels": labels}
    return tiny.randomized(model), call


MODELS = "dit", "flux", "qwen-image", "sd3"


def recorded(kind: str) -> Any:
    """A small denoiser of a pipeline, and a call of it."""
    pipe, prompts, call = tiny.asked(kind)
    trajectory = tn.record(pipe, prompts and prompts[:2], steps=2, call=call, batch=2)
    return denoiser_of(pipe), dict(trajectory.calls[0].inputs)


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(k, (tn.schemes.W8A8, tn.schemes.FP8)[n % 2]) for n, k in enumerate(MODELS)],
)
def test_blocks_of_real_models(parts: list[Any], kind: str, scheme: Any) -> None:
    """Quantized, with equal numbers: what a block makes of a timestep, class or pooled prompt."""
    denoiser, call = dit() if kind == "dit" else recorded(kind)
    handle = tn.attach(denoiser, scheme, execution="int8", graphs=False)
    blocks = CompiledBlocks(denoiser, backend="eager")
    try:
        with torch.no_grad():
            (wanted, *_) = tensors_in(denoiser(**call))
            blocks.compile()
            (found, *_) = tensors_in(denoiser(**call))
    finally:
        blocks.remove()
        handle.detach()
    assert torch.allclose(found, wanted, atol=2e-4)
    assert any(parts), "a block makes something of its step alone"


# --- the branch -----------------------------------------------------------------------------------


def test_without_a_capture_all_is_in_one_stream() -> None:
    """On any device."""
    assert (
        side_branch.ahead(lambda x, w: (x + w,), [torch.ones(2), torch.ones(2)], (0,))[0].sum() == 4
    )


@needs_cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # Inductor's
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_replayed_graph_has_the_numbers_of_its_inputs(parts: list[Any], backend: str) -> None:
    """Replayed a hundred times with other inputs; what was made of t first is not used again."""
    from tenuto.runtime.captures import CudaCapture

    model, (x, t) = Model().cuda(), inputs()
    with torch.no_grad():
        compiled(model, backend)
        plain = Model().cuda()
        for _ in range(2):
            model(x, t)
        replay, out = CudaCapture(torch.device("cuda", 0))(lambda: model(x, t))
        for seed in range(100):
            for mine, its in zip((x, t), inputs(seed), strict=True):
                mine.copy_(its)
            replay()
            assert torch.allclose(out, plain(x, t), atol=1e-4), seed
    assert parts[0]


@needs_cuda
def test_a_branch_waits_for_what_it_reads() -> None:
    """Of a tensor that is made late, or written to, the part begins then."""
    from tenuto.runtime.captures import CudaCapture

    x, big = torch.zeros(4, device="cuda"), torch.randn(4096, 4096, device="cuda")

    def call() -> Tensor:
        found = []
        for _ in range(6):
            slow = (big @ big)[:1, :4].flatten() * 0
            x.add_(1).add_(slow)
            found += side_branch.ahead(lambda a: (a * 2,), [x], (0,))
        return torch.stack(found)

    with torch.no_grad():
        call()
        replay, out = CudaCapture(torch.device("cuda", 0))(call)
        for _ in range(5):
            x.zero_()
            replay()
            assert out[:, 0].tolist() == [2, 4, 6, 8, 10, 12]


@needs_cuda
def test_parts_run_on_a_stream_of_their_own() -> None:
    """And in inference mode, where nobody counts what is written, on the one that is there."""
    from tenuto.runtime.captures import CudaCapture

    x, seen = torch.zeros(4, device="cuda"), set[int]()

    def part(a: Tensor) -> tuple[Tensor]:
        seen.add(torch.cuda.current_stream().cuda_stream)
        return (a + 1,)

    def call() -> Tensor:
        seen.add(torch.cuda.current_stream().cuda_stream)
        return side_branch.ahead(part, [x], (0,))[0]

    with torch.no_grad():
        CudaCapture(torch.device("cuda", 0))(call)
        assert len(seen) == 2
        call()
    seen.clear()
    with torch.inference_mode():
        x = torch.zeros(4, device="cuda")
        CudaCapture(torch.device("cuda", 0))(call)
        assert len(seen) == 1
