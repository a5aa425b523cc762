"""What is of the prompt alone is computed once: equal bits, fewer layers, nothing left behind."""

from __future__ import annotations

import copy
import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tenuto as tn
from tenuto.model import denoiser_of, describe, override_, tensors_in, watched
from tenuto.runtime import QLinear
from tenuto.runtime.computed_once import MOST, Once
from tenuto.runtime.prompt_modules import once_
from tenuto.runtime.weights_in_place import InPlaceWeights
from tests.core.family_pipelines import MODELS, Ready
from tests.core.model.conftest import FAMILIES, Draw, built

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KEYS = r"(attn2\.to_[kv]|attn2\.add_[kv]_proj)$"
EXPECTED = {  # layers of a denoiser that see the prompt alone, and no other
    "Stable Diffusion 1.5": KEYS,
    "SDXL": KEYS,
    "PixArt": KEYS + r"|^caption_projection\.",
    "Sana": KEYS + r"|^caption_projection\.",
    "Wan 2.1": KEYS + r"|^condition_embedder\.text_embedder\.",
    "Krea 2": r"^text_fusion\.|^txt_in\.",
    "Z-Image": r"^cap_embedder\.|^context_refiner\.",
    "Lumina 2": r"^context_refiner\.|caption_embedder\.",
}
STEPS = 4


def image(ready: Ready, prompts: Any = None) -> Tensor:
    pipe, given = ready.model, dict(ready.call)
    pipe.set_progress_bar_config(disable=True)
    given["prompt"] = list(prompts or ready.prompts)
    if "negative_prompt" in given:
        given["negative_prompt"] = [given["negative_prompt"]] * len(given["prompt"])
    given |= {"num_inference_steps": STEPS, "output_type": "latent"}
    out = pipe(generator=torch.Generator().manual_seed(0), **given)
    return next(tensors_in(out if isinstance(out, tuple) else out.to_tuple()))


@contextmanager
def linears() -> Iterator[list[tuple[int, ...]]]:
    """The weights' places of all products of linear layers meanwhile."""
    seen: list[Any] = []
    original = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(id(weight))
        return original(x, weight, bias)

    F.linear = linear  # type: ignore[assignment]
    try:
        yield seen
    finally:
        F.linear = original  # type: ignore[assignment]


def the_only(attached: Any) -> Once:
    (found,) = (p for p in attached.patches if isinstance(p, Once))
    return found


@contextmanager
def put(denoiser: nn.Module, **options: Any) -> Iterator[Once]:
    (found,) = once_(denoiser, describe(denoiser), **options)
    try:
        yield found
    finally:
        found.remove()


@pytest.mark.parametrize("name", EXPECTED)
def test_equal_bits_and_fewer_layers(name: str) -> None:
    """Each of them is computed once a stream of guidance, and every other one as before."""
    ready = MODELS[name]()
    denoiser = denoiser_of(ready.model)
    wanted = {
        id(m.weight) for n, m in denoiser.named_modules()
        if isinstance(m, nn.Linear) and re.search(EXPECTED[name], n)
    }  # fmt: skip
    with linears() as before:
        plain = image(ready)
    calls = list[Any]()
    hook = denoiser.register_forward_pre_hook(lambda *a: calls.append(1))
    with put(denoiser) as once, linears() as after:
        found = image(ready)
        kept = once.size()
    hook.remove()
    assert torch.equal(found, plain)
    assert kept == 0, "the pipeline has let go of its prompt"
    passes, left = len(calls) // STEPS, [w for w in after if w in wanted]
    assert wanted and len(before) - len(after) == len([w for w in before if w in wanted]) - len(
        left
    )
    assert len(left) * STEPS == len([w for w in before if w in wanted])
    assert passes in (1, 2)
    with linears() as again:
        assert torch.equal(image(ready), plain)
    assert len(again) == len(before), "off is off"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if n not in EXPECTED])
def test_equal_bits_in_every_family(name: str) -> None:
    ready = MODELS[name]()
    if not ready.prompts:
        pytest.skip("it is no plain pipeline of prompts")
    found = once_(denoiser_of(ready.model), describe(denoiser_of(ready.model)))
    for once in found:
        once.remove()
    plain = image(ready)
    found = once_(denoiser_of(ready.model), describe(denoiser_of(ready.model)))
    assert torch.equal(image(ready), plain)
    assert all(once.size() == 0 for once in found)


