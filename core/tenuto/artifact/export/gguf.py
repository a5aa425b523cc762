"""GGUF, as ComfyUI-GGUF and diffusers read it: smaller files and memory, no faster arithmetic.

Calibrated codes of 4 bits with ranges of 32 columns are Q4_1's own, and stay. Codes of 5 bits and
more, and of 8-bit floats, have a range a row, which Q8_0's of 32 weights is finer than: these
layers are rounded anew, from the model's weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import TenutoError
from ...files import whole_file
from ...model import KeyMap, host_map_of, key_map_of, same_names
from ...progress import Progress
from ..header import KEY
from .beside import check_bytes, write_companion
from .gguf_blocks import KINDS, SIZE, Blocks, Kind, kept, nearest, unpacked
from .gguf_file import Entry, GgufWriter, Value, read_gguf
from .plan import Plan, Settings
from .report import Report, bf16_bytes, counted_progress, relative, travelling

ABOUT = "one GGUF file for ComfyUI-GGUF and diffusers"
SCHEMES = tuple(KINDS)
SUFFIX = ".gguf"
F32, F16 = 0, 1  # ggml's types
FLOATS = {F32: torch.float32, F16: torch.float16}
SMALL = 1024  # values of a tensor that stays in fp32
WIDE = ("modulation", "scale_shift_table", "emb_pos", "pos_embed", "pos_embedder")
MOST = 65504.0  # of fp16
DIMENSIONS = 4  # of ggml's tensors
SHAPE = "comfy.gguf.orig_shape."  # of one that has more
ARCHITECTURES = {  # as ComfyUI-GGUF asks for them
    "flux": "flux", "flux2": "flux", "chroma": "flux", "sd3": "sd3", "wan": "wan",
    "lumina2": "lumina2", "z_image": "lumina2", "qwen_image": "qwen_image",
    "hunyuan_video": "hyvid", "hunyuan_image": "hyvid",
}  # fmt: skip


def keys_of(denoiser: nn.Module) -> KeyMap:
    """The names in a host's file; a host's own model has them already."""
    return same_names(denoiser) if key_map_of(denoiser) is not None else host_map_of(denoiser)


def check(plan: Plan, settings: Settings) -> None:
    """TenutoError where no program would read it."""
    _ = architecture(plan)
    if plan.artifact is None and settings.scheme is None:
        raise TenutoError("Say what to write: an artifact, a scheme, or both.")


def architecture(plan: Plan) -> str:
    """`general.architecture` of a model; TenutoError where there is none for it."""
    family = plan.backbone.family
    if family == "unet":
        return "sdxl" if any(name.startswith("label_emb.") for name in plan.parts) else "sd1"
    if family not in ARCHITECTURES:
        raise TenutoError(f"No program that Tenuto knows reads {family} from GGUF.")
    return ARCHITECTURES[family]


def write(plan: Plan, out: Path, settings: Settings, on_progress: Progress | None) -> Report:
    """Write `out` and what travels with it; every tensor is read back before it gets its name."""
    kinds = _kinds(plan, settings)
    if not kinds:
        raise TenutoError("No layer of this model would be quantized: nothing to export.")
    report = Report("gguf", [out], bf16_bytes(plan), dropped=plan.dropped)
    report.layers = {layer: kind.name for layer, kind in kinds.items()}
    report.host = "ComfyUI-GGUF, or diffusers with gguf >= 0.10"
    entries = [_entry(plan, host, kinds) for host in plan.parts]
    check_bytes(out, sum(entry.bytes for entry in entries))
    step = counted_progress(on_progress, 2 * len(entries))
    marks: dict[str, Tensor] = {}
    with whole_file(out) as part:
        with GgufWriter(part, _values(plan, report, kinds), entries) as file:
            for host in plan.parts:
                step(host)
                marks[host] = _put(plan, host, kinds, file, report)
        _read_back(plan, part, kinds, marks, step)
    if any(s is not None and s.activation is not None for s in map(plan.scheme, report.layers)):
        report.dropped.append("Formats of inputs: these programs multiply in 16 bits.")
    report.files += [write_companion(plan, report, out)]
    return report


def _kinds(plan: Plan, settings: Settings) -> dict[str, Kind]:
    """The blocks of every layer that is quantized; what is left out is said."""
    found: dict[str, Kind] = {}
    odd, outer = 0, sum(1 for host in plan.quantized() if host not in plan.inner)
    for layer in sorted(plan.inner):
        scheme = plan.scheme(layer)
        name = settings.scheme
        if scheme is not None:
            name = "q4_1" if scheme.weight.bits <= 4 else "q8_0"
        if name is not None and plan.shape(f"{layer}.weight")[1] % SIZE == 0:
            found[layer] = KINDS[name]
        else:
            odd += name is not None
    if outer:
        plan.dropped.append(
            f"{outer} first, last, embedding and convolution layers are in 16 bits, from the "
            "model's own weights."
        )
    if odd:
        plan.dropped.append(f"{odd} layers are in 16 bits: their inputs are no multiple of {SIZE}.")
    return found


def _entry(plan: Plan, host: str, kinds: dict[str, Kind]) -> Entry:
    """Type, shape and size of one tensor in the file."""
    shape, layer = plan.shape(host) or (1,), host.removesuffix(".weight")
    count = torch.Size(shape).numel()
    if layer != host and layer in kinds:
        kind = kinds[layer]
        return Entry(host, shape, kind.number, count // SIZE * kind.bytes)
    wide = len(shape) == 1 or count <= SMALL or host.rpartition(".")[2] in WIDE
    flat = shape if len(shape) <= DIMENSIONS else (shape[0], count // shape[0])
    return Entry(host, flat, F32 if wide else F16, count * (4 if wide else 2))


def _values(plan: Plan, report: Report, kinds: dict[str, Kind]) -> dict[str, Value]:
    """What the file says of itself."""
    common = max(kinds.values(), key=list(kinds.values()).count)
    shapes = {host: plan.shape(host) for host in plan.parts}
    return {
        "general.architecture": architecture(plan),
        "general.quantization_version": 2,
        "general.file_type": common.file,
        **{SHAPE + n: list(s) for n, s in shapes.items() if len(s) > DIMENSIONS},
        KEY: json.dumps(travelling(plan, report), separators=(",", ":")),
    }


def _put(plan: Plan, host: str, kinds: dict[str, Kind], file: GgufWriter, report: Report) -> Tensor:
    """Write one tensor; a checksum of what a reader is to find."""
    value, layer = plan.value(host), host.removesuffix(".weight")
    entry = _entry(plan, host, kinds)
    if layer == host or layer not in kinds:
        if entry.type == F16 and float(value.abs().max()) > MOST:
            raise TenutoError(f"{host} has values that fp16 has not: it cannot be in a GGUF file.")
        rounded = value.to(FLOATS[entry.type])
        file.put(host, rounded)
        return _mark(rounded)
    blocks, own = _blocks(plan, layer, value, kinds[layer])
    file.put(host, blocks.packed())
    weight = blocks.weight(tuple(value.shape))
    report.add(layer, blocks.kind.name, kept=own, error=relative(weight, value))
    return _mark(weight)


def _blocks(plan: Plan, layer: str, value: Tensor, kind: Kind) -> tuple[Blocks, bool]:
    """The blocks of a layer, and whether they are the artifact's codes."""
    codes = plan.codes(layer)
    found = None if codes is None or kind.name != "q4_1" else kept(codes)
    if found is not None:
        return found, True
    if codes is not None and kind.bits <= 5:
        value = codes.dequantize()  # what was learnt is in these
    return nearest(value, kind), False


