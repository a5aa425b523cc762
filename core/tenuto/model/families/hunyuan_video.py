"""HunyuanVideo, FramePack and HunyuanVideo 1.5 (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, present, sharing, whole

CLASSES = (
    "HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
)  # fmt: skip
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
REFINED = "context_embedder.time_text_embed.timestep_embedder"
MIXED, PURE = "time_text_embed", "time_embed"  # of the first version, of 1.5


def describe(module: Any) -> Backbone:
    """Double, then single blocks (none in 1.5); the whole block is the branch: hosts inline it."""
    blocks = members(module, "transformer_blocks", "single_transformer_blocks")
    return Backbone(
        family="hunyuan_video",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, blocks, *SHARED),
        temporal=_temporal(module, blocks),
        ends=(
            "x_embedder.*", "context_embedder*", "image_embedder.*", "image_projection.*",
            "time_embed.*", "time_text_embed.*", "*.norm1.*", "*.norm1_context.*", "*.norm.*",
            "norm_out.*", "proj_out",
        ),
    )  # fmt: skip


def _temporal(module: Any, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """In 1.5 all modulations, a third of the weights; else the pooled prompt or guidance mixes in.

    A model that is distilled to see the next timestep too (mean flow) has it in all of them. One
    that sees the first frame as finished embeds a second timestep by the same embedder.
    """
    first = has(module, f"{MIXED}.timestep_embedder")
    twice = getattr(module.get_submodule(MIXED), "image_condition_type", None) if first else None
    own = f"{MIXED if first else PURE}.timestep_embedder"
    if first or has(module, f"{PURE}.timestep_embedder_r"):
        return (REFINED,) if twice == "token_replace" else (own, REFINED)
    norms = (f"{b}.{name}.linear" for b in blocks for name in ("norm1", "norm1_context"))
    return (PURE, REFINED, *present(module, norms), "norm_out.linear")
