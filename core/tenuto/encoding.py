"""What a pipeline asks of its text encoders, and how far quantized ones are from full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .artifact import Artifact
from .attachment import encoder_layers
from .bf16 import bf16_arithmetic, bf16_copy
from .errors import TenutoError
from .metrics import percentile
from .patching import Signature, Swap, denoiser_of, encoders_of, place
from .trajectory import Call, sampler, to_device

BATCH = 8


class _Encoded(Exception):  # leaves a pipeline when it comes to its denoiser
    pass


def encoder_calls(pipe: Any, prompts: Sequence[str], batch: int = BATCH) -> dict[str, list[Call]]:
    """What each text encoder of a pipeline is called with for `prompts` and the empty one.

    Every row of input once, `batch` in a call. TenutoError if the pipeline calls none.
    """
    seen: dict[str, dict[bytes, dict[str, Any]]] = {name: {} for name in encoders_of(pipe)}

    def keep(name: str, facts: Signature) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for row in _rows(facts.inputs(args, kwargs)):
                seen[name].setdefault(row["input_ids"].numpy().tobytes(), row)

        return hook

    def leave(*_: Any) -> None:
        raise _Encoded

    hooks: list[Any] = [denoiser_of(pipe).register_forward_pre_hook(leave)]
    for name, encoder in encoders_of(pipe).items():
        hook = keep(name, Signature(encoder))
        hooks.append(encoder.register_forward_pre_hook(hook, with_kwargs=True))
    lines = ("", *prompts)
    sample = sampler(pipe, lines, 1, None)
    try:
        for start in range(0, len(lines), batch):
            with suppress(_Encoded), torch.no_grad():
                sample(denoiser_of(pipe), start, min(batch, len(lines) - start))
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: calls_of(list(rows.values()), batch) for name, rows in seen.items()}
    if not any(found.values()):
        raise TenutoError(f"{type(pipe).__name__} calls no text encoder that Tenuto knows.")
    return {name: calls for name, calls in found.items() if calls}


def _rows(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one call; what has no rows stays as it is."""
    ids = inputs["input_ids"]
    return [
        {
            key: value[i].detach().cpu() if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        for i in range(len(ids))
    ]


def calls_of(rows: Sequence[dict[str, Any]], batch: int = BATCH) -> list[Call]:
    """Rows of input by argument, equally long, as calls; `attention_mask` says what counts."""
    found = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        inputs = {
            key: torch.stack([row[key] for row in some]) if isinstance(value, Tensor) else value
            for key, value in some[0].items()
        }
        mask = inputs.get("attention_mask")
        found.append(Call(start // batch, 0, 0.0, inputs, None if mask is None else mask.float()))
    return found


def hidden_distance(
    pipe: Any, artifact: Artifact, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How far the states of each quantized encoder of a pipeline are from full precision.

    By encoder, see `states_distance`; of nothing where the artifact has no encoders.
    """
    wanted = artifact.header.get("encoders", {})
    calls = encoder_calls(pipe, prompts) if wanted else {}
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
    twin = bf16_copy(encoder, bf16_arithmetic(place(encoder)[0]))
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
    device, dtype = place(encoder)
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
