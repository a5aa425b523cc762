"""A user's own description of a model: remembered for the module, found wherever it is described.

It is kept beside the module, not in it: the module is as it was, and what is remembered goes with
it. A `private_copy` is described like its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import ModelError
from .backbone import Backbone, has
from .parts import denoiser_of

Describe = Backbone | Callable[[nn.Module], Backbone]

_known: WeakKeyDictionary[nn.Module, Backbone] = WeakKeyDictionary()


def describing(model: Any, describe: Describe | None) -> None:
    """Let `describe` say what the denoiser of `model`, or this module, is made of from now on.

    describe: a Backbone, or a function that gives the one of a module. None changes nothing; what
    was said last counts. ModelError if it is none, or names what the module does not have.
    """
    if describe is None:
        return
    module = denoiser_of(model)
    found: Any = describe if isinstance(describe, Backbone) else None
    if found is None:
        if not callable(describe):
            said = f"not a {type(describe).__name__}"
            raise ModelError(f"`describe` takes a Backbone or a function that gives one, {said}.")
        found = describe(module)
    if not isinstance(found, Backbone):
        said = type(found).__name__
        raise ModelError(f"`describe` is to give a tenuto.model.Backbone, and it gave a {said}.")
    complaint = next(_wrong(module, found), None)
    if complaint is not None:
        raise ModelError(f"The description of {type(module).__name__} {complaint}.")
    _known[module] = found


def own_family(module: nn.Module) -> Backbone | None:
    """What was said of `module`, if anything was."""
    return _known.get(module)


def described_like(module: nn.Module, original: nn.Module) -> None:
    """Take over what was said of `original`, of which `module` is a copy."""
    if original in _known:
        _known[module] = _known[original]


def _wrong(module: nn.Module, found: Backbone) -> Iterator[str]:
    """What cannot be in a description of `module`."""
    if not found.blocks:
        yield "names no block"
    names = [*found.blocks, *(branch.name for branch in found.branches), *found.temporal]
    names += [name for subset in found.subsets for name in subset.linears]
    yield from (f"names {name}, which it does not have" for name in names if not has(module, name))
    for branch in found.branches:
        if branch.block not in found.blocks:
            yield f"has a branch {branch.name} in {branch.block}, which is none of its blocks"
