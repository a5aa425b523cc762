"""Z-Image, its turbo and Omni (diffusers; ComfyUI and Forge by key map)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, parts, present, sharing
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, size_of, standing

CLASSES = ("ZImageTransformer2DModel",)
HOSTS = ("NextDiT",)
LISTS = ("noise_refiner", "context_refiner", "siglip_refiner", "layers")
KINDS = {"attention": "attention", "feed_forward": "feed-forward"}
SHARED = (
    ("attention.to_q", "attention.to_k", "attention.to_v"),
    ("feed_forward.w1", "feed_forward.w3"),
)

SAME = (
    "feed_forward", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2",
    "adaLN_modulation",
)  # fmt: skip
ATTENTION = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
MODULATION = "layers.0.adaLN_modulation.0"


def describe(module: Any) -> Backbone:
    """Refiners of the image and of the prompt, then joint blocks; a part's norm follows it.

    Omni embeds two timesteps in one call, so that nothing there depends on one alone.
    """
    blocks, refined = members(module, *LISTS), members(module, "context_refiner")
    last = (f"all_final_layer.{size}" for size, _ in _final(module))
    modulated = present(module, (f"{name}.adaLN_modulation" for name in (*blocks, *last)))
    return Backbone(
        family="z_image",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        temporal=() if has(module, "siglip_embedder") else ("t_embedder", *modulated),
        ends=(
            "all_x_embedder.*", "cap_embedder.*", "siglip_embedder.*", "t_embedder.*",
            "*.adaLN_modulation.*", "all_final_layer.*",
        ),
        prompt=() if has(module, "siglip_embedder") else ("cap_embedder", *refined),
    )  # fmt: skip


def _final(module: Any) -> Any:
    return module.get_submodule("all_final_layer").named_children()


def key_map(module: Any) -> KeyMap | None:
    """Where the parts of a `NextDiT` are; None where its modulations have an activation first.

    That is Lumina, of the same class. The attention's inputs are fused.
    """
    if not hasattr(module.get_submodule(MODULATION), "in_features"):
        return None
    size = f"{module.patch_size}-1"
    same = ("t_embedder", "cap_embedder", "x_pad_token", "cap_pad_token")
    prefixes: dict[str, Any] = {name: name for name in same}
    prefixes |= {"x_embedder": f"all_x_embedder.{size}", "final_layer": f"all_final_layer.{size}"}
    modules: dict[str, tuple[str, ...]] = {"t_embedder": ("t_embedder",)}
    modules[f"all_final_layer.{size}.adaLN_modulation"] = ("final_layer.adaLN_modulation",)
    for block in members(module, *LISTS):
        own = f"{block}.attention"
        prefixes |= {f"{block}.{name}": f"{block}.{name}" for name in SAME}
        prefixes |= {f"{own}.{theirs}": f"{own}.{name}" for theirs, name in ATTENTION.items()}
        width = module.get_submodule(f"{own}.qkv").in_features
        prefixes[f"{own}.qkv"] = tuple((f"{own}.to_{x}", width) for x in "qkv")
        for name in (block, own, f"{block}.feed_forward", f"{block}.adaLN_modulation"):
            modules[name] = (name,)
    kind, unused = "ZImageTransformer2DModel", ("norm_final",)
    return keymap(module, kind, prefixes, modules, ignored=unused, rising=True)


def stand_in(module: Any) -> StandIn:
    """A `NextDiT` of the same blocks, for its one size of patches."""
    layers = {}
    for block in members(module, *LISTS):
        width = size_of(module, f"{block}.attention.to_q")[1]
        layers[f"{block}.attention.qkv"] = 3 * width, width
    layers[MODULATION] = size_of(module, MODULATION)
    size = next(name for name, _ in _final(module)).partition("-")[0]
    return standing(module, layers, patch_size=int(size))
