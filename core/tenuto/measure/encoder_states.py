"""How far the hidden states of quantized text encoders are from full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..model import Swap, device_and_dtype, encoders_of
from ..runtime import encoder_layers, percentile
from ..sampling import Call, encoder_calls, to_device
from .bf16 import bf16_arithmetic, bf16_copy


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
    bf16 {cosine, relative_l2}: what half precision does. Of the state before the last layer where
    the pipeline asks for all states, else of the last one; of the tokens that a mask leaves.
    """
    full = [_states(encoder, call) for call in calls]
    twin = bf16_copy(encoder, bf16_arithmetic(device_and_dtype(encoder)[0]))
    floor = _distance(full, [_states(twin, call) for call in calls])
    del twin
    swaps = [Swap(encoder, *pair) for pair in layers.items()]
    try:
        low = [_states(encoder, call) for call in calls]
    finally:
        for swap in reversed(swaps):
            swap.remove()
    empty = _distance([full[0][:1]], [low[0][:1]])
    return _distance(full, low) | {
        "empty": {"cosine": empty["cosine"]["mean"], "relative_l2": empty["relative_l2"]},
        "bf16": {"cosine": floor["cosine"]["mean"], "relative_l2": floor["relative_l2"]},
    }


def _states(encoder: nn.Module, call: Call) -> Tensor:
    """What the pipeline reads, (B, L, D) in fp32 on the CPU; zero where the mask says nothing."""
    device, dtype = device_and_dtype(encoder)
    out = encoder(**to_device(call.inputs, device, dtype))
    several = getattr(out, "hidden_states", None)
    state = (several[-2] if several is not None else out[0]).float().cpu()
    return state if call.counted is None else state * call.counted[..., None]


def _distance(full: list[Tensor], low: list[Tensor]) -> dict[str, Any]:
    a, b = (torch.cat([t.flatten(0, 1) for t in some]) for some in (full, low))
    counted = a.any(1)
    a, b = a[counted].double(), b[counted].double()
    cosine = nn.functional.cosine_similarity(a, b).tolist()
    return {
        "cosine": {
            "mean": sum(cosine) / len(cosine), "p5": percentile(cosine, 5), "min": min(cosine),
        },
        "relative_l2": float((a - b).norm() / a.norm()),
        "tokens": len(cosine),
    }  # fmt: skip
