"""A denoiser's arguments by name, however they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tenuto.model import Signature


class Plain(nn.Module):
    def forward(self, sample: Any, timestep: Any, prompt: Any = None, *, mask: Any = None) -> None:
        pass


class Open(nn.Module):
    def forward(self, sample: Any, timestep: Any, *more: Any, scale: Any = 1, **rest: Any) -> None:
        pass


@pytest.mark.parametrize("args", [(), ("x",), ("x", 9), ("x", 9, "p")])
def test_by_place_or_by_name(args: tuple[Any, ...]) -> None:
    every = {"mask": "m", "prompt": "p", "timestep": 9, "sample": "x"}
    named = {name: every[name] for name in list(every)[: 4 - len(args)]}
    found = Signature(Plain()).inputs(args, named)
    assert list(found.items()) == [("sample", "x"), ("timestep", 9), ("prompt", "p"), ("mask", "m")]


def test_defaults_are_left_out() -> None:
    assert Signature(Plain()).inputs(("x",), {"timestep": 9}) == {"sample": "x", "timestep": 9}


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("x",), {}),  # no timestep
        (("x", 9), {"prompts": "p"}),
        (("x", 9), {"timestep": 9}),
        (("x", 9, "p", "m"), {}),  # the mask has no place
    ],
)
def test_what_the_denoiser_does_not_take(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Signature(Plain()).inputs(args, named)


def test_further_arguments() -> None:
    found = Signature(Open()).inputs(("x", 9, "more"), {"control": "c"})
    assert found == {"sample": "x", "timestep": 9, "control": "c"}


class Media(nn.Module):
    """As Cosmos 3: each medium has tokens and timesteps, after the text's."""

    def forward(
        self,
        input_ids: Any,
        vision_tokens: Any,
        vision_timesteps: Any,
        sound_tokens: Any = None,
        sound_timesteps: Any = None,
    ) -> None:
        pass  # fmt: skip


def test_the_pictures_of_several_media() -> None:
    facts, text, pictures = Signature(Media()), torch.arange(3), [torch.zeros(2, 4)]
    found = facts.inputs((text, pictures, torch.full((2,), 700.0)), {})
    assert facts.sample(found) is pictures and facts.step(found) == 700.0
    (condition,) = facts.conditions(found)
    assert condition is text
    assert facts.moves("vision_tokens") and not facts.moves("input_ids")
