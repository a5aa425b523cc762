"""What is captured, when, and what is kept of it; on the CPU, see `Recorded`."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tenuto as tn
from tenuto.caching import CacheSchedule, apply_schedule_
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.errors import TenutoError
from tenuto.model import override_
from tenuto.numerics import schemes
from tenuto.runtime.captures import Reads, cause_of
from tenuto.runtime.denoiser_call import DenoiserCall
from tenuto.runtime.execution import chooser_for
from tenuto.runtime.graphs import LONG, Graphs
from tenuto.runtime.layers import QLinear
from tenuto.runtime.mode import Mode
from tenuto.runtime.weights_in_place import MARKS
from tenuto.sampling import Clock
from tests.core import tiny_pipelines as tiny
from tests.core.runtime.recorded import Recorded, alike


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Denoiser(nn.Module):
    """Takes a dict and a list beside the sample, and adds to its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, sample: Tensor, timestep: Tensor, extra: dict[str, Any]) -> dict[str, Any]:
        y = self.two(self.one(sample)) * timestep.view(-1, 1)
        return {"sample": y.add_(extra["added"]), "other": [y[:1], extra["name"]]}


def captured(model: nn.Module, **options: Any) -> tuple[DenoiserCall, Recorded]:
    """The calls of a model, captured on the CPU."""
    again = Recorded()
    call = DenoiserCall(Graphs(model, capture=lambda _: again, device="cpu", **options))
    override_(model, call)
    return call, again


def inputs(seed: int, rows: int = 2, name: str = "a") -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(seed)
    sample, time = torch.randn(rows, 4, generator=draw), torch.rand(1, generator=draw)
    return sample, time, {"added": torch.randn(rows, 4, generator=draw), "name": name}


def plain(model: nn.Module, given: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        return type(model).forward(model, *given)["sample"]


@torch.no_grad()
def test_the_second_call_of_a_case_is_captured_and_later_ones_replayed() -> None:
    model = tiny.randomized(Denoiser())
    _, again = captured(model)
    outs = []
    for seed in range(5):
        given = inputs(seed)
        out = model(*given)
        assert alike(out["sample"], plain(model, given)) and out["other"][1] == "a"
        outs.append((out["sample"], out["sample"].clone()))
    assert (again.captured, again.replayed) == (1, 4)
    assert all(torch.equal(out, kept) for out, kept in outs), "a replay wrote over an output"


@torch.no_grad()
def test_an_input_that_was_written_to_is_copied_again() -> None:
    model = tiny.randomized(Denoiser())
    captured(model)
    given = inputs(0)
    for _ in range(4):
        assert alike(model(*given)["sample"], plain(model, given))
        given[2]["added"].add_(1.0)


@torch.no_grad()
def test_shapes_dtypes_and_arguments_have_a_graph_each() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    kinds = [inputs(0), inputs(0, rows=3), inputs(0, name="b")]
    for given in kinds * 3:
        assert alike(model(*given)["sample"], plain(model, given))
    assert call.graphs is not None
    assert again.captured == len(call.graphs.known) == 3


@torch.no_grad()
def test_the_graph_used_longest_ago_goes() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model, most=2)
    for rows in (1, 1, 2, 2, 1, 3, 3, 1, 2):
        given = inputs(0, rows)
        assert alike(model(*given)["sample"], plain(model, given))
    assert call.graphs is not None and len(call.graphs.known) == 2
    assert again.captured == 4 and call.graphs.evicted == 2, "that of 2 rows, then it again"


@torch.no_grad()
@pytest.mark.parametrize("replays", [1, 6])
def test_graphs_that_are_hardly_used_are_no_longer_made(replays: int) -> None:
    """But in a process that lives long, of many sizes one after another, for each of them."""
    model = tiny.randomized(Denoiser())
    call, again = captured(model, most=2)
    assert call.graphs is not None
    for rows in range(1, 16):
        for seed in range(1 + replays):
            given = inputs(seed, rows)
            assert alike(model(*given)["sample"], plain(model, given))
    if replays == 1:
        assert again.captured == 11 and "more kinds" in str(call.graphs.reason)
        assert not call.graphs.known
    else:
        assert again.captured == 15 and call.graphs.reason is None


