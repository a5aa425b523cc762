"""T5 and UMT5 encoders (transformers), as diffusers' pipelines use them.

What the consumer reads is the state after the last norm; `wo` sees the widest range of inputs.
"""

from __future__ import annotations

from typing import Any

from ..backbone import Backbone, Subset

CLASSES = ("T5EncoderModel", "UMT5EncoderModel", "MT5EncoderModel")


def describe(module: Any) -> Backbone:
    """Blocks of self-attention and feed-forward, no biases; every subset can be folded exactly.

    A gate's linear branch takes the scale of what follows it (`wi_1`), never the gate (`wi_0`).
    """
    blocks = [f"encoder.block.{i}" for i in range(len(module.encoder.block))]
    subsets: list[Subset] = []
    for block in blocks:
        own = module.get_submodule(block)
        attention, forward = f"{block}.layer.0.SelfAttention", f"{block}.layer.1.DenseReluDense"
        gated = hasattr(own.layer[1].DenseReluDense, "wi_0")
        wide = ("wi_0", "wi_1") if gated else ("wi",)
        subsets += [
            Subset(tuple(f"{attention}.{x}" for x in "qkv"), f"{block}.layer.0.layer_norm"),
            Subset((f"{attention}.o",), f"{attention}.v"),
            Subset(tuple(f"{forward}.{x}" for x in wide), f"{block}.layer.1.layer_norm"),
            Subset((f"{forward}.wo",), f"{forward}.wi_1" if gated else None),
        ]
    return Backbone("t5", tuple(blocks), (), tuple(subsets))