def _mark(value: Tensor) -> Tensor:
    """Sums that tell one tensor from another: of the values, and of them by their place."""
    flat = value.flatten().double()
    places = torch.arange(len(flat), dtype=torch.float64).remainder_(8191)
    return torch.stack((flat.sum(), (flat * places).sum(), flat.abs().max()))


def _read_back(
    plan: Plan,
    path: Path,
    kinds: dict[str, Kind],
    marks: dict[str, Tensor],
    step: Callable[[str], None],
) -> None:
    """TenutoError unless every tensor reads as it was meant."""
    values, entries = read_gguf(path)
    with path.open("rb") as file:
        for host, mark in marks.items():
            step(host)
            entry, layer = entries[host], host.removesuffix(".weight")
            file.seek(entry.offset)
            kind = kinds.get(layer) if layer != host else None
            data = torch.frombuffer(bytearray(file.read(entry.bytes)), dtype=torch.uint8)
            if kind is not None:
                found = unpacked(data.view(-1, kind.bytes), kind)
            else:
                found = data.view(FLOATS[entry.type])
            shape = values.get(SHAPE + host, list(entry.shape))
            same = torch.equal(_mark(found), mark) and shape == list(plan.shape(host) or (1,))
            if not same or not bool(found.isfinite().all()):
                raise TenutoError(f"{host} reads differently from what was written.")
