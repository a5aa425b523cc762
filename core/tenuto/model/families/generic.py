"""Any denoiser with lists of blocks: the fallback for models that no family covers.

A model without a family file loses detail, not the method: whole blocks can always be reused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..backbone import Backbone, Branch, is_large, layers
from ..levels import is_unet, level_blocks

CROSS = re.compile(r"(^|_)(cross_?attn|cross_?attention|attn_?2|\w+_to_\w+_attn)$")
PARTS = (  # in the order in which a block runs them
    (re.compile(r"(^|_)(attn_?\d?|attention|self_?attn|self_?attention)$"), "attention"),
    (CROSS, "cross-attention"),
    (
        re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward|moe)\d?(_(i|t|img|txt|context))?$"),
        "feed-forward",
    ),
)
TIME = re.compile(r"^t_|(^|_)(temb|emb|time|timestep|step|cond|adaln|mod)(_|$)", re.IGNORECASE)
MODULATION = re.compile(r"(norm|mod|ada|emb|time|scale|shift|gate)", re.IGNORECASE)
COVERED = 0.9  # of a block's weights: with less in its parts, the block itself is the branch


def describe(module: nn.Module) -> Backbone:
    """Blocks: what the model's lists hold and a call runs, see `_blocks`; of a U-Net, its levels'.

    Branches: parts of a block that are called like attention or feed-forward; the block itself
    where most of its weights lie elsewhere. Ends: the layers outside the blocks.
    """
    if is_unet(module):
        found = dict(level_blocks(module))
        blocks = tuple(found)
        branches = [Branch(name, kind, name) for name, kind in found.items()]
    else:
        blocks = tuple(_blocks(module))
        branches = [found for block in blocks for found in _branches(module, block)]
    inside = tuple(f"{block}." for block in blocks)
    outside = tuple(name for name, _ in layers(module) if not f"{name}.".startswith(inside))
    return Backbone("generic", blocks, tuple(branches), ends=outside)


# --- blocks ---------------------------------------------------------------------------------------


def _blocks(module: nn.Module, name: str = "") -> Iterator[str]:
    """The members of the outermost lists, in definition order: modules of two layers or more.

    What is in a list and is never called itself (another list, a plain holder) is looked into,
    so that each block is something that a call runs. Lists inside attention or a feed-forward are
    no lists of blocks.
    """
    for key, child in module.named_children():
        inner = f"{name}.{key}" if name else key
        if not is_large(child) or TIME.search(key) or "embed" in key:
            continue
        if isinstance(child, nn.ModuleList) or (_kind(key) is None and _is_list(child)):
            for number, member in child.named_children():
                yield from _members(member, f"{inner}.{number}")
        elif _kind(key) is None:
            yield from _blocks(child, inner)


def _members(member: nn.Module, name: str) -> Iterator[str]:
    if not is_large(member):
        return
    if not _is_called(member):
        for key, child in member.named_children():
            yield from _members(child, f"{name}.{key}")
        return
    only = list(member.named_children())
    if len(only) == 1 and not _own(member) and _is_called(only[0][1]) and is_large(only[0][1]):
        yield from _members(only[0][1], f"{name}.{only[0][0]}")  # a holder of one block
        return
    yield name


def _is_list(module: nn.Module) -> bool:
    """A ModuleList, or a Sequential of several modules of one class."""
    if isinstance(module, nn.ModuleList):
        return True
    kinds = [type(child) for child in module.children()]
    return isinstance(module, nn.Sequential) and len(kinds) > 1 and len(set(kinds)) == 1


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward: lists, dicts and plain holders have none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    return type(module).forward is not nn.Module.forward


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


# --- branches -------------------------------------------------------------------------------------


def _branches(module: nn.Module, block: str) -> list[Branch]:
    """The parts of a block if nearly all of its weights are in them, else the block.

    Attention comes before cross-attention and both before a feed-forward, however they are defined.
    """
    child = module.get_submodule(block)
    inner = ((name, part) for name, part in child.named_children() if is_large(part))
    kinds = {name: _kind(name) for name, part in inner if _is_called(part)}
    named = {name: kind for _, kind in PARTS for name, found in kinds.items() if found == kind}
    sizes: dict[str, int] = {}
    for name, weight in child.named_parameters():
        part = name.split(".")[0]
        if part in named or not MODULATION.search(part):
            sizes[part] = sizes.get(part, 0) + weight.numel()
    covered = sum(sizes.get(name, 0) for name in named)
    if not covered or covered < COVERED * sum(sizes.values()):
        return [Branch(block, "block", block)]
    return [Branch(f"{block}.{name}", kind, block) for name, kind in named.items()]


def _kind(name: str) -> str | None:
    """What a part called `name` is; a time embedding's `mlp` is no feed-forward."""
    if TIME.search(name):
        return None
    if CROSS.search(name):
        return "cross-attention"
    return next((kind for pattern, kind in PARTS if pattern.search(name)), None)
