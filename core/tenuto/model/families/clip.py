"""CLIP's text encoders (transformers), as diffusers' pipelines use them."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, Subset

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


def describe(module: Any) -> Backbone:
    """Blocks of self-attention and a two-layer MLP; no scale goes through the MLP's GELU.

    Newer versions of transformers have the layers one level higher.
    """
    root = "text_model." if hasattr(module, "text_model") else ""
    count = len(module.get_submodule(f"{root}encoder.layers"))
    blocks = [f"{root}encoder.layers.{i}" for i in range(count)]
    subsets: list[Subset] = []
    for block in blocks:
        attention = f"{block}.self_attn"
        subsets += [
            Subset(tuple(f"{attention}.{x}_proj" for x in "qkv"), f"{block}.layer_norm1"),
            Subset((f"{attention}.out_proj",), f"{attention}.v_proj"),
            Subset((f"{block}.mlp.fc1",), f"{block}.layer_norm2"),
            Subset((f"{block}.mlp.fc2",)),
        ]
    return Backbone("clip", tuple(blocks), (), tuple(subsets), keep=("text_projection",))
