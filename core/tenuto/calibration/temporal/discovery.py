"""`discover`: which modules of a denoiser depend on the timestep alone, in three runs.

Two runs at one timestep with every other input changed, one at another timestep: time-only is
what is equal in the first two and differs in the third. (Two runs alone would also claim what
depends on nothing but the guidance or the image's size.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model import Signature, device_and_dtype, frozen, map_leaves, tensors_in, watched
from ...sampling import Call
from ..replay import arguments


@torch.no_grad()
def discover(denoiser: nn.Module, call: Call) -> tuple[str, ...]:
    """The largest modules with weights that depend on the timestep alone, in execution order.

    `call` is one recorded call. Equal means equal bit by bit. A module is not listed if one that
    holds it is, if it has no weights, or if one call of the denoiser runs it with several results.
    """
    device, _ = device_and_dtype(denoiser)
    facts = Signature(denoiser)
    inputs = arguments(denoiser, call, device)
    timestep = facts.timestep(inputs)
    name = next(n for n, value in inputs.items() if value is timestep)
    draw = torch.Generator().manual_seed(0)
    other = {n: v if n == name else changed(v, draw, n) for n, v in inputs.items()}
    later = inputs | {name: _moved(timestep)}
    with frozen(denoiser):
        first, second, third = (_outputs(denoiser, given) for given in (inputs, other, later))
    found = [
        n
        for n, seen in first.items()
        if _same(seen, second.get(n, []))
        and not _same(seen, third.get(n, []))
        and all(_same(s[:1] * len(s), s) for s in (seen, third.get(n, [])))
        and next(denoiser.get_submodule(n).parameters(), None) is not None
    ]
    return tuple(n for n in found if not any(n.startswith(f"{o}.") for o in found))


def changed(value: Any, draw: torch.Generator, name: str = "") -> Any:
    """`value` with every tensor and float in it changed to another one that is valid.

    Floats are sampled anew at their own spread, integers move by one within what was seen, masks
    of 0 and 1 lose or gain their last place, other masks stay.
    """

    def other(leaf: Any, name: str) -> Any:
        if isinstance(leaf, Tensor):
            return _changed(leaf, draw, "mask" in name)
        return leaf * 1.5 + 0.25 if isinstance(leaf, float) else leaf

    return map_leaves(other, value, name)


def _changed(x: Tensor, draw: torch.Generator, mask: bool) -> Tensor:
    if mask or x.dtype is torch.bool:
        binary = bool(((x == 0) | (x == 1)).all())
        if not binary or not x.ndim or x.shape[-1] < 2:
            return x
        last = torch.zeros_like(x, dtype=torch.bool)
        last[..., -1] = True
        return torch.where(last, (x == 0).to(x.dtype), x)
    if not x.numel():
        return x
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=draw).to(x.device)
        spread = x.float().std() if x.numel() > 1 else x.float().abs().max()
        return (x.float() + noise * spread.clamp_min(0.1)).to(x.dtype)
    return torch.where(x > 0, x - 1, torch.ones_like(x))


def _moved(timestep: Any) -> Any:
    """Another timestep of the same kind, nearer to the image."""
    if isinstance(timestep, Tensor):
        low = timestep / 2 if timestep.is_floating_point() else timestep // 2
        return torch.where(timestep == 0, timestep + 1, low.to(timestep.dtype))
    half = timestep // 2 if isinstance(timestep, int) else timestep / 2
    return type(timestep)(half) if timestep else timestep + 1


def _outputs(denoiser: nn.Module, inputs: dict[str, Any]) -> dict[str, list[list[Tensor]]]:
    """The tensors that each submodule returns, call by call, in the order of the first calls."""
    order: dict[str, None] = {}
    found: dict[str, list[list[Tensor]]] = {}

    def enter(name: str, args: Any, kwargs: Any) -> None:
        order.setdefault(name)

    def leave(name: str, args: Any, kwargs: Any, out: Any) -> None:
        found.setdefault(name, []).append([t.clone() for t in tensors_in(out)])

    names = [name for name, _ in denoiser.named_modules() if name]
    with watched(denoiser, names, before=enter, after=leave):
        denoiser(**inputs)
    return {name: found[name] for name in order if any(found.get(name, []))}


def _same(one: Sequence[list[Tensor]], other: Sequence[list[Tensor]]) -> bool:
    """Whether two lists of calls returned the same tensors, bit by bit."""
    if [len(tensors) for tensors in one] != [len(tensors) for tensors in other]:
        return False
    pairs = (p for a, b in zip(one, other, strict=True) for p in zip(a, b, strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
