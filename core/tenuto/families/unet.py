"""The U-Net of Stable Diffusion 1.x, 2.x and XL (diffusers)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..backbone import Backbone, Branch, Subset

CLASSES = ("UNet2DConditionModel",)
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ff": "feed-forward"}


def describe(module: Any) -> Backbone:
    """Residual blocks and transformer blocks, in the order in which they run."""
    blocks = list(_blocks(module))
    branches: list[Branch] = []
    for name in blocks:
        child = module.get_submodule(name)
        if type(child).__name__ == "ResnetBlock2D":
            branches.append(Branch(name, "resnet", name))
        else:
            found = (part for part in KINDS if getattr(child, part, None) is not None)
            branches += [Branch(f"{name}.{part}", KINDS[part], name) for part in found]
    embeddings = tuple(n for n, _ in module.named_modules() if n.endswith("time_emb_proj"))
    return Backbone(
        family="unet",
        blocks=tuple(blocks),
        branches=tuple(branches),
        subsets=tuple(_subsets(blocks, module)),
        temporal=_temporal(module, embeddings),
        ends=("conv_in", "conv_out", "time_embedding.*", "add_embedding.*", "*.time_emb_proj"),
    )


def _temporal(module: Any, embeddings: tuple[str, ...]) -> tuple[str, ...]:
    """Labels and sizes are added after the time embedding, the guidance of LCM inside it."""
    if getattr(module.time_embedding, "cond_proj", None) is not None:
        return ()
    added = ("add_embedding", "class_embedding")
    mixed = any(getattr(module, name, None) is not None for name in added)
    return ("time_embedding",) if mixed else ("time_embedding", *embeddings)


def _blocks(module: Any) -> Iterator[str]:
    """ResnetBlock2D and BasicTransformerBlock by level: they alternate inside one level."""
    levels = [f"down_blocks.{i}" for i in range(len(module.down_blocks))]
    levels += ["mid_block"] if module.mid_block is not None else []
    levels += [f"up_blocks.{i}" for i in range(len(module.up_blocks))]
    for level in levels:
        found = [
            f"{level}.{name}"
            for name, child in module.get_submodule(level).named_modules()
            if type(child).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")
        ]
        yield from sorted(found, key=_place)


def _place(name: str) -> tuple[int, ...]:
    """resnets.i before attentions.i; inner blocks in their own order; samplers of a level last."""
    found = re.search(r"\.(resnets|attentions)\.(\d+)", name)
    if found is None:
        return (10**6,)
    kind, index = found.groups()
    inner = re.findall(r"transformer_blocks\.(\d+)", name)
    return int(index), int(kind == "attentions"), *(int(i) for i in inner)


def _subsets(blocks: list[str], module: Any) -> Iterator[Subset]:
    for name in blocks:
        child = module.get_submodule(name)
        if getattr(child, "attn1", None) is not None:
            yield Subset(tuple(f"{name}.attn1.{p}" for p in ("to_q", "to_k", "to_v")))
        if getattr(child, "attn2", None) is not None:
            yield Subset(tuple(f"{name}.attn2.{p}" for p in ("to_k", "to_v")))
