"""FLUX.2 dev and klein (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, sharing, whole

CLASSES = ("Flux2Transformer2DModel",)
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
EMBED = "time_guidance_embed"
MODULATIONS = (
    "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
)  # fmt: skip


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch: hosts inline its parts.

    Three modulations serve all blocks: an error in one is felt in each. Where guidance is embedded
    (dev), the timestep embedder alone is time-only.
    """
    double = members(module, "transformer_blocks")
    blocks = (*double, *members(module, "single_transformer_blocks"))
    guided = has(module, f"{EMBED}.guidance_embedder")
    pure = (f"{EMBED}.timestep_embedder",) if guided else (EMBED, *MODULATIONS, "norm_out.linear")
    return Backbone(
        family="flux2",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, double, *SHARED),
        temporal=pure,
        ends=(
            "x_embedder", "context_embedder", f"{EMBED}.*", "*_stream_modulation*", "norm_out.*",
            "proj_out",
        ),
    )  # fmt: skip