class Right:
    """A captured model that is asked whether it answers as it would without graphs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seed = model, 0
        call, self.again = captured(model)
        assert call.graphs is not None
        self.graphs: Graphs = call.graphs

    def __call__(self, calls: int = 1) -> bool:
        found = []
        for _ in range(calls):
            self.seed += 1
            given = inputs(self.seed)
            found.append(alike(self.model(*given)["sample"], plain(self.model, given)))
        return all(found)


@torch.no_grad()
def test_other_weights_are_another_graph() -> None:
    """A weight elsewhere in memory, a LoRA, its strength: none is read where it was."""
    from peft import LoraConfig, inject_adapter_in_model

    right = Right(tiny.randomized(Denoiser()))
    inner: Any = right.model.one.inner  # type: ignore[union-attr]
    assert right(2) and right.again.captured == 1
    inner.weight.data = inner.weight.data * 2
    assert right(2) and right.again.captured == 2
    config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    inject_adapter_in_model(config, right.model, "a")
    assert right(2) and right.again.captured == 3
    right.model.one.inner.set_scale("a", 0.3)  # type: ignore[union-attr]
    assert right(2) and right.again.captured == 4


@torch.no_grad()
def test_whatever_is_exchanged_is_seen_at_the_next_call() -> None:
    """A parameter, a layer, a value of a module or of an object in it, a class."""
    model = tiny.randomized(Denoiser())
    one: Any = model.one
    right = Right(model)

    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x - self.inner(x)

    class Doubled(nn.Linear):
        by: Any = type("By", (), {})()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.by.values[0]["factor"]

    Doubled.by.values = [{"factor": 2.0}]
    old = one.inner

    def doubled() -> None:
        one.inner = Doubled(4, 4)
        one.inner.by = Doubled.by

    changes: list[Callable[[], Any]] = [
        lambda: setattr(old, "weight", nn.Parameter(torch.randn(4, 4))),
        lambda: old._parameters.update(bias=nn.Parameter(torch.randn(4))),
        lambda: setattr(one, "inner", nn.Linear(4, 4)),
        doubled,
        lambda: one.inner.by.values[0].update(factor=3.0),
        lambda: setattr(one, "__class__", Other),
        lambda: setattr(one.inner, "bias", None),
    ]
    assert right(3)
    for number, change in enumerate(changes):
        change()
        assert right(3), number
        assert right.again.captured == number + 2
    one.inner, one.__class__ = old, Block
    assert right(3) and right.again.captured == len(changes) + 1, "as it was after the second"
    assert right.graphs.weights.walks == len(changes) + 2 and right.graphs.reason is None


@torch.no_grad()
def test_a_model_that_changes_all_the_time_runs_as_it_is() -> None:
    right = Right(tiny.randomized(Denoiser()))
    for number in range(60):
        right.model.one.count = number  # type: ignore[union-attr]
        assert right()
    assert right.again.captured == 0 and "changes from call to call" in str(right.graphs.reason)


class Convolved(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.LayerNorm(4)
        self.drop, self.act = nn.Dropout(0.0), nn.LeakyReLU(0.5)
        self.by: Any = None

    def forward(self, sample: Tensor, timestep: Tensor, extra: dict[str, Any]) -> dict[str, Any]:
        sample = self.norm(self.act(self.conv(self.drop(sample)[:, None, :, None])[:, 0, :, 0]))
        if self.by is not None:
            sample = sample * self.by()
        return super().forward(sample, timestep, extra)


@torch.no_grad()
def test_what_is_set_on_a_layer_of_torch_is_seen() -> None:
    """Tiling makes convolutions circular, others stretch them; a size is only told."""
    model: Any = tiny.randomized(Convolved())
    right = Right(model)
    conv = model.conv

    def circular(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 1, 1), mode="circular")
        return nn.functional.conv2d(x, weight, bias, padding=(0, 1))

    changes: list[Callable[[], Any]] = [
        lambda: (setattr(conv, "dilation", (2, 2)), setattr(conv, "padding", (2, 2))),
        lambda: (setattr(conv, "dilation", (1, 1)), setattr(conv, "padding_mode", "circular")),
        lambda: setattr(conv, "_conv_forward", circular),
        lambda: setattr(model.norm, "eps", 1.0),
        lambda: setattr(model.act, "negative_slope", 0.1),
        lambda: setattr(model.drop, "p", 0.5),  # not in training: the same values
    ]
    assert right(3)
    for number, change in enumerate(changes):
        change()
        assert right(3), number
        assert right.again.captured == number + 2
    conv.kernel_size, model.training = (1, 1), model.training
    model.one.inner.in_features = 5
    assert right(3) and right.again.captured == len(changes) + 1


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self) -> float:
        return self.factor


class Both(Slotted):
    """With a dict beside its slot."""

    __slots__ = ("__dict__",)


class Listed(list[float]):
    """A list that knows more than its members."""

    factor = 1.0

    def __call__(self) -> float:
        return self.factor


def listed(factor: float) -> Listed:
    made = Listed([1.0])
    made.factor = factor
    return made


class Factor:
    """Made of a value that torch knows nothing of."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> float:
        return float(self.value)


