"""What was exported: in which format each layer is, the sizes, and what the format cannot hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import TenutoError
from ...progress import Progress
from ...resources import __version__
from ..artifact import Artifact
from ..header import KEY
from ..in_float import MARKS
from ..summary import counted, mib
from .plan import Plan

FORM = 1  # of what is written beside the weights
WORST = 0.5  # relative error of a layer's weight above which something is wrong
COMPANION = ".tenuto.json"


@dataclass
class Report:
    """An export. files: what was written, the main one first. before: bytes of it all in bf16.

    layers: (how a layer is written, how many of them kept the artifact's codes) by name. error: the
    relative error of the layer whose weight is farthest from the model's. host: the first version
    of a host that reads it. facts: of a text encoder, what its file says of it.
    """

    format: str
    files: list[Path]
    before: int
    layers: dict[str, str] = field(default_factory=dict)
    kept: int = 0
    error: float = 0.0
    worst: str = ""
    host: str = ""
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def after(self) -> int:
        """Bytes of the weights' files."""
        return sum(f.stat().st_size for f in self.files if f.suffix != ".json")

    @property
    def kinds(self) -> dict[str, int]:
        """How many layers are written in which way."""
        return dict(Counter(self.layers.values()))

    def add(self, layer: str, kind: str, *, kept: bool = False, error: float = 0.0) -> None:
        """Note one layer. TenutoError where its weight is not near that of the model."""
        if not error < WORST:
            raise TenutoError(
                f"The weight of {layer} would be {error:.0%} off in {kind}: nothing is written."
            )
        self.layers[layer] = kind
        self.kept += kept
        if error > self.error:
            self.error, self.worst = error, layer

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": self.format, "files": [str(f) for f in self.files], "bytes": self.after,
            "bytes_in_bf16": self.before, "layers_by_kind": self.kinds, "kept_codes": self.kept,
            "weight_error": self.error, "host": self.host, "dropped": self.dropped,
            "notes": self.notes,
        } | ({"encoder": self.facts} if self.facts else {})  # fmt: skip


def lines_of(report: Report) -> list[str]:
    """A report as people read it."""
    out, beside = report.files[0], [f for f in report.files if f.name.endswith(COMPANION)]
    found = [f"{out}: {mib(report.after)}; in bf16 it would be {mib(report.before)}."]
    kinds = ", ".join(f"{counted(n, 'layer')} in {kind}" for kind, n in report.kinds.items())
    own = "with the artifact's own codes" if report.kept else "rounded to nearest"
    partly = f"{report.kept} of them " if 0 < report.kept < len(report.layers) else ""
    found.append(f"{kinds}, {partly}{own}; all else in 16 bits or more.")
    if report.worst:
        found.append(f"Farthest from the model's weights: {report.worst}, {report.error:.2%}.")
    found.append(f"Each layer was read back. Read by: {report.host}.")
    found += [f"Left out: {line}" for line in report.dropped]
    found += [f"Note: {line}" for line in report.notes]
    found += [f"Beside it: {path}, with what Tenuto knows of it." for path in beside]
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    """The relative error of `found`; not a number where one of them has no finite size."""
    size = float(wanted.norm())
    gap = float((found - wanted).norm())
    return gap / size if size > 0 else (0.0 if gap == 0 else float("inf"))


def bf16_bytes(plan: Plan) -> int:
    """The bytes of a model in bf16."""
    return sum(2 * torch.Size(plan.shape(name)).numel() for name in plan.parts)


def travelling(plan: Plan, report: Report) -> dict[str, Any]:
    """What goes with the weights that no host reads but ours: cache schedule and forecast.

    In canonical names, as an artifact has them; tables and kernels as lists.
    """
    made: dict[str, Any] = {
        "version": FORM, "tenuto": __version__, "format": report.format, "host": report.host,
        "family": plan.backbone.family, "model_class": plan.keys.model_class,
        "layers": report.kinds,
    }  # fmt: skip
    if plan.about is not None:
        made["encoder"] = plan.about
    known = plan.original
    if known is None:
        return made
    made["schedule"] = known.header["schedule"]
    made["fingerprint"] = known.header["fingerprint"]
    made["made"] = known.header["made"]
    made |= {key: known.header[key] for key in ("family", "model_class")}
    made[MARKS] = plan.in_float(report.layers)
    for section in ("route", "forecast"):
        if known.header.get(section):
            tensors = {name: value.tolist() for name, value in known.section(section).items()}
            made[section] = known.header[section] | {"tensors": tensors}
    return made


def metadata(plan: Plan, report: Report, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The header of a file of tensors: ours beside `more`."""
    return {**(more or {}), KEY: json.dumps(travelling(plan, report), separators=(",", ":"))}


def travelled(facts: Mapping[str, Any]) -> Artifact:
    """The artifact of schedule and forecast that `travelling` wrote, as `attach` would take it."""
    header = {
        "format_version": "1.2", "family": facts["family"], "model_class": facts["model_class"],
        "prediction_type": None, "fingerprint": facts["fingerprint"],
        "schedule": facts["schedule"], "made": facts["made"], MARKS: facts[MARKS],
    }  # fmt: skip
    types = {"route/table": torch.bool, "forecast/kernel": torch.float64}
    tensors = {}
    for section in ("route", "forecast"):
        if section in facts:
            own = dict(facts[section])
            for name, values in own.pop("tensors").items():
                key = f"{section}/{name}"
                tensors[key] = torch.tensor(values, dtype=types.get(key, torch.float32))
            header[section] = own
    found = Artifact(header, tensors)
    found.validate("The companion of an exported file")
    return found


def counted_progress(on_progress: Progress | None, total: int) -> Callable[[str], None]:
    """A function that reports one more thing done, out of `total`."""
    done = 0

    def step(note: str) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(min(done, total), total, note)

    return step
