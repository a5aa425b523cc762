"""Whole files, read by the code of those who will read them: comfy-kitchen, gguf."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import attach, quantize, quantize_text_encoder, record
from tenuto.artifact.export import export, read_companion
from tenuto.artifact.export.comfy_reader import comfy_file
from tenuto.artifact.export.gguf_blocks import KINDS
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.errors import ArtifactError
from tenuto.model import host_map_of
from tenuto.numerics import QTensor, Scheme, schemes
from tenuto.numerics.scheme import Recipe, Rule
from tenuto.sampling import OutputKernel
from tests.core import tiny_pipelines
from tests.core.tiny_encoders import encoder_folder

NATIVE = {"COMFY_W4A8": "asym_w4a8_int8", "COMFY_W6A8": "asym_w4a8_int8", "COMFY_INT8":
          "int8_tensorwise", "NVFP4": "nvfp4", "W8A8": "int8_tensorwise"}  # fmt: skip


def z_image() -> nn.Module:
    """Of a width that 64 divides, and with it all layouts but for a few layers."""
    return tiny_pipelines.z_image().transformer


@pytest.fixture(scope="module")
def made() -> Any:
    """made(scheme): an artifact of a tiny Z-Image whose layers are all rounded to nearest."""
    pipe = tiny_pipelines.z_image()
    pipe.set_progress_bar_config(disable=True)
    seen = record(pipe, prompts=["a cat"], steps=2, guidance=1.0, batch=1, runs=1,
                  call={"height": 32, "width": 32})  # fmt: skip
    known: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in known:
            fit = ("*.attention.*", "*.feed_forward.w1", "*.feed_forward.w3")
            rules = [Rule(p, getattr(schemes, name), RoundToNearest()) for p in fit]
            known[name] = quantize(pipe, Recipe(tuple(rules)), seen)
        return known[name]

    return build


def by_kitchen(file: Any, layer: str, facts: dict[str, Any]) -> Tensor:
    """The weight of a layer in fp32, by the eager code of comfy-kitchen."""
    eager = "comfy_kitchen.backends.eager"
    quantization = importlib.import_module(f"{eager}.quantization")
    tensor = file.file.get_tensor
    weight, kind = tensor(f"{layer}.weight"), facts["format"]
    if kind == "asym_w4a8_int8":
        own = importlib.import_module(f"{eager}.w4a8_int8")
        book = f"{layer}.weight_codebook"
        return own.dequantize_w4a8_int8_weight(
            weight, tensor(f"{layer}.weight_s_rel"), tensor(f"{layer}.weight_s_channel"),
            tensor(book) if book in file.names else None, None, facts["group_size"],
            facts["convrot_groupsize"], torch.float32,
        )  # fmt: skip
    scale = tensor(f"{layer}.weight_scale")
    if kind == "nvfp4":
        second = tensor(f"{layer}.weight_scale_2")
        return quantization.dequantize_nvfp4(weight, second, scale, torch.float32)
    if kind == "float8_e4m3fn":
        return quantization.dequantize_per_tensor_fp8(weight, scale, torch.float32)
    if facts.get("convrot"):
        size = facts["convrot_groupsize"]
        return quantization.dequantize_int8_convrot_weight(weight, scale, size)
    return quantization.dequantize_int8_simple(weight, scale)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "comfy-int8", "comfy-w6a8", "comfy-w4a8",
                                    "nvfp4"])  # fmt: skip
def test_comfy_kitchen_reads_what_our_reader_reads(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "comfy_kitchen", reason="needs comfy-kitchen, 190 MB: pip install comfy-kitchen==0.2.40"
    )
    out = tmp_path / "z.safetensors"
    report = export(z_image(), "comfy", out, scheme=scheme)
    with comfy_file(out) as file:
        file.check()
        assert set(file.layers) == set(report.layers) and len(report.layers) > 12
        for layer, facts in file.layers.items():
            own = file.decode(layer)
            assert torch.equal(by_kitchen(file, layer, facts)[: len(own)], own), layer


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "fp8", "nvfp4"])
def test_comfy_kitchen_reads_calibrated_text_encoders(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "comfy_kitchen", reason="needs comfy-kitchen, 190 MB: pip install comfy-kitchen==0.2.40"
    )
    folder, out = encoder_folder(tmp_path / "e", "z-image"), tmp_path / "q.safetensors"
    report = quantize_text_encoder(folder, out, scheme=scheme, consumer="z-image")
    with comfy_file(out) as file:
        for layer, facts in file.layers.items():
            own = file.decode(layer)
            assert torch.equal(by_kitchen(file, layer, facts)[: len(own)], own), layer
        assert set(file.layers) == set(report.layers) and report.kept == 21


@pytest.mark.parametrize("name", NATIVE)
def test_the_artifacts_codes_are_what_is_read(made: Any, name: str, tmp_path: Path) -> None:
    """Fused by the host or not: bit for bit, but for nvfp4's one scale, which is said."""
    artifact, model, out = made(name), z_image(), tmp_path / "z.safetensors"
    report = export(model, "comfy", out, artifact=artifact)
    keys, known = host_map_of(model), artifact.header["layers"]
    with comfy_file(out) as file:
        for layer, facts in file.layers.items():
            parts, dense = keys.layers()[layer], []
            for part in parts:
                form = Scheme.from_json(artifact.header["schemes"][known[part]["scheme"]]).weight
                section, shape = artifact.section("weights"), known[part]["shape"]
                dense.append(QTensor.from_tensors(section, part, shape, form).dequantize())
            wanted, found = torch.cat(dense), file.decode(layer)
            assert facts["format"] == NATIVE[name]
            if name == "NVFP4" and len(parts) > 1:
                assert 0 < (found[: len(wanted)] - wanted).norm() < 0.2 * wanted.norm()
            else:
                assert torch.equal(found[: len(wanted)], wanted), layer
    fused = sum(len(keys.layers()[layer]) > 1 for layer in report.layers)
    assert fused and report.kept == len(report.layers) - (fused if name == "NVFP4" else 0)
    assert any("rounded anew" in note for note in report.notes) == (name == "NVFP4")


