"""HiDream-I1 and E1 (diffusers; ComfyUI has the same names)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, present, sharing

CLASSES = ("HiDreamImageTransformer2DModel",)
SAME_IN_HOSTS = CLASSES  # in ComfyUI
KINDS = {"attn1": "attention", "ff_i": "feed-forward", "ff_t": "feed-forward"}
ATTENTION = (("to_q", "to_k", "to_v"), ("to_q_t", "to_k_t", "to_v_t"))


def describe(module: Any) -> Backbone:
    """Double, then single blocks, each in a holder; the image's feed-forward is four experts.

    All experts together are one branch: which of them sees a token changes from step to step. The
    modulations see the pooled prompt too.
    """
    holders = members(module, "double_stream_blocks", "single_stream_blocks")
    blocks = tuple(f"{holder}.block" for holder in holders)
    attention = present(module, (f"{block}.attn1" for block in blocks))
    inside = members(module, *(f"{block}.ff_i.experts" for block in blocks))
    forward = (f"{b}.{name}" for b in blocks for name in ("ff_i.shared_experts", "ff_i", "ff_t"))
    return Backbone(
        family="hidream",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, attention, *ATTENTION)
        + sharing(module, (*present(module, forward), *inside), ("w1", "w3")),
        temporal=("t_embedder",),
        ends=(
            "x_embedder.*", "t_embedder.*", "p_embedder.*", "caption_projection.*",
            "*.adaLN_modulation.*", "final_layer.*",
        ),
    )  # fmt: skip
