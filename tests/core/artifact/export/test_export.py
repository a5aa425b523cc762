"""What holds for all formats: weights in bf16, what is refused, models that stay on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tenuto.artifact.export import FORMATS, export, formats
from tenuto.artifact.export.tensors_file import TensorsFile
from tenuto.cli import commands
from tenuto.errors import ArtifactError, ModelError, TenutoError
from tenuto.numerics import QTensor, Scheme, schemes
from tenuto.sampling.loading import load_denoisers
from tests.core import tiny_pipelines

ENDS = {"comfy": "x.safetensors", "float": "x.safetensors", "gguf": "x.gguf", "diffusers": "x"}


def test_every_format_is_named() -> None:
    assert tuple(formats()) == FORMATS and set(FORMATS) <= set(ENDS)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "FP8", "W6A8"])
def test_float_is_the_codes_in_bf16(
    tiny: Any, rounded: Any, contents: Any, tmp_path: Path, scheme: str
) -> None:
    """Under the model's own names, each layer with codes and nothing else changed."""
    model, artifact, out = tiny("pixart"), rounded("pixart", scheme), tmp_path / "x.safetensors"
    report = export(model, "float", out, artifact=artifact)
    tensors, _ = contents(out)
    values = model.state_dict()
    assert tensors.keys() == values.keys()
    schemes = {k: Scheme.from_json(v) for k, v in artifact.header["schemes"].items()}
    for name, tensor in tensors.items():
        facts = artifact.header["layers"].get(name.removesuffix(".weight"))
        wanted = values[name]
        if facts is not None and name.endswith(".weight"):
            layer, form = name.removesuffix(".weight"), schemes[facts["scheme"]].weight
            known = artifact.section("weights")
            wanted = QTensor.from_tensors(known, layer, facts["shape"], form).dequantize()
            assert not torch.equal(wanted, values[name])
        assert torch.equal(tensor, wanted.bfloat16()), name
    assert len(report.layers) == len(artifact.header["layers"]) == report.kept


def test_float_is_loaded_and_computes_as_attached(
    tiny: Any, rounded: Any, contents: Any, call_as: Any, conditions: Any, tmp_path: Path
) -> None:
    """In the model itself, what `attach` computes with floating inputs, within bf16."""
    from tenuto import attach

    model, artifact, out = tiny("pixart"), rounded("pixart", "W4A16"), tmp_path / "x.safetensors"
    export(model, "float", out, artifact=artifact)
    other = tiny("pixart")
    other.load_state_dict({k: v.float() for k, v in contents(out)[0].items()})
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    plain = call_as("pixart", model, x, t, conditions("pixart", [0, 1]))
    found = call_as("pixart", other, x, t, conditions("pixart", [0, 1]))
    with attach(model, artifact, execution="float"):
        wanted = call_as("pixart", model, x, t, conditions("pixart", [0, 1]))
    gap = (found - wanted).norm() / wanted.norm()
    assert gap < 2e-2 and (plain - wanted).norm() / wanted.norm() > 3 * gap


def quantized_already(model: nn.Module) -> None:
    model.register_to_config(quantization_config={"quant_method": "torchao"})  # type: ignore[operator]


def in_eight_bits(model: nn.Module) -> None:
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    data = layer.weight.data.to(torch.int8)  # type: ignore[union-attr]
    layer.weight = nn.Parameter(data, requires_grad=False)  # type: ignore[assignment]


def with_lora(model: nn.Module) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # type: ignore[operator]


def not_a_number(model: nn.Module) -> None:
    model.get_parameter("transformer_blocks.0.attn.to_q.weight").data[0, 0] = float("nan")


@pytest.mark.parametrize("to", ["comfy", "gguf"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (quantized_already, "already quantized"),
        (in_eight_bits, "already quantized"),
        (with_lora, "has a LoRA"),
        (not_a_number, "has values that are no finite numbers"),
    ],
)
def test_models_that_cannot_be_exported(
    tiny: Any, tmp_path: Path, to: str, change: Any, sentence: str
) -> None:
    model = tiny("flux")
    change(model)
    scheme = "w8a8" if to == "comfy" else "q8_0"
    with pytest.raises(TenutoError, match=sentence) as caught:
        export(model, to, tmp_path / ENDS[to], scheme=scheme)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_text_encoders_are_refused(tmp_path: Path) -> None:
    for encoder in (tiny_pipelines.clip(), tiny_pipelines.t5()):
        with pytest.raises(ModelError, match="is a text encoder"):
            export(encoder, "comfy", tmp_path / "x.safetensors", scheme="w8a8")
    assert not list(tmp_path.iterdir())


def test_convolutions_are_refused(tiny: Any, tmp_path: Path) -> None:
    """ComfyUI computes noise with them: a U-Net goes elsewhere."""
    with pytest.raises(TenutoError, match="convolutions wrongly: export it to gguf"):
        export(tiny("unet"), "comfy", tmp_path / "x.safetensors", scheme="w8a8")
    assert not list(tmp_path.iterdir())