@pytest.mark.parametrize("name", ["COMFY_W4A8", "NVFP4", "COMFY_INT8"])
def test_other_numbers_in_other_files(made: Any, contents: Any, name: str, tmp_path: Path) -> None:
    """In bf16 exactly, out of the rotated basis; in GGUF as near as its blocks are."""
    artifact, model, layer = made(name), z_image(), "layers.0.attention.to_out.0"
    facts = artifact.header["layers"][layer]
    form = Scheme.from_json(artifact.header["schemes"][facts["scheme"]]).weight
    section = artifact.section("weights")
    wanted = QTensor.from_tensors(section, layer, facts["shape"], form).dequantize()
    export(model, "float", tmp_path / "z.safetensors", artifact=artifact)
    found = contents(tmp_path / "z.safetensors")[0][f"{layer}.weight"]
    assert torch.equal(found, wanted.bfloat16())
    report = export(model, "gguf", tmp_path / "z.gguf", artifact=artifact)
    assert report.kinds == {"q8_0" if name == "COMFY_INT8" else "q4_1": len(report.layers)}
    assert report.kept == 0 and report.error < 0.15


def test_the_forecast_travels(made: Any, tmp_path: Path) -> None:
    """The kernel of a pipeline's outputs, bit for bit, as an artifact of its own."""
    times = tuple(float(t) for t in torch.linspace(1.0, 0.1, 10))
    rest, draw = tuple(1 - t for t in times), torch.Generator().manual_seed(0)
    root = torch.randn(10, 12, generator=draw, dtype=torch.float64)
    artifact = copy.deepcopy(made("W8A8"))
    artifact.add_forecast(OutputKernel(root @ root.T, times, rest, times, "flow"))
    kernel = artifact.tensors["forecast/kernel"]
    report = export(z_image(), "comfy", tmp_path / "z.safetensors", artifact=artifact)
    facts, found = read_companion(report.files[1])
    assert found is not None and torch.equal(found.tensors["forecast/kernel"], kernel)
    assert found.tensors["forecast/kernel"].dtype is kernel.dtype
    assert found.header["forecast"] == artifact.header["forecast"]
    assert facts["host"] == report.host


def test_codes_that_do_not_exist_there_are_said(made: Any, tmp_path: Path) -> None:
    """Our own W4A8 has zero points: rounded anew, in the host's numbers."""
    report = export(z_image(), "comfy", tmp_path / "z.safetensors", artifact=made("W4A8"))
    assert report.kept == 0 and set(report.layers.values()) == {"asym_w4a8_int8"}
    assert any("quantize with a scheme of the format" in note for note in report.notes)


