"""`tenuto check`, and what the long commands say before they load a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenuto import cli
from tenuto.calibration.costs import images_of, layer_costs
from tenuto.cli import commands, session
from tenuto.sampling.loading import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded fails the test."""

    def loaded(*arguments: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "load", loaded)


@pytest.mark.usefixtures("never_loaded")
def test_a_folder_is_checked_without_loading_it(
    tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", str(tiny_pixart_folder), "--scheme", "w4a8", "--steps", "20"]
    assert cli.main([*arguments, "--set", "negative_prompt=blur", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert not err and found["family"] == "pixart" and not found["problems"]
    assert set(found["layers"]) == {"w4a8", "w8a8"}
    parts = layer_costs(16 * 20, 4, replays=True, stored=False, search=True)
    measured = images_of(20) + 2 * 20 * 4  # a forecast, and what rounding adds to it
    expected = 2 * (16 * 20 + sum(parts.values()) + measured)  # with guidance
    assert found["time"]["uses"]["quantize"]["calls"] == expected
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    lines = out.replace(str(tiny_pixart_folder), "MODEL").splitlines()
    assert not err and max(map(len, lines[:-1])) <= 80 and lines[0].startswith("model ")
    line = "Next: tenuto quantize MODEL --scheme w4a8 --steps 20 --out quantized.safetensors"
    assert lines[-1] == line  # with the steps that were asked about


def test_a_run_is_timed(tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tiny_pixart_folder), "--run"]) == 0
    assert "from one call of the denoiser" in " ".join(capfd.readouterr().out.split())


@pytest.mark.usefixtures("never_loaded")
def test_what_cannot_be_is_said(
    tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By `check` as an answer, with no command to go on with, and by its exit code."""
    assert cli.main(["check", str(tiny_pixart_folder), "--steps", "2000"]) == 1
    out = capfd.readouterr().out
    assert "nothing works: This model samples in at most 1000 steps" in " ".join(out.split())
    assert "Next:" not in out
    assert cli.main(["check", str(tiny_pixart_folder), "--steps", "2000", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["stops"]["quantize"]


CODES: list[tuple[str, list[str], int]] = [
    ("a cache schedule alone cannot be", ["--steps", "1"], 0),
    ("weights that are quantized", ["--scheme", "w8a8"], 1),
    ("text encoders of the same model", ["--text-encoder", "w8"], 0),
    ("both", ["--scheme", "w8a8", "--text-encoder", "w8"], 1),
    ("no such setting", ["--set", "hight=9"], 1),
    ("no such scheme", ["--scheme", "w9a9"], 2),
]


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(("what", "options", "code"), CODES, ids=[row[0] for row in CODES])
def test_the_exit_code_is_that_of_what_is_asked_for(
    what: str, options: list[str], code: int, tiny_pixart_folder: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """1 where `quantize` would refuse just that, however the rest is."""
    model = tmp_path / "model"
    shutil.copytree(tiny_pixart_folder, model)
    if "--steps" not in options:
        of_another_library(model)
    assert cli.main(["check", str(model), *options]) == code, what
    out = capfd.readouterr().out
    assert ("Next: tenuto quantize" in out) == (code == 0)
    assert ("--text-encoder w8 " in out) == (what.startswith("text"))


def without_weights(folder: Path) -> None:
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()


def of_another_library(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


def as_it_is(folder: Path) -> None:
    pass


STOPPED: list[tuple[Callable[[Path], None], str, dict[str, Any], str]] = [
    (without_weights, "quantize", {"scheme": "w8a8"}, "no weights in safetensors"),
    (without_weights, "train_router", {}, "no weights in safetensors"),
    (of_another_library, "quantize", {"scheme": "w4a8"}, "quantized by bitsandbytes already"),
    (as_it_is, "train_router", {"steps": 1}, "With one step there is nothing to reuse"),
    (as_it_is, "quantize", {"scheme": "w8a8", "steps": 1001}, "at most 1000 steps"),
    (as_it_is, "quantize", {"scheme": "w8a8", "call": {"hight": 9}}, "takes no hight"),
]


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(("change", "command", "options", "words"), STOPPED)
def test_a_long_command_stops_before_it_loads_the_model(
    change: Callable[[Path], None], command: str, options: dict[str, Any], words: str,
    tiny_pixart_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    model, out = tmp_path / "model", tmp_path / "o.safetensors"
    shutil.copytree(tiny_pixart_folder, model)
    change(model)
    with pytest.raises(commands.TenutoError, match=words):
        getattr(commands, command)(str(model), out=out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_does_not_stop_is_one_line(
    tiny_pixart_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Said before the model is loaded, on stderr."""
    said: list[str] = []

    def loaded(*arguments: Any) -> Any:
        said.append(capfd.readouterr().err)
        raise commands.TenutoError("enough")

    monkeypatch.setattr(session, "load", loaded)
    arguments = ["train-router", str(tiny_pixart_folder), "--out", str(tmp_path / "o.safetensors")]
    assert cli.main(arguments) == 2
    (before,) = said
    assert before.startswith("tenuto: note: 4 steps are few for a cache schedule")
    assert before.count("\n") == 1
    assert capfd.readouterr().err == "tenuto: enough\n"


def test_a_model_that_only_loading_tells_is_checked_then(
    tiny_pixart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hub id is: the check comes before the first call of the denoiser."""
    pipe = load(str(tiny_pixart_folder))
    pipe.transformer.register_to_config(quantization_config={"quant_method": "torchao"})
    monkeypatch.setattr(pipe.transformer, "forward", None)
    monkeypatch.setattr(session, "load", lambda *arguments, **memory: pipe)
    with pytest.raises(commands.TenutoError, match="quantized by torchao already"):
        commands.quantize("org/name", out=tmp_path / "o.safetensors", scheme="w8a8")
