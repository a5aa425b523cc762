"""The levels of a U-Net: what runs in each, in execution order, whatever kind of U-Net it is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .backbone import is_large, members

ORDER = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
AROUND = {"resnets_in": 0, "attentions": 1, "resnets_out": 2}  # of Kandinsky 3
SAMPLERS = 10**6  # last in their level
Place = tuple[int, int]


def is_unet(module: nn.Module) -> bool:
    """Whether it has lists of levels, down and up, with lists of residual blocks in them."""
    lists = [getattr(module, name, None) for name in ("down_blocks", "up_blocks")]
    inner = [
        name
        for levels in lists
        if isinstance(levels, nn.ModuleList)
        for level in levels
        for name, _ in level.named_children()
    ]
    both = all(isinstance(levels, nn.ModuleList) for levels in lists)
    return both and any(name.startswith("resnets") for name in inner)


def level_blocks(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, kind) of what runs in the levels: "resnet", or "block" for all else.

    A level that has no list is one block.
    """
    middle = ["mid_block"] if isinstance(getattr(module, "mid_block", None), nn.Module) else []
    for name in (*members(module, "down_blocks"), *middle, *members(module, "up_blocks")):
        level = module.get_submodule(name)
        lists = [key for key, some in level.named_children() if isinstance(some, nn.ModuleList)]
        found = [
            (_place(name, key, int(number), "resnets_in" in lists), f"{name}.{key}.{number}", key)
            for key in lists
            for number, member in level.get_submodule(key).named_children()
            if is_large(member)
        ]
        if not found and is_large(level):
            yield name, "block"
        for _, own, key in sorted(found):
            yield own, "resnet" if key.startswith("resnets") else "block"


def _place(level: str, key: str, number: int, around: bool) -> Place:
    """Where a member of a list runs in its level: of each list the first, then the second ones.

    around: an attention lies between two residual blocks, and a further one, the first of its
    list, before all of them or, on the way up, after them.
    """
    if around and key == "attentions":
        first = SAMPLERS if level.startswith("up_blocks") else -1
        return (number - 1, AROUND[key]) if number else (first, 0)
    if around and key in AROUND:
        return number, AROUND[key]
    if key in ORDER:
        return number, ORDER.index(key)
    return SAMPLERS, number