def flux3(steps: int, model: nn.Module, text: Any = None) -> Tensor:
    """As its modular pipeline: prompt and places are the same objects at every step."""
    known = FAMILIES["flux3"]
    first = known.inputs(Draw(0), 1.0)
    rest = {k: v for k, v in first.items() if k not in ("hidden_states", "timestep")}
    rest |= text or {}
    x = first["hidden_states"]
    with torch.no_grad():
        for step in range(steps):
            t = 1 - step / steps
            x = x - model(hidden_states=x, timestep=torch.full((len(x),), t), **rest)[0] / steps
    return x


def test_the_text_blocks_of_flux3_run_once() -> None:
    """Their modulation is that of t = 0, made anew at every call."""
    model = built(FAMILIES["flux3"])
    own = {
        id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear)
        and n.startswith(("txt_mode_blocks", "context_embedder", "early_stream_modulations.txt",
                          "single_stream_modulations.txt"))
    }  # fmt: skip
    with linears() as before:
        plain = flux3(5, model)
    with put(model) as once, linears() as after:
        assert torch.equal(flux3(5, model), plain)
        assert once.size() == 0
    count = [len([w for w in ws if w in own]) for ws in (before, after)]
    assert count[0] == 5 * count[1] > 0 and len(before) - len(after) == count[0] - count[1]
    with put(model, whole=False) as once, linears() as some:
        assert torch.equal(flux3(5, model), plain)
    assert len(before) - len(some) == 4, "the embedding of the prompt"
    jumps = copy.deepcopy(model)
    jumps.register_to_config(flow_map=True)  # type: ignore[operator]
    assert describe(jumps).prompt == ()


PROMPT = [n for n in FAMILIES if n in ("flux3", "krea2", "z_image", "lumina2")]


@pytest.mark.parametrize("name", PROMPT)
def test_what_a_family_calls_of_the_prompt_sees_nothing_else(name: str) -> None:
    """Under another sample at another timestep bit for bit the same; under another prompt not."""
    known = FAMILIES[name]
    model = built(known)
    names = describe(model).prompt
    assert names

    def outputs(inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}

        def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
            found.setdefault(name, []).extend(t.clone() for t in tensors_in(out))

        with watched(model, names, after=note), torch.no_grad():
            model(**inputs)
        return found

    facts = Once(model, {})
    facts.remove()
    first, other = known.inputs(Draw(0), 0.9), known.inputs(Draw(1), 0.3)
    sample = facts.facts.names[0]
    moved = {k: v for k, v in other.items() if k == sample or k in ("timestep", "t")}
    one, two, three = outputs(first), outputs(first | moved), outputs(other)
    assert one.keys() == two.keys() == set(names)
    changed = 0
    for key, parts in one.items():
        assert all(map(torch.equal, parts, two[key])), key
        changed += not all(map(torch.equal, parts, three[key]))
    assert changed


# --- what may happen in between -------------------------------------------------------------------


