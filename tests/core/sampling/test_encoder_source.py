"""What is no text encoder, or no whole one, gets one sentence before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tenuto
from tenuto.errors import TenutoError
from tenuto.model import Weights
from tenuto.model.encoder_names import NAMES, known_to_hosts
from tenuto.sampling.encoder_source import encoder_source
from tests.core.tiny_encoders import encoder_folder
from tests.core.tiny_language import sighted
from tests.core.tiny_pipelines import clip


def config(folder: Path, **facts: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(state, path, {"format": "pt"})


def with_codes(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})


def a_clip(folder: Path) -> None:
    clip().save_pretrained(folder)


def a_denoiser(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def a_pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    inner = folder / "text_encoder"
    inner.mkdir()
    (inner / "config.json").write_text('{"model_type": "qwen3"}')


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, "no whole safetensors file"),
    "a weight is missing": (without_a_weight, "SelfAttention.q.weight is missing"),
    "codes": (with_codes, "already quantized (encoder.block.0.layer.0.SelfAttention.q.weight)"),
    "quantized config": (lambda f: config(f, quantization_config={}), "already quantized"),
    "CLIP": (a_clip, "CLIP text encoders cannot be quantized for hosts"),
    "a denoiser": (a_denoiser, "tenuto export is for denoisers"),
    "another type": (lambda f: config(f, model_type="bert"), "type bert is no text encoder whose"),
    "another encoder": (lambda f: config(f, model_type="umt5"), "reads an encoder of the type t5"),
    "of AuraFlow": (lambda f: config(f, num_layers=24, d_model=2048), "T5-XL of AuraFlow"),
    "no config": (without("config.json"), "it has no config.json"),
    "no weights": (without("model.safetensors"), "no safetensors file with the weights"),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "a pipeline without it": (a_pipeline, "no text encoder of the type t5 (it has: qwen3)"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_gets_one_sentence_and_no_file(what: str, tmp_path: Path) -> None:
    folder, out = encoder_folder(tmp_path / "e", "flux"), tmp_path / "a.safetensors"
    damage, said = WRONG[what]
    damage(folder)
    with pytest.raises(TenutoError) as refused:
        tenuto.quantize_text_encoder(folder, out, scheme="w4a8", consumer="flux")
    sentence = str(refused.value)
    assert said in sentence and sentence.endswith(".") and "\n" not in sentence
    assert not out.exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheme": "w3"}, "has w4a8, w4a16, w8a8, fp8, nvfp4, not 'w3'"),
        ({"method": "magic"}, "rtn, awq, gptq, awq.gptq, not by 'magic'"),
        ({"consumer": "sdxl"}, "Unknown consumer 'sdxl'"),
        ({"config": "."}, "--config is for a single file"),
        ({"embeddings": "int4"}, "Embeddings are in bf16 or int8, not in 'int4'"),
    ],
)
def test_what_is_asked_for_must_be_there(given: Any, said: str, tmp_path: Path) -> None:
    asked = {"scheme": "w4a8", "consumer": "flux"} | given
    with pytest.raises(TenutoError, match=said):
        tenuto.quantize_text_encoder(tmp_path, tmp_path / "a.safetensors", **asked)


def test_a_file_needs_its_config_and_must_be_in_float(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "e", "z-image", torch.bfloat16)
    given: Any = {"scheme": "nvfp4", "consumer": "z-image", "method": "rtn"}
    out, alone = tmp_path / "a.safetensors", tmp_path / "alone.safetensors"
    save_file(load_file(folder / "model.safetensors"), alone)
    with pytest.raises(TenutoError, match="give --config with the folder"):
        tenuto.quantize_text_encoder(alone, out, **given)
    tenuto.quantize_text_encoder(alone, out, config=folder, **given)
    with pytest.raises(TenutoError, match="already quantized"):
        tenuto.quantize_text_encoder(out, tmp_path / "b.safetensors", config=folder, **given)
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4, 4)}, alone)
    with pytest.raises(TenutoError, match="CLIP text encoders"):
        tenuto.quantize_text_encoder(alone, tmp_path / "b.safetensors", config=folder, **given)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_tokenizer_that_hosts_need_must_be_there(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "e", "wan")
    (folder / "spiece.model").unlink()
    with pytest.raises(TenutoError, match=r"has no spiece.model: put it"):
        tenuto.quantize_text_encoder(folder, tmp_path / "a.safetensors", scheme="w8a8",
                                     consumer="wan")  # fmt: skip


def test_names_go_to_files_and_back() -> None:
    for kind, name, host in (
        ("t5", "shared.weight", "shared.weight"),
        ("t5", "encoder.embed_tokens.weight", None),
        ("qwen3", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("qwen2_5_vl", "language_model.norm.weight", "model.norm.weight"),
        ("qwen2_5_vl", "visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("qwen3_vl", "visual.deepstack_merger_list.0.norm.weight",
         "model.visual.deepstack_merger_list.0.norm.weight"),
        ("mistral3", "vision_tower.ln_pre.weight", None),
        ("gemma3", "language_model.layers.0.mlp.up_proj.weight",
         "model.layers.0.mlp.up_proj.weight"),
    ):  # fmt: skip
        assert NAMES[kind].in_file(name) == host
        assert host is None or NAMES[kind].in_model(host) == name


@pytest.mark.parametrize("kind", ["Gemma3", "Mistral3", "Qwen3VL", "Qwen2_5_VL"])
@pytest.mark.parametrize("single", [False, True])
def test_an_encoder_with_eyes_from_a_hubs_folder(kind: str, single: bool, tmp_path: Path) -> None:
    """Its names there are others than in memory; on disk, and without eyes, it is the same."""
    model = sighted(f"{kind}ForConditionalGeneration")
    model.save_pretrained(tmp_path)
    own: Any = model.config
    source = encoder_source(str(tmp_path), (own.model_type,))
    whole = source.load()
    if single:
        state = whole.state_dict()
        pairs = ((source.names.in_file(name), t) for name, t in state.items())
        save_file({n: t.clone() for n, t in pairs if n is not None}, tmp_path / "e.safetensors")
        source = encoder_source(str(tmp_path / "e.safetensors"), (own.model_type,), tmp_path)
    apart = source.load(max_memory=1000)
    values, found = Weights(apart), dict(apart.named_parameters())
    assert found.keys() == dict(whole.named_parameters()).keys()
    assert any(p.is_meta for p in found.values())
    for name, wanted in whole.named_parameters():
        if not single or source.names.in_file(name) is not None:
            assert torch.equal(values(found[name]), wanted), name
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(apart(input_ids=ids)[0], whole(input_ids=ids)[0])


def test_which_encoder_a_host_takes_a_file_for() -> None:
    norm, first = "model.layers.0.post_attention_layernorm.weight", "model.layers.0."
    wide = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    assert known_to_hosts({wide: 10240}) == "T5-XXL or UMT5-XXL"
    assert known_to_hosts({wide: 5120}) is None
    assert known_to_hosts({norm: 2560, f"{first}self_attn.q_norm.weight": 128}) == "Qwen3-4B"
    assert known_to_hosts({norm: 3584, f"{first}self_attn.k_proj.bias": 512}) == "Qwen2.5-VL-7B"
    assert known_to_hosts({norm: 5120}) == "Mistral 3 24B"
    assert known_to_hosts({norm: 64}) is None


def test_a_folder_of_a_variant_alone_is_read(tmp_path: Path) -> None:
    """As downloads have it that took the files of fp16 and no others."""
    folder, kinds = encoder_folder(tmp_path / "e", "flux"), ("t5",)
    wanted = encoder_source(str(folder), kinds).load().state_dict()
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    source = encoder_source(str(folder), kinds)
    assert [path.name for path in source.files] == ["model.fp16.safetensors"]
    found = source.load().state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name])
