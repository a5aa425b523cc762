"""Krea 2, base and turbo (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, present, sharing

CLASSES = ("Krea2Transformer2DModel",)
KINDS = {"attn": "attention", "ff": "feed-forward"}
SHARED = (("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate"), ("ff.gate", "ff.up"))
TEXT = ("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks")


def describe(module: Any) -> Backbone:
    """Blocks that fuse the layers of the text encoder, then those of the joint sequence.

    The first ones see a row a token, not a row an image: their output is not reused. What weighs
    the layers of the encoder is a single row of a dozen numbers, and stays as it is.
    """
    fused = members(module, *TEXT)
    joint = members(module, "transformer_blocks")
    reused = (*(b for b in fused if b.startswith(TEXT[1])), *joint)
    return Backbone(
        family="krea2",
        blocks=(*fused, *joint),
        branches=parts(module, reused, KINDS),
        subsets=sharing(module, (*fused, *joint), *SHARED),
        temporal=("time_embed", "time_mod_proj"),
        ends=(
            "img_in",
            "txt_in.*",
            "text_fusion.*",
            "time_embed.*",
            "time_mod_proj",
            "final_layer.*",
        ),
        keep=("text_fusion.projector",),
        prompt=present(module, ("text_fusion", "txt_in")),
    )
