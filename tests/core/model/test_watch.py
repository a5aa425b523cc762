"""Hooks for the time of a context: what they see, their order, and that none is left behind."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from tenuto.model import Leave, watched


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.other(self.one(x)) * scale


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Two().requires_grad_(False)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_calls_are_seen_and_nothing_changes(model: nn.Module) -> None:
    x, seen = torch.ones(1, 2), []
    wanted = model(x, scale=2.0)

    def before(name: str, args: Any, kwargs: Any) -> str:
        seen.append((f">{name}", len(args), kwargs))
        return "not an input"

    def after(name: str, args: Any, kwargs: Any, out: Any) -> str:
        seen.append((f"<{name}", len(args), kwargs))
        return "not an output"

    with watched(model, ("other", "", "one"), before=before, after=after):
        assert hooks_of(model) == 6
        assert torch.equal(model(x, scale=2.0), wanted)
    assert hooks_of(model) == 0
    whole, inner = {"scale": 2.0}, {}
    assert seen == [
        (">", 1, whole), (">one", 1, inner), ("<one", 1, inner), (">other", 1, inner),
        ("<other", 1, inner), ("<", 1, whole),
    ]  # fmt: skip


def test_order_is_as_documented(model: nn.Module) -> None:
    seen: list[str] = []

    def noting(word: str) -> Any:
        return lambda *_: seen.append(word)

    own = model.register_forward_pre_hook(noting("own"))
    with (
        watched(model, before=noting("outer")),
        watched(model, before=noting("inner")),
        watched(model, before=noting("first"), first=True),
    ):
        model(torch.ones(1, 2))
    assert seen == ["first", "own", "outer", "inner"]
    assert list(model._forward_pre_hooks) == [own.id]


def test_a_call_can_be_left(model: nn.Module) -> None:
    seen: list[str] = []

    def note(name: str, args: Any, kwargs: Any) -> None:
        seen.append(name)
        raise Leave

    with watched(model, ["one", "other"], before=note):
        with suppress(Leave):
            model(torch.ones(1, 2))
        with suppress(Leave):
            model(torch.ones(1, 2))
    assert seen == ["one", "one"]
    assert hooks_of(model) == 0


@pytest.mark.parametrize("inside", [True, False], ids=["in the context", "in a callback"])
def test_hooks_are_out_after_an_error(model: nn.Module, inside: bool) -> None:
    def fail(*_: Any) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), watched(model, ["one"], before=fail):
        if inside:
            fail()
        model(torch.ones(1, 2))
    assert hooks_of(model) == 0


def test_a_missing_submodule_leaves_no_hook(model: nn.Module) -> None:
    with (
        pytest.raises(AttributeError, match="third"),
        watched(model, ["one", "third"], before=lambda *_: None),
    ):
        pytest.fail("entered")
    assert hooks_of(model) == 0
