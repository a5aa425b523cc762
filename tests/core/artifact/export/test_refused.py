"""What no format can be made of: each command says why in one sentence and leaves no file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenuto import cli
from tenuto.artifact.export import export
from tests.core import tiny_pipelines
from tests.core.tiny_encoders import encoder_folder

SCHEMES = {"comfy": ("--scheme", "w8a8"), "gguf": ("--scheme", "q8_0"),
           "diffusers": ("--scheme", "w8a8"), "float": ()}  # fmt: skip
ENDS = {"comfy": ".safetensors", "gguf": ".gguf", "diffusers": "", "float": ".safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A diffusers folder of a tiny Z-Image, in shards."""
    path = tmp_path_factory.mktemp("models") / "z-image"
    tiny_pipelines.z_image().save_pretrained(path, max_shard_size="40KB")
    return path


def truncated(model: Path) -> Path:
    shard = sorted((model / "transformer").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    return model


def cut_in_the_header(model: Path) -> Path:
    shard = sorted((model / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:40])
    return model


def quantized(model: Path) -> Path:
    config = model / "transformer" / "config.json"
    facts = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "sdnq"}}
    config.write_text(json.dumps(facts))
    return model


def with_codes(dtype: torch.dtype) -> Callable[[Path], Path]:
    """As a converter leaves them: the config has no word of it."""

    def change(model: Path) -> Path:
        for shard in (model / "transformer").glob("*.safetensors"):
            tensors = load_file(shard)
            wide = {k for k in tensors if k.endswith("attention.to_q.weight")}
            codes = {k: t.to(dtype) if k in wide else t for k, t in tensors.items()}
            save_file(codes, shard, {"format": "pt"})
        return model

    return change


def a_clip(model: Path) -> Path:
    shutil.rmtree(model)
    tiny_pipelines.clip().save_pretrained(model)
    return model


def a_t5(model: Path) -> Path:
    shutil.rmtree(model)
    return encoder_folder(model, "flux")


def one_file(model: Path) -> Path:
    return sorted((model / "transformer").glob("*.safetensors"))[0]


def what_was_exported(model: Path) -> Path:
    out = model / "exported.safetensors"
    export(tiny_pipelines.z_image(), "comfy", out, scheme="w8a8")
    return out


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "Cannot load"),
    "cut in the header": (cut_in_the_header, "Cannot load"),
    "quantized": (quantized, "transformer is already quantized"),
    "8-bit floats": (with_codes(torch.float8_e4m3fn), "transformer is already quantized"),
    "8-bit codes": (with_codes(torch.int8), "transformer is already quantized"),
    "CLIP": (a_clip, "is not a diffusers folder"),
    "T5": (a_t5, "is not a diffusers folder"),
    "one file": (one_file, "is a part of "),
    "exported": (what_was_exported, "is already quantized"),
}


def refused(words: list[str], said: str, out: Path, capfd: Any) -> None:
    """The command fails with one line that says so, and nothing is written."""
    capfd.readouterr()
    assert cli.main([*words, "--out", str(out)]) == 2
    found = capfd.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and not found.out
    assert not out.parent.exists()


@pytest.mark.parametrize("to", SCHEMES)
@pytest.mark.parametrize("what", WRONG)
def test_one_sentence_and_no_file(
    what: str, to: str, folder: Path, tmp_path: Path, capfd: Any
) -> None:
    change, said = WRONG[what]
    model = change(Path(shutil.copytree(folder, tmp_path / "model")))
    words = ["export", str(model), "--to", to, *SCHEMES[to]]
    refused(words, said, tmp_path / "out" / f"x{ENDS[to]}", capfd)


@pytest.mark.parametrize("to", SCHEMES)
def test_a_damaged_artifact_and_one_of_another_family(
    to: str, folder: Path, rounded: Any, tmp_path: Path, capfd: Any
) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "out" / f"x{ENDS[to]}"
    words = ["export", str(folder), "--to", to, "--artifact", str(path)]
    rounded("pixart").save(path)
    refused(words, "artifact is for a PixArtTransformer2DModel", out, capfd)
    path.write_bytes(path.read_bytes()[:-100])
    refused(words, "truncated or damaged", out, capfd)


def test_a_u_net_is_refused_where_hosts_misread_it(tmp_path: Path, capfd: Any) -> None:
    """By the command, before its convolutions are read."""
    model = tmp_path / "sd"
    tiny_pipelines.stable_diffusion("StableDiffusionPipeline").save_pretrained(model)
    words = ["export", str(model), "--to", "comfy", "--scheme", "w8a8"]
    refused(words, "convolutions wrongly: export it to gguf", tmp_path / "out" / "x.safetensors",
            capfd)  # fmt: skip


def test_a_quantized_encoder_beside_it_is_not_looked_at(folder: Path, tmp_path: Path) -> None:
    """The denoiser alone is exported."""
    model, out = Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "x.safetensors"
    config = model / "text_encoder" / "config.json"
    facts = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}
    config.write_text(json.dumps(facts))
    words = ["export", str(model), "--to", "comfy", "--scheme", "w8a8", "--out", str(out)]
    assert cli.main(words) == 0 and out.is_file()
