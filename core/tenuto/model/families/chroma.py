"""Chroma (diffusers; ComfyUI and Forge Neo by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, sharing, whole
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, standing
from ..streams import ENDS, stream_layers, streams

CLASSES = ("ChromaTransformer2DModel",)
HOSTS = ("Chroma", "IntegratedChromaTransformer2DModel")  # the second is Forge Neo's
TIME = "distilled_guidance_layer"
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)

OUTER = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    f"{TIME}.in_proj": f"{TIME}.in_proj", f"{TIME}.out_proj": f"{TIME}.out_proj",
}  # fmt: skip


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch: hosts inline its parts.

    All modulations come out of one network that sees the timestep alone.
    """
    blocks = members(module, "transformer_blocks", "single_transformer_blocks")
    return Backbone(
        family="chroma",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(TIME,),
        ends=("x_embedder", "context_embedder", f"{TIME}.*", "proj_out"),
    )


def key_map(module: Any) -> KeyMap:
    """Where the parts of a `Chroma` are: blocks as FLUX.1's, the modulations' network beside."""
    prefixes, modules = streams(module)
    modules[TIME] = (TIME,)
    for i in range(len(module.get_submodule(f"{TIME}.layers"))):
        inner = f"{TIME}.layers.{i}"
        prefixes |= {f"{inner}.in_layer": f"{inner}.linear_1"}
        prefixes |= {f"{inner}.out_layer": f"{inner}.linear_2"}
        prefixes |= {f"{TIME}.norms.{i}.{end}": f"{TIME}.norms.{i}.weight" for end in ENDS}
    return keymap(module, "ChromaTransformer2DModel", OUTER | prefixes, modules)


def stand_in(module: Any) -> StandIn:
    """A `Chroma` of the same blocks."""
    count = len(module.get_submodule(f"{TIME}.layers"))
    holders = [f"{TIME}.layers.{i}" for i in range(count)]
    return standing(module, stream_layers(module), holders)
