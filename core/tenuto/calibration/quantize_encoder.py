"""Text encoders in 8 or 4 bits: their weights alone; inputs stay in float, as encoders are run.

Calibration is on prompts, exactly as the pipeline gives them to the encoder: its templates, padding
and masks, and the empty prompt; on general captions beside the user's own, see `held_out.py`. What
counts are the states that the pipeline reads: blocks after the last one are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact import Artifact, fingerprint, versions
from ..errors import SchemeError
from ..model import Backbone, describe, encoders_of
from ..numerics import QTensor, Recipe, Rule, Scheme, schemes
from ..progress import Progress, Shown, parts, shown
from ..resume import Work, digest
from ..sampling import (
    BATCH,
    HELD_OUT,
    Call,
    Trajectory,
    cosines,
    described,
    encoder_calls,
    processes,
    schedule_of_run,
    state_count,
    states_read,
    unprompted,
    work_in,
)
from ..sampling.reads import States
from .algorithms import by_name, names, spelled
from .algorithms.nearest import RoundToNearest
from .algorithms.tiar import Tiar
from .by_block import by_block, with_codes
from .codes import Codes
from .held_out import apart, better, calibration_prompts, captions, rounded_to_nearest
from .job import Job
from .presets import recipe_for
from .result_check import checked_encoder

WIDTHS = {"w8": schemes.W8A16, "w4": schemes.W4A16}
NEAREST = "nearest"  # the unit of all layers rounded to nearest
WHOLE = 100_000  # what one encoder is worth in the progress
PART = WHOLE // 20  # what measuring it is worth, before (with rounding to nearest) and after


def encoder_scheme(width: str, method: str) -> Scheme:
    """The scheme of such a width and method; SchemeError names the choices."""
    return _chosen(width, method)[0]


def _chosen(width: str | Scheme, method: str) -> tuple[Scheme, Any]:
    """The scheme, and the algorithm that rounds to it."""
    if isinstance(width, Scheme):
        return width, by_name(method, "encoder")
    try:
        scheme, algorithm = WIDTHS[width], by_name(method, "encoder")
    except (KeyError, SchemeError):
        raise SchemeError(
            f"A text encoder is quantized to {' or '.join(WIDTHS)} by "
            f"{', '.join(names('encoder'))}, not to {width!r} by {method!r}."
        ) from None
    if getattr(algorithm, "smooth", False):
        first = algorithm.name.split("+")[0]
        scheme = Scheme(f"{scheme.name}-{first}", replace(scheme.weight, smooth=True))
    return scheme, algorithm


def quantize_encoder(
    pipe: Any,
    width: str,
    prompts: Sequence[str],
    *,
    method: str = "gptq",
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    device: Any = None,
    max_memory: int | None = None,
    work: str | Path | None = None,
    on_progress: Shown = True,
) -> Artifact:
    """The weights of every text encoder of `pipe` in 8 or 4 bits, as an artifact to merge with `|`.

    width: "w8" or "w4" (a range per 32 columns). method: an algorithm's name, such as "gptq", or
    several with a plus between them.
    The shipped list "general" is calibrated on too, but for a part that checks it: of calibrated
    and nearest each layer gets what is better there, and the header has the cosine of both.
    steps, guidance and call: as in `record`; the header has the schedule of that run, of which the
    denoiser computes one call. max_memory, `work`, on_progress, resuming and Cancelled are as in
    `quantize`.
    """
    scheme, method = encoder_scheme(width, method), spelled(method)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    general, held = captions()
    lines = calibration_prompts(prompts)
    calls = encoder_calls(pipe, lines, steps=steps, call=call, held_out=held)
    about = {"method": method, "prompts": len(prompts), "general": len(general), "seed": seed}
    times = schedule_of_run(pipe, prompts, steps, guidance, unprompted(call))
    schedule = Trajectory(times, [], seed, 1, 1, steps, guidance, call=described(call)).schedule()
    artifact = Artifact.new(pipe, schedule, {"encoder": about})
    artifact.header["encoders"] = {}
    mark = {"job": "encoders", "encoders": sorted(calls), "seed": seed, "scheme": scheme.to_json()}
    shelf = work_in(work, mark).path
    with shown(on_progress, "Text encoders") as told:
        notes = parts(processes().told(told), dict.fromkeys(calls, WHOLE), named=True)
        for name, own in calls.items():
            encoder = encoders_of(pipe)[name]
            job = encoder_job(
                encoder, own, width, method, seed=seed, device=device, max_memory=max_memory,
                work=shelf and shelf / name, on_progress=notes[name],
            )  # fmt: skip
            fill(artifact, name, encoder, job)
            given = encoder, artifact, name, own[0], job.device
            found = processes().once(lambda: checked_encoder(*given))  # noqa: B023
            artifact.header["encoders"][name] |= {"check": found} if found else {}
    return artifact


def encoder_job(
    encoder: nn.Module,
    calls: Sequence[Call],
    width: str | Scheme,
    method: str,
    *,
    seed: int = 0,
    device: Any = None,
    max_memory: int | None = None,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> EncoderJob:
    """One encoder quantized on `calls`, without a pipeline: `weights` and `errors` by layer.

    width: as in `quantize_encoder`, or a scheme, whose weights alone count.
    """
    scheme, algorithm = _chosen(width, method)
    backbone = describe(encoder)
    unread = unread_blocks(encoder, backbone, calls)
    rules = [
        replace(rule, algorithm=rule.scheme and algorithm)
        for rule in recipe_for(scheme, backbone, algorithm).rules
    ]
    rules[-1:-1] = [Rule(f"{block}.*", scheme, RoundToNearest()) for block in unread]
    trajectory = Trajectory((0.0, 0.0), list(calls), seed, BATCH, len(calls), 1)
    job = EncoderJob(encoder, backbone, Recipe(tuple(rules)), trajectory, device, seed)
    job.max_memory = max_memory
    job.maintain("none", Tiar())
    inputs = {
        "job": "encoder", "recipe": job.recipe.to_json(), "seed": seed, "versions": versions(),
        "model": fingerprint(encoder), "calls": [mark_of(call) for call in calls],
    }  # fmt: skip
    job.run_measured(work_in(work, inputs), processes().told(on_progress))
    return job


class EncoderJob(Job):
    """The quantization of a text encoder: what it has not seen has a say, and is measured.

    plain: every layer rounded to nearest, where something was held out.
    """

    facts: dict[str, Any]
    plain: dict[str, QTensor]
    compares = True

    def plain_copy(self, codes: Codes | None = None) -> nn.Module:
        """In memory as a whole, for it is run again and again, unless it is on disk itself."""
        return by_block(self.denoiser, self._apart, self.device, codes)

    @property
    def _apart(self) -> tuple[str, ...]:
        """The blocks that have their weights only when they are called."""
        whole = not any(p.is_meta for p in self.denoiser.parameters())
        return () if whole else self.backbone.blocks

    def run_measured(self, work: Work, on_progress: Progress | None) -> None:
        """`run`, and how far the states that are read are from full precision, before and after.

        Where calibrated weights are no better than nearest ones on what was held out, those stay.
        """
        calls = [call for call in self.trajectory.calls if call.row == HELD_OUT]
        self.facts, self.plain = {"read": list(self.trajectory.calls[0].read)}, {}
        if not calls:
            self.run(work, on_progress)
            return
        notes = parts(on_progress, {"before": 3 * PART, "blocks": WHOLE, "after": PART})

        def states(model: nn.Module) -> States:
            return [row for call in calls for row in states_read(model, call)]

        self.plain = plain = rounded_to_nearest(self.plan, self.values, notes["before"])
        full, twin = states(self.model), with_codes(self.denoiser, self.device, plain)
        rounded = cosines(full, states(twin))
        del twin
        self.run(work, notes["blocks"])
        notes["after"](0, 1, "held-out captions")
        found, least = _mean(cosines(full, states(self.model))), _mean(rounded)
        if found < least:
            kept = {k: t for n, q in plain.items() for k, t in q.tensors(n).items()}
            work.save(NEAREST, kept)
            self._take([*plain], kept, NEAREST, work)
            found = least
        same = sum(_equal(q, plain[name]) for name, q in self.weights.items())
        self.facts["held_out"] = {
            "captions": len(full), "cosine": found, "nearest": least, "layers_nearest": same,
        }  # fmt: skip
        notes["after"](1, 1, "held-out captions")

    def _rounded(
        self,
        algorithm: Any,
        root: nn.Module,
        group: dict[str, Scheme],
        data: tuple[Any, Any],
        seed: int,
        note: Progress,
    ) -> dict[str, QTensor]:
        if data[0] is None:
            known = self.known(root, group) if isinstance(algorithm, RoundToNearest) else {}
            return known or super()._rounded(algorithm, root, group, data, seed, note)
        seen, held = apart(*data)
        found = super()._rounded(algorithm, root, group, seen, seed, note)
        return found if held is None else better(root, found, group, held, self.known(root, group))

    def known(self, root: nn.Module, group: Mapping[str, Scheme]) -> dict[str, QTensor]:
        """Those of `plain` for layers inside of `root`, by their names there."""
        unit = next(name for name, module in self.model.named_modules() if module is root)
        start = f"{unit}." if unit else ""
        return {n: self.plain[f"{start}{n}"] for n in group} if self.plain else {}

    def described(self) -> dict[str, Any]:
        """What a header says: the layers, what the pipeline reads, what was measured there."""
        return super().described() | self.facts


def unread_blocks(encoder: nn.Module, backbone: Backbone, calls: Sequence[Call]) -> list[str]:
    """Blocks after the last hidden state that the pipeline reads."""
    read = calls[0].read
    places = [place for place in read if isinstance(place, int)]
    if not read or len(places) < len(read) or max(places) >= len(backbone.blocks):
        return []
    of_blocks = state_count(encoder, calls[0]) == len(backbone.blocks) + 1
    return list(backbone.blocks[max(places) :]) if of_blocks else []


def _equal(one: QTensor, other: QTensor) -> bool:
    return torch.equal(one.dequantize().cpu(), other.dequantize().cpu())


def _mean(values: Sequence[float]) -> float:
    return float(f"{sum(values) / len(values):.6g}")


def mark_of(call: Call) -> str:
    """What an encoder is asked, and what of its answer counts, as a short text."""
    mask = None if call.counted is None else call.counted.tolist()
    return digest([call.inputs["input_ids"].tolist(), mask, call.row, call.read])


def fill(artifact: Artifact, name: str, encoder: nn.Module, job: Job) -> None:
    """Put the codes of one encoder, and what is known of them, into the artifact."""
    for layer, q in job.weights.items():
        artifact.tensors |= {f"encoder/{name}.{k}": v for k, v in q.tensors(layer).items()}
    artifact.header["encoders"][name] = {
        "family": job.backbone.family,
        "model_class": type(encoder).__name__,
        "fingerprint": fingerprint(encoder),
    } | job.described()