EXCHANGED: dict[str, Callable[[float], Any]] = {
    "slots": Slotted,
    "slots and a dict": Both,
    "partial": lambda factor: partial(float, factor),
    "a list's own": listed,
    "numpy's scalar": lambda factor: Factor(np.float32(factor)),
    "numpy's array": lambda factor: Factor(np.array(factor)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", EXCHANGED)
def test_an_object_that_one_cannot_look_into_is_seen_when_exchanged(kind: str) -> None:
    model: Any = tiny.randomized(Convolved())
    right = Right(model)
    for number, factor in enumerate((2.0, 3.0, 4.0)):
        model.by = EXCHANGED[kind](factor)
        assert right(3) and right.again.captured == number + 1


@torch.no_grad()
def test_two_states_may_take_turns() -> None:
    """Each is known: that there were many changes is no reason to have no graphs."""
    right = Right(tiny.randomized(Denoiser()))
    for number in range(60):
        right.model.one.which = number % 2  # type: ignore[union-attr]
        assert right(3)
    assert right.again.captured == 2 and right.graphs.reason is None


def test_states_that_are_forgotten_keep_nothing() -> None:
    model: Any = tiny.randomized(Denoiser())
    weights = Graphs(model, device="cpu").weights
    for number in range(3 * MARKS):
        model.one.scaled = lambda by=number: by
        weights.state()
    assert len(weights._opaque) <= MARKS + 8


@pytest.mark.parametrize("cached", [False, True])
def test_autocast_is_another_graph_by_its_dtype(cached: bool) -> None:
    """And what autocast keeps of weights is free after it: no graph may read that."""
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    for number, dtype in enumerate((torch.bfloat16, torch.float16) * 2):
        with torch.no_grad(), torch.autocast("cpu", dtype, cache_enabled=cached):
            for seed in range(3):
                given = inputs(seed)
                assert alike(model(*given)["sample"], plain(model, given)), dtype
            assert torch.is_autocast_cache_enabled() == cached
        assert again.captured == min(2, number + 1)
    assert call.graphs is not None and call.graphs.reason is None


def test_what_went_wrong_first_is_what_is_said() -> None:
    """The end of a capture raises another error, which says nothing."""

    @contextmanager
    def capture() -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("failed due to a previous error")

    with pytest.raises(RuntimeError) as caught, capture():
        raise ValueError("a shape is wrong")
    assert str(cause_of(caught.value)) == "a shape is wrong"


def test_each_device_has_a_capture_of_its_own() -> None:
    """And another one when all of its graphs are gone: its memory is gone with them."""
    asked: list[torch.device] = []
    model = tiny.randomized(Denoiser())
    again = Recorded()
    graphs = Graphs(model, capture=lambda device: asked.append(device) or again, device="cpu")
    override_(model, DenoiserCall(graphs))
    with torch.no_grad():
        for seed in range(9):
            model(*inputs(seed, 1 + seed // 3))
        assert again.captured == 3 and asked == [torch.device("cpu")]
        graphs.forget()
        for seed in range(3):
            model(*inputs(seed))
    assert again.captured == 4 and len(asked) == 2


@torch.no_grad()
def test_loras_of_one_shape_share_a_graph() -> None:
    """Loaded under one name after another: what is read stays where it was, with other values."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    right = Right(tiny.randomized(Denoiser()))
    twin: Any = tiny.randomized(Denoiser())
    model: Any = right.model
    assert right(3) and right.again.captured == 1
    for seed, rank in enumerate((2, 2, 3, 2)):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["inner"], init_lora_weights=False
        )
        inject_adapter_in_model(config, model, "a")
        given = {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}
        assert right(3), "another LoRA"
        inject_adapter_in_model(config, twin, "a")
        twin.load_state_dict(given, strict=False)
        assert alike(model(*inputs(7))["sample"], twin(*inputs(7))["sample"])
        model.one.inner.lora_A["a"].weight.data.copy_(torch.ones(rank, 4))  # swapped in place
        twin.one.inner.lora_A["a"].weight.data.copy_(torch.ones(rank, 4))
        assert alike(model(*inputs(8))["sample"], twin(*inputs(8))["sample"])
        for unloaded in (model, twin):
            recurse_remove_peft_layers(unloaded)
            del unloaded.peft_config
        assert right(3), "and none"
        assert right.again.captured == (2 if seed < 2 else 3), seed


@torch.no_grad()
def test_a_lora_that_somebody_keeps_is_not_written_over() -> None:
    """By one that is loaded under the same name: it gets other memory, and a graph of its own."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    right = Right(tiny.randomized(Denoiser()))
    model: Any = right.model
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in range(4):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
        inject_adapter_in_model(config, model, "a")
        assert right(3)
        if seed < 2:
            state = model.state_dict()
            kept += [(v, v.clone()) for k, v in state.items() if "lora" in k]
            del state
        assert all(torch.equal(v, before) for v, before in kept), seed
        assert right.again.captured == min(seed, 2) + 1
        recurse_remove_peft_layers(model)
        del model.peft_config
    assert len(kept) == 8


@torch.no_grad()
def test_adapters_that_are_gone_free_their_memory() -> None:
    """When others come, whatever their names; until then the last ones have theirs."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    right = Right(tiny.randomized(Denoiser()))
    model: Any = right.model
    for name in "abc":
        config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
        inject_adapter_in_model(config, model, name)
        assert right(3)
        recurse_remove_peft_layers(model)
        del model.peft_config
        assert right(1)
        memory = right.graphs.weights._adapters.memory
        assert len(memory) == 4 and all(f".{name}." in key for key in memory)


@torch.no_grad()
def test_a_packed_weight_is_another_graph() -> None:
    """A move of the model packs every weight anew, elsewhere in memory."""
    pipe = tiny.flux()
    attached = tn.attach(pipe, tn.schemes.W8A8, execution="int8")
    weights = Graphs(pipe.transformer, device="cpu").weights
    before = weights.state()
    assert weights.state() == before and weights.walks == 1
    layer = next(m for m in pipe.transformer.modules() if isinstance(m, tn.runtime.QLayer))
    copy.deepcopy(layer)  # which unpacks it
    assert weights.latest() is None, "nothing may be read of what is freed"
    pipe.transformer.to(torch.float32)
    assert weights.state() != before
    attached.detach()


@torch.no_grad()
def test_a_graph_is_kept_where_it_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    """By medians of both, once an order of magnitude; and only while there is memory."""
    model = tiny.randomized(Denoiser())
    call, again = captured(model, choose=True)
    assert call.graphs is not None
    short = LONG / 2
    again.times = [short, 1.0, 2.0, 9.0, 2.0, 1.0, 2.0, short] + [3.0, 2.0] * 3
    for rows, kept in ((2, 1), (8, 1)):
        for seed in range(4):
            given = inputs(seed, rows)
            assert alike(model(*given)["sample"], plain(model, given))
        assert len(call.graphs.known) == kept
    assert again.captured == 2 and not again.times and call.graphs.reason is None
    again.full, again.times = "they would take 9 GiB", [short] + [1.0, 2.0] * 3
    with caplog.at_level(logging.INFO, "tenuto"):
        for seed in range(4):
            model(*inputs(seed, 4))
    (said,) = [r for r in caplog.records if "without CUDA graphs" in r.getMessage()]
    assert "9 GiB" in said.getMessage() and said.levelno == logging.INFO, "nobody asked for them"
    assert not call.graphs.known


@torch.no_grad()
def test_sizes_of_one_magnitude_are_tried_once() -> None:
    """Each new prompt may have a length of its own: a trial takes as long as six calls."""
    model = tiny.randomized(Denoiser())
    _, again = captured(model, choose=True)
    again.times = [LONG / 2, *[1.0, 2.0] * 3, LONG / 2]
    for rows in (2, 3):
        for seed in range(4):
            given = inputs(seed, rows)
            assert alike(model(*given)["sample"], plain(model, given))
    assert again.captured == 2 and not again.times


@torch.no_grad()
def test_an_input_that_was_written_to_unseen_is_copied() -> None:
    """`.data` does not raise a tensor's version, nor do other graphs that give it out."""
    model = tiny.randomized(Denoiser())
    captured(model)
    given = inputs(0)
    for _ in range(5):
        assert alike(model(*given)["sample"], plain(model, given))
        given[2]["added"].data.mul_(0.5)


def test_threads_do_not_share_a_graph() -> None:
    """One that comes while another replays has its call as it is."""
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    assert call.graphs is not None

    def many(seed: int) -> bool:
        with torch.no_grad():
            found = []
            for number in range(20):
                given = inputs(100 * seed + number)
                found.append(alike(model(*given)["sample"], plain(model, given)))
        return all(found)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(many, range(3)))
    finally:
        sys.setswitchinterval(before)
    with torch.no_grad(), call.graphs.lock:
        replayed, given = again.replayed, inputs(7)
        assert alike(model(*given)["sample"], plain(model, given))
        assert again.replayed == replayed


@torch.no_grad()
def test_switches_are_cases_of_their_own() -> None:
    """A replay would go on with the kernels of before."""
    right = Right(tiny.randomized(Denoiser()))
    assert right(3) and right.again.captured == 1
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert right(3) and right.again.captured == 2
    torch.use_deterministic_algorithms(True)
    try:
        assert right(3) and right.again.captured == 3
    finally:
        torch.use_deterministic_algorithms(False)
    assert right(3) and right.again.captured == 3


@torch.no_grad()
def test_a_block_that_is_compiled_later_is_another_graph() -> None:
    right = Right(tiny.randomized(Denoiser()))
    assert right(3) and right.again.captured == 1
    compiled = CompileCounter()
    right.model.one.compile(backend=compiled)  # type: ignore[union-attr]
    assert right(3) and right.again.captured == 2 and compiled.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_a_model_that_goes_elsewhere_frees_its_graphs() -> None:
    model = tiny.randomized(Denoiser())
    call, _ = captured(model)
    for seed in range(3):
        model(*inputs(seed))
    assert call.graphs is not None and call.graphs.known
    call.graphs.device = "cuda"
    model(*inputs(3))
    assert not call.graphs.known


@torch.no_grad()
def test_a_call_that_takes_long_is_timed_once_and_left_as_it_is(caplog: Any) -> None:
    """Trials of a graph would take longer than it saves; another size of it is asked anew."""
    model = tiny.randomized(Denoiser())
    call, again = captured(model, choose=True)
    again.times = [2 * LONG, 2 * LONG]
    with caplog.at_level(logging.INFO, "tenuto"):
        for rows in (2, 3):
            for seed in range(5):
                given = inputs(seed, rows)
                assert alike(model(*given)["sample"], plain(model, given))
    assert not again.captured and not again.times
    assert [line.partition(": ")[2] for line in caplog.messages] == ["a call takes 0.6 s."] * 2
    assert call.graphs is not None and call.graphs.reason is None


class Keeper:
    """An attention processor of somebody's."""


@torch.no_grad()
@pytest.mark.parametrize("choose", [False, True])
def test_a_processor_that_may_keep_what_it_sees(choose: bool) -> None:
    """Nobody has asked for graphs where they are the default: it misses nothing there."""
    model: Any = tiny.randomized(Denoiser())
    model.one.processor = Keeper()
    call, again = captured(model, choose=choose)
    again.times = [LONG / 2] + [1.0, 2.0] * 3
    for seed in range(4):
        model(*inputs(seed))
    assert again.captured == (not choose) and call.graphs is not None
    assert bool(call.graphs.reason) == choose


def scheduled(most: int = 16) -> tuple[nn.Module, Clock, Recorded]:
    """A model whose first block is computed in every other step, and the second in every third."""
    model = tiny.randomized(Denoiser())
    times = tuple(float(t) for t in range(12, 0, -1))
    rows = torch.tensor([[i % 2 == 0, i % 3 == 0] for i in range(12)])
    clock = Clock(times)
    call, again = captured(model, most=most)
    cells = apply_schedule_(model, CacheSchedule(rows, times, ("one", "two")), clock)
    call.prepare([cell.call for cell in cells])
    return model, clock, again


@torch.no_grad()
@pytest.mark.parametrize("split", [False, True], ids=["batch", "passes"])
def test_a_graph_for_every_pattern_of_a_schedule(split: bool) -> None:
    """Of two branches at most four, in any run; guidance in one call or in two."""
    expected_model = tiny.randomized(Denoiser())
    model, clock, again = scheduled()
    rows = [[i % 2 == 0, i % 3 == 0] for i in range(12)]
    for run in range(3):
        kept: dict[Any, Tensor] = {}
        clock.begin()
        for place, time in enumerate(clock.timesteps):
            parts = [("c",), ("u",)] if split else [("c", "u")]
            for number, streams in enumerate(parts):
                clock.tick(time, streams)
                given = inputs(100 * run + 2 * place + number, rows=len(streams))
                x = given[0]
                for name, computes in zip(("one", "two"), rows[place], strict=True):
                    if computes or (name, streams) not in kept:
                        kept[name, streams] = getattr(expected_model, name)(x)
                    x = kept[name, streams]
                expected = x * given[1].view(-1, 1) + given[2]["added"]
                assert alike(model(*given)["sample"], expected), (run, place, streams)
    assert again.captured == 4 and again.replayed > 20


@torch.no_grad()
def test_a_clock_reads_by_a_graph() -> None:
    """The same steps, streams and runs as without one, with a condition that changes in place."""
    plain_clock, clock = Clock((9.0, 5.0, 1.0)), Clock((9.0, 5.0, 1.0))
    again = Recorded()
    clock.reads = Reads(lambda _: again, "cpu")
    prompt = torch.randn(2, 3, 4)
    for _ in range(3):
        for time in (9.0, 5.0, 1.0):
            sample = torch.randn(2, 4, 2, 2)
            for one in (plain_clock, clock):
                one.observe(torch.tensor([time]), 2, [prompt, torch.ones(2)], "cpu", sample)
            assert clock.streams == plain_clock.streams and clock.step == plain_clock.step
            assert clock.run == plain_clock.run and clock.exact
        prompt.add_(1.0)
    assert (again.captured, again.replayed) == (1, 8) and clock.run == plain_clock.run > 1


def moved(model: nn.Module, again: Recorded) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, "cpu")


def grouped(model: nn.Module, again: Recorded) -> None:
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(model.one).register_hook(ModelHook(), "some_cache")  # type: ignore[arg-type]


def patched(model: nn.Module, again: Recorded) -> None:
    inner: Any = model.two
    inner.forward = lambda x, own=inner.forward: own(x)


SPOILT: dict[str, Callable[[Any, Recorded], Any]] = {
    "offloading moves its weights": moved,
    "the hook some_cache of diffusers": grouped,
    "another library's patch lies on its Block": patched,
    "a hook lies on its Linear": lambda model, again: model.two.inner.register_forward_hook(
        lambda *args: None
    ),
    "operation not permitted": lambda model, again: setattr(
        again, "error", RuntimeError("CUDA error: operation not permitted\nmore")
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("reason", "late"),
    [(r, late) for r in SPOILT for late in (False, True) if not (late and "permitted" in r)],
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_so_once(
    reason: str, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """From the start, or when it comes after a graph was made."""
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    twin = copy.deepcopy(model)
    del vars(twin)["forward"]
    for seed in range(3 if late else 0):
        model(*inputs(seed))
    before = again.replayed
    SPOILT[reason](model, again)
    with caplog.at_level(logging.WARNING, "tenuto"):
        for seed in range(4):
            given = inputs(seed)
            assert alike(model(*given)["sample"], plain(twin, given))
    said = [r.getMessage() for r in caplog.records if "without CUDA graphs" in r.getMessage()]
    assert len(said) == 1 and reason in said[0] and "\n" not in said[0]
    assert again.captured == late and call.graphs is not None and call.graphs.reason
    assert again.replayed <= before + 1 and not call.graphs.known


@torch.no_grad()
def test_when_a_hook_is_gone_graphs_are_made_again() -> None:
    right = Right(tiny.randomized(Denoiser()))
    hook = right.model.one.register_forward_hook(lambda *args: None)  # type: ignore[union-attr]
    assert right(3) and right.again.captured == 0 and right.graphs.reason
    hook.remove()
    assert right(3) and right.again.captured == 1 and right.graphs.reason is None


@torch.no_grad()
def test_who_counts_operations_sees_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    right = Right(tiny.randomized(Denoiser()))
    assert right(3)
    with FlopCounterMode(display=False) as counted:
        right.model(*inputs(0))
    assert counted.get_total_flops() > 0
    calls: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *args: calls.append(m))
    right.model(*inputs(0))
    hook.remove()
    assert right.model.one in calls


@torch.no_grad()
def test_an_argument_of_an_unknown_class_is_not_captured() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    sample, time, extra = inputs(0)
    for _ in range(3):
        model(sample, time, extra | {"cache": object()})
    assert again.captured == 0 and call.graphs is not None
    assert "has a object" in str(call.graphs.reason)


def test_gradients_are_not_captured() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    for seed in range(3):
        assert model(*inputs(seed))["sample"].requires_grad
    assert again.captured == 0 and call.graphs is not None and call.graphs.reason is None


@torch.no_grad()
def test_a_copy_captures_for_itself() -> None:
    model = tiny.randomized(Denoiser())
    call, _ = captured(model)
    for seed in range(3):
        model(*inputs(seed))
    twin = copy.deepcopy(model)
    own = twin.forward.__self__.call.graphs  # type: ignore[union-attr]
    assert own is not call.graphs and not own.known and own.denoiser is twin
    assert alike(twin(*inputs(9))["sample"], plain(model, inputs(9)))


@torch.no_grad()
def test_a_copy_of_what_must_not_be_captured_is_not() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    call.prepare([object()])  # a cache policy that decides while it runs
    twin = copy.deepcopy(model)
    for seed in range(3):
        twin(*inputs(seed))
    own = twin.forward.__self__.call.graphs  # type: ignore[union-attr]
    assert again.captured == 0 and own.final and "cache policy" in own.reason


def test_what_may_be_asked_for() -> None:
    pipe = tiny.flux()
    with pytest.raises(TenutoError, match="Unknown graphs='never'"):
        tn.attach(pipe, tn.schemes.W8A8, graphs="never")
    if not torch.cuda.is_available():
        with pytest.raises(TenutoError, match="need a GPU"):
            tn.attach(pipe, tn.schemes.W8A8, graphs=True)
    tn.attach(pipe, tn.schemes.W8A8).detach()


@torch.no_grad()
def test_layers_choose_for_calls_as_they_will_run() -> None:
    """What is fastest in a graph may be slowest where each of its kernels waits for Python."""
    model = tiny.randomized(Denoiser())
    base = nn.Linear(4, 4)
    weight = RoundToNearest().weight(base.weight, schemes.W8A8.weight)
    modes = [chooser_for(Mode(False, captured)) for captured in (False, True)]
    model.one.add_module("of_ours", QLinear(base, weight, schemes.W8A8, Clock((0,)),
                                            wanted="auto", chooser=modes[1]))  # fmt: skip
    other = QLinear(base, weight, schemes.W8A8, Clock((0,)), wanted="auto", chooser=own_choice)
    model.two.add_module("of_the_users_choice", other)
    graphs = Graphs(model, capture=lambda _: Recorded(), device="cpu")
    call = DenoiserCall(graphs, None, model)
    override_(model, call)
    layer: Any = model.one.of_ours
    layer(torch.randn(2, 4))
    model(*inputs(0))
    assert layer.chooser is modes[1] and layer.choices
    graphs.off("something moves")
    model(*inputs(1))
    assert layer.chooser is modes[0] and not layer.choices
    assert other.chooser is own_choice
    graphs.reason = None
    model(*inputs(2))
    assert layer.chooser is modes[1]


def own_choice(kind: Any, runs: Any) -> str:
    return "int8"
