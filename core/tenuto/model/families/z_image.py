"""Z-Image, its turbo and Omni (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, has, members, parts, present, sharing

CLASSES = ("ZImageTransformer2DModel",)
KINDS = {"attention": "attention", "feed_forward": "feed-forward"}
SHARED = (
    ("attention.to_q", "attention.to_k", "attention.to_v"),
    ("feed_forward.w1", "feed_forward.w3"),
)


def describe(module: Any) -> Backbone:
    """Refiners of the image and of the prompt, then joint blocks; a part's norm follows it.

    Omni embeds two timesteps in one call, so that nothing there depends on one alone.
    """
    blocks = members(module, "noise_refiner", "context_refiner", "siglip_refiner", "layers")
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
    )  # fmt: skip


def _final(module: Any) -> Any:
    return module.get_submodule("all_final_layer").named_children()
