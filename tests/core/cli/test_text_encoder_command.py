"""`tenuto text-encoder`: what it says, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto import cli
from tenuto.calibration import ENCODER_METHODS, ENCODER_SCHEMES
from tenuto.cli.text_encoder import state_lines
from tenuto.cli.text_encoder_options import METHODS, SCHEMES
from tests.core.tiny_encoders import encoder_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("e") / "qwen", "z-image", torch.bfloat16)


def asked(folder: Path, out: Path, *more: str) -> list[str]:
    found = ["text-encoder", str(folder), "--for", "z-image", "--scheme", "w4a16"]
    return [*found, "--out", str(out), *more]


def test_it_writes_one_file_and_says_how_far_the_states_are(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    out, prompts = tmp_path / "q.safetensors", tmp_path / "p.txt"
    prompts.write_text("a red fox\ntwo chairs\n")
    assert cli.main(asked(folder, out, "--prompts", str(prompts))) == 0
    said = capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.txt", "q.safetensors"]
    for words in (
        "21 layers in asym_w4a8_int8, by gptq on 35 prompts as z-image gives them",
        "number 2: cosine 0.99", "rounded to nearest 0.9", "Read by: ComfyUI >= 0.31",
        "Left out: The head", "The file of w4a16 is that of w4a8",
        "No encoder that ComfyUI knows",
    ):  # fmt: skip
        assert words in " ".join(said.split()), words
    assert "Next:" not in said  # no host would take it


def test_json_has_what_the_header_has(folder: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "q.safetensors"
    assert cli.main(asked(folder, out, "--method", "rtn", "--json")) == 0
    data = json.loads(capfd.readouterr().out)
    states = data["encoder"]["states"]
    assert data["layers_by_kind"] == {"asym_w4a8_int8": 21} and [s["state"] for s in states] == [2]
    assert states[0]["quantized"] == states[0]["nearest"]
    assert data["bytes"] == out.stat().st_size < 0.6 * data["bytes_in_bf16"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--scheme": "w3"}, "has w4a8, w4a16, w8a8, fp8, nvfp4, not 'w3'"),
        ({"--method": "magic"}, "not by 'magic'"),
        ({"--for": "sdxl"}, "Unknown consumer 'sdxl': choose one of flux"),
        ({"--for": "wan"}, "reads an encoder of the type umt5"),
        ({"--prompts": "none.txt"}, "Cannot read none.txt"),
        ({"--out": "a.gguf"}, "ends in .safetensors, and a.gguf is none"),
    ],
)
def test_what_cannot_be_gets_one_sentence(
    change: dict[str, str], said: str, folder: Path, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = asked(folder, Path("a.safetensors"))
    options = dict(zip(words[2::2], words[3::2], strict=True)) | change
    assert cli.main([*words[:2], *(w for pair in options.items() for w in pair)]) == 2
    found = capfd.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and not found.out
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_not_written_over(folder: Path, capfd: Any) -> None:
    assert cli.main(asked(folder, folder / "model.safetensors")) == 2
    assert "is a file of the model itself" in capfd.readouterr().err


def test_of_many_states_the_farthest_are_told() -> None:
    def state(number: int, error: float) -> dict[str, Any]:
        one = {"cosine": 1 - error, "least": 0.5, "relative_l2": error}
        return {"state": number, "quantized": one, "nearest": one}

    lines = state_lines([state(k, 0.01 * k) for k in range(9)])
    assert "the farthest of 9" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [f"  number {k}" for k in (5, 6, 7, 8)]


def test_the_options_name_what_the_library_has() -> None:
    assert tuple(ENCODER_SCHEMES) == SCHEMES and ENCODER_METHODS == METHODS
