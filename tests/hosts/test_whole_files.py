"""An exported file in the real ComfyUI without any node of ours: the image of our own attach.

Formats that this version of the host, or its comfy-kitchen, does not read are skipped: 0.3.75 knows
fp8 alone, 0.31 and later the rest. `python benchmarks/check_comfy.py` runs this on a newer one.
"""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto import Artifact, describe, schemes
from tenuto.artifact.export import export
from tenuto.artifact.export.comfy_reader import comfy_file
from tenuto.artifact.host_names import canonicalized
from tenuto.model import key_map_of, layers
from tenuto.numerics import QTensor
from tenuto.runtime import Patches
from tenuto.runtime.recipe import quantizable

FAMILIES = ("sd3", "flux", "flux2", "wan", "lumina2", "z_image")
FORMATS = {
    "w4a8": (schemes.COMFY_W4A8, "asym_w4a8_int8"), "w6a8": (schemes.COMFY_W6A8, "asym_w4a8_int8"),
    "int8": (schemes.COMFY_INT8, "int8_tensorwise"), "fp8": (schemes.FP8, "float8_e4m3fn"),
    "nvfp4": (schemes.NVFP4, "nvfp4"),
}  # fmt: skip
STEPS = 6
SIX_BITS = (0, 2, 40)  # of comfy-kitchen, the oldest that was tried; 0.2.31 has none
# Inputs are rounded: where nearly all rows are alike (padding), one on an edge is one in each row.
EDGE = {"flux2": 2e-2, "z_image": 2e-2}


def unread(name: str) -> str:
    """Why this host does not read a format; nothing where it does."""
    known = importlib.import_module("comfy.quant_ops").QUANT_ALGOS
    if FORMATS[name][1] not in known:
        return f"this ComfyUI has no {FORMATS[name][1]}"
    if name == "w6a8":  # told by the width of a row: an older one takes it for 4 bits
        kitchen = version("comfy-kitchen")
        if tuple(map(int, kitchen.split("."))) < SIX_BITS:
            return f"comfy-kitchen {kitchen} has no codes of 6 bits"
    return ""


def artifact_of(denoiser: Any, name: str) -> Artifact:
    """Codes of the host's layers that a file has codes of, rounded to nearest: no modulations."""
    scheme, backbone = FORMATS[name][0], describe(denoiser)
    keys, inside = key_map_of(denoiser), describe(key_map_of(denoiser).view(denoiser))
    blocks = tuple(f"{block}." for block in backbone.blocks)
    made = Artifact.new(denoiser, {"timesteps": [900.0, 500.0], "steps": 2, "guidance": 1.0})
    made.header["schemes"], made.header["layers"] = {"s": scheme.to_json()}, {}
    for place, layer in layers(denoiser):
        names = keys.layers()[place]
        end = any(fnmatchcase(one, pattern) for one in names for pattern in inside.ends)
        if place.startswith(blocks) and not end and quantizable(layer, scheme):
            codes = QTensor.nearest(layer.weight.detach(), scheme.weight)
            made.tensors |= {f"weights/{k}": v for k, v in codes.tensors(place).items()}
            made.header["layers"][place] = {"scheme": "s", "shape": list(layer.weight.shape)}
    return canonicalized(made, denoiser)


def decoded_(denoiser: Any, path: Path) -> None:
    """Put into the host's float layers what a file's codes stand for."""
    with comfy_file(path) as file, torch.no_grad():
        for name in file.layers:
            denoiser.get_parameter(f"{name}.weight").copy_(file.decode(name))


def image(model: Any, family: str, prompts: Any) -> Tensor:
    """The latents of a whole run by the host's own sampler."""
    import comfy.sample

    text = prompts([1])
    given = [[text, {"pooled_output": text[:, 0].clone(), "num_tokens": text.shape[1]}]]
    empty = torch.zeros(1, 16, *((1, 8, 8) if family == "wan" else (8, 8)))
    noise = comfy.sample.prepare_noise(empty, 3, None)
    return comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", given, given, empty, disable_pbar=True, seed=3
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_gives_the_image_of_our_own_attach(
    original: Any, in_comfy: Any, from_file: Any, prompts: Any, tmp_path: Path, name: str,
    family: str,
) -> None:  # fmt: skip
    from comfy.model_patcher import ModelPatcher

    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.own_formats import own_formats

    why = unread(name)
    if why:
        pytest.skip(why)
    model, out, cpu = original(family).bfloat16().float(), tmp_path / "m.safetensors", "cpu"
    plain = in_comfy(family)
    with torch.no_grad():  # what is not quantized is in 16 bits in the file
        for tensor in plain.model.diffusion_model.state_dict().values():
            tensor.copy_(tensor.bfloat16())
    made = artifact_of(plain.model.diffusion_model, name)
    report = export(model, "comfy", out, artifact=made)
    host = from_file(family, out)
    assert own_formats(host.diffusion_model) and len(report.layers) > 3
    device = torch.device(cpu)
    file = image(ModelPatcher(host, load_device=device, offload_device=device), family, prompts)
    float_ = image(plain, family, prompts)
    if name == "fp8":  # a file has one scale a layer: what it stands for, by our own reader
        decoded_(plain.model.diffusion_model, out)
        wanted = image(plain, family, prompts)
    else:
        ours = ComfyUI().install(plain, Patches(made, route=False, execution="int8"))
        wanted = image(ours.handle, family, prompts)
    gap = float((file - wanted).norm() / wanted.norm())
    far = float((float_ - wanted).norm() / wanted.norm())
    print(f"{name} {family}: {gap:.2e} from our own attach, {far:.2e} from the float model")
    assert gap < EDGE.get(family, 1e-2) and gap < far, (gap, far)
