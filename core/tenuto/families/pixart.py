"""PixArt-alpha and PixArt-Sigma (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, Branch, Subset

CLASSES = ("PixArtTransformer2DModel",)
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ff": "feed-forward"}


def describe(module: Any) -> Backbone:
    """Blocks of self-attention, cross-attention and feed-forward; one shared modulation (6 D).

    The modulation depends on the timestep alone unless size embeddings enter it.
    """
    blocks = [f"transformer_blocks.{i}" for i in range(len(module.transformer_blocks))]
    branches = [Branch(f"{b}.{part}", kind, b) for b in blocks for part, kind in KINDS.items()]
    subsets = [
        Subset(tuple(f"{b}.{attn}.{part}" for part in parts))
        for b in blocks
        for attn, parts in (("attn1", ("to_q", "to_k", "to_v")), ("attn2", ("to_k", "to_v")))
    ]
    pure = not getattr(module.adaln_single.emb, "use_additional_conditions", False)
    return Backbone(
        family="pixart",
        blocks=tuple(blocks),
        branches=tuple(branches),
        subsets=tuple(subsets),
        temporal=("adaln_single",) if pure else ("adaln_single.emb.timestep_embedder",),
        ends=("pos_embed.*", "caption_projection.*", "adaln_single.*", "proj_out"),
    )