def test_the_wrong_artifact_is_refused(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    for to in ("comfy", "float"):
        with pytest.raises(ArtifactError, match="artifact is for a PixArtTransformer2DModel"):
            export(tiny("flux"), to, tmp_path / ENDS[to], artifact=rounded("pixart"))
    model = tiny("flux")
    for parameter in model.parameters():
        parameter.data *= 1.1
    with pytest.raises(ArtifactError, match="weights differ"):
        export(model, "comfy", tmp_path / "x.safetensors", artifact=rounded("flux"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"to": "onnx"}, "Unknown format 'onnx': choose one of comfy"),
        ({"to": "comfy", "scheme": "q8_0"}, "has no scheme 'q8_0': choose one of w8a8"),
        ({"to": "float", "scheme": "w8a8"}, "it takes none"),
        ({"to": "comfy"}, "Say what to write"),
        ({"to": "float"}, "nothing to fold"),
        ({"to": "gguf", "scheme": "q8_0"}, "ends in .gguf"),
        ({"to": "diffusers", "scheme": "w8a8"}, "is a folder, and x.safetensors is none"),
        ({"to": "comfy", "scheme": "w8a8", "part": "transformer_2"}, "no denoiser 'transformer_2'"),
        ({"to": "comfy", "scheme": "w8a8", "library": "sdnq"}, "for --to diffusers alone"),
    ],
)
def test_what_is_asked_for_must_make_sense(
    tiny: Any, tmp_path: Path, options: Any, sentence: str
) -> None:
    given = dict(options)
    with pytest.raises(TenutoError, match=sentence):
        export(tiny("flux"), given.pop("to"), tmp_path / "x.safetensors", **given)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9, 8, 1))
    for to, scheme in (("comfy", "w8a8"), ("gguf", "q8_0")):
        with pytest.raises(TenutoError, match="GiB are free there"):
            export(tiny("flux"), to, tmp_path / ENDS[to], scheme=scheme)
    assert not list(tmp_path.iterdir())


def test_one_denoiser_of_two(contents: Any, tmp_path: Path) -> None:
    pipe, out = tiny_pipelines.wan_22(), tmp_path / "x.safetensors"
    for part, model in (("", pipe.transformer), ("transformer_2", pipe.transformer_2)):
        report = export(pipe, "comfy", out, scheme="w8a8", part=part)
        found = contents(out)[0]["blocks.0.norm3.weight"]
        assert torch.equal(found, model.state_dict()["blocks.0.norm2.weight"].bfloat16())
        assert any("Of several denoisers" in line for line in report.dropped)


def test_two_writings_of_one_model_are_equal(tiny: Any, tmp_path: Path) -> None:
    marks = set()
    for to, scheme in (("comfy", "w8a8"), ("gguf", "q4_1")):
        for name in ("a", "b"):
            out = tmp_path / name / ENDS[to]
            export(tiny("flux"), to, out, scheme=scheme)
            marks.add((to, hashlib.sha256(out.read_bytes()).hexdigest()))
    assert len(marks) == 2


