"""Sana, 1.5 and Sprint (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, parts, sharing

CLASSES = ("SanaTransformer2DModel",)
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ff": "feed-forward"}
SHARED = (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"))


def describe(module: Any) -> Backbone:
    """Blocks of linear attention, cross-attention and a feed-forward of three convolutions.

    Sprint embeds its guidance beside the timestep, in the shared modulation.
    """
    blocks = members(module, "transformer_blocks")
    guided = has(module, "time_embed.guidance_embedder")
    return Backbone(
        family="sana",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=("time_embed.timestep_embedder",) if guided else ("time_embed",),
        ends=("patch_embed.*", "caption_projection.*", "time_embed.*", "proj_out"),
    )
