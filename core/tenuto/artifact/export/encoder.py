"""A quantized text encoder as one of ComfyUI's single files: names, tokenizer, what is left out.

The file itself is written and read back as that of a denoiser, by `comfy.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import ModelError
from ...model import KeyMap, Place, describe
from ...model.encoder_names import EncoderNames, known_to_hosts
from ...numerics import QTensor, Scheme, schemes
from ...progress import Progress
from ..artifact import Artifact
from . import comfy
from .plan import Plan, Settings
from .report import Report
from .size import size_note

TABLE = schemes.W8A16  # of embeddings: a scale a row


def encoder_plan(
    encoder: nn.Module,
    names: EncoderNames,
    codes: Mapping[str, QTensor],
    scheme: Scheme,
    tokens: Mapping[str, Tensor],
    about: Mapping[str, Any],
    tables: Mapping[str, QTensor] | None = None,
) -> Plan:
    """What a file of `encoder` has, whose layers are in `codes` by the model's own names.

    tokens: tensors with the tokenizer. about: what the header says of it. tables: embeddings in 8
    bits (`TABLE`). ModelError where nothing in it has codes.
    """
    keys, tables = encoder_keys(encoder, names), tables or {}
    known = {s.name: s.to_json() for s in (scheme, TABLE)}
    header: dict[str, Any] = {"layers": {}, "schemes": known}
    tensors: dict[str, Tensor] = {}
    for own, some in ((scheme, codes), (TABLE, tables)):
        for layer, q in some.items():
            host = keys.module(layer)[0]
            header["layers"][host] = {"scheme": own.name, "shape": list(q.shape)}
            tensors |= {f"weights/{k}": t for k, t in q.to("cpu").tensors(host).items()}
    if not header["layers"]:
        raise ModelError("No layer of this encoder fits the format: nothing to write.")
    plan = Plan(encoder, keys, describe(encoder), Artifact(header, tensors))
    plan.more, plan.about = dict(tokens), dict(about)
    plan.tables = frozenset(keys.module(layer)[0] for layer in tables)
    gone = sorted(n for n in encoder.state_dict() if n not in keys.places)
    eyes = [n for n in gone if n.startswith(names.dropped) and not n.startswith("encoder.")]
    if eyes:
        plan.dropped.append(
            f"{len(eyes)} tensors that read images ({eyes[0].split('.')[0]}): the denoiser gets "
            "states of the text alone."
        )
    rows = {name: plan.shape(name)[0] for name in plan.parts if plan.shape(name)}
    plan.about["known_as"] = known_to_hosts(rows)
    return plan


def encoder_keys(encoder: nn.Module, names: EncoderNames) -> KeyMap:
    """Where each parameter of an encoder is in a file."""
    places = {}
    for name, tensor in encoder.state_dict().items():
        host = names.in_file(name)
        if host is not None:
            places[name] = Place(host, (0, len(tensor) if tensor.ndim else 1))
    return KeyMap(type(encoder).__name__, places, {})


def write_encoder(plan: Plan, out: Path, on_progress: Progress | None = None) -> Report:
    """Write the file, whole or not at all; every layer is read back and compared."""
    report = comfy.write(plan, out, Settings(), on_progress)
    report.facts = plan.about or {}
    known = report.facts.get("known_as")
    if known is None:
        report.notes.append(
            "No encoder that ComfyUI knows has these names and sizes: its loaders will not take "
            "this file for one."
        )
    else:
        report.notes.append(f"ComfyUI takes the file for {known}.")
    report.notes += filter(None, [size_note(report)])
    return report
