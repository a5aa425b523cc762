"""What walks through nested inputs and outputs: every container that a model uses survives it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from tenuto.caching import CacheSchedule, Slot, apply_schedule_
from tenuto.calibration.bank import banked, cut_out
from tenuto.calibration.router.student import usable
from tenuto.calibration.temporal.discovery import changed
from tenuto.calibration.temporal.time_path import _fed, _first_row
from tenuto.measure.bf16 import bf16_copy
from tenuto.model import map_leaves, map_tensors, tensors_in
from tenuto.resume import Work
from tenuto.sampling import Clock, calls_of, to_device
from tenuto.sampling.encoder_calls import _rows
from tenuto.sampling.plain import unpacked
from tenuto.sampling.record import recording
from tenuto.sampling.storage import keep
from tenuto.sampling.trajectory import Call, Trajectory


class Pair(NamedTuple):
    x: Any
    y: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Any
    name: str = "frozen"


@dataclass
class Late:
    """A field that `dataclasses.replace` refuses, and a check that must not run again."""

    x: Any
    y: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        assert self.y is None
        self.y = self.x


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"x": x, "n": 3},
    "ordered": lambda x: OrderedDict(x=x, n=None),
    "list": lambda x: [x, "text"],
    "tuple": lambda x: (x, None),
    "named tuple": Pair,
    "frozen dataclass": Frozen,
    "late dataclass": Late,
    "of transformers": lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, x)),
    "of diffusers": lambda x: Transformer2DModelOutput(sample=x),
    "nested": lambda x: Pair([Frozen({"a": Pair(x)})], BaseModelOutput(last_hidden_state=x)),
}


@pytest.fixture(params=list(WRAPS))
def wrap(request: pytest.FixtureRequest) -> Callable[[Tensor], Any]:
    return WRAPS[request.param]


def same(found: Any, wanted: Any) -> None:
    """Equal in types, leaves and tensors, and by attribute where there are attributes."""
    trees: list[list[tuple[str, Any]]] = []
    for value in (found, wanted):
        trees.append([])
        map_leaves(lambda leaf, name, seen=trees[-1]: seen.append((name, leaf)), value)
    assert [name for name, _ in trees[0]] == [name for name, _ in trees[1]]
    for (_, one), (_, other) in zip(*trees, strict=True):
        if isinstance(other, Tensor):
            assert torch.equal(one, other) and one.dtype == other.dtype
        else:
            assert one == other
    assert type(found) is type(wanted)
    for name in vars(wanted) if hasattr(wanted, "__dict__") else ():
        if isinstance(getattr(wanted, name), Tensor) and not isinstance(wanted, Tensor):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(0))


def test_map_tensors(wrap: Callable[..., Any], x: Tensor) -> None:
    value = wrap(x)
    same(map_tensors(lambda t: t * 2, value), wrap(x * 2))
    same(value, wrap(x))
    same(map_tensors(torch.add, value, wrap(x * 2)), wrap(x + x * 2))
    assert all(t is x for t in tensors_in(value)) and list(tensors_in(value))


def test_what_is_no_container_stays(x: Tensor) -> None:
    plain = Frozen(2.0)
    for leaf in ("text", None, 3, range(2), {1, 2}, nn.Identity(), Frozen, plain):
        assert map_tensors(torch.neg, leaf) is leaf
    assert map_tensors(torch.neg, MappingProxyType({"x": x}))["x"].equal(-x)
    most = map_tensors(torch.neg, torch.max(x, 0))
    assert isinstance(most, torch.return_types.max) and most.values.equal(-x.amax(0))


def test_several_values_fit_or_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="argument"):
        map_tensors(torch.add, (x, x), (x,))


def test_names_lead_to_a_leaf(x: Tensor) -> None:
    names = []
    value = {"a": [Pair(x, Frozen(x))], "b": x}
    map_leaves(lambda leaf, name: names.append(name), value, "top")
    assert names == ["top.a.x", "top.a.y.x", "top.a.y.name", "top.b"]


class Told(nn.Module):
    """A denoiser and a branch in one: it returns what it is given, in the same container."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[Any] = []

    def forward(self, sample: Any, timestep: Any = 0.0, extra: Any = None) -> Any:
        self.seen.append(extra)
        return map_tensors(lambda t: t * self.scale, extra)


def test_recording_keeps_the_containers(wrap: Callable[..., Any], x: Tensor) -> None:
    model, value, calls = Told(), wrap(x.clone()), list[Call]()
    with torch.no_grad(), recording(model, calls):
        model(x, torch.tensor([5.0]), value)
    next(tensors_in(value)).zero_()  # what was recorded is a copy
    same(calls[0].inputs["extra"], wrap(x))
    same(to_device(wrap(x.half()), "cpu", torch.float64), wrap(x.half().double()))


