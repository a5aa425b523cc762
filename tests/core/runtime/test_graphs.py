"""What is captured, when, and what is kept of it; with a capture that runs its call again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.caching import CacheSchedule, apply_schedule_
from tenuto.errors import TenutoError
from tenuto.model import map_tensors, override_, tensors_in
from tenuto.runtime.denoiser_call import DenoiserCall
from tenuto.runtime.graphs import Graphs, Reads
from tenuto.sampling import Clock
from tests.core import tiny_pipelines as tiny


class Again:
    """As a graph: what was captured is done again, on the same tensors, into the same outputs."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.error: Exception | None = None
        self.cells: list[Any] = []

    def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        self.captured += 1
        given = [cell.given for cell in self.cells]
        out = map_tensors(torch.clone, call())
        made = [cell.made for cell in self.cells]

        def replay() -> None:
            self.replayed += 1
            before = [(cell.given, cell.made) for cell in self.cells]
            for cell, own in zip(self.cells, given, strict=True):
                cell.given = own
            for own, value in zip(tensors_in(out), tensors_in(call()), strict=True):
                own.copy_(value)
            for cell, own, (old, made_before) in zip(self.cells, made, before, strict=True):
                if own is not None:
                    own.copy_(cell.made)
                cell.given, cell.made = old, made_before

        return replay, out


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


def captured(model: nn.Module, **options: Any) -> tuple[DenoiserCall, Again]:
    """The calls of a model, captured on the CPU."""
    again = Again()
    call = DenoiserCall(Graphs(model, capture=again, device="cpu", **options))
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
        assert torch.equal(out["sample"], plain(model, given)) and out["other"][1] == "a"
        outs.append((out["sample"], out["sample"].clone()))
    assert (again.captured, again.replayed) == (1, 4)
    assert all(torch.equal(out, kept) for out, kept in outs), "a replay wrote over an output"


@torch.no_grad()
def test_an_input_that_was_written_to_is_copied_again() -> None:
    model = tiny.randomized(Denoiser())
    captured(model)
    given = inputs(0)
    for _ in range(4):
        assert torch.equal(model(*given)["sample"], plain(model, given))
        given[2]["added"].add_(1.0)


@torch.no_grad()
def test_shapes_dtypes_and_arguments_have_a_graph_each() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    kinds = [inputs(0), inputs(0, rows=3), inputs(0, name="b")]
    for given in kinds * 3:
        assert torch.equal(model(*given)["sample"], plain(model, given))
    assert call.graphs is not None
    assert again.captured == len(call.graphs.known) == 3


@torch.no_grad()
def test_the_graph_used_longest_ago_goes() -> None:
    model = tiny.randomized(Denoiser())
    call, again = captured(model, most=2)
    for rows in (1, 1, 2, 2, 1, 3, 3, 1, 2):
        given = inputs(0, rows)
        assert torch.equal(model(*given)["sample"], plain(model, given))
    assert call.graphs is not None and len(call.graphs.known) == 2
    assert again.captured == 4 and call.graphs.evicted == 2, "that of 2 rows, then it again"


@torch.no_grad()
def test_other_weights_are_another_graph() -> None:
    """A weight elsewhere in memory, a LoRA, its strength: none is read where it was."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.randomized(Denoiser())
    call, again = captured(model)
    assert call.graphs is not None

    def right(seed: int) -> bool:
        given = inputs(seed)
        return torch.equal(model(*given)["sample"], plain(model, given))

    assert right(0) and right(1) and again.captured == 1
    call.graphs.weights.state()
    inner: Any = model.one.inner  # type: ignore[union-attr]
    inner.weight.data = inner.weight.data * 2
    assert right(2) and right(3) and again.captured == 2
    config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    inject_adapter_in_model(config, model, "a")
    assert right(4) and right(5) and again.captured == 3
    model.one.inner.set_scale("a", 0.3)  # type: ignore[union-attr]
    assert right(6) and right(7) and again.captured == 4


@torch.no_grad()
def test_a_packed_weight_is_another_graph() -> None:
    """A move of the model packs every weight anew, elsewhere in memory."""
    pipe = tiny.flux()
    attached = tn.attach(pipe, tn.schemes.W8A8, execution="int8")
    weights = Graphs(pipe.transformer, device="cpu").weights
    before = weights.state()
    assert weights.state() == before
    pipe.transformer.to(torch.float32)
    assert weights.state() != before
    attached.detach()


def scheduled(most: int = 16) -> tuple[nn.Module, Clock, Again]:
    """A model whose first block is computed in every other step, and the second in every third."""
    model = tiny.randomized(Denoiser())
    times = tuple(float(t) for t in range(12, 0, -1))
    rows = torch.tensor([[i % 2 == 0, i % 3 == 0] for i in range(12)])
    clock = Clock(times)
    call, again = captured(model, most=most)
    cells = apply_schedule_(model, CacheSchedule(rows, times, ("one", "two")), clock)
    again.cells = [cell.call for cell in cells]
    call.prepare(again.cells)
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
                assert torch.equal(model(*given)["sample"], expected), (run, place, streams)
    assert again.captured == 4 and again.replayed > 20


@torch.no_grad()
def test_a_clock_reads_by_a_graph() -> None:
    """The same steps, streams and runs as without one, with a condition that changes in place."""
    plain_clock, clock = Clock((9.0, 5.0, 1.0)), Clock((9.0, 5.0, 1.0))
    again = Again()
    clock.reads = Reads(again, "cpu")
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


@torch.no_grad()
def test_what_cannot_be_captured_runs_as_it_is_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for reason, spoil in {
        "hooks of another library": lambda model, again: vars(model).update(_hf_hook=object()),
        "operation not permitted": lambda model, again: setattr(
            again, "error", RuntimeError("CUDA error: operation not permitted\nmore")
        ),
    }.items():
        model = tiny.randomized(Denoiser())
        call, again = captured(model)
        spoil(model, again)
        with caplog.at_level(logging.WARNING, "tenuto"):
            for seed in range(4):
                given = inputs(seed)
                assert torch.equal(model(*given)["sample"], plain(model, given))
        said = [r.getMessage() for r in caplog.records if "without CUDA graphs" in r.getMessage()]
        assert len(said) == 1 and reason in said[0] and "\n" not in said[0]
        assert again.captured == 0 and call.graphs is not None and call.graphs.reason
        caplog.clear()


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
    own = twin.forward.call.graphs  # type: ignore[union-attr]
    assert own is not call.graphs and not own.known and own.denoiser is twin
    assert torch.equal(twin(*inputs(9))["sample"], plain(model, inputs(9)))


def test_what_may_be_asked_for() -> None:
    pipe = tiny.flux()
    with pytest.raises(TenutoError, match="Unknown graphs='never'"):
        tn.attach(pipe, tn.schemes.W8A8, graphs="never")
    if not torch.cuda.is_available():
        with pytest.raises(TenutoError, match="need a GPU"):
            tn.attach(pipe, tn.schemes.W8A8, graphs=True)
    tn.attach(pipe, tn.schemes.W8A8).detach()
