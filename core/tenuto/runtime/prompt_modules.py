"""Modules that see nothing but the prompt, whole: FLUX.3's text blocks, refiners of a context.

A family says which (`Backbone.prompt`). What such a module gets is made anew at every call, so it
is known by the arguments of the denoiser instead: all of them but the sample and the timestep.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..model import Backbone, adapted, own_modules, tensors_in
from ..sampling import Clock
from .computed_once import Answer, Cell, Once
from .kernels.quantize_input import compiling
from .same_memory import place_of, plain, state_of, unusual, versions
from .temporal_table import TemporalTable
from .weights_in_place import PLAIN

KEYS = ("to_k", "to_v", "add_k_proj", "add_v_proj")  # of cross-attention, as diffusers names them
TEXT = re.compile(r"caption|context|text|txt|cap_|prompt|encoder|cond_embed")
NORMS = ("LayerNorm", "RMSNorm", "FP32LayerNorm")
KINDS = (nn.Linear, nn.LayerNorm, nn.GELU, nn.SiLU)


class Whole(Cell):
    """The forward of a module of the prompt, which answers once for each call that it gets.

    Not one round which an adapter lies somewhere: its strength is a number that nobody sees change.
    """

    def __init__(self, once: Once) -> None:
        super().__init__(once)
        self.call = self.turn = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        clone: Any = super().__deepcopy__(memo)
        clone.call = clone.turn = 0
        return clone

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if compiling() or not self.once.mine():
            return original(*args, **kwargs)
        return self._whole(original, module, args, kwargs)

    def _whole(self, original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.turn = self.turn + 1 if self.call == self.once.calls else 0
        self.call = self.once.calls
        inputs = list(tensors_in((args, kwargs)))
        sources, given = self.once.given or ((), ())
        able = sources and None not in sources and inputs and all(map(plain, inputs))
        if not able or unusual(inputs[0]) or adapted(module):
            self.counts[0] += 1
            return original(*args, **kwargs)
        forms = tuple((x.shape, x.dtype, x.device) for x in inputs)
        numbers = tuple(v for v in (*args, *kwargs.values()) if isinstance(v, PLAIN))
        key = self.turn, forms, numbers, given
        state = tuple((*state_of(m), id(getattr(m, "processor", None))) for m in module.modules())
        found = self.answers.get(key)
        if found is not None and found.holds(sources, state):  # type: ignore[arg-type]
            return self.again(key, found)
        self.counts[0] += 1
        out = original(*args, **kwargs)
        made, places = list(tensors_in(out)), {place_of(x) for x in inputs}
        if made and all(plain(t) and place_of(t) not in places for t in made):
            self.keep(key, Answer(sources, None, out, versions(out), state))  # type: ignore
        return out


def once_(
    denoiser: nn.Module, backbone: Backbone, whole: bool = True, clock: Clock | None = None
) -> list[Once]:
    """Put `Once` into a denoiser; [] where nothing in it could answer so.

    backbone: described before anything was put in. whole: modules that the family names too; not
    where something inside reuses outputs of its own. clock: which tells runs apart, if it moves.
    """
    names = [name for name in backbone.prompt if whole and _steady(denoiser, name)]
    inside = tuple(f"{name}." for name in names)
    cells: dict[str, type[Cell]] = {
        name: Cell for name in candidates(denoiser, backbone) if not f"{name}.".startswith(inside)
    }
    cells |= dict.fromkeys(names, Whole)
    return [Once(denoiser, cells, clock)] if cells else []


def candidates(denoiser: nn.Module, backbone: Backbone) -> Iterator[str]:
    """Keys and values of cross-attention, and what embeds a prompt outside of the blocks, by name.

    Not a layer whose input has a range of its own at each step: it answers otherwise at each.
    """
    across = tuple(f"{b.name}." for b in backbone.branches if b.kind == "cross-attention")
    for name, module in own_modules(denoiser):
        ranges = getattr(module, "input_scale", None)
        if not name or next(module.children(), None) is not None or by_step(ranges):
            continue
        if name.startswith(across):
            wanted = isinstance(module, nn.Linear) and name.rpartition(".")[2] in KEYS
        else:
            text = TEXT.search(name) is not None and backbone.block_of(name) is None
            wanted = text and (isinstance(module, KINDS) or type(module).__name__ in NORMS)
        if wanted:
            yield name


def by_step(ranges: Any) -> bool:
    """Whether an input has a range of its own at each step."""
    return isinstance(ranges, Tensor) and len(ranges) > 1


def _steady(denoiser: nn.Module, name: str) -> bool:
    """Whether nothing in a module goes by the step."""
    return not any(
        isinstance(m, TemporalTable) or by_step(getattr(m, "input_scale", None))
        for m in denoiser.get_submodule(name).modules()
    )
