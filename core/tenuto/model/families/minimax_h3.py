"""MiniMax H3, video with audio (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, sharing

CLASSES = ("MiniMaxH3Transformer3DModel",)
KINDS = {"attn": "attention", "ff": "feed-forward"}
SHARED = (("attn.to_q", "attn.to_k", "attn.to_v"),)


def describe(module: Any) -> Backbone:
    """Blocks that refine the prompt, then those of one packed sequence of text, video and audio.

    A call embeds the timesteps of three kinds of token, a row each: no row is the step's own, and
    nothing is described as time-only. What the released model has in fp32 stays as it is.
    """
    blocks = members(module, "token_refiner.refiner_blocks", "transformer_blocks")
    return Backbone(
        family="minimax_h3",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        ends=("context_embedder", "*.adaln_proj.*", "norm_out.*"),
        keep=("proj_in", "audio_proj_in", "time_embedder.*", "proj_out", "audio_proj_out"),
    )
