"""Wan 2.1 and 2.2 (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, sharing

CLASSES = ("WanTransformer3DModel",)
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ffn": "feed-forward"}
SHARED = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
)
EMBED = "condition_embedder"


def describe(module: Any) -> Backbone:
    """Blocks of self-attention, cross-attention and feed-forward; one modulation for all (6 D)."""
    blocks = members(module, "blocks")
    return Backbone(
        family="wan",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(f"{EMBED}.time_embedder", f"{EMBED}.time_proj"),
        ends=(f"{EMBED}.*", "proj_out"),
    )
