"""FLUX.3's image model (diffusers)."""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, members, parts, present, sharing

CLASSES = ("Flux3Transformer2DModel",)
KINDS = {"attn": "attention", "ff": "feed-forward"}
SHARED = (("attn.to_q", "attn.to_k", "attn.to_v", "ff.linear_in"),)


def describe(module: Any) -> Backbone:
    """Blocks of the text, of the image, then joint ones; attention and feed-forward are parallel.

    The blocks of a condition image run only where there is one: they are no blocks here, and get 8
    bits. Modulations have a row a token and a text at t = 0: nothing is time-only, and the text's
    blocks see the prompt alone, unless each step's target enters them too (`flow_map`).
    """
    early = ("early_stream_modulations.txt", "single_stream_modulations.txt")
    text = (*present(module, early), *members(module, "txt_mode_blocks"))
    jumps = getattr(getattr(module, "config", None), "flow_map", False)
    blocks = members(module, "txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks")
    return Backbone(
        family="flux3",
        blocks=blocks,
        branches=parts(module, blocks, KINDS),
        subsets=sharing(module, blocks, *SHARED),
        ends=(
            "x_embedders.*", "context_embedder", "*timestep_embedder.*", "*_stream_modulations.*",
            "norm_out.*", "proj_out", "*.image_cond", "*.image_cond.*",
        ),
        prompt=() if jumps else text,
    )  # fmt: skip
