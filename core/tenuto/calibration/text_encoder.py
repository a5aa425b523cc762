"""A text encoder by itself, quantized into a file that ComfyUI reads without anything of ours.

Its weights get the numbers of the file (`numerics.native`), calibrated on prompts as the denoiser's
own pipeline gives them to it, and what is measured are the states that this denoiser reads. Inputs
of layers stay in float: hosts encode with weights that they dequantize.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact import fingerprint, versions
from ..artifact.export.encoder import TABLE, encoder_plan, write_encoder
from ..artifact.export.report import Report
from ..errors import SchemeError
from ..model import describe, device_and_dtype
from ..numerics import Format, QTensor, Scheme, schemes
from ..progress import Progress, Shown, parts, shown
from ..resources import prompts as shipped
from ..resume import Work
from ..sampling import BATCH, HELD_OUT, Call, cosines, processes, states_read, work_in
from ..sampling.consumers import Consumer, calls_for, consumer_of
from ..sampling.encoder_source import encoder_source
from ..sampling.reads import States, states_apart
from .algorithms import spelled
from .by_block import Values, with_codes
from .fold import folded
from .held_out import calibration_prompts, captions, rounded_to_nearest
from .quantize_encoder import EncoderJob, encoder_job, mark_of, unread_blocks

FP8 = Scheme("fp8-layer", Format(dtype="e4m3", granularity="tensor"))
ENCODER_SCHEMES: Mapping[str, Scheme] = {  # the numbers of a file by what `--scheme` calls them
    "w4a8": schemes.COMFY_W4A8,
    "w4a16": schemes.COMFY_W4A8,
    "w8a8": schemes.COMFY_INT8,
    "fp8": FP8,
    "nvfp4": schemes.NVFP4,
}
EMBEDDINGS = ("bf16", "int8")
ENCODER_METHODS = ("rtn", "awq", "gptq", "awq+gptq")
UNSEEN = slice(3, None, 4)  # of the list "general": what nothing is calibrated on or decided by
SAME = (
    "The file of w4a16 is that of w4a8: hosts dequantize such layers to encode a text, and ComfyUI "
    "0.31 to 0.33, which does not, finds the ranges of the inputs itself."
)
SIZES = {"fold": 400, "blocks": 1000, "measure": 100, "write": 200}  # what each part is worth


def check_text_encoder(
    scheme: str, method: str, consumer: str, embeddings: str = "bf16"
) -> Consumer:
    """The consumer's row; SchemeError or TenutoError names the choices."""
    if scheme not in ENCODER_SCHEMES:
        raise SchemeError(
            f"A text encoder's file has {', '.join(ENCODER_SCHEMES)}, not {scheme!r}."
        )
    if spelled(method) not in ENCODER_METHODS:
        raise SchemeError(
            f"A text encoder is rounded by {', '.join(ENCODER_METHODS)}, not by {method!r}."
        )
    if embeddings not in EMBEDDINGS:
        raise SchemeError(f"Embeddings are in {' or '.join(EMBEDDINGS)}, not in {embeddings!r}.")
    return consumer_of(consumer)


def quantize_text_encoder(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str,
    consumer: str,
    method: str = "gptq",
    embeddings: str = "bf16",
    prompts: Sequence[str] = (),
    config: str | Path | None = None,
    seed: int = 0,
    device: Any = None,
    max_memory: int | None = None,
    work: str | Path | None = None,
    on_progress: Shown = True,
) -> Report:
    """Write a text encoder with quantized weights as ComfyUI reads it: one safetensors file.

    model: a folder of transformers, a pipeline's, or a single file with hosts' names, which needs
    `config`, the folder of its config.json and tokenizer. scheme: one of `ENCODER_SCHEMES`; w4a8
    and w4a16 are the same file. consumer: a row of `sampling.consumers.CONSUMERS`, such as
    "qwen-image": whose template, padding and hidden states count. method: one of
    `ENCODER_METHODS` ("awq-gptq" is an older name of "awq+gptq"). embeddings: "bf16", or "int8"
    with a scale a row. prompts: calibrated on (none: the shipped list "captions") beside the list
    "general", a part of which is left for a check. The report's `facts`, also in the file's header,
    tell how far the states are that the denoiser reads, on prompts that nothing was calibrated on.
    max_memory, `work`, on_progress, resuming and Cancelled: as in `quantize`. TenutoError says what
    cannot be, before anything is written.
    """
    row = check_text_encoder(scheme, method, consumer, embeddings)
    method = spelled(method)
    source = encoder_source(str(model), row.kinds, None if config is None else Path(config))
    tokens, tokenizer = source.tokenizer_tensors(), source.tokenizer()
    encoder = source.load(device, max_memory)
    blocks = len(describe(encoder).blocks)
    unseen = ["", *shipped("general")[UNSEEN]]
    lines = [p for p in calibration_prompts(prompts or shipped("captions")) if p not in unseen]
    given = row, encoder, tokenizer, blocks
    batch = BATCH if row.filled else 4 * BATCH  # texts of some tokens
    calls = calls_for(*given, ["", *lines], captions()[1], batch, by_length=True)
    with shown(on_progress, "Quantizing") as told:
        notes = parts(told, SIZES if method.startswith("awq") else SIZES | {"fold": 0})
        how = {"seed": seed, "device": device, "max_memory": max_memory, "work": work}
        made = EncoderCodes.of(encoder, calls, ENCODER_SCHEMES[scheme], method, notes, how)
        made.tables = embedding_codes(encoder) if embeddings == "int8" else {}
        notes["measure"](0, 1, "measuring")
        facts = {
            "type": source.kind, "consumer": consumer, "source": row.source, "scheme": scheme,
            "method": method, "embeddings": embeddings, "prompts": len(lines) + 1, "seed": seed,
            "states": made.measured(calls_for(*given, unseen, (), batch, read_alone=True), device),
        }  # fmt: skip
        if method.endswith("gptq"):
            facts["layers_nearest"] = made.layers_nearest
        plan = encoder_plan(made.encoder, source.names, made.codes, made.scheme, tokens, facts,
                            made.tables)  # fmt: skip
        plan.dropped += source.unused()
        report = processes().once(lambda: write_encoder(plan, Path(out), notes["write"]))
    report.notes += [*made.notes, *([SAME] if scheme == "w4a16" else [])]
    return report


