"""What is noticed of a model between two calls: new members, other objects, other memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tenuto.runtime.weights_in_place import InPlaceWeights


class Own(nn.Module):
    """Of no class of torch: whatever it gets may count."""

    def forward(self, x: Any) -> Any:
        return x


def model() -> Any:
    return nn.Sequential(nn.Linear(4, 4), Own(), nn.LayerNorm(4), nn.Linear(4, 4))


def moved(found: Any) -> None:
    """As many members as before, the last one in a dict that was empty."""
    bias = found[3]._parameters.pop("bias")
    found[1]._parameters["bias"] = bias


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(4, 4))),
    "a weight elsewhere": lambda m: setattr(m[0].weight, "data", torch.zeros(4, 4)),
    "a buffer where none was": lambda m: m[1].register_buffer("more", torch.zeros(1)),
    "a member moved": moved,
    "a module more": lambda m: m.append(nn.SiLU()),
    "another module": lambda m: m.__setitem__(1, nn.GELU()),
    "another class": lambda m: setattr(m[1], "__class__", nn.SiLU),
    "a setting": lambda m: setattr(m[2], "eps", 0.5),
    "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed(change: str) -> None:
    found = model()
    watch = InPlaceWeights(found, "cpu")
    before = watch.state()
    assert watch.same() and watch.same(placed=True) and watch.latest() == before
    CHANGES[change](found)
    assert not watch.same()
    in_place = watch.latest() is not None  # what a graph reads is where it was
    assert in_place == (change != "a weight elsewhere")
    assert watch.same(placed=True) == (change == "a weight elsewhere"), "objects alone"


def test_values_may_change() -> None:
    found = model()
    watch = InPlaceWeights(found, "cpu")
    watch.state()
    with torch.no_grad():
        found[0].weight.fill_(3)
    assert watch.same()
