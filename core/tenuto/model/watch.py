"""Watch modules of a model while it runs: hooks for the time of a context, then out again.

    with watched(model, names, before=note), suppress(Leave):
        model(*args, **kwargs)

A callback that has seen enough raises `Leave`, which ends the call of the model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

Before = Callable[[str, tuple[Any, ...], dict[str, Any]], object]
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], object]


Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(call: Function) -> Function:
    """`call`, which torch's compiler leaves out of its graphs; it is not imported for that.

    It takes a second to import, and models that are not compiled do without.
    """

    disabled: list[Callable[..., Any]] = []  # made once: it costs as much as some calls

    @functools.wraps(call)
    def eager(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return call(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(call))
        return disabled[0](*args, **kwargs)

    vars(eager)["_torchdynamo_disable"] = True  # what torch's own decorator writes
    return eager  # type: ignore[return-value]


class Leave(Exception):
    """Raised in a callback to leave the call of the model; suppress it where that is made."""


@contextmanager
def watched(
    model: nn.Module,
    names: Iterable[str] = ("",),
    *,
    before: Before | None = None,
    after: After | None = None,
    first: bool = False,
) -> Iterator[None]:
    """Call before(name, args, kwargs) and after(name, args, kwargs, out) for named submodules.

    "" is `model` itself. What they return is ignored: nothing that the model computes changes.
    Hooks that were there run before those of this context, of which the inner one of two runs
    last; with `first`, `before` runs in front of all others. AttributeError, with every hook out
    again, if there is no such submodule.
    """
    hooks: list[Any] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            if before is not None:
                hook = _before(before, name)
                hooks.append(
                    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
                )
            if after is not None:
                hooks.append(module.register_forward_hook(_after(after, name), with_kwargs=True))
        yield
    finally:
        while hooks:
            hooks.pop().remove()


def _before(call: Before, name: str) -> Callable[..., None]:
    @outside_graphs
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(name, args, kwargs)

    return hook


def _after(call: After, name: str) -> Callable[..., None]:
    @outside_graphs
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call(name, args, kwargs, out)

    return hook
