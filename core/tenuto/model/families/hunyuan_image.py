"""HunyuanImage 2.1, its refiner and its distilled form (diffusers; ComfyUI by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, present, sharing, whole
from ..key_map import KeyMap
from .hunyuan_video import mapped, stand_in

__all__ = ["CLASSES", "HOSTS", "describe", "key_map", "stand_in"]
CLASSES = ("HunyuanImageTransformer2DModel",)
HOSTS = ("HunyuanVideo",)
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
EMBED = "time_guidance_embed"
REFINED = "context_embedder.time_text_embed.timestep_embedder"
NORMS = ("norm1", "norm1_context", "norm")


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch, as parts of a single one mix.

    The modulations, a quarter of the weights, are time-only unless guidance or the next timestep
    is embedded too.
    """
    blocks = members(module, "transformer_blocks", "single_transformer_blocks")
    mixed = present(module, (f"{EMBED}.{n}" for n in ("guidance_embedder", "timestep_embedder_r")))
    norms = present(module, (f"{b}.{name}.linear" for b in blocks for name in NORMS))
    refined = (REFINED,) if has(module, REFINED) else ()
    own = (f"{EMBED}.timestep_embedder", *refined)
    return Backbone(
        family="hunyuan_image",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, blocks, *SHARED),
        temporal=own if mixed else (EMBED, *refined, *norms, "norm_out.linear"),
        ends=(
            "x_embedder.*", "context_embedder*", f"{EMBED}.*", "*.norm1.*", "*.norm1_context.*",
            "*.norm.*", "norm_out.*", "proj_out",
        ),
    )  # fmt: skip


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `HunyuanVideo` without a pooled prompt and kinds of text are."""
    if has(module, "vector_in") or has(module, "cond_type_embedding"):
        return None
    return mapped(module, EMBED, "HunyuanImageTransformer2DModel")