def test_a_tensor_must_be_what_was_said(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2,)), "b": (torch.uint8, (3,))}
    missing = TensorsFile(tmp_path / "x", specs, {})
    with pytest.raises(ValueError, match="b was not written"), missing as file:
        file.put("a", torch.zeros(2))
    with TensorsFile(tmp_path / "x", specs, {}) as file:
        file.put("b", torch.ones(3, dtype=torch.uint8))
        for wrong in (torch.zeros(3), torch.zeros(2).double()):
            with pytest.raises(ValueError, match="a is not the tensor"):
                file.put("a", wrong)
        file.put("a", torch.zeros(2))
        with pytest.raises(ValueError, match="a is not the tensor"):
            file.put("a", torch.zeros(2))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A diffusers folder of a tiny Z-Image."""
    path = tmp_path_factory.mktemp("models") / "z-image"
    tiny_pipelines.z_image().save_pretrained(path, max_shard_size="40KB")
    return path


def test_weights_stay_on_disk(folder: Path) -> None:
    """Read one at a time, from shards; the text encoder is not loaded at all."""
    found = load_denoisers(str(folder))
    assert list(vars(found)) == ["transformer"]
    block = found.transformer.get_parameter("layers.0.attention.to_q.weight")
    assert block.is_meta and len(list((folder / "transformer").glob("*.safetensors"))) > 3


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path, contents: Any) -> None:
    out = tmp_path / "z.safetensors"
    answer = commands.export(str(folder), to="comfy", out=out, scheme="w8a8")
    text = str(answer)
    for part in ("in int8_tensorwise", "ComfyUI >= 0.27", "Next: put", "rounded to nearest"):
        assert part in text
    assert json.loads(json.dumps(answer.data))["bytes"] == out.stat().st_size
    whole = tmp_path / "whole.safetensors"
    export(tiny_pipelines.z_image(), "comfy", whole, scheme="w8a8")
    assert out.read_bytes() == whole.read_bytes()


def test_a_folder_that_is_wrong(folder: Path, tmp_path: Path) -> None:
    """Truncated, quantized, or of another kind: one sentence and no file."""
    import shutil

    given = {"to": "comfy", "scheme": "w8a8", "out": tmp_path / "out" / "z.safetensors"}
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shard = sorted((broken / "transformer").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="Cannot load"):
        commands.export(str(broken), **given)
    config = broken / "transformer" / "config.json"
    facts = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "sdnq"}}
    config.write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="already quantized"):
        commands.export(str(broken), **given)
    with pytest.raises(ModelError, match=r"is a part of .*: name that folder"):
        commands.export(str(shard), **given)
    assert not given["out"].parent.exists()


def test_a_folder_for_diffusers(tiny: Any, rounded: Any, contents: Any, tmp_path: Path) -> None:
    """Codes as they are, and what makes diffusers ask torchao for them; never over another one."""
    model, artifact, out = tiny("pixart"), rounded("pixart"), tmp_path / "folder"
    report = export(model, "diffusers", out, artifact=artifact)
    tensors, metadata = contents(out / "diffusion_pytorch_model.safetensors")
    layers = {n for n, f in artifact.header["layers"].items() if len(f["shape"]) == 2}
    assert set(report.layers) == layers and report.kept == len(layers)
    for name in layers:
        known = artifact.section("weights")
        assert torch.equal(tensors[f"{name}._weight_qdata"], known[f"{name}.qdata"])
        assert torch.equal(tensors[f"{name}._weight_scale"][:, 0], known[f"{name}.scale"])
        assert json.loads(metadata[f"{name}.weight"])["_type"] == "Int8Tensor"
    config = json.loads((out / "config.json").read_text())
    assert config["_class_name"] == type(model).__name__ and "_name_or_path" not in config
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert any("convolutions are in 16 bits" in line for line in report.dropped)
    with pytest.raises(TenutoError, match="is there already"):
        export(model, "diffusers", out, artifact=artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_with_layers_of_sdnq(
    tiny: Any, rounded: Any, contents: Any, tmp_path: Path
) -> None:
    """Convolutions too: the artifact's codes under the layers' own names, a scale for every tap."""
    model, artifact, out = tiny("unet"), rounded("unet"), tmp_path / "folder"
    report = export(model, "diffusers", out, artifact=artifact, library="sdnq")
    tensors, _ = contents(out / "diffusion_pytorch_model.safetensors")
    known, layers = artifact.section("weights"), artifact.header["layers"]
    assert set(report.layers) == set(layers) and report.kept == len(layers)
    assert any(len(facts["shape"]) == 4 for facts in layers.values())
    for name, facts in layers.items():
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        assert codes.dtype is torch.int8 and list(codes.shape) == facts["shape"]
        assert torch.equal(codes.flatten(1), known[f"{name}.qdata"].flatten(1))
        assert list(scale.shape) == [facts["shape"][0], 1, *facts["shape"][2:]]
        assert torch.equal(scale.flatten(1).amax(1), known[f"{name}.scale"])
        assert torch.equal(scale.flatten(1).amin(1), known[f"{name}.scale"])
    about = json.loads((out / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "sdnq" and about["quant_conv"]
    kinds = nn.Linear | nn.Conv2d
    every = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)}
    assert set(about["modules_to_not_convert"]) == every - {f"{name}.weight" for name in layers}


# --- scales per column, and files that must stay --------------------------------------------------


@pytest.mark.parametrize("to", ["comfy", "gguf", "diffusers", "float"])
def test_scales_per_column_are_not_lost(tiny: Any, rounded: Any, tmp_path: Path, to: str) -> None:
    """Where a host fuses layers too: without them every weight is far off."""
    model, artifact = tiny("flux"), rounded("flux", "W8A16")
    form = replace(schemes.W8A16.weight, smooth=True)
    artifact.header["schemes"] = dict.fromkeys(
        artifact.header["schemes"], Scheme("smooth", form).to_json()
    )
    artifact.tensors = {k: v for k, v in artifact.tensors.items() if "weights/" not in k}
    for name, facts in artifact.header["layers"].items():
        weight = model.get_parameter(f"{name}.weight").detach().float()
        columns = torch.linspace(0.25, 4, weight.shape[1])
        codes = replace(QTensor.nearest(weight * columns, form), channel=columns)
        artifact.tensors |= {f"weights/{k}": v for k, v in codes.tensors(name).items()}
        assert list(weight.shape) == facts["shape"]
    report = export(model, to, tmp_path / ENDS[to], artifact=artifact)
    assert report.layers and report.error < 0.04


def test_what_is_read_is_not_replaced(folder: Path, rounded: Any, tmp_path: Path) -> None:
    """Neither the artifact nor a file of the model, by a link to it either."""
    path, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    path.write_bytes(b"an artifact")
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(TenutoError, match="is the artifact itself"):
            commands.export(str(folder), to="comfy", out=out, artifact=path)
    shard = min((folder / "transformer").glob("*.safetensors"))
    before = shard.read_bytes()
    with pytest.raises(TenutoError, match="is a file of the model itself"):
        commands.export(str(folder), to="comfy", out=shard, scheme="w8a8")
    assert path.read_bytes() == b"an artifact" and shard.read_bytes() == before
