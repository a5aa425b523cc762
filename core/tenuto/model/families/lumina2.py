"""Lumina-Image 2 (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, present, sharing

CLASSES = ("Lumina2Transformer2DModel",)
KINDS = {"attn": "attention", "feed_forward": "feed-forward"}
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("feed_forward.linear_1", "feed_forward.linear_3"),
)
EMBED = "time_caption_embed"


def describe(module: Any) -> Backbone:
    """Refiners of the prompt and of the image, then joint blocks; a part's norm follows it."""
    blocks = members(module, "context_refiner", "noise_refiner", "layers")
    norms = present(module, (f"{block}.norm1.linear" for block in blocks))
    return Backbone(
        family="lumina2",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(f"{EMBED}.timestep_embedder", *norms, "norm_out.linear_1"),
        ends=("x_embedder", f"{EMBED}.*", "*.norm1.linear", "norm_out.*"),
    )
