"""A folder that diffusers loads with a library's 8-bit layers: the artifact's codes as they are.

`config.json` has a `quantization_config`, which tells diffusers whose layers they are. What a
library's layers look like is in a file of its own: `folder_torchao.py`, `folder_sdnq.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import TenutoError
from ...files import remove_part, write_text
from ...model import KeyMap, same_names
from ...numerics import Format, QTensor, named
from ...progress import Progress
from . import folder_sdnq, folder_torchao
from .beside import check_room, write_companion
from .plan import Plan, Settings
from .report import Report, bf16_bytes, counted_progress, metadata, relative
from .tensors_file import Spec, TensorsFile

ABOUT = "a folder for from_pretrained of diffusers, with torchao or SDNQ"
SCHEMES = ("w8a8", "w8a16")
SUFFIX = ""
DEFAULT = torch.bfloat16
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
LIBRARIES: dict[str, ModuleType] = {"torchao": folder_torchao, "sdnq": folder_sdnq}


def keys_of(denoiser: nn.Module) -> KeyMap:
    """The model's own names."""
    return same_names(denoiser)


def check(plan: Plan, settings: Settings) -> None:
    """TenutoError where nothing could be written."""
    if plan.artifact is None and settings.scheme is None:
        raise TenutoError("Say what to write: an artifact, a scheme, or both.")
    if not hasattr(plan.denoiser, "save_config"):
        raise TenutoError(f"{type(plan.denoiser).__name__} has no configuration of diffusers.")


def write(plan: Plan, out: Path, settings: Settings, on_progress: Progress | None) -> Report:
    """Write the folder `out`, which must not be there yet; every layer is read back."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TenutoError(f"{out} is there already: name a new folder.")
    library = LIBRARIES[settings.library]
    layers = _chosen(plan, settings, library)
    if not layers:
        raise TenutoError("No layer of this model would be quantized: nothing to export.")
    report = Report("diffusers", [], bf16_bytes(plan), dropped=plan.dropped)
    report.layers = dict.fromkeys(sorted(layers), str(library.KIND))
    report.host = library.HOST
    dynamic = _dynamic(plan, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    remove_part(part)
    part.mkdir()
    try:
        header = library.header(plan, layers, dynamic)
        _weights(plan, part / WEIGHTS, report, header, library, on_progress)
        _config(plan, part, library.config(plan, layers, dynamic))
        beside = write_companion(plan, report, part / WEIGHTS)
        part.replace(out)
    finally:
        remove_part(part)
    report.files = [out / WEIGHTS, out / CONFIG, out / beside.name]
    if any(s is not None and s.stored for s in map(plan.scheme, layers)):
        report.dropped.append(
            f"Ranges of inputs, one a step: {settings.library} finds them itself where it is to."
        )
    return report


def _chosen(plan: Plan, settings: Settings, library: ModuleType) -> frozenset[str]:
    """The layers in 8 bits: those of the artifact, and by `scheme` the linears inside blocks."""
    known = frozenset(plan.quantized())
    convs = len(known - plan.linears)
    if convs and not library.CONVOLUTIONS:
        plan.dropped.append(
            f"{convs} convolutions are in 16 bits: {settings.library} has none in 8, sdnq has."
        )
        known &= plan.linears
    return known | (plan.inner if settings.scheme is not None else frozenset())


def _dynamic(plan: Plan, settings: Settings) -> bool:
    """Whether inputs are quantized too."""
    schemes = [plan.scheme(host) for host in plan.quantized()]
    if not schemes and settings.scheme is not None:
        schemes = [named(settings.scheme)]
    return any(s is not None and s.activation is not None for s in schemes)


def _codes(plan: Plan, layer: str, value: Tensor) -> tuple[QTensor, bool]:
    """8-bit codes of a layer, and whether they are the artifact's; else of what its codes mean."""
    own = plan.codes(layer)
    plain = own is not None and own.zero_point is None and own.channel is None
    if own is not None and plain and own.dtype == "int" and not own.rotation:
        return own, True
    return QTensor.nearest(value if own is None else own.dequantize(), Format(8)), False


def _specs(plan: Plan, layers: Container[str], library: ModuleType) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for host in plan.parts:
        layer, shape = host.removesuffix(".weight"), plan.shape(host)
        if layer == host or layer not in layers:
            found[host] = plan.dtype(host, DEFAULT), shape
        else:
            found |= library.specs(layer, shape)
    return found


def _weights(
    plan: Plan, path: Path, report: Report, header: dict[str, str], library: ModuleType,
    on_progress: Progress | None,
) -> None:  # fmt: skip
    specs = _specs(plan, report.layers, library)
    check_room(path, specs)
    step = counted_progress(on_progress, len(plan.parts))
    with TensorsFile(path, specs, metadata(plan, report, header)) as file:
        for host in plan.parts:
            step(host)
            value, layer = plan.value(host), host.removesuffix(".weight")
            if layer == host or layer not in report.layers:
                file.put(host, value.to(specs[host][0]))
                continue
            codes, own = _codes(plan, layer, value)
            made = library.tensors(layer, codes)
            for name, tensor in made.items():
                file.put(name, tensor)
            file.flush()
            intended = codes.dequantize()
            with safe_open(str(path), "pt") as opened:
                read = {name: opened.get_tensor(name) for name in made}
            if not torch.equal(library.decoded(layer, read), intended):
                raise TenutoError(f"{layer} reads differently from what was written.")
            error = relative(intended, value)
            report.add(layer, report.layers[layer], kept=own, error=error)


def _config(plan: Plan, folder: Path, about: dict[str, Any]) -> None:
    """The model's configuration, and how it is quantized."""
    model: Any = plan.denoiser
    facts = json.loads(model.to_json_string())
    facts.pop("_name_or_path", None)
    facts["quantization_config"] = about
    write_text(folder / CONFIG, json.dumps(facts, indent=2, sort_keys=True) + "\n")
