"""A folder that diffusers loads with torchao's 8-bit layers: the artifact's codes as they are.

`config.json` has a `quantization_config`, and the header of the weights says which tensor is of
which class, as torchao 0.16 and newer write it. Where the artifact quantizes inputs, torchao does,
a range a token; else weights alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import TenutoError
from ...files import remove_part, write_text
from ...model import KeyMap, same_names
from ...numerics import Format, QTensor, named
from ...progress import Progress
from .beside import check_room, write_companion
from .plan import Plan, Settings
from .report import Report, bf16_bytes, counted_progress, metadata, relative
from .tensors_file import Spec, TensorsFile

ABOUT = "a folder for from_pretrained of diffusers, with torchao"
SCHEMES = ("w8a8", "w8a16")
SUFFIX = ""
DEFAULT = torch.bfloat16
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
ENDS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
ROW: dict[str, Any] = {"_type": "PerRow", "_data": {"dim": -1}}
INPUTS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": ROW, "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}  # fmt: skip


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
    layers = _chosen(plan, settings)
    if not layers:
        raise TenutoError("No layer of this model would be quantized: nothing to export.")
    report = Report("diffusers", [], bf16_bytes(plan), dropped=plan.dropped)
    report.layers = dict.fromkeys(sorted(layers), "torchao int8")
    report.host = "diffusers >= 0.36 with torchao >= 0.16"
    dynamic = _dynamic(plan, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    remove_part(part)
    part.mkdir()
    try:
        _weights(plan, part / WEIGHTS, report, dynamic, on_progress)
        _config(plan, part, layers, dynamic)
        beside = write_companion(plan, report, part / WEIGHTS)
        part.replace(out)
    finally:
        remove_part(part)
    report.files = [out / WEIGHTS, out / CONFIG, out / beside.name]
    if any(s is not None and s.stored for s in map(plan.scheme, layers)):
        report.dropped.append("Ranges of inputs, one a step: torchao finds a range a token itself.")
    return report


def _chosen(plan: Plan, settings: Settings) -> frozenset[str]:
    """The linears in 8 bits: those of the artifact, and by `scheme` those inside blocks."""
    known = frozenset(plan.quantized())
    convs = len(known - plan.linears)
    if convs:
        plan.dropped.append(f"{convs} convolutions are in 16 bits: torchao has none in 8.")
    return (known & plan.linears) | (plan.inner if settings.scheme is not None else frozenset())


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


def _specs(plan: Plan, layers: dict[str, str]) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for host in plan.parts:
        layer, shape = host.removesuffix(".weight"), plan.shape(host)
        if layer == host or layer not in layers:
            found[host] = plan.dtype(host, DEFAULT), shape
            continue
        kinds = (torch.int8, shape), (torch.float32, (shape[0], 1)), (torch.int8, (shape[0], 1))
        found |= {f"{layer}.{end}": spec for end, spec in zip(ENDS, kinds, strict=True)}
    return found


def _header(plan: Plan, layers: dict[str, str], dynamic: bool) -> dict[str, str]:
    """Which class each tensor is of, as torchao reads it."""
    found = {"format": "pt", "tensor_names": json.dumps(list(plan.parts))}
    for host in plan.parts:
        layer = host.removesuffix(".weight")
        about: dict[str, Any] = {"_type": "Tensor"}
        if layer != host and layer in layers:
            data = {
                "act_quant_kwargs": INPUTS if dynamic else None, "reduce_range": False,
                "block_size": [1, plan.shape(host)[1]],
                "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            }  # fmt: skip
            names = ["zero_point", "qdata", "scale"]
            about = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": names}
        found[host] = json.dumps(about)
    return found


def _weights(
    plan: Plan, path: Path, report: Report, dynamic: bool, on_progress: Progress | None
) -> None:
    specs = _specs(plan, report.layers)
    check_room(path, specs)
    step = counted_progress(on_progress, len(plan.parts))
    said = metadata(plan, report, _header(plan, report.layers, dynamic))
    with TensorsFile(path, specs, said) as file:
        for host in plan.parts:
            step(host)
            value, layer = plan.value(host), host.removesuffix(".weight")
            if layer == host or layer not in report.layers:
                file.put(host, value.to(specs[host][0]))
                continue
            codes, own = _codes(plan, layer, value)
            scale = codes.scale[:, None]
            parts = codes.qdata, scale, torch.zeros_like(scale, dtype=torch.int8)
            for end, tensor in zip(ENDS, parts, strict=True):
                file.put(f"{layer}.{end}", tensor)
            file.flush()
            intended = codes.dequantize()
            with safe_open(str(path), "pt") as opened:
                read = [opened.get_tensor(f"{layer}.{end}").float() for end in ENDS]
            if not torch.equal((read[0] - read[2]) * read[1], intended):
                raise TenutoError(f"{layer} reads differently from what was written.")
            error = relative(intended, value)
            report.add(layer, report.layers[layer], kept=own, error=error)


def _config(plan: Plan, folder: Path, layers: frozenset[str], dynamic: bool) -> None:
    """The model's configuration, and how it is quantized."""
    model: Any = plan.denoiser
    facts = json.loads(model.to_json_string())
    facts.pop("_name_or_path", None)
    row = {**ROW, "_version": 1}
    weights = {"group_size": None, "granularity": row, "set_inductor_config": True}
    both = {
        "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "granularity": row,
        "reduce_range": False, "set_inductor_config": True, "weight_only_decode": False,
    }  # fmt: skip
    name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
    kind = {"_type": name, "_version": 2, "_data": both if dynamic else weights}
    facts["quantization_config"] = {
        "quant_method": "torchao", "quant_type": {"default": kind},
        "modules_to_not_convert": sorted(plan.linears - layers),
    }  # fmt: skip
    write_text(folder / CONFIG, json.dumps(facts, indent=2, sort_keys=True) + "\n")
