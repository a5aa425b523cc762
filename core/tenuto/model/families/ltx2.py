"""LTX-2 and 2.3, video with audio (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, present, sharing

CLASSES = ("LTX2VideoTransformer3DModel",)
KINDS = {
    "attn1": "attention", "audio_attn1": "attention",
    "attn2": "cross-attention", "audio_attn2": "cross-attention",
    "audio_to_video_attn": "cross-attention", "video_to_audio_attn": "cross-attention",
    "ff": "feed-forward", "audio_ff": "feed-forward",
}  # fmt: skip
QUERY, KEY = ("to_q", "to_gate_logits"), ("to_k", "to_v")
TIME = (
    "time_embed", "av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate",
    "audio_time_embed", "av_cross_attn_audio_scale_shift", "av_cross_attn_audio_v2a_gate",
    "prompt_adaln", "audio_prompt_adaln",
)  # fmt: skip


def describe(module: Any) -> Backbone:
    """Blocks of two streams that attend to themselves, to their text and to each other.

    2.3 gates each head by a few logits (in full precision) and modulates the text by sigma.
    """
    blocks = members(module, "transformer_blocks")
    own = (f"{block}.{part}" for block in blocks for part in KINDS if part.endswith("attn1"))
    across = (f"{b}.{p}" for b in blocks for p, k in KINDS.items() if k == "cross-attention")
    return Backbone(
        family="ltx2",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, own, (*QUERY, *KEY)) + sharing(module, across, QUERY, KEY),
        temporal=present(module, TIME),
        ends=(
            "proj_in", "audio_proj_in", "*caption_projection.*", "*time_embed.*",
            "av_cross_attn_*", "*prompt_adaln.*", "proj_out", "audio_proj_out",
        ),
        keep=("*.to_gate_logits",),
    )  # fmt: skip
