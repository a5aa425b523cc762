"""What a layer of a block sees on recorded inputs, as second moments.

A Linear sees rows x (R, K); a Conv2d sees its patches, K = (in / groups) x kh x kw, one group at a
time. All that a least-squares fit of the weight needs is A = x^T x and B = y^T x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .replay import Bank

CHUNK = 32  # rows of the bank in one call of the block


def inputs_seen(
    block: nn.Module, names: Sequence[str], bank: Bank, rows: Tensor, device: Any
) -> Iterator[dict[str, Tensor]]:
    """name -> the input of that layer, as it came, for `rows` of the bank, a chunk at a time."""
    with _watched(block, names) as found:
        for index in rows.split(CHUNK):
            args, kwargs = bank.rows(index, device)
            block(*args, **kwargs)
            yield dict(found)
            found.clear()


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

    A layer that the block does not call is left out.
    """
    order: list[tuple[Tensor, str]] = []

    def note(name: str) -> Any:
        return lambda module, args: order.append((args[0], name))

    hooks = [block.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    args, kwargs = bank.rows(torch.arange(1), device)
    try:
        block(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for x, name in order:
        if x is last and type(block.get_submodule(name)) is nn.Linear:
            groups[-1].append(name)
        elif all(name not in group for group in groups):
            groups.append([name])
            last = x
    return groups


@contextmanager
def _watched(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            x = args[0].detach()
            found[name] = torch.cat((found[name], x)) if name in found else x

        return hook

    hooks = [block.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
