"""The calibrated weights in bf16 under the model's own names: works wherever the model does.

Codes, scales and smoothing are folded in; nothing gets smaller. For hosts that know no quantized
file, and to merge a LoRA.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ...errors import TenutoError
from ...files import whole_file
from ...model import KeyMap, same_names
from ...progress import Progress
from .beside import check_room, write_companion
from .plan import Plan, Settings
from .report import Report, bf16_bytes, counted_progress, metadata, relative
from .tensors_file import TensorsFile

ABOUT = "one safetensors file in bf16, in diffusers' names"
SCHEMES: tuple[str, ...] = ()
DEFAULT = torch.bfloat16
SUFFIX = ".safetensors"


def keys_of(denoiser: nn.Module) -> KeyMap:
    """The model's own names."""
    return same_names(denoiser)


def check(plan: Plan, settings: Settings) -> None:
    """TenutoError where there is nothing to fold in."""
    if plan.artifact is None:
        raise TenutoError("There is nothing to fold into the weights: give an artifact.")


def write(plan: Plan, out: Path, settings: Settings, on_progress: Progress | None) -> Report:
    """Write `out` and what travels with it; every layer is read back."""
    report = Report("float", [out], bf16_bytes(plan), dropped=plan.dropped, host="diffusers")
    for layer in plan.quantized():
        report.layers[layer] = "bf16"
    specs = {host: (plan.dtype(host, DEFAULT), plan.shape(host)) for host in plan.parts}
    check_room(out, specs)
    step = counted_progress(on_progress, len(plan.parts))
    with (
        whole_file(out) as part,
        TensorsFile(part, specs, metadata(plan, report, {"format": "pt"})) as file,
    ):
        for host in plan.parts:
            step(host)
            name, layer = host, host.removesuffix(".weight")
            value, codes = plan.value(host), plan.codes(layer) if layer != host else None
            wanted = value if codes is None else codes.dequantize()
            rounded = wanted.to(specs[name][0])
            file.put(name, rounded)
            file.flush()
            with safe_open(str(part), "pt") as opened:
                same = torch.equal(opened.get_tensor(name), rounded)
            if not same or not bool(rounded.isfinite().all()):
                raise TenutoError(f"{host} reads differently from what was written.")
            if codes is not None:
                report.add(layer, "bf16", kept=True, error=relative(wanted, value))
    if any(s is not None and s.activation is not None for s in map(plan.scheme, report.layers)):
        report.dropped.append("Formats of inputs: floating weights take floating inputs.")
    report.files += [write_companion(plan, report, out)]
    return report
