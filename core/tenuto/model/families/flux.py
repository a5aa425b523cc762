"""FLUX.1 (diffusers; ComfyUI, Forge and the original code by key map)."""

from __future__ import annotations

from typing import Any

from ...errors import ModelError
from ..backbone import Backbone, Branch, Subset
from ..key_map import KeyMap, keymap

CLASSES = ("FluxTransformer2DModel",)
HOSTS = ("Flux", "IntegratedFluxTransformer2DModel")
EMBED = "time_text_embed"
TIME = f"{EMBED}.timestep_embedder"
IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
OUTER = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": f"{TIME}.linear_1", "time_in.out_layer": f"{TIME}.linear_2",
    "vector_in.in_layer": f"{EMBED}.text_embedder.linear_1",
    "vector_in.out_layer": f"{EMBED}.text_embedder.linear_2",
    "guidance_in.in_layer": f"{EMBED}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{EMBED}.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
}  # fmt: skip
DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}  # fmt: skip
SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
ENDS = ("scale", "weight")  # the original code's name of a norm's weight; ComfyUI's from 0.14 on


def describe(module: Any) -> Backbone:
    """Double, then single blocks; the whole block is the branch: hosts inline its parts.

    The modulations see the pooled prompt too, so that the timestep embedder alone is time-only.
    """
    double = [f"transformer_blocks.{i}" for i in range(len(module.transformer_blocks))]
    single = [
        f"single_transformer_blocks.{i}" for i in range(len(module.single_transformer_blocks))
    ]
    subsets = [Subset(tuple(f"{b}.attn.{n}" for n in s)) for b in double for s in (IMAGE, TEXT)]
    subsets += [Subset((*(f"{b}.attn.{n}" for n in IMAGE), f"{b}.proj_mlp")) for b in single]
    return Backbone(
        family="flux",
        blocks=(*double, *single),
        branches=tuple(Branch(b, "block", b) for b in (*double, *single)),
        subsets=tuple(subsets),
        temporal=(TIME,),
        ends=(
            "x_embedder", "context_embedder", "time_text_embed.*", "*.norm1.*",
            "*.norm1_context.*", "*.norm.*", "norm_out.*", "proj_out",
        ),
    )  # fmt: skip


def key_map(module: Any) -> KeyMap:
    """Where the parts of a `Flux` are: fused attention inputs, one swapped modulation."""
    if hasattr(module, "double_stream_modulation_img"):  # the same class name, another network
        raise ModelError("Tenuto does not know the parts of FLUX.2 in this host yet.")
    prefixes: dict[str, Any] = dict(OUTER)
    modules: dict[str, tuple[str, ...]] = {TIME: ("time_in",)}
    width = module.img_in.out_features
    for i in range(len(module.double_blocks)):
        host, name = f"double_blocks.{i}", f"transformer_blocks.{i}"
        modules[name] = (host,)
        prefixes |= {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in DOUBLE.items()}
        prefixes |= _norms(host, name, DOUBLE_NORMS)
        for stream, parts in (("img", IMAGE), ("txt", TEXT)):
            qkv = tuple((f"{name}.attn.{part}", width) for part in parts)
            prefixes[f"{host}.{stream}_attn.qkv"] = qkv
    for i, block in enumerate(module.single_blocks):
        host, name = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        modules[name] = (host,)
        prefixes |= {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in SINGLE.items()}
        prefixes |= _norms(host, name, SINGLE_NORMS)
        qkv = tuple((f"{name}.attn.{part}", width) for part in IMAGE)
        rest = block.linear1.out_features - 3 * width
        prefixes[f"{host}.linear1"] = (*qkv, (f"{name}.proj_mlp", rest))
    swapped = ("final_layer.adaLN_modulation.1",)
    return keymap(module, "FluxTransformer2DModel", prefixes, modules, swapped)


def _norms(host: str, name: str, norms: dict[str, str]) -> dict[str, str]:
    """The norms of queries and keys, whichever name their weight has in the host."""
    return {
        f"{host}.{theirs}.{end}": f"{name}.{own}.weight"
        for theirs, own in norms.items()
        for end in ENDS
    }
