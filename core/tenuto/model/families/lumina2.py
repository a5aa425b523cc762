"""Lumina-Image 2 (diffusers; ComfyUI and Forge by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, parts, present, sharing
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, size_of, standing

CLASSES = ("Lumina2Transformer2DModel",)
HOSTS = ("NextDiT",)
LISTS = ("context_refiner", "noise_refiner", "layers")
KINDS = {"attn": "attention", "feed_forward": "feed-forward"}
SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("feed_forward.linear_1", "feed_forward.linear_3"),
)
EMBED = "time_caption_embed"

OUTER = {
    "x_embedder": "x_embedder", "cap_embedder": f"{EMBED}.caption_embedder",
    "t_embedder.mlp.0": f"{EMBED}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{EMBED}.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}  # fmt: skip
INNER = {
    "attention.out": "attn.to_out.0", "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k", "attention_norm2": "norm2", "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2", "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2", "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip


def describe(module: Any) -> Backbone:
    """Refiners of the prompt and of the image, then joint blocks; a part's norm follows it."""
    blocks = members(module, *LISTS)
    norms = present(module, (f"{block}.norm1.linear" for block in blocks))
    return Backbone(
        family="lumina2",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=(f"{EMBED}.timestep_embedder", *norms, "norm_out.linear_1"),
        ends=("x_embedder", f"{EMBED}.*", "*.norm1.linear", "norm_out.*"),
        prompt=(f"{EMBED}.caption_embedder", *members(module, "context_refiner")),
    )


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `NextDiT` are; None where its modulations are linears alone (Z-Image).

    The attention's inputs are fused, of which keys and values have fewer heads. A block that is
    modulated has the modulation inside its first norm in diffusers.
    """
    if not has(module, "layers.0.adaLN_modulation.1"):
        return None
    prefixes: dict[str, Any] = dict(OUTER)
    modules: dict[str, tuple[str, ...]] = {f"{EMBED}.timestep_embedder": ("t_embedder",)}
    for block in members(module, *LISTS):
        prefixes |= {f"{block}.{theirs}": f"{block}.{own}" for theirs, own in INNER.items()}
        modulated = has(module, f"{block}.adaLN_modulation")
        prefixes[f"{block}.attention_norm1"] = f"{block}.norm1" + ".norm" * modulated
        qkv = module.get_submodule(f"{block}.attention.qkv")
        width, few = qkv.in_features, (qkv.out_features - qkv.in_features) // 2
        rows = {"to_q": width, "to_k": few, "to_v": few}
        prefixes[f"{block}.attention.qkv"] = tuple(
            (f"{block}.attn.{name}", count) for name, count in rows.items()
        )
        modules |= {block: (block,), f"{block}.attn": (f"{block}.attention",)}
        modules[f"{block}.feed_forward"] = (f"{block}.feed_forward",)
    kind, unused = "Lumina2Transformer2DModel", ("norm_final",)
    return keymap(module, kind, prefixes, modules, ignored=unused, rising=True)


def stand_in(module: Any) -> StandIn:
    """A `NextDiT` of the same blocks."""
    layers = {}
    for block in members(module, *LISTS):
        sizes = [size_of(module, f"{block}.attn.{name}") for name in ("to_q", "to_k", "to_v")]
        layers[f"{block}.attention.qkv"] = sum(rows for rows, _ in sizes), sizes[0][1]
        if has(module, f"{block}.norm1.linear"):
            layers[f"{block}.adaLN_modulation.1"] = size_of(module, f"{block}.norm1.linear")
    return standing(module, layers)
