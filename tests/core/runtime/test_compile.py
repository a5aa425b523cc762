"""An attached model under torch.compile: no graph break, no new compilation from step to step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tenuto as tn
from tenuto.caching import Interval
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import denoiser_of, tensors_in
from tenuto.numerics import Recipe, Rule, Scheme
from tenuto.runtime import Patches, denoiser_call
from tenuto.runtime.attachment import install
from tenuto.runtime.denoiser_call import Calls, CompiledBlocks
from tenuto.runtime.graphs import Graphs
from tenuto.runtime.kernels import int8_linear
from tenuto.runtime.layers import QLinear
from tenuto.sampling import Clock
from tests.core import family_pipelines, tiny_language
from tests.core import tiny_pipelines as tiny
from tests.core.runtime.exact import for_int_mm

STEPS = 2
SCHEMES = (
    tn.schemes.W8A8,
    tn.schemes.W8A8_STATIC,
    tn.schemes.FP8,
    tn.schemes.FP8_STATIC,
)
TARGETS = ["to_q", "to_v", "to_qkv_mlp_proj", "to_out.0", "linear_1", "proj"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def asked(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """(pipeline, prompts, call)."""
    if kind == "demo transformer":
        pipe = tn.demo("transformer")
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:3]
        return pipe, ("a dog", "two cats"), {}
    if kind == "demo unet":
        return tn.demo("unet"), ("a dog", "two cats"), {}
    if kind == "flux2":
        layers = {"max_sequence_length": 16, "text_encoder_out_layers": (0, 1, 2)}
        return tiny_language.flux2(True), tiny.PROMPTS, tiny.SMALL | layers
    if kind == "sdxl":
        found = family_pipelines.sdxl()
        return found.model, found.prompts, found.call
    return tiny.asked(kind)


class Case:
    """A tiny pipeline, its recorded calls, and an artifact with a temporal table."""

    def __init__(self, kind: str, scheme: Scheme) -> None:
        pipe, prompts, call = asked(kind)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.denoiser = pipe, denoiser_of(pipe)
        trajectory = tn.record(pipe, prompts and prompts[:2], steps=STEPS, call=call, batch=2)
        found = [c for c in trajectory.calls if c.run == trajectory.calls[0].run]
        self.calls = [c.inputs for c in found]
        recipe = Recipe((Rule("*", scheme, RoundToNearest()),))
        self.artifact = tn.quantize(pipe, recipe, trajectory, temporal="table")

    def attach(self, how: Calls | None, policy: Any = None) -> tn.Tenuto:
        """With the schedule `policy`; compiled as the test says, a break of the graph raises."""
        patches = Patches(self.artifact, policy=policy, route=False, execution="int8")
        return install(self.pipe, patches, None, how)

    def run(self, change: float = 0.0) -> list[Tensor]:
        """The outputs of all calls of a run; change: of the floats that go in."""
        found: list[Tensor] = []
        for inputs in self.calls:
            given = copy.copy(inputs)
            name = next(iter(given))
            if change:
                given[name] = _plus(given[name], change)
            with torch.no_grad():
                out = self.denoiser(**given)
            found.append(torch.cat([t.detach().flatten() for t in tensors_in(out)]))
        return found


def _plus(value: Any, change: float) -> Any:
    return value + change if isinstance(value, Tensor) else [v + change for v in value]


def with_options(attached: tn.Tenuto, backend: Any, most: int = 2) -> CompiledBlocks:
    """The compiled blocks of a model: of every class the last ones, in a graph without breaks."""
    (blocks,) = (p for p in attached.patches if isinstance(p, CompiledBlocks))
    blocks.options = {"backend": backend, "fullgraph": True}
    classes: dict[type, list[nn.Module]] = {}
    for block in blocks.blocks:
        classes.setdefault(type(block), []).append(block)
    blocks.blocks = [b for same in classes.values() for b in same[-most:]]
    return blocks


def with_lora(denoiser: nn.Module) -> Callable[[], None]:
    """Random LoRAs round what there is of the usual layers; what takes them off."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    names = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    targets = [n for n in names if n.endswith(tuple(TARGETS))]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, denoiser)
    return lambda: recurse_remove_peft_layers(denoiser)


