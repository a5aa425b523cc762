"""How far the hidden states of quantized text encoders are from full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..model import Swap, device_and_dtype, encoders_of
from ..runtime import encoder_layers, percentile
from ..sampling import Call, cosines, encoder_calls, states_read
from .bf16 import bf16_arithmetic, bf16_copy

States = list[list[Tensor]]  # by row of a call and state: (T, D)


def hidden_distance(
    pipe: Any,
    artifact: Artifact,
    prompts: Sequence[str],
    call: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """How far the states of each quantized encoder of a pipeline are from full precision.

    By encoder, see `states_distance`; of nothing where the artifact has no encoders. call: as in
    `record`.
    """
    wanted = artifact.header.get("encoders", {})
    calls = encoder_calls(pipe, prompts, call=call) if wanted else {}
    found: dict[str, dict[str, Any]] = {}
    for name in wanted.keys() & calls.keys():
        encoder = encoders_of(pipe)[name]
        layers = encoder_layers(encoder, artifact, name)
        found[name] = states_distance(encoder, calls[name], layers)
    return found


@torch.no_grad()
def states_distance(
    encoder: nn.Module, calls: Sequence[Call], layers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """How far the states of `encoder` with other `layers` are from its own, over their tokens.

    cosine {mean, p5, min}, relative_l2, the same two of the first row alone (the empty prompt), and
    bf16 {cosine, relative_l2}: what half precision does. Of the states that the pipeline reads, and
    of the tokens that a mask leaves.
    """
    full = _states(encoder, calls)
    twin = bf16_copy(encoder, bf16_arithmetic(device_and_dtype(encoder)[0]))
    floor = _distance(full, _states(twin, calls))
    del twin
    swaps = [Swap(encoder, *pair) for pair in layers.items()]
    try:
        low = _states(encoder, calls)
    finally:
        for swap in reversed(swaps):
            swap.remove()
    empty = _distance(full[:1], low[:1])
    return _distance(full, low) | {
        "empty": {"cosine": empty["cosine"]["mean"], "relative_l2": empty["relative_l2"]},
        "bf16": {"cosine": floor["cosine"]["mean"], "relative_l2": floor["relative_l2"]},
    }


def _states(encoder: nn.Module, calls: Sequence[Call]) -> States:
    return [row for call in calls for row in states_read(encoder, call)]


def _distance(full: States, low: States) -> dict[str, Any]:
    """Over all tokens and states; the relative L2 is the mean of that of each state."""
    cosine = cosines(full, low)
    pairs = zip(zip(*full, strict=True), zip(*low, strict=True), strict=True)
    each = [(torch.cat(a).double(), torch.cat(b).double()) for a, b in pairs]
    return {
        "cosine": {
            "mean": sum(cosine) / len(cosine), "p5": percentile(cosine, 5), "min": min(cosine),
        },
        "relative_l2": sum(float((a - b).norm() / a.norm()) for a, b in each) / len(each),
        "tokens": len(cosine),
    }  # fmt: skip