class Cross(nn.Module):
    """A denoiser of one block: attn2.to_k of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(8, 8)})})]
        )

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        key = self.blocks[0]["attn2"]["to_k"](self.text(prompt).view(len(x), -1, 8))  # type: ignore
        return x + key.mean(1) * timestep


def cross() -> nn.Module:
    model = Cross().eval()
    described_as_cross(model)
    return model


def described_as_cross(model: nn.Module) -> None:
    from tenuto.model import Backbone, Branch, describing

    describing(model, lambda m: Backbone(
        "cross", ("blocks.0",), (Branch("blocks.0.attn2", "cross-attention", "blocks.0"),)
    ))  # fmt: skip


@pytest.fixture
def toy() -> Iterator[tuple[nn.Module, Once, Callable[[Tensor], Tensor]]]:
    """(model, what is put in, call): a call compares with a copy that has nothing put in."""
    model = cross()
    plain = copy.deepcopy(model)
    x, step = torch.randn(2, 8), torch.ones(1)
    with put(model) as once, torch.no_grad():

        def call(prompt: Tensor) -> Tensor:
            plain.load_state_dict(model.state_dict())
            found = model(x, step, prompt)
            assert torch.equal(found, plain(x, step, prompt))
            return found

        yield model, once, call


def test_streams_and_batches(toy: Any) -> None:
    """Two prompts by turns, a batch of other rows: each is computed once."""
    _, once, call = toy
    one, other, more = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(2, 7, 6)
    for _ in range(4):
        for prompt in (one, other, more):
            call(prompt)
    assert once.counts() == [6, 18]


def test_a_prompt_that_is_written_to_is_computed_anew(toy: Any) -> None:
    _, once, call = toy
    prompt = torch.randn(2, 3, 6)
    first = call(prompt)
    call(prompt)
    prompt.mul_(2)
    assert not torch.equal(call(prompt), first)
    view = prompt[:, 1:]
    call(view)
    prompt[0, 2] = 0
    call(view)
    assert once.counts()[1] == 2


def test_a_prompt_whose_memory_is_exchanged(toy: Any) -> None:
    """Of one object with other memory, and of other objects in what may be the same memory."""
    _, _, call = toy
    prompt = torch.randn(2, 3, 6)
    call(prompt)
    prompt.data = torch.randn(2, 3, 6)
    call(prompt)
    for _ in range(50):
        call(torch.randn(2, 3, 6))


def test_weights_that_change_in_a_run(toy: Any) -> None:
    model, once, call = toy
    prompt = torch.randn(2, 3, 6)
    first = call(prompt)
    model.text.weight.mul_(1.5)
    assert not torch.equal(call(prompt), first)
    model.blocks[0]["attn2"]["to_k"].bias = nn.Parameter(torch.zeros(8))
    call(prompt)
    model.text.weight.data = torch.randn(8, 6)
    call(prompt)
    call(prompt)
    assert once.counts()[1] == 1 + 2, "to the input that stayed, then all"


def test_answers_that_are_written_to(toy: Any) -> None:
    """A processor that turns its keys in place finds them as they were."""
    model, _once, call = toy
    layer = model.blocks[0]["attn2"]["to_k"]
    prompt = torch.randn(2, 3, 6)
    call(prompt)
    text = model.text(prompt)
    layer(text.view(2, -1, 8)).mul_(3)
    call(prompt)
    text.mul_(2)
    call(prompt)


def test_memory_goes_with_the_prompt(toy: Any) -> None:
    """And is bounded while prompts stay."""
    _model, once, call = toy
    prompt = torch.randn(2, 3, 6)
    call(prompt)
    assert once.size() == 2 * (2 * 3 * 8) * 4
    del prompt
    assert once.size() == 0 and not once.sources
    held = [torch.randn(2, 3, 6) for _ in range(3 * MOST)]
    for number in range(len(held)):
        call(held[number])
    assert all(len(cell.answers) <= MOST for cell in once.cells)
    held.clear()
    gc.collect()
    assert once.size() == 0


def test_learning_and_inference_mode(toy: Any) -> None:
    """Gradients reach what is learnt; what has no version is never taken for the same."""
    model, once, _call = toy
    prompt = torch.randn(2, 3, 6)
    with torch.enable_grad():
        model(torch.randn(2, 8), torch.ones(1), prompt).sum().backward()
    assert model.text.weight.grad is not None
    with torch.inference_mode():
        x, step, text = torch.randn(2, 8), torch.ones(1), torch.randn(2, 3, 6)
        before = model(x, step, text)
        text.mul_(2)
        assert not torch.equal(model(x, step, text), before)
    assert once.counts()[1] == 0


def test_it_reads_no_device(toy: Any, monkeypatch: Any) -> None:
    _, once, _ = toy
    model, prompt = toy[0], torch.randn(2, 3, 6)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("values were looked at")

    for name in ("item", "tolist", "cpu", "__bool__", "equal", "numpy", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refused)
    monkeypatch.setattr(torch, "equal", refused)
    for _ in range(3):
        model(torch.ones(2, 8), torch.ones(1), prompt)
    assert once.counts() == [2, 4]


def test_copies_are_apart(toy: Any) -> None:
    model, once, call = toy
    prompt = torch.randn(2, 3, 6)
    call(prompt)
    twin = copy.deepcopy(model)
    twin.text.weight.mul_(2)
    x, step = torch.randn(2, 8), torch.ones(1)
    assert not torch.equal(twin(x, step, prompt), model(x, step, prompt))
    assert once.size() == 2 * (2 * 3 * 8) * 4


def test_compiled_and_captured_it_is_off(toy: Any) -> None:
    """A compiler finds the layer alone; for graphs the model is the same at every step."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    model, once, call = toy
    reset()
    counter = CompileCounter()
    layer = torch.compile(model.blocks[0]["attn2"]["to_k"], backend=counter, fullgraph=True)
    text = torch.randn(2, 3, 8)
    for _ in range(3):
        layer(text)
    assert counter.frame_count == 1 and once.counts() == [0, 0]
    reset()
    watch, prompt = InPlaceWeights(model, "cpu"), torch.randn(2, 3, 6)
    states = set()
    for _ in range(4):
        call(prompt)
        states.add(watch.state())
    assert len(states) == 1 and watch.walks == 1 and watch.refusal is None


