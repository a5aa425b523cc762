"""Qwen-Image, with Edit and Layered, and Qwen-Image-2.1 (diffusers; ComfyUI has the same names)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, parts, present, sharing

CLASSES = ("QwenImageTransformer2DModel", "QwenImage21Transformer2DModel")
SAME_IN_HOSTS = CLASSES[:1]  # in ComfyUI; in its 2.1 two layers of the feed-forward are one
KINDS = {"attn": "attention", "img_mlp": "feed-forward", "txt_mlp": "feed-forward"}
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("img_mlp.gate_layer", "img_mlp.proj"),
)
MODULATIONS = ("img_mod", "txt_mod")


def describe(module: Any) -> Backbone:
    """Joint blocks of image and text; those of 2.1 have one sequence and one feed-forward."""
    blocks = members(module, "transformer_blocks")
    return Backbone(
        family="qwen_image",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=_temporal(module, blocks),
        ends=("img_in", "txt_in*", "time_text_embed.*", "modulation.*", "norm_out.*", "proj_out"),
    )


def _temporal(module: Any, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The embedding and every modulation (a third of all weights), where they see t alone.

    2.1 has one more row, for what is modulated as if it were finished; Edit-2511 does so with half
    of the rows, which the text's modulation and the last one do not see; Layered adds a kind.
    """
    if has(module, "modulation") or has(module, "time_text_embed.addition_t_embedding"):
        return ()
    if getattr(module, "zero_cond_t", False):
        return (*present(module, (f"{b}.txt_mod" for b in blocks)), "norm_out.linear")
    inner = present(module, (f"{b}.{name}" for b in blocks for name in MODULATIONS))
    return ("time_text_embed", *inner, "norm_out.linear")
