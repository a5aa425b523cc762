"""What a denoiser is made of, as names: they survive deepcopy, clone, offload and compile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from .adapters import own_modules


@dataclass(frozen=True)
class Branch:
    """A unit of caching: a module whose output can be reused from an earlier step.

    kind: "attention", "cross-attention", "feed-forward", "resnet" or "block". block: its block.
    Of every denoiser the whole call is one too (`WHOLE`), whatever it is made of.
    """

    name: str
    kind: str
    block: str

    @property
    def whole(self) -> bool:
        """Whether its output is all that goes on from there, a shortcut included.

        Holding it makes all that it was computed from dead work; others are added to a stream.
        """
        return self.kind in ("resnet", "block", "whole call")


WHOLE = Branch("", "whole call", "")  # of no Backbone's branches: a schedule names it alone


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
    prompt: modules that see nothing of the sample and the timestep, called in the same order at
    every step.
    """

    family: str
    blocks: tuple[str, ...]
    branches: tuple[Branch, ...]
    subsets: tuple[Subset, ...] = ()
    temporal: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    keep: tuple[str, ...] = field(default=())
    prompt: tuple[str, ...] = ()

    def block_of(self, name: str) -> str | None:
        """The block that holds the module called `name`."""
        return next((b for b in self.blocks if name == b or name.startswith(b + ".")), None)


# Hosts' classes in these modules have a forward of their own: torch's, with the weight cast first.
CASTING = ("comfy.ops", "backend.operations", "ldm_patched.modules.ops", "diffusers.models.lora")


def layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """(name, module) of every Linear and Conv2d that computes as torch's, in definition order.

    A class with a forward of its own (standardised weights, say) is left out: nothing here knows
    what it computes. Those of hosts that cast the weight first are known, by their module.
    """
    for name, child in own_modules(module):
        if isinstance(child, nn.Linear | nn.Conv2d) and computes_as_torch(child):
            yield name, child


def own_kinds(module: nn.Module) -> dict[str, int]:
    """How many Linear and Conv2d of each class have a forward of their own: they stay in float."""
    found = (child for _, child in own_modules(module) if isinstance(child, nn.Linear | nn.Conv2d))
    return dict(Counter(type(m).__name__ for m in found if not computes_as_torch(m)))


def computes_as_torch(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether the class of `layer` has torch's own forward, or that of a host that casts first."""
    own: type[nn.Module] = type(layer)
    if str(getattr(own.forward, "__module__", "")).startswith(CASTING):
        return True
    names = ("forward",) if isinstance(layer, nn.Linear) else ("forward", "_conv_forward")
    torchs = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    return all(getattr(own, name) is getattr(torchs, name) for name in names)


# --- what family files are written with -----------------------------------------------------------


def is_large(module: nn.Module) -> bool:
    """Whether it is more than one layer: two weights of more than one dimension, or more."""
    return sum(1 for parameter in module.parameters() if parameter.ndim > 1) > 1


def members(module: nn.Module, *lists: str) -> tuple[str, ...]:
    """The names of what is in the lists of modules called `lists`, in this order."""
    found = ((name, module.get_submodule(name)) for name in lists if has(module, name))
    return tuple(f"{name}.{i}" for name, some in found for i in range(len(some)))  # type: ignore[arg-type]


def has(module: nn.Module, name: str) -> bool:
    """Whether `module` has a submodule `name`."""
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def present(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that are submodules."""
    return tuple(name for name in names if has(module, name))


def parts(module: nn.Module, blocks: Iterable[str], kinds: Mapping[str, str]) -> tuple[Branch, ...]:
    """A branch for every part that a block has. kinds: part -> kind, in execution order."""
    return tuple(
        Branch(f"{block}.{part}", kind, block)
        for block in blocks
        for part, kind in kinds.items()
        if has(module, f"{block}.{part}")
    )


def whole(blocks: Iterable[str]) -> tuple[Branch, ...]:
    """Each block as its own branch."""
    return tuple(Branch(block, "block", block) for block in blocks)


def sharing(module: nn.Module, blocks: Iterable[str], *groups: Iterable[str]) -> tuple[Subset, ...]:
    """In every block those of a group of linears that it has; two or more share their input."""
    found = (
        present(module, (f"{block}.{name}" for name in group))
        for block in blocks
        for group in groups
    )
    return tuple(Subset(names) for names in found if len(names) > 1)
