"""Class-conditional DiT (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, Branch, Subset

CLASSES = ("DiTTransformer2DModel",)


def describe(module: Any) -> Backbone:
    """Blocks of self-attention and feed-forward; each has its own timestep and label embedding.

    Only the timestep embedders are time-only: the label enters before the modulation.
    """
    blocks = [f"transformer_blocks.{i}" for i in range(len(module.transformer_blocks))]
    parts = (("attn1", "attention"), ("ff", "feed-forward"))
    return Backbone(
        family="dit",
        blocks=tuple(blocks),
        branches=tuple(Branch(f"{b}.{part}", kind, b) for b in blocks for part, kind in parts),
        subsets=tuple(
            Subset(tuple(f"{b}.attn1.{p}" for p in ("to_q", "to_k", "to_v"))) for b in blocks
        ),
        temporal=tuple(f"{b}.norm1.emb.timestep_embedder" for b in blocks),
        ends=("pos_embed.*", "proj_out_1", "proj_out_2", "*.norm1.*"),
    )
