"""PixArt-alpha and PixArt-Sigma (diffusers; ComfyUI and the original code by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, Branch, Subset
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, size_of, standing

CLASSES = ("PixArtTransformer2DModel",)
HOSTS = ("PixArtMS", "PixArt")
OUTER = {
    "x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out", "final_layer.scale_shift_table": "scale_shift_table",
}  # fmt: skip
INNER = {
    "attn.proj": "attn1.to_out.0", "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip
PARTS = {"attn": "attn1", "cross_attn": "attn2", "mlp": "ff"}
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ff": "feed-forward"}


def describe(module: Any) -> Backbone:
    """Blocks of self-attention, cross-attention and feed-forward; one shared modulation (6 D).

    The modulation depends on the timestep alone unless size embeddings enter it.
    """
    blocks = [f"transformer_blocks.{i}" for i in range(len(module.transformer_blocks))]
    branches = [Branch(f"{b}.{part}", kind, b) for b in blocks for part, kind in KINDS.items()]
    subsets = [
        Subset(tuple(f"{b}.{attn}.{part}" for part in parts))
        for b in blocks
        for attn, parts in (("attn1", ("to_q", "to_k", "to_v")), ("attn2", ("to_k", "to_v")))
    ]
    emb = getattr(module.adaln_single, "emb", None)  # a table in its place has none
    sized = hasattr(emb, "resolution_embedder") or getattr(emb, "use_additional_conditions", False)
    return Backbone(
        family="pixart",
        blocks=tuple(blocks),
        branches=tuple(branches),
        subsets=tuple(subsets),
        temporal=("adaln_single.emb.timestep_embedder",) if sized else ("adaln_single",),
        ends=("pos_embed.*", "caption_projection.*", "adaln_single.*", "proj_out"),
    )


def key_map(module: Any) -> KeyMap:
    """Where the parts of a `PixArtMS` are; the modulation there is two modules, not one."""
    prefixes: dict[str, Any] = dict(OUTER)
    modules: dict[str, tuple[str, ...]] = {
        "adaln_single": ("t_block", "t_embedder"),
        "adaln_single.emb.timestep_embedder": ("t_embedder",),
    }
    width = module.hidden_size
    for i in range(len(module.blocks)):
        host, block = f"blocks.{i}", f"transformer_blocks.{i}"
        prefixes[host], modules[block] = block, (host,)
        prefixes |= {f"{host}.{theirs}": f"{block}.{own}" for theirs, own in INNER.items()}
        qkv = ((f"{block}.attn1.to_{x}", width) for x in "qkv")
        kv = ((f"{block}.attn2.to_{x}", width) for x in "kv")
        prefixes |= {f"{host}.attn.qkv": tuple(qkv), f"{host}.cross_attn.kv_linear": tuple(kv)}
        modules |= {f"{block}.{own}": (f"{host}.{theirs}",) for theirs, own in PARTS.items()}
    kind, unused = "PixArtTransformer2DModel", ("y_embedder.y_embedding",)
    return keymap(module, kind, prefixes, modules, ignored=unused)


def stand_in(module: Any) -> StandIn:
    """A `PixArtMS` of the same blocks."""
    blocks = range(len(module.transformer_blocks))
    width = size_of(module, "transformer_blocks.0.attn1.to_q")[1]
    return standing(module, holders=[f"blocks.{i}" for i in blocks], hidden_size=width)
