"""What a layer of a block sees on recorded inputs, as second moments.

A Linear sees rows x (R, K); a Conv2d sees its patches, K = (in / groups) x kh x kw, one group at a
time. All that a least-squares fit of the weight needs is A = x^T x and B = y^T x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import Leave, tensors_in, watched
from .bank import Bank
from .compensation import gram_of, mirrored

CHUNK = 32  # rows of the bank in one call of the block
TRIED = 4  # chunks in which a layer must have been called


def inputs_seen(
    block: nn.Module, names: Sequence[str], bank: Bank, rows: Tensor, device: Any
) -> Iterator[dict[str, Tensor]]:
    """name -> the input of that layer, as it came, for `rows` of the bank, a chunk at a time.

    The first chunk tells how often the layers are called; others are left after the last call.
    A layer that a chunk does not call (an expert) is not in it. Tokens that do not count are zero.
    """
    yield from map(InputsSeen(block, names, bank, rows, device), bank.parts(rows, CHUNK))


def seen_gram(block: nn.Module, name: str, bank: Bank, rows: Tensor, device: Any) -> Tensor | None:
    """A = x^T x (G, K, K) in fp32 of what the layer `name` gets; None where it was not called."""
    layer, found = block.get_submodule(name), None
    for seen in inputs_seen(block, [name], bank, rows, device):
        if name in seen:
            found = gram_of(patches(layer, seen[name]).float(), found)
    return None if found is None else mirrored(found)


def over(gram: Tensor, channel: Tensor) -> Tensor:
    """A (..., K, K) of inputs divided by the scale of each column (K,)."""
    return gram / channel / channel[:, None]


class InputsSeen:
    """`inputs_seen` of a chunk that is asked for, one of `bank.parts(rows, CHUNK)`."""

    def __init__(
        self, block: nn.Module, names: Sequence[str], bank: Bank, rows: Tensor, device: Any
    ) -> None:
        self.block, self.names, self.bank, self.device = block, names, bank, device
        self.start = next(bank.parts(rows, CHUNK))
        self.last: int | None = None  # how often they are called in the first chunk

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The inputs for the rows `index`, by name of the layer."""
        if self.last is None and not torch.equal(index, self.start):
            self._found(self.start)
        return self._found(index)

    def _found(self, index: Tensor) -> dict[str, Tensor]:
        bank, found, calls = self.bank, dict[str, Tensor](), 0
        counted = None if bank.counted is None else bank.counted[index].to(self.device)

        def note(name: str, args: Any, kwargs: Any) -> None:
            nonlocal calls
            x = next(tensors_in((args, kwargs))).detach()
            x, calls = _counted(x, counted), calls + 1
            found[name] = _joined(found[name], x) if name in found else x
            if calls == self.last:
                raise Leave

        args, kwargs = bank.rows(index, self.device)
        if counted is not None and bank.lengths is not None:
            counted = counted[:, : bank.lengths.of(index)]
        with watched(self.block, self.names, before=note), suppress(Leave):
            self.block(*args, **kwargs)
        self.last = calls if self.last is None else self.last
        return found


def _joined(x: Tensor, more: Tensor) -> Tensor:
    """What two calls of a layer get, as one.

    Side by side where they have other lengths: image and text through one feed-forward.
    """
    return torch.cat((x, more), 0 if x.shape[1:] == more.shape[1:] else 1)


def _counted(x: Tensor, counted: Tensor | None) -> Tensor:
    """x (B, L, K) with zeros where `counted` (B, L) is 0; other shapes as they are."""
    if counted is None or x.shape[:-1] != counted.shape:
        return x
    return x * counted[..., None].to(x.dtype)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as rows that its flattened weight multiplies: (groups, R, K)."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)[None]
    assert not isinstance(layer.padding, str)
    cut = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, gK, L)
    return cut.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def shared_inputs(
    block: nn.Module, names: Sequence[str], bank: Bank, device: Any
) -> list[list[str]]:
    """The layers `names` in the order in which they run, those with the same input together.

    A layer that the block does not call is left out. One row tells, or as many as it takes until
    each was called: an expert gets some tokens only.
    """
    order: list[tuple[Tensor, str]] = []

    def note(name: str, args: Any, kwargs: Any) -> None:
        order.append((next(tensors_in((args, kwargs))), name))

    several = torch.arange(1, min(len(bank), TRIED * CHUNK))
    for index in (torch.arange(1), *bank.parts(several, CHUNK)):
        args, kwargs = bank.rows(index, device)
        with watched(block, names, before=note):
            block(*args, **kwargs)
        if {name for _, name in order} == set(names):
            break
    groups: list[list[str]] = []
    last: Tensor | None = None
    for x, name in order:
        if x is last and type(block.get_submodule(name)) is nn.Linear:
            groups[-1].append(name)
        elif all(name not in group for group in groups):
            groups.append([name])
            last = x
    return groups
