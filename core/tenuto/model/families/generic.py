"""Any denoiser with a list of equal blocks: the fallback for models that no family covers."""

from __future__ import annotations

import re

from torch import nn

from ..backbone import Backbone, Branch, layers

PARTS = (
    (re.compile(r"(^|_)(cross_?attn|cross_?attention|attn2)$"), "cross-attention"),
    (re.compile(r"(^|_)(attn\d?|attention|self_?attn)$"), "attention"),
    (re.compile(r"^(ff|ff_context|mlp|feed_?forward|ffn)$"), "feed-forward"),
)


def describe(module: nn.Module) -> Backbone:
    """Blocks: every outermost ModuleList of two or more modules that hold a Linear or Conv2d.

    Branches: their children called like attention or feed-forward, else the block itself is not
    reused. Ends: the layers outside the blocks.
    """
    blocks: list[str] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(b + ".") for b in blocks)
        if isinstance(child, nn.ModuleList) and len(child) > 1 and not inside:
            blocks += [f"{name}.{i}" for i, b in enumerate(child) if any(True for _ in layers(b))]
    branches = [found for block in blocks for found in _branches(module, block)]
    outside = [n for n, _ in layers(module) if not any(n.startswith(b + ".") for b in blocks)]
    return Backbone("generic", tuple(blocks), tuple(branches), ends=tuple(outside))


def _branches(module: nn.Module, block: str) -> list[Branch]:
    found = []
    for name, _ in module.get_submodule(block).named_children():
        kind = next((kind for pattern, kind in PARTS if pattern.search(name)), None)
        if kind is not None:
            found.append(Branch(f"{block}.{name}", kind, block))
    return found
