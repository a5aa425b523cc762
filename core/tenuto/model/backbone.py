"""What a denoiser is made of, as names: they survive deepcopy, clone, offload and compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .adapters import own_modules


@dataclass(frozen=True)
class Branch:
    """A unit of caching: a module whose output can be reused from an earlier step.

    kind: "attention", "cross-attention", "feed-forward", "resnet" or "block". block: its block.
    """

    name: str
    kind: str
    block: str


@dataclass(frozen=True)
class Subset:
    """Linears that share one input, and the module (if any) an inverse scale folds into."""

    linears: tuple[str, ...]
    fold: str | None = None


@dataclass(frozen=True)
class Backbone:
    """A denoiser described. Names are module paths inside it.

    blocks: in execution order, the units of reconstruction. branches: the units of caching, in
    execution order. temporal: modules that depend on the timestep alone. ends: first and last
    layers, which need more bits than the rest. keep: patterns that stay in full precision.
    """

    family: str
    blocks: tuple[str, ...]
    branches: tuple[Branch, ...]
    subsets: tuple[Subset, ...] = ()
    temporal: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    keep: tuple[str, ...] = field(default=())

    def block_of(self, name: str) -> str | None:
        """The block that holds the module called `name`."""
        return next((b for b in self.blocks if name == b or name.startswith(b + ".")), None)


def layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """(name, module) of every Linear and Conv2d, in definition order."""
    for name, child in own_modules(module):
        if isinstance(child, nn.Linear | nn.Conv2d) and not hasattr(child, "qdata"):
            yield name, child
