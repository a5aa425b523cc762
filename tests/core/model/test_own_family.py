"""A model that its user describes: said once, found by every function, in copies too."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.errors import ModelError
from tenuto.model import Backbone, Branch, describe, describing, own_family, private_copy


class Odd(nn.Module):
    """(x (B, 16), timestep (B,)) -> (B, 16): two parts that no list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = nn.Linear(1, 16)
        self.first = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.second = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.first(x + self.clock(timestep[:, None] / 1000))
        return x + self.second(x)


def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    """Ten steps; images of 2 x 2 pixels in three channels."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, generator=draw)
    for t in range(900, -1, -100):
        x = x - 0.1 * denoiser(x, torch.full((batch,), float(t)))
    return x[:, :12].reshape(batch, 3, 2, 2).clamp(-1, 1)


def odd(module: nn.Module) -> Backbone:
    return Backbone(
        "odd", ("first", "second"),
        (Branch("first", "block", "first"), Branch("second", "block", "second")),
        temporal=("clock",), ends=("clock",),
    )  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


def test_every_function_takes_a_description(model: nn.Module, tmp_path: Path) -> None:
    """Said to the first, known to the others; a model loaded later needs it once more."""
    trajectory = tn.record(model, sample=sample, batch=2, runs=2)
    with pytest.raises(ModelError, match="no list of blocks"):
        tn.quantize(model, "w8a8", trajectory)
    made = tn.quantize(model, "w4a8", trajectory, describe=odd, work=tmp_path / "work")
    assert made.header["family"] == "odd"
    assert set(made.header["temporal"]["modules"]) == {"clock"}
    made |= tn.train_router(model, trajectory, reuse=0.3, artifact=made, iterations=1)
    assert made.header["route"]["branches"] == ["first", "second"]
    later = copy.deepcopy(model)
    assert own_family(later) is None
    with tn.attach(later, made, describe=odd(later)) as attached:
        sample(later, 0, 1)
        assert sum(reused for _, reused in attached.counts().values()) > 0
    other: Any = Odd().eval()
    other.load_state_dict(model.state_dict())
    found = tn.compare(other, made, sample=sample, count=2, batch=1, describe=odd)
    assert found.reuse_ratio and found.count == 2


def test_it_is_remembered_for_the_module_alone(model: nn.Module) -> None:
    """Nothing is put into the module; a private copy is described like it."""
    before = dict(vars(model))
    describing(model, odd)
    assert vars(model) == before and describe(model).family == "odd"
    assert describe(private_copy(model)).family == "odd"
    describing(model, None)
    assert describe(model).family == "odd"
    with pytest.raises(ModelError):
        describe(Odd())


def test_what_is_remembered_goes_with_the_module() -> None:
    module = Odd()
    describing(module, odd)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (7, "not a int"), (lambda m: None, "gave a NoneType"), (Backbone("x", (), ()), "no block"),
        (Backbone("x", ("third",), ()), "names third"),
        (Backbone("x", ("first",), (), temporal=("time",)), "names time"),
        (Backbone("x", ("first",), (Branch("second", "block", "second"),)), "none of its blocks"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(
    model: nn.Module, description: Any, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        describing(model, description)
    assert own_family(model) is None