def near(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Codes at the edge of rounding may differ by one."""
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return max(gaps) < 0.02


ALIKE = "demo transformer", "qwen-image", "wan"  # of one class of blocks
MODELS = (
    "demo transformer", "demo unet", "sdxl", "flux", "flux2", "qwen-image", "z-image", "wan",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_no_graph_break_and_no_recompilation(kind: str) -> None:
    """W4A8 with a temporal table, a cache schedule and a LoRA: blocks as one graph each."""
    case = Case(kind, tn.schemes.W4A8)
    off = with_lora(case.denoiser)
    with case.attach(None, Interval(2)):
        expected = case.run()
    attached = case.attach(Calls(compile=True), Interval(2))
    counted = CompileCounter()
    blocks = with_options(attached, counted)
    assert near(case.run(), expected) and blocks.on
    case.run(1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert near(case.run(), expected), "a second run, its steps computed and reused"
    computed, reused = (sum(column) for column in zip(*attached.counts().values(), strict=True))
    assert computed == reused > 0
    if kind in ALIKE:
        assert counted.frame_count == 2, "two blocks, computed and reused: each pattern once"
    attached.detach()
    assert not any("_compiled_call_impl" in vars(m) for m in case.denoiser.modules())
    off()


def test_a_move_of_a_compiled_model() -> None:
    """Its layers have to pack anew, which compiled code cannot do: one call runs as it is."""
    case = Case("flux", tn.schemes.W8A8)
    with case.attach(None):
        expected = case.run()
    attached = case.attach(Calls(compile=True))
    with_options(attached, "eager", 1).blocks.pop()
    case.run()
    for _ in range(2):
        case.denoiser.to(torch.float64).to(torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert near(case.run(), expected)
    attached.detach()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_capture_compiles_nothing(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a call was compiled before: compilers time kernels, which no capture survives."""
    counter, during = CompileCounter(), []

    class Capture:
        def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            before = counter.frame_count
            out = call()
            during.append(counter.frame_count - before)
            return lambda: None, out

    case = Case("flux", tn.schemes.W8A8)
    on_cpu = functools.partial(Graphs, capture=lambda _: Capture(), device="cpu")
    monkeypatch.setattr(denoiser_call, "Graphs", on_cpu)
    attached = case.attach(Calls(compile=True, graphs=True))
    with_options(attached, counter, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for change in range(4):
            case.run(0.01 * change)
    assert counter.frame_count and during and not any(during)
    attached.detach()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_schemes(scheme: Scheme) -> None:
    """Through AOTAutograd too, which asks every operation for its fake."""
    case = Case("flux", scheme)
    with case.attach(None):
        expected = case.run()
    attached = case.attach(Calls(compile=True))
    blocks = with_options(attached, "aot_eager", 1)
    del blocks.blocks[:-1]
    case.run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert near(case.run(), expected)
    attached.detach()


@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
def test_the_denoiser_in_one_graph(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles the forward of the whole model, hooks outside, gets one graph of it."""
    monkeypatch.setattr(denoiser_call, "Graphs", functools.partial(Graphs, device="cpu"))
    case = Case("flux", tn.schemes.W4A8)
    with case.attach(Calls(graphs=graphs)), monkeypatch.context() as patched:
        patched.setattr(Graphs, "case", lambda *_: None)
        expected = case.run()
        forward = torch.compile(case.denoiser.forward, backend="eager", fullgraph=True)
        patched.setattr(case.denoiser, "forward", forward)
        assert near(case.run(), expected)


@pytest.mark.slow
def test_a_user_compiles() -> None:
    """The denoiser as a whole, after `attach`: branches are reused as they are."""
    case = Case("flux", tn.schemes.W8A8)
    attached = case.attach(None, Interval(2))
    expected = case.run()
    case.denoiser.compile(backend="eager")
    assert near(case.run(), expected)
    computed, reused = (sum(column) for column in zip(*attached.counts().values(), strict=True))
    assert computed == reused > 0
    attached.detach()


@pytest.mark.parametrize("scheme", [tn.schemes.W8A8, tn.schemes.FP8], ids=["int8", "fp8"])
def test_what_is_trained_beside_a_compiled_layer(scheme: Scheme) -> None:
    """An adapter gets the gradients that it gets in eager mode: codes have none, nor do ranges."""
    base, beside = nn.Linear(16, 8), nn.Linear(16, 8)
    weight = RoundToNearest().weight(base.weight, scheme.weight)
    layer = QLinear(base, weight, scheme, Clock((999.0,)), simulate=True)
    found = []
    for compile in (False, True):
        x = torch.ones(3, 16).cumsum(1).requires_grad_()

        def both(x: Tensor) -> Tensor:
            return layer(x * 2) + beside(x)

        call = torch.compile(both, backend="aot_eager") if compile else both
        found.append(torch.autograd.grad(call(x).square().sum(), [x, beside.weight]))
    assert all(map(torch.allclose, *found))


def test_detached_while_compiled() -> None:
    """The blocks are what they were, those included that the user compiled; and the weights."""
    case = Case("flux", tn.schemes.W8A8)
    plain = case.run()[:1]
    own = next(m for n, m in case.denoiser.named_modules() if n == "transformer_blocks.0")
    before = own._compiled_call_impl = lambda *args, **kwargs: own._call_impl(*args, **kwargs)
    attached = case.attach(Calls(compile=True))
    with_options(attached, "eager")
    del case.calls[1:]  # after the first they are compiled, by the second traced
    case.run()
    assert vars(own)["_compiled_call_impl"] is not before
    attached.detach()
    assert vars(own)["_compiled_call_impl"] is before
    del own._compiled_call_impl
    assert all(map(torch.equal, case.run(), plain))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("stored", [False, True], ids=["token", "stored"])
def test_the_product_of_a_gpu_is_traced_as_plain_operations(rows: int, stored: bool) -> None:
    """What CUDA computes with runs here too: in a graph, Inductor fuses what is round it."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (rows, 64), generator=draw).to(torch.uint8)
    codes = for_int_mm(torch.randint(-127, 128, (32, 64), generator=draw).to(torch.int8))
    w_scale, bias = torch.rand(32, generator=draw), torch.randn(32, generator=draw)
    scale = torch.rand(1 if stored else rows, 1, generator=draw)
    zero: Any = torch.tensor([117], dtype=torch.int32) if stored else 128
    scale = scale.view(1) if stored else scale
    packed = int8_linear.IntLinear(codes, w_scale)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def product(x: Tensor) -> Tensor:
        return int8_linear.KERNEL.call(x, scale, zero, packed, bias, torch.bfloat16)

    found = torch.compile(product, backend=keep, fullgraph=True)(x)
    expected = int8_linear.reference(x, scale.view(-1, 1), zero, codes, w_scale, bias)
    assert torch.allclose(found.double(), expected, rtol=0.01, atol=0.1)
    assert len(graphs) == 1 and "_int_mm" in graphs[0] and "tenuto" not in graphs[0]
