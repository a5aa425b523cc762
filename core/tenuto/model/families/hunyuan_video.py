"""HunyuanVideo, FramePack and HunyuanVideo 1.5 (diffusers; ComfyUI by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, present, sharing, whole
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, size_of, standing
from ..streams import QKV, stream_layers, streams

CLASSES = (
    "HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
)  # fmt: skip
HOSTS = ("HunyuanVideo",)
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
REFINED = "context_embedder.time_text_embed.timestep_embedder"
MIXED, PURE = "time_text_embed", "time_embed"  # of the first version, of 1.5

REFINER = (
    "txt_in.individual_token_refiner.blocks",
    "context_embedder.token_refiner.refiner_blocks",
)
BESIDE = {
    "vector_in": "text_embedder", "guidance_in": "guidance_embedder",
    "time_r_in": "timestep_embedder_r",
}  # fmt: skip
TEXT = "context_embedder.time_text_embed"
OUTER = {
    "img_in": "x_embedder", "txt_in.input_embedder": "context_embedder.proj_in",
    "byt5_in.layernorm": "context_embedder_2.norm", "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2", "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in", "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2", "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
REFINED_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "self_attn.proj": "attn.to_out.0",
    "mlp.0": "ff.net.0.proj", "mlp.2": "ff.net.2", "adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip


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


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `HunyuanVideo` are; None where it is of neither version."""
    if has(module, "vector_in"):
        return mapped(module, MIXED, "HunyuanVideoTransformer3DModel")
    if has(module, "cond_type_embedding"):
        return mapped(module, PURE, "HunyuanVideo15Transformer3DModel")
    return None


def mapped(module: Any, embed: str, kind: str) -> KeyMap:
    """The key map of a `HunyuanVideo`, a class that HunyuanImage has too.

    Blocks as FLUX.1's, a refiner with fused inputs. embed: what embeds the timestep in diffusers,
    alone or with guidance, a pooled prompt or the next timestep. kind: diffusers' class.
    """
    prefixes, modules = streams(module)
    embedders = {
        "time_in": f"{embed}.timestep_embedder", "vector_in": f"{embed}.text_embedder",
        "guidance_in": f"{embed}.guidance_embedder", "time_r_in": f"{embed}.timestep_embedder_r",
        "txt_in.t_embedder": REFINED, "txt_in.c_embedder": f"{TEXT}.text_embedder",
    }  # fmt: skip
    beside = ("vector_in", "guidance_in.in_layer", "time_r_in")
    time = embedders["time_in"] if present(module, beside) else embed
    modules |= {time: ("time_in",), REFINED: ("txt_in.t_embedder",)}
    prefixes |= {f"{host}.in_layer": f"{own}.linear_1" for host, own in embedders.items()}
    prefixes |= {f"{host}.out_layer": f"{own}.linear_2" for host, own in embedders.items()}
    for i, block in enumerate(module.get_submodule(REFINER[0])):
        host, own = (f"{where}.{i}" for where in REFINER)
        prefixes |= {f"{host}.{theirs}": f"{own}.{name}" for theirs, name in REFINED_BLOCK.items()}
        width = block.self_attn.proj.out_features
        qkv = tuple((f"{own}.attn.{name}", width) for name in QKV)
        prefixes[f"{host}.self_attn.qkv"] = qkv
    swapped = ("final_layer.adaLN_modulation.1",)
    return keymap(module, kind, OUTER | prefixes, modules, swapped)


def stand_in(module: Any) -> StandIn:
    """A `HunyuanVideo` of the same blocks, of whichever version: as HunyuanImage has it too."""
    layers, holders = stream_layers(module), ["single_blocks"]
    for i, name in enumerate(members(module, REFINER[1])):
        layers[f"{REFINER[0]}.{i}.self_attn.proj"] = size_of(module, f"{name}.attn.to_out.0")
    for host, end in BESIDE.items():
        if any(has(module, f"{embed}.{end}") for embed in (MIXED, PURE, "time_guidance_embed")):
            holders.append(f"{host}.in_layer")
    if getattr(module, "cond_type_embed", None) is not None:
        holders.append("cond_type_embedding")
    return standing(module, layers, holders)
