"""FLUX.1 (diffusers; ComfyUI, Forge and the original code by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, sharing, whole
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, standing
from ..streams import stream_layers, streams

CLASSES = ("FluxTransformer2DModel",)
HOSTS = ("Flux", "IntegratedFluxTransformer2DModel")
EMBED = "time_text_embed"
TIME = f"{EMBED}.timestep_embedder"
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
OUTER = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": f"{TIME}.linear_1", "time_in.out_layer": f"{TIME}.linear_2",
    "vector_in.in_layer": f"{EMBED}.text_embedder.linear_1",
    "vector_in.out_layer": f"{EMBED}.text_embedder.linear_2",
    "guidance_in.in_layer": f"{EMBED}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{EMBED}.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
}  # fmt: skip


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch: hosts inline its parts.

    The modulations see the pooled prompt too, so that the timestep embedder alone is time-only.
    """
    blocks = members(module, "transformer_blocks", "single_transformer_blocks")
    return Backbone(
        family="flux",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(TIME,),
        ends=(
            "x_embedder", "context_embedder", "time_text_embed.*", "*.norm1.*",
            "*.norm1_context.*", "*.norm.*", "norm_out.*", "proj_out",
        ),
    )  # fmt: skip


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `Flux` are: fused attention inputs, one swapped modulation.

    None where the blocks share their modulations: that is FLUX.2, of the same class.
    """
    if hasattr(module, "double_stream_modulation_img"):
        return None
    prefixes, modules = streams(module)
    modules[TIME] = ("time_in",)
    swapped = ("final_layer.adaLN_modulation.1",)
    return keymap(module, "FluxTransformer2DModel", OUTER | prefixes, modules, swapped)


def stand_in(module: Any) -> StandIn:
    """A `Flux` of the same blocks."""
    return standing(module, stream_layers(module))