def test_a_recording_comes_back_as_it_was_or_not_at_all(
    wrap: Callable[..., Any], x: Tensor
) -> None:
    value, work = wrap(x), Work(None, {})
    plain = type(value) in (Tensor, dict, list, tuple)
    trajectory = Trajectory((1.0,), [Call(0, 0, 1.0, {"extra": value})], 0, 1, 1, 1)
    assert keep(work, trajectory) is plain
    if plain:
        kept = work.load("trajectory")
        assert kept is not None
        inputs = json.loads(bytes(kept["about"].tolist()))["calls"][0][3]
        same(unpacked(inputs, kept)["extra"], value)


def test_a_bank_gives_back_the_containers(wrap: Callable[..., Any], x: Tensor) -> None:
    calls = [cut_out(((x + row,), {"extra": wrap(x + row)}), row) for row in range(2)]
    bank = banked("a block", calls)
    assert len(bank) == 6
    args, kwargs = bank.rows(torch.tensor([1, 4]), "cpu")
    wanted = torch.cat((x, x + 1))[[1, 4]]
    assert torch.equal(args[0], wanted)
    same(kwargs["extra"], wrap(wanted))


def test_the_time_path_takes_the_containers(wrap: Callable[..., Any], x: Tensor) -> None:
    args, kwargs = _first_row((wrap(x),), {"extra": wrap(x)})
    same(args[0], wrap(x[:1]))
    same(kwargs["extra"], wrap(x[:1]))
    args, kwargs = _fed((), {"extra": [wrap(x)], "other": x.clone()}, x + 1)
    assert torch.equal(next(tensors_in(kwargs)), x + 1) and torch.equal(kwargs["other"], x)


def test_discovery_changes_what_is_inside(wrap: Callable[..., Any], x: Tensor) -> None:
    value = changed(wrap(x), torch.Generator().manual_seed(0))
    assert type(value) is type(wrap(x))
    assert not any(torch.equal(t, x) for t in tensors_in(value))
    mask = torch.ones(1, 4)
    by_name = changed(Pair({"mask": mask}), torch.Generator().manual_seed(0))
    assert by_name.x["mask"].tolist() == [[1, 1, 1, 0]], "a mask is known by its name"


def test_a_router_trains_on_the_containers(wrap: Callable[..., Any], x: Tensor) -> None:
    with torch.inference_mode():
        value = wrap(x.clone())
    with torch.inference_mode(False):
        found = usable(value)
    assert not any(t.is_inference() for t in tensors_in(found))
    same(found, wrap(x))


def test_a_branch_returns_its_containers(wrap: Callable[..., Any], x: Tensor) -> None:
    times = (3.0, 2.0)
    model = nn.ModuleDict({"branch": Told()})
    schedule = CacheSchedule(torch.tensor([[True], [False]]), times, ("branch",))
    clock = Clock(times)
    for patch in apply_schedule_(model, schedule, clock):
        clock.tick(3.0, (0, 1, 2), "cpu")
        with torch.no_grad():
            model["branch"](x, 0.0, wrap(x))
            clock.tick(2.0, (2, 0), "cpu")
            same(model["branch"](x[:2], 0.0, wrap(x * 9)), wrap(x[[2, 0]]))
        patch.remove()


def test_a_slot_is_cut_off_its_graph(wrap: Callable[..., Any], x: Tensor) -> None:
    clock, slot = Clock((1.0,)), Slot()
    clock.tick(1.0, (0, 1, 2), "cpu")
    slot.store(clock, (2,), wrap(x.clone().requires_grad_()))
    slot.detach_()
    found = slot.find(clock, (2,))
    assert not any(t.requires_grad for t in tensors_in(found))
    same(found, wrap(x))


def test_a_bf16_copy_takes_and_gives_the_containers(wrap: Callable[..., Any], x: Tensor) -> None:
    with torch.no_grad():
        twin = bf16_copy(Told())
        found = twin(x, torch.tensor([5.0]), wrap(x))
    assert all(t.dtype is torch.bfloat16 for t in tensors_in(twin.seen[0]))  # type: ignore[arg-type]
    same(found, wrap(x.bfloat16().float()))


def test_an_encoders_rows_are_split_and_joined(wrap: Callable[..., Any], x: Tensor) -> None:
    inputs = {"input_ids": torch.arange(6).view(3, 2), "extra": wrap(x)}
    rows = list(_rows(inputs))
    assert len(rows) == 3
    same(rows[1]["extra"], wrap(x[1:2]))
    same(calls_of(rows, 2)[0].inputs["extra"], wrap(x[:2]))
