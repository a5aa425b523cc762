"""Stable Diffusion 3 and 3.5 (diffusers; ComfyUI and the original code by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, sharing, whole
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, size_of, standing

CLASSES = ("SD3Transformer2DModel",)
HOSTS = ("MMDiT",)
TIME = "time_text_embed.timestep_embedder"
TEXT = "time_text_embed.text_embedder"
ATTENTION = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
SHARED = (
    *(tuple(f"attn.{name}" for name in group) for group in ATTENTION),
    tuple(f"attn2.{name}" for name in ATTENTION[0]),  # SD3.5 medium's first blocks
)
OUTER = {
    "context_embedder": "context_embedder", "x_embedder.proj": "pos_embed.proj",
    "pos_embed": "pos_embed.pos_embed",
    "t_embedder.mlp.0": f"{TIME}.linear_1", "t_embedder.mlp.2": f"{TIME}.linear_2",
    "y_embedder.mlp.0": f"{TEXT}.linear_1", "y_embedder.mlp.2": f"{TEXT}.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
}  # fmt: skip
INNER = {
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out", "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2", "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k", "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0", "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k", "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2", "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
}  # fmt: skip


def describe(module: Any) -> Backbone:
    """Joint blocks of two streams; the whole block is the branch: hosts inline its attention.

    The modulations see the pooled prompt too, so that the timestep embedder alone is time-only.
    """
    blocks = members(module, "transformer_blocks")
    return Backbone(
        family="sd3",
        blocks=blocks,
        branches=whole(blocks),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(TIME,),
        ends=(
            "pos_embed.*", "context_embedder", "time_text_embed.*", "*.norm1.*",
            "*.norm1_context.*", "norm_out.*", "proj_out",
        ),
    )  # fmt: skip


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of an `MMDiT` are: fused attention inputs, two swapped modulations.

    A block whose context ends there (the last one) has a plain continuous norm in diffusers.
    """
    if not hasattr(module, "joint_blocks"):  # AuraFlow's class has this name too
        return None
    prefixes: dict[str, Any] = dict(OUTER)
    modules: dict[str, tuple[str, ...]] = {TIME: ("t_embedder",), TEXT: ("y_embedder",)}
    swapped = ["final_layer.adaLN_modulation.1"]
    for i, block in enumerate(module.joint_blocks):
        host, name = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        modules[name] = (host,)
        prefixes |= {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in INNER.items()}
        width = block.x_block.attn.qkv.in_features
        for theirs, attention, own in (
            ("x_block.attn", "attn", ATTENTION[0]),
            ("context_block.attn", "attn", ATTENTION[1]),
            ("x_block.attn2", "attn2", ATTENTION[0]),
        ):
            parts = tuple((f"{name}.{attention}.{part}", width) for part in own)
            prefixes[f"{host}.{theirs}.qkv"] = parts
        if block.context_block.pre_only:
            swapped.append(f"{host}.context_block.adaLN_modulation.1")
    return keymap(module, "SD3Transformer2DModel", prefixes, modules, swapped)


def stand_in(module: Any) -> StandIn:
    """An `MMDiT` of the same blocks."""
    width = size_of(module, "transformer_blocks.0.attn.to_q")[1]
    blocks = range(len(module.transformer_blocks))
    layers = {f"joint_blocks.{i}.x_block.attn.qkv": (3 * width, width) for i in blocks}
    found: Any = standing(module, layers, [f"joint_blocks.{i}.context_block" for i in blocks])
    for own, block in zip(module.transformer_blocks, found.joint_blocks, strict=True):
        vars(block.context_block)["pre_only"] = own.context_pre_only
    return found