@dataclass
class EncoderCodes:
    """The codes of an encoder's layers. original: as it was given. encoder: the same with folded
    scales, whose weights `codes` stand for. nearest: those of `original` rounded to nearest.
    layers_nearest: how many layers have these. notes: sentences for a user. job: what made them.
    tables: codes of embeddings.
    """

    original: nn.Module
    encoder: nn.Module
    scheme: Scheme
    codes: Mapping[str, QTensor]
    nearest: Mapping[str, QTensor]
    layers_nearest: int
    job: EncoderJob
    notes: list[str] = field(default_factory=list)
    tables: dict[str, QTensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        encoder: nn.Module,
        calls: Sequence[Call],
        scheme: Scheme,
        method: str,
        notes: Mapping[str, Progress] | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> EncoderCodes:
        """Fold, round, and keep what is no worse than to nearest on prompts left for that check.

        notes: of the parts "fold" and "blocks". how: further arguments of `encoder_job`.
        """
        notes, how = notes or parts(None, SIZES), how or {}
        source, device = encoder, how.get("device")
        first, _, rest = spelled(method).partition("+")
        if first == "awq":
            unread = unread_blocks(encoder, describe(encoder), calls)
            kept = _fold_work(encoder, calls, scheme, how.get("work"))
            source = folded(encoder, calls, scheme.weight, device, unread, notes["fold"], kept)
        rounding = (rest or "nearest") if first == "awq" else method
        job = encoder_job(source, calls, scheme, rounding, on_progress=notes["blocks"], **how)
        held = job.facts["held_out"]
        made = cls(encoder, source, scheme, job.weights, job.plain, held["layers_nearest"], job)
        if source is encoder:
            return made
        made.nearest = rounded_to_nearest(job.plan, Values(encoder, job.device, {}))
        known = [call for call in calls if call.row == HELD_OUT]
        full, low = (made.states(known, codes, device) for codes in ({}, made.nearest))
        cosine = cosines(full, low)
        if sum(cosine) / len(cosine) >= held["cosine"]:
            made.encoder, made.codes = encoder, made.nearest
            made.layers_nearest = len(made.codes)
            made.notes.append("Scales of columns gained nothing on held-out prompts: it is rounded "
                              "to nearest.")  # fmt: skip
        return made

    def states(
        self,
        calls: Sequence[Call],
        codes: Mapping[str, QTensor],
        device: Any,
        encoder: nn.Module | None = None,
    ) -> States:
        """By row and state, with the weights that `codes` stand for."""
        source = self.original if encoder is None else encoder
        device = device_and_dtype(source)[0] if device is None else torch.device(device)
        model = with_codes(source, device, codes)
        return [row for call in calls for row in states_read(model, call)]

    def measured(self, calls: Sequence[Call], device: Any) -> list[dict[str, Any]]:
        """Of each state that is read: its distance from full precision, beside to nearest."""
        full = self.states(calls, {}, device)
        found = states_apart(
            full, self.states(calls, {**self.codes, **self.tables}, device, self.encoder)
        )
        plain = states_apart(full, self.states(calls, {**self.nearest, **self.tables}, device))
        read = calls[0].read or ("last",)
        return [
            {"state": name, "quantized": one, "nearest": other}
            for name, one, other in zip(read, found, plain, strict=True)
        ]


def _fold_work(
    encoder: nn.Module, calls: Sequence[Call], scheme: Scheme, work: str | Path | None
) -> Work:
    """Where the scales of the blocks are kept that are done: a folder in that of the job."""
    if work is None:
        return work_in(None, {})
    about = {"job": "fold", "scheme": scheme.to_json(), "model": fingerprint(encoder)}
    about |= {"versions": versions(), "calls": [mark_of(call) for call in calls]}
    return work_in(Path(work) / "fold", about)


def embedding_codes(encoder: nn.Module) -> dict[str, QTensor]:
    """The table of an encoder's words in 8 bits, a scale a row."""
    values: Any = encoder.get_input_embeddings()  # type: ignore[operator]
    name = next(n for n, module in encoder.named_modules() if module is values)
    return {name: QTensor.nearest(values.weight, TABLE.weight)}
