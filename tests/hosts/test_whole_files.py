"""An exported file in the real ComfyUI without any node of ours: the image of our own attach.

Formats that this version of the host, or its comfy-kitchen, does not read are skipped: 0.3.75 knows
fp8 alone, 0.31 and later the rest. `python benchmarks/check_comfy.py` runs this on a newer one.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import ExitStack
from dataclasses import replace
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
from tenuto.numerics.rotation import butterfly, size_for
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
# Our own attach is as far from itself (9e-3, 1.5e-2 in int8) with noise that is a millionth larger;
# layer by layer nothing differs, see below.
EDGE = {"flux2": 2e-2, "z_image": 2e-2}
SLICED = {"flux2": ("*.attn.to_out.0", "*.attn.to_add_out")}  # on parts of a row's tokens, no bias
INTEGER = ("w4a8", "w6a8", "int8")
NEAR = 127 * 2**-21  # of a code to an edge: some roundings of fp32


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


def sliced_in_float() -> bool:
    """Whether this host gives no bias and a part of the tokens to a weight that it dequantizes.

    torch takes the product for one of batches then (`bmm`), of which comfy-kitchen 0.2.40 has no
    integer form: findings/comfy_kitchen_product_of_a_slice.sh.
    """
    if importlib.util.find_spec("comfy_kitchen") is None:
        return False
    codes = importlib.import_module("comfy_kitchen.tensor").QuantizedTensor
    x = torch.linspace(-1, 1, 8 * 64).view(1, 8, 64)[:, :4]
    weight = codes.from_float(torch.eye(64), "TensorWiseINT8Layout", per_channel=True)
    return torch.equal(torch.nn.functional.linear(x, weight), x @ weight.dequantize().T)


def written(
    original: Any, in_comfy: Any, from_file: Any, out: Path, name: str, family: str
) -> tuple[Any, Artifact, Any]:
    """A host's float model, an artifact of it, and the host's model of the file with its codes."""
    from comfy.model_patcher import ModelPatcher

    from comfy_nodes.own_formats import own_formats

    why = unread(name)
    if why:
        pytest.skip(why)
    model, plain = original(family).bfloat16().float(), in_comfy(family)
    with torch.no_grad():  # what is not quantized is in 16 bits in the file
        for tensor in plain.model.diffusion_model.state_dict().values():
            tensor.copy_(tensor.bfloat16())
    made = artifact_of(plain.model.diffusion_model, name)
    report = export(model, "comfy", out, artifact=made)
    if family in SLICED and sliced_in_float():
        alone = replace(FORMATS[name][0], name="alone", activation=None)
        made.header["schemes"]["alone"] = alone.to_json()
        for layer, facts in made.header["layers"].items():
            if any(fnmatchcase(layer, pattern) for pattern in SLICED[family]):
                facts["scheme"] = "alone"
    host, cpu = from_file(family, out), torch.device("cpu")
    assert own_formats(host.diffusion_model) and len(report.layers) > 3
    return plain, made, ModelPatcher(host, load_device=cpu, offload_device=cpu)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_gives_the_image_of_our_own_attach(
    original: Any, in_comfy: Any, from_file: Any, prompts: Any, tmp_path: Path, name: str,
    family: str,
) -> None:  # fmt: skip
    from comfy_nodes.adapter import ComfyUI

    out = tmp_path / "m.safetensors"
    plain, made, host = written(original, in_comfy, from_file, out, name, family)
    file = image(host, family, prompts)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INTEGER)
def test_every_layer_answers_as_our_own_does(
    original: Any, in_comfy: Any, from_file: Any, prompts: Any, tmp_path: Path, name: str,
    family: str,
) -> None:  # fmt: skip
    """On the host's own inputs, in each call of a run, but for rows with a value on an edge.

    Rotations are sums, whose order is each program's own, so such a value's code may be the next.
    """
    from comfy_nodes.adapter import ComfyUI

    out, rows = tmp_path / "m.safetensors", list[Tensor]()
    plain, made, host = written(original, in_comfy, from_file, out, name, family)
    with comfy_file(out) as file:
        names = list(file.layers)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in names}
    ours = ComfyUI().install(plain, Patches(made, route=False, execution="int8"))
    with ExitStack() as stack:
        for layer in names:
            module = host.model.diffusion_model.get_submodule(layer)
            stack.callback(module.register_forward_hook(noting(seen[layer])).remove)
        image(host, family, prompts)
    called = {layer: found for layer, found in seen.items() if found}
    with ExitStack() as stack:
        for layer, found in called.items():
            module = plain.model.diffusion_model.get_submodule(layer)
            given = iter([x for x, _ in found])
            stack.callback(module.register_forward_pre_hook(giving(given)).remove)
            stack.callback(module.register_forward_hook(comparing(iter(found), rows)).remove)
        image(ours.handle, family, prompts)
    gap, edge = torch.cat(rows).T
    off = gap > 1e-5
    print(f"{name} {family}: {int(off.sum())} of {len(gap)} rows off, {int(edge.sum())} on an edge")
    assert len(called) >= len(names) - 2  # a host may hand one and its activation to its kernel
    assert len(rows) == STEPS * len(called)
    assert bool(edge[off].all()) and edge.mean() < 0.2


def noting(found: list[tuple[Tensor, Tensor]]) -> Any:
    """A hook that keeps what a layer got and answered."""

    def hook(_: Any, args: Any, answer: Tensor) -> None:
        found.append((args[0].clone(), answer.clone()))

    return hook


def giving(inputs: Any) -> Any:
    """A hook by which a layer gets these inputs."""
    return lambda _, args: (next(inputs), *args[1:])


def comparing(wanted: Any, rows: list[Tensor]) -> Any:
    """A hook that notes (R, 2): how far each row is from these, and if an input is on an edge."""

    def hook(_: Any, args: Any, answer: Tensor) -> None:
        x, other = next(wanted)
        gap = (answer - other).norm(dim=-1) / other.norm(dim=-1)
        codes = butterfly(x, size_for(x.shape[-1]))
        codes = 127 * codes / codes.abs().amax(-1, keepdim=True)
        edge = ((codes - codes.floor() - 0.5).abs() < NEAR).any(-1)
        rows.append(torch.stack((gap.flatten(), edge.flatten().float()), 1))

    return hook
