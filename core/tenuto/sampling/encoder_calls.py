"""What a pipeline calls its text encoders with: the inputs that they are calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from ..errors import TenutoError
from ..model import Leave, Signature, denoisers_of, encoders_of, map_tensors, watched
from .pipeline_call import PipelineCall, unprompted
from .trajectory import Call

BATCH = 8


def encoder_calls(
    pipe: Any,
    prompts: Sequence[str],
    batch: int = BATCH,
    *,
    steps: int = 20,
    call: Mapping[str, Any] | None = None,
) -> dict[str, list[Call]]:
    """What each text encoder of a pipeline is called with for `prompts` and the empty one.

    Every row of input once, `batch` in a call. steps and call: as in `record`, but for embeddings
    of prompts; of the run, only what comes before the denoiser is done. TenutoError if the pipeline
    calls none.
    """
    seen: dict[str, dict[bytes, dict[str, Any]]] = {name: {} for name in encoders_of(pipe)}

    def keeper(name: str, facts: Signature) -> Any:
        def keep(_: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for row in _rows(facts.inputs(args, kwargs)):
                seen[name].setdefault(row["input_ids"].numpy().tobytes(), row)

        return keep

    def leave(*_: Any) -> None:
        raise Leave

    lines = ("", *prompts)
    asked = PipelineCall(pipe, lines, steps, None, unprompted(call))
    with ExitStack() as watching:
        for denoiser in denoisers_of(pipe).values():
            watching.enter_context(watched(denoiser, before=leave))
        for name, encoder in encoders_of(pipe).items():
            watching.enter_context(watched(encoder, before=keeper(name, Signature(encoder))))
        size = batch if asked.together else 1
        for start in range(0, len(lines), size):
            with suppress(Leave), torch.no_grad():
                asked(asked.denoiser, start, min(size, len(lines) - start), "latent")
    found = {name: calls_of(list(rows.values()), batch) for name, rows in seen.items()}
    if not any(found.values()):
        raise TenutoError(f"{type(pipe).__name__} calls no text encoder that Tenuto knows.")
    return {name: calls for name, calls in found.items() if calls}


def _rows(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one call; what has no rows stays as it is."""
    ids = inputs["input_ids"]
    return [map_tensors(lambda x, i=i: x[i].detach().cpu(), inputs) for i in range(len(ids))]


def calls_of(rows: Sequence[dict[str, Any]], batch: int = BATCH) -> list[Call]:
    """Rows of input by argument, equally long, as calls; `attention_mask` says what counts."""
    found = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        inputs = {
            key: map_tensors(lambda *rows: torch.stack(rows), *(row[key] for row in some))
            for key in some[0]
        }
        mask = inputs.get("attention_mask")
        found.append(Call(start // batch, 0, 0.0, inputs, None if mask is None else mask.float()))
    return found
