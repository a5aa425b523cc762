"""Cosmos-Predict and Anima, which has its denoiser (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, present, sharing

CLASSES = ("CosmosTransformer3DModel",)
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ff": "feed-forward"}
SHARED = (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"))
NORMS = ("norm1", "norm2", "norm3")
LOW_RANK = ("linear_1", "linear_2")


def describe(module: Any) -> Backbone:
    """Blocks of self-attention, cross-attention and feed-forward, each under its own modulation.

    A modulation is two linears of low rank inside a norm; both see the timestep alone.
    """
    blocks = members(module, "transformer_blocks")
    norms = (*(f"{block}.{norm}" for block in blocks for norm in NORMS), "norm_out")
    return Backbone(
        family="anima",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=("time_embed", *present(module, (f"{n}.{x}" for n in norms for x in LOW_RANK))),
        ends=(
            "patch_embed.*", "time_embed.*", "crossattn_proj.*", "*.norm1.*", "*.norm2.*",
            "*.norm3.*", "norm_out.*", "proj_out",
        ),
    )  # fmt: skip
