"""Wan 2.1 and 2.2, VACE, and what is made of them (diffusers; ComfyUI by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, parts, sharing
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, standing

CLASSES = (
    "WanTransformer3DModel", "WanVACETransformer3DModel", "ChronoEditTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
)  # fmt: skip
HOSTS = ("WanModel",)
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ffn": "feed-forward"}
SHARED = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
)
EMBED = "condition_embedder"
LISTS = ("vace_blocks", "blocks")

OUTER = {
    "patch_embedding": "patch_embedding", "vace_patch_embedding": "vace_patch_embedding",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "text_embedding.0": f"{EMBED}.text_embedder.linear_1",
    "text_embedding.2": f"{EMBED}.text_embedder.linear_2",
    "time_embedding.0": f"{EMBED}.time_embedder.linear_1",
    "time_embedding.2": f"{EMBED}.time_embedder.linear_2",
    "time_projection.1": f"{EMBED}.time_proj",
    "img_emb.proj.0": f"{EMBED}.image_embedder.norm1",
    "img_emb.proj.1": f"{EMBED}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{EMBED}.image_embedder.ff.net.2",
    "img_emb.proj.4": f"{EMBED}.image_embedder.norm2",
    "img_emb.emb_pos": f"{EMBED}.image_embedder.pos_embed",
}  # fmt: skip
PARTS = {"self_attn": "attn1", "cross_attn": "attn2", "ffn": "ffn"}
ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
}  # fmt: skip
INNER = {
    f"{theirs}.{x}": f"{own}.{y}"
    for theirs, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for x, y in ATTENTION.items()
} | {
    "modulation": "scale_shift_table", "norm3": "norm2",  # here the third norm is the second
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "before_proj": "proj_in", "after_proj": "proj_out",  # of VACE's
}  # fmt: skip


def describe(module: Any) -> Backbone:
    """Blocks of self-attention, cross-attention and feed-forward; one modulation for all (6 D).

    Those of VACE, which see what is to be edited, run first.
    """
    blocks = members(module, *LISTS)
    return Backbone(
        family="wan",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(f"{EMBED}.time_embedder", f"{EMBED}.time_proj"),
        ends=(f"{EMBED}.*", "fps_projection.*", "proj_out"),
    )


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `WanModel` are, none fused; None where it takes a reference too."""
    if has(module, "ref_conv"):
        return None
    prefixes: dict[str, Any] = dict(OUTER)
    modules: dict[str, tuple[str, ...]] = {f"{EMBED}.time_embedder": ("time_embedding",)}
    for block in members(module, *LISTS):
        modules[block] = (block,)
        modules |= {f"{block}.{own}": (f"{block}.{theirs}",) for theirs, own in PARTS.items()}
        prefixes |= {f"{block}.{theirs}": f"{block}.{own}" for theirs, own in INNER.items()}
    kind = "WanVACETransformer3DModel" if has(module, LISTS[0]) else "WanTransformer3DModel"
    return keymap(module, kind, prefixes, modules)


def stand_in(module: Any) -> StandIn:
    """A `WanModel` of the same blocks."""
    return standing(module, holders=members(module, *LISTS))
