"""FLUX.2 dev and klein (diffusers; ComfyUI and Forge Neo by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, sharing, whole
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, size_of, standing
from ..streams import SINGLE_NORMS, double_block, norms

CLASSES = ("Flux2Transformer2DModel",)
HOSTS = ("Flux", "IntegratedFluxTransformer2DModel")
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
EMBED = "time_guidance_embed"
MODULATIONS = (
    "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
)  # fmt: skip

INNER = tuple(f"{name}.linear" for name in MODULATIONS)
OUTER = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": f"{EMBED}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{EMBED}.timestep_embedder.linear_2",
    "guidance_in.in_layer": f"{EMBED}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{EMBED}.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
} | {f"{name}.lin": f"{name}.linear" for name in MODULATIONS}  # fmt: skip
SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch: hosts inline its parts.

    Three modulations serve all blocks: an error in one is felt in each. Where guidance is embedded
    (dev), the timestep embedder alone is time-only.
    """
    double = members(module, "transformer_blocks")
    blocks = (*double, *members(module, "single_transformer_blocks"))
    guided = has(module, f"{EMBED}.guidance_embedder")
    pure = (f"{EMBED}.timestep_embedder",) if guided else (EMBED, *INNER, "norm_out.linear")
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


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `Flux` with shared modulations are; None where there are none."""
    if not has(module, MODULATIONS[0]):
        return None
    prefixes: dict[str, Any] = dict(OUTER)
    guided = has(module, "guidance_in.in_layer")
    time = f"{EMBED}.timestep_embedder" if guided else EMBED
    modules: dict[str, tuple[str, ...]] = {time: ("time_in",)}
    for i, block in enumerate(module.double_blocks):
        host, name = f"double_blocks.{i}", f"transformer_blocks.{i}"
        modules[name] = (host,)
        width = block.img_attn.proj.out_features
        prefixes |= double_block(host, name, width, ("linear_in", "linear_out"))
    for i in range(len(module.single_blocks)):
        host, name = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        modules[name] = (host,)
        prefixes |= {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in SINGLE.items()}
        prefixes |= norms(host, name, SINGLE_NORMS)
    swapped = ("final_layer.adaLN_modulation.1",)
    return keymap(module, "Flux2Transformer2DModel", prefixes, modules, swapped)


def stand_in(module: Any) -> StandIn:
    """A `Flux` with shared modulations, of the same blocks."""
    layers = {
        f"double_blocks.{i}.img_attn.proj": size_of(module, f"{name}.attn.to_out.0")
        for i, name in enumerate(members(module, "transformer_blocks"))
    }
    if has(module, f"{EMBED}.guidance_embedder"):
        name = f"{EMBED}.guidance_embedder.linear_1"
        layers["guidance_in.in_layer"] = size_of(module, name)
    singles = range(len(module.single_transformer_blocks))
    holders = [*MODULATIONS, "double_blocks", *(f"single_blocks.{i}" for i in singles)]
    return standing(module, layers, holders)