def test_an_adapter_lies_round_it() -> None:
    """LoRA on keys and values: its part is computed, its strength may change at any step."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = cross()
    plain = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["to_k", "text"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    inject_adapter_in_model(config, plain)
    plain.load_state_dict(model.state_dict())
    described_as_cross(model)
    x, step, prompt = torch.randn(2, 8), torch.ones(1), torch.randn(2, 3, 6)
    with put(model) as once, torch.no_grad():
        for scale in (1.0, 1.0, 0.3):
            for one in (model, plain):
                for layer in one.modules():
                    if isinstance(layer, LoraLayer):
                        layer.scaling["default"] = scale
            assert torch.equal(model(x, step, prompt), plain(x, step, prompt))
        assert once.counts()[1] == 2, "the layer beneath, of the prompt itself"


def test_a_whole_module_with_an_adapter_is_computed() -> None:
    """How strong an adapter is, is a number that changes without a trace."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = built(FAMILIES["flux3"])
    with put(model) as once:
        flux3(3, model)
        alone = once.counts()
    targets = ["to_q", "context_embedder"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    known = FAMILIES["flux3"].inputs(Draw(0), 0.5)

    def outputs() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for scale in (1.0, 1.0, 0.3):
                for layer in layers:
                    layer.scaling["default"] = scale
                found.append(model(**known)[0])
        return found

    plain = outputs()
    with put(model) as once:
        assert all(map(torch.equal, outputs(), plain))
        assert once.counts()[1] < alone[1], "blocks of the text with an adapter are computed"
    assert not torch.equal(plain[1], plain[2])


def test_an_adapter_that_is_merged() -> None:
    """It writes to the weights beneath, of which no version tells."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = cross()
    config = LoraConfig(r=2, target_modules=["to_k", "text"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    described_as_cross(model)
    plain = copy.deepcopy(model)
    x, step, prompt = torch.randn(2, 8), torch.ones(1), torch.randn(2, 3, 6)
    with put(model) as once, torch.no_grad():
        for change in ("merge", "unmerge"):
            for _ in range(2):
                assert torch.equal(model(x, step, prompt), plain(x, step, prompt))
            for one in (model, plain):
                for layer in one.modules():
                    if isinstance(layer, LoraLayer):
                        getattr(layer, change)()
        assert torch.equal(model(x, step, prompt), plain(x, step, prompt))
        assert once.counts()[1] >= 2


def test_nothing_outlives_a_run() -> None:
    """Where a clock knows of runs: weights may have changed in a way that no version tells."""
    model, clock = cross(), tn.sampling.Clock((0.0,))
    x, step, prompt = torch.randn(2, 8), torch.ones(1), torch.randn(2, 3, 6)
    with put(model, clock=clock) as once, torch.no_grad():
        first = [model(x, step, prompt) for _ in range(2)][1]
        assert once.counts() == [2, 2]
        model.text.weight.data.mul_(2)
        clock.begin()
        found = model(x, step, prompt)
        assert not torch.equal(found, first)
    with torch.no_grad():
        assert torch.equal(model(x, step, prompt), found)


def test_another_thread_in_the_same_model(toy: Any) -> None:
    """It computes as ever, and leaves no answers of its own."""
    model, once, call = toy
    one, other = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    found: list[Tensor] = []

    def beside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    @torch.no_grad()
    def work() -> None:
        found.append(model(torch.zeros(2, 8), torch.ones(1), other))

    wanted = [call(p) for p in (one, other)]
    hook = model.blocks[0]["attn2"]["to_k"].register_forward_pre_hook(beside)
    before = once.counts()
    more = torch.randn(2, 3, 6)
    call(more)
    hook.remove()
    assert once.counts() == [before[0] + 2, before[1]]
    assert len(found) == 1 and once.mine() is False
    plain = copy.deepcopy(model)
    assert all(map(torch.equal, (call(one), call(other)), wanted))
    with torch.no_grad():
        assert torch.equal(found[0], plain(torch.zeros(2, 8), torch.ones(1), other))


def test_somebody_listens_inside_of_a_whole_module() -> None:
    """Hooks are called at every step, and what they change is changed."""
    model, known = built(FAMILIES["flux3"]), FAMILIES["flux3"].inputs(Draw(0), 0.5)
    inner = next(m for n, m in model.named_modules() if n.startswith("txt_mode_blocks") and
                 isinstance(m, nn.Linear))  # fmt: skip
    calls: list[int] = []

    def outputs() -> list[Tensor]:
        calls.clear()
        with torch.no_grad():
            return [model(**known)[0] for _ in range(3)]

    hook = inner.register_forward_hook(lambda m, a, out: calls.append(1) or out * len(calls))
    plain, often = outputs(), len(calls)
    with put(model):
        assert all(map(torch.equal, outputs(), plain)) and len(calls) == often
    hook.remove()
    assert not torch.equal(plain[0], plain[1])


# --- attached -------------------------------------------------------------------------------------


def test_attached_alone() -> None:
    ready = MODELS["Wan 2.1"]()
    plain = image(ready)
    with tn.attach(ready.model, once=True) as attached:
        assert torch.equal(image(ready), plain)
        assert the_only(attached).counts()[1] > 0
    with pytest.raises(tn.TenutoError, match="Say what to attach"):
        tn.attach(ready.model)


def test_attached_with_codes(bits: Any) -> None:
    """Quantized layers answer once too; detached, the model is as it was."""
    ready = MODELS["PixArt"]()
    denoiser = denoiser_of(ready.model)
    before = bits(denoiser)
    with tn.attach(ready.model, "w8a8", execution="int8"):
        plain = image(ready)
    with tn.attach(ready.model, "w8a8", execution="int8", once=True) as attached:
        once = the_only(attached)
        assert torch.equal(image(ready), plain)
        _computed, answered = once.counts()
        assert answered > 0 and once.size() == 0
        inner = denoiser.transformer_blocks[0].attn2.to_k
        assert isinstance(inner, QLinear)
    assert bits(denoiser) == before
    assert not any("forward" in vars(m) for m in denoiser.modules())


def test_with_weights_out_of_the_way_and_a_cache_schedule(bits: Any) -> None:
    """All of them together: the image of the codes and the schedule alone."""
    from tenuto.caching import Interval

    ready = MODELS["PixArt"]()
    before = bits(denoiser_of(ready.model))
    trajectory = tn.record(ready.model, ready.prompts, steps=STEPS, batch=2, call=ready.call)
    made = tn.quantize(ready.model, "w8a8", trajectory, temporal="table")
    options: dict[str, Any] = {"policy": Interval(2), "execution": "int8"}
    with tn.attach(ready.model, made, **options) as attached:
        plain, reused = image(ready), attached.counts()
    with tn.attach(ready.model, made, once=True, originals="disk", **options) as attached:
        assert torch.equal(image(ready), plain) and attached.counts() == reused
        assert the_only(attached).counts()[1] > 0
    assert bits(denoiser_of(ready.model)) == before


def test_ranges_by_step_are_computed_at_each() -> None:
    """The answer to one input is another one at every step: such a layer is left alone."""
    ready = MODELS["PixArt"]()
    trajectory = tn.record(ready.model, ready.prompts, steps=STEPS, batch=2, call=ready.call)
    made = tn.quantize(ready.model, "w8a8-static", trajectory)
    scales = [k for k in made.tensors if k.endswith(("attn2.to_k.scale", "attn2.to_v.scale"))]
    scales = [k for k in scales if k.startswith("ranges/")]
    assert scales
    for key in scales:  # a prompt has the same at all of them, unless somebody says otherwise
        made.tensors[key] = made.tensors[key] * torch.linspace(1, 2, STEPS)
    with tn.attach(ready.model, made, execution="int8"):
        plain = image(ready)
    with tn.attach(ready.model, made, execution="int8", once=True):
        assert torch.equal(image(ready), plain)


def test_a_graph_computes_and_calls_around_it_answer(toy: Any) -> None:
    """What is captured holds no answer: a replay reads the prompt that it is given."""
    from tenuto.runtime.denoiser_call import DenoiserCall
    from tenuto.runtime.graphs import Graphs
    from tests.core.runtime.recorded import Recorded, alike

    model, once, _ = toy
    plain = copy.deepcopy(model)
    again = Recorded()
    patch = override_(model, DenoiserCall(Graphs(model, capture=lambda _: again, device="cpu")))
    prompts = [torch.randn(2, 3, 6) for _ in range(2)]
    x, step = torch.randn(2, 8), torch.ones(1)
    for number in range(8):
        x, step = torch.randn(2, 8), torch.rand(1)
        prompt = prompts[number // 2 % 2]
        assert alike(model(x, step, prompt), plain(x, step, prompt))
    assert again.captured == 1 and again.replayed >= 6
    more = torch.randn(2, 7, 6)  # of another shape: not captured yet
    assert alike(model(x, step, more), plain(x, step, more))
    assert once.counts()[0] > 0
    patch.remove()