@pytest.mark.parametrize(
    ("end", "complaint"),
    [("weight_codebook", "no weight_codebook"), ("weight_s_rel", "no weight_s_rel"),
     ("weight_s_channel", "lacks its weight_s_channel")],
)  # fmt: skip
def test_a_layer_of_four_bits_without_a_part(
    damaged: Any, tmp_path: Path, end: str, complaint: str
) -> None:
    out = tmp_path / "z.safetensors"
    report = export(z_image(), "comfy", out, scheme="comfy-w4a8")
    layer = next(iter(report.layers))
    path = damaged(out, lambda tensors, _: tensors.pop(f"{layer}.{end}"))
    with comfy_file(path) as file, pytest.raises(ArtifactError, match=complaint):
        file.decode(layer)


@pytest.mark.parametrize("scheme", KINDS)
def test_gguf_reads_what_was_meant(scheme: str, tmp_path: Path) -> None:
    """Types, shapes and every weight, 0.0 of difference from our reader; the header too."""
    import gguf

    from tenuto.artifact.export.gguf_blocks import unpacked

    out = tmp_path / "z.gguf"
    report = export(z_image(), "gguf", out, scheme=scheme)
    reader, kind = gguf.GGUFReader(out), KINDS[scheme]
    assert reader.get_field("general.architecture").contents() == "lumina2"
    quantized = [tensor for tensor in reader.tensors if int(tensor.tensor_type) == kind.number]
    assert {tensor.name for tensor in quantized} == {f"{n}.weight" for n in report.layers}
    for tensor in quantized:
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        data = torch.from_numpy(tensor.data.copy()).view(-1, kind.bytes)
        assert torch.equal(unpacked(data, kind).view(theirs.shape), theirs)


@pytest.mark.parametrize(("name", "dynamic"), [("W8A8", True), ("W8A16", False)])
def test_diffusers_loads_the_folder_with_our_codes(
    made: Any, name: str, dynamic: bool, tmp_path: Path
) -> None:
    """By torchao: each code and scale is the artifact's, all else the model's in bf16."""
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao==0.18.0")
    import diffusers

    artifact, model, out = made(name), z_image(), tmp_path / "z"
    report = export(model, "diffusers", out, artifact=artifact)
    assert report.kept == len(report.layers) > 8
    kind = diffusers.ZImageTransformer2DModel
    found = kind.from_pretrained(out, torch_dtype=torch.bfloat16)
    section, own = artifact.section("weights"), model.state_dict()
    for key, tensor in found.state_dict().items():
        layer = key.removesuffix(".weight")
        if layer in report.layers and layer != key:
            assert type(tensor).__name__ == "Int8Tensor"
            assert torch.equal(tensor.qdata, section[f"{layer}.qdata"])
            assert torch.equal(tensor.scale[:, 0], section[f"{layer}.scale"])
            assert (tensor.act_quant_kwargs is not None) == dynamic
        else:
            assert torch.equal(tensor, own[key].bfloat16()), key


def test_sdnq_loads_the_folder_with_our_codes(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    """A U-Net with its convolutions: the artifact's codes and scales, and what they compute."""
    import sdnq  # noqa: F401 # tells diffusers of its layers

    artifact, model, out = rounded("unet", "W8A16"), tiny("unet"), tmp_path / "u"
    report = export(model, "diffusers", out, artifact=artifact, library="sdnq")
    found = type(model).from_pretrained(out, torch_dtype=torch.float32)
    section = artifact.section("weights")
    coded = {n for n, m in found.named_modules() if type(m).__name__.startswith("SDNQ")}
    assert coded == set(report.layers) == set(artifact.header["layers"])
    for name in coded:
        layer = found.get_submodule(name)
        assert torch.equal(layer.weight.flatten(1), section[f"{name}.qdata"].flatten(1))
        assert torch.equal(layer.scale.flatten(1)[:, 0], section[f"{name}.scale"])
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample": torch.randn(2, model.config.in_channels, 8, 8), "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 5, model.config.cross_attention_dim),
    }  # fmt: skip
    with torch.no_grad(), attach(model, artifact):
        wanted = model(**given).sample
    rest = {k for k in model.state_dict() if k.removesuffix(".weight") not in coded}
    own = model.state_dict()
    found.load_state_dict({k: own[k] for k in rest}, strict=False)  # the file has them in bf16
    with torch.no_grad():
        apart = found(**given).sample - wanted
    assert float(apart.norm()) <= 1e-3 * float(wanted.norm())
