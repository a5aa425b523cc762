"""ComfyUI's own quantized files (`comfy_quant`), which Forge Neo and SGLang read too.

Each layer has a layout of its own (`comfy_layouts.py`); all else is bf16. What a layer is lies in
the tensor `LAYER.comfy_quant` and in the header, as different versions of the host look at either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TenutoError
from ...files import whole_file
from ...model import KeyMap, host_map_of, key_map_of, same_names
from ...numerics import float8
from ...progress import Progress
from .beside import check_room, write_companion
from .comfy_layouts import FP8, INT8, LAYOUTS, Coded, Layout, layout_of
from .comfy_reader import HEADER, MARK, comfy_file
from .plan import Plan, Settings
from .report import Report, bf16_bytes, counted_progress, metadata, relative
from .tensors_file import Spec, TensorsFile

ABOUT = "one safetensors file that ComfyUI loads like any model"
SCHEMES = tuple(LAYOUTS)
PREFIXED = True
SPREAD = 8  # of the largest inputs over the steps, from which on one scale for all is coarse
LINEAR = 0.5  # of a U-Net's bytes that must be in linears
GAP = 2.0**-20  # of the largest weight: how far the reader may be off where it adds up sums
DEFAULT = torch.bfloat16
SUFFIX = ".safetensors"


def keys_of(denoiser: nn.Module) -> KeyMap:
    """The names in a host's file; a host's own model has them already."""
    return same_names(denoiser) if key_map_of(denoiser) is not None else host_map_of(denoiser)


def check(plan: Plan, settings: Settings) -> None:
    """TenutoError where nothing could be written, or it would be wrong."""
    if plan.artifact is None and settings.scheme is None:
        raise TenutoError("Say what to write: an artifact, a scheme, or both.")
    whole = bf16_bytes(plan)
    linear = sum(2 * torch.Size(plan.shape(f"{name}.weight")).numel() for name in plan.linears)
    if linear < LINEAR * whole:
        raise TenutoError(
            f"Only {linear / whole:.0%} of this model is in linears, and ComfyUI reads quantized "
            "convolutions wrongly: export it to gguf, or use the artifact by Tenuto's node."
        )


def write(plan: Plan, out: Path, settings: Settings, on_progress: Progress | None) -> Report:
    """Write `out` and, beside it, what travels with it; read back before it gets its name."""
    chosen = dict(_chosen(plan, settings))
    if not chosen:
        raise TenutoError("No layer of this model would be quantized: nothing to export.")
    report = Report("comfy", [out], bf16_bytes(plan), dropped=plan.dropped)
    for layer, layout in chosen.items():
        report.layers[layer] = layout.format
    report.host = "ComfyUI >= " + max((x.since for x in chosen.values()), key=_version)
    job = _Job(plan, settings, report, chosen)
    specs = job.specs()
    check_room(out, specs)
    with whole_file(out) as part:
        job.write(part, specs, on_progress)
    if plan.about is None:
        _notes(plan, report, settings)
        report.files += [write_companion(plan, report, out)]
    return report


def _chosen(plan: Plan, settings: Settings) -> Iterator[tuple[str, Layout]]:
    """(layer, layout) of what is quantized; what is left out is said."""
    unknown, known = 0, set(plan.quantized()) - plan.tables
    convs, outer = len(known - plan.linears), len((known & plan.linears) - plan.inner)
    for host in sorted(plan.inner | plan.tables):
        scheme = plan.scheme(host)
        if scheme is None and settings.scheme is None:
            continue
        layout = LAYOUTS[settings.scheme or ""] if scheme is None else layout_of(scheme)
        if layout.fits(plan.shape(f"{host}.weight")):
            yield host, layout
        else:
            unknown += 1
    if convs:
        plan.dropped.append(
            f"{convs} convolutions are in 16 bits: hosts read quantized ones wrong."
        )
    if outer:
        plan.dropped.append(
            f"{outer} first, last and embedding layers are in 16 bits, from the model's own "
            "weights: hosts look at their shapes and types."
        )
    if unknown:
        plan.dropped.append(
            f"{unknown} layers are in 16 bits: the layout does not fit their shape."
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


class _Job:
    """One file: what its tensors are, and their values one layer at a time."""

    def __init__(
        self, plan: Plan, settings: Settings, report: Report, layouts: dict[str, Layout]
    ) -> None:
        self.plan, self.settings, self.report, self.layouts = plan, settings, report, layouts
        self.scales = {n: self._input_scale(n) for n, lay in layouts.items() if lay.format == FP8}
        self.facts = {name: self._facts(name) for name in layouts}

    def name(self, host: str) -> str:
        """A name as the file has it."""
        return f"{self.settings.prefix}{host}"

    def _facts(self, host: str) -> dict[str, Any]:
        """The JSON of one layer."""
        layout = self.layouts[host]
        found = {"format": layout.format, **layout.settings(self.plan.shape(f"{host}.weight"))}
        if layout.format == FP8 and self.scales[host] is None:
            found["full_precision_matrix_mult"] = True
        return found

    def _input_scale(self, host: str) -> Tensor | None:
        """The largest input over all steps / 448: what the host divides by. None: not known."""
        found = self.plan.largest_inputs(host)
        if found is not None and len(found):
            if float(found.max()) > SPREAD * float(found.median()):
                self.report.notes.append(
                    f"The inputs of {host} are {float(found.max() / found.median()):.0f} times as "
                    "large at one step as at most: one scale for all is coarse there."
                )
        else:
            names = (n.removesuffix(".weight") for n, _ in self.plan.parts[f"{host}.weight"])
            known = [self.settings.inputs[n] for n in names if n in self.settings.inputs]
            found = torch.tensor(known)
        most = float(found.max()) if len(found) else 0.0
        return torch.tensor(most / float8.MOST) if most > 0 else None

    def _mark(self, host: str) -> Tensor:
        return torch.tensor(list(json.dumps(self.facts[host]).encode()), dtype=torch.uint8)

    def specs(self) -> dict[str, Spec]:
        """Type and shape of every tensor of the file."""
        found: dict[str, Spec] = {}
        for host in self.plan.parts:
            layer = host.removesuffix(".weight")
            if layer not in self.layouts or layer == host:
                found[self.name(host)] = self.plan.dtype(host, DEFAULT), self.plan.shape(host)
                continue
            for end, spec in self.layouts[layer].specs(self.plan.shape(host)).items():
                found[self.name(f"{layer}.{end}")] = spec
            if self.scales.get(layer) is not None:
                found[self.name(f"{layer}.input_scale")] = torch.float32, ()
            mark = self._mark(layer)
            found[self.name(f"{layer}.{MARK}")] = torch.uint8, tuple(mark.shape)
        more = {name: (t.dtype, tuple(t.shape)) for name, t in self.plan.more.items()}
        return found | more

    def write(self, part: Path, specs: dict[str, Spec], on_progress: Progress | None) -> None:
        """All tensors; every layer is read back as soon as it is there."""
        layers = {self.name(host): facts for host, facts in self.facts.items()}
        said = {HEADER: json.dumps({"format_version": "1.0", "layers": layers})}
        step = counted_progress(on_progress, len(self.plan.parts))
        with TensorsFile(part, specs, metadata(self.plan, self.report, said)) as file:
            for name, tensor in self.plan.more.items():
                file.put(name, tensor)
            for host in self.plan.parts:
                step(host)
                value = self.plan.value(host)
                layer = host.removesuffix(".weight")
                if layer == host or layer not in self.layouts:
                    file.put(self.name(host), value.to(specs[self.name(host)][0]))
                    continue
                codes = self.plan.codes(layer)
                coded = self.layouts[layer].coded(value, codes)
                for end, tensor in coded.tensors.items():
                    file.put(self.name(f"{layer}.{end}"), tensor)
                scale = self.scales.get(layer)
                if scale is not None:
                    file.put(self.name(f"{layer}.input_scale"), scale)
                file.put(self.name(f"{layer}.{MARK}"), self._mark(layer))
                file.flush()
                self._compare(part, layer, coded)
                kind = self.report.layers[layer]
                error = relative(coded.weight, value)
                self.report.add(layer, kind, kept=coded.kept, error=error)
        with comfy_file(part) as found:
            found.check()

    def _compare(self, part: Path, layer: str, coded: Coded) -> None:
        with comfy_file(part) as file:
            read = file.decode(self.name(layer), tuple(coded.weight.shape))
        gap, size = (read - coded.weight).abs().max(), coded.weight.abs().max()
        if read.shape != coded.weight.shape or not float(gap) <= GAP * float(size):
            raise TenutoError(f"{layer} reads differently from what was written: no file is kept.")


def _notes(plan: Plan, report: Report, settings: Settings) -> None:
    """What a user should know of the file."""
    kinds = set(report.layers.values())
    schemes = [plan.scheme(host) for host in report.layers]
    ranged = any(s is not None and s.stored for s in schemes)
    if kinds - {FP8} and ranged:
        report.dropped.append(
            "Ranges of inputs, one a step: this format has none, and the host finds a range a "
            "token itself."
        )
    if FP8 in kinds and not ranged and not settings.inputs:
        report.notes.append(
            "The fp8 layers have no range of their inputs: the host multiplies in 16 bits, and "
            "only memory is saved. An artifact of fp8-static has them."
        )
    anew = sum(s is not None for s in schemes) - report.kept
    if anew:
        report.notes.append(
            f"The codes of {anew} layers do not exist there and were rounded anew, without "
            "calibration: quantize with a scheme of the format, such as comfy-w4a8."
        )
    if kinds - {INT8, FP8}:
        report.notes.append(
            "A LoRA that the host merges into 4-bit layers rounds them anew and undoes most of the "
            "calibration: merge it before, or use Tenuto's node."
        )
