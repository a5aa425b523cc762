"""Chroma (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, sharing, whole

CLASSES = ("ChromaTransformer2DModel",)
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch: hosts inline its parts.

    All modulations come out of one network that sees the timestep alone.
    """
    blocks = members(module, "transformer_blocks", "single_transformer_blocks")
    return Backbone(
        family="chroma",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, blocks, *SHARED),
        temporal=("distilled_guidance_layer",),
        ends=("x_embedder", "context_embedder", "distilled_guidance_layer.*", "proj_out"),
    )
