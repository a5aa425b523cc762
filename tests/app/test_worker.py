"""The worker without its process: what it tells the library's commands, a stop and what follows."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradio_app import worker
from gradio_app.worker import Reports, calibrate
from tenuto.artifact.artifact import Artifact
from tenuto.cli import commands
from tenuto.cli.console import Answer
from tenuto.errors import Cancelled

RECORDED = ["Recording", "Quantizing"]
ROUTED = ["Recording", "Training the router"]
COMMANDS = ("quantize", "train_router")
NEW = ("text_encoder", "method", "rounding")  # what requests of the first version lack


CALL = {"height": 48, "negative_prompt": "blur"}


def request(folder: Path, **changes: Any) -> dict[str, Any]:
    asked = {
        "model": "demo:unet", "preset": "quick", "steps": 3, "guidance": None, "seed": 0,
        "device": "cpu", "prompts": None, "scheme": None, "reuse": None, "iterations": None,
        "out": str(folder / "x.safetensors"), "first": str(folder / "first.safetensors"),
        **dict.fromkeys(NEW), "call": CALL, "inputs": str(folder / "inputs"),
    }  # fmt: skip
    return asked | changes


@pytest.mark.parametrize(
    ("asked", "plan", "told"),
    [
        ({"scheme": "w8a8"}, RECORDED, [("w8a8", None)]),
        ({"text_encoder": "w4", "method": "awq"}, ["Text encoders"], [(None, "w4")]),
        ({"scheme": "w4a8", "text_encoder": "w8", "rounding": "nearest"},
         [*RECORDED, "Text encoders"], [("w4a8", "w8")]),
        ({"reuse": 0.3}, ROUTED, ["alone"]),
        ({"text_encoder": "w8", "reuse": 0.3}, ["Text encoders", *ROUTED], [(None, "w8"), "first"]),
        ({"scheme": "w8a8", "text_encoder": "w8", "reuse": 0.3},
         [*RECORDED, "Text encoders", *ROUTED], [("w8a8", "w8"), "first"]),
    ],
    ids=["scheme", "encoder", "scheme and encoder", "route", "encoder and route", "all"],
)  # fmt: skip
def test_what_the_commands_are_told(
    asked: dict[str, Any], plan: list[str], told: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Parts in the order in which they are done; the route joins what was quantized before."""
    calls: list[Any] = []

    signatures = {name: inspect.signature(getattr(commands, name)) for name in COMMANDS}

    def given(command: str, *args: Any, **options: Any) -> dict[str, Any]:
        bound = signatures[command].bind(*args, **options)  # TypeError if it cannot be called so
        bound.apply_defaults()
        assert bound.arguments["call"] == CALL
        assert bound.arguments["model"] == "demo:unet" and bound.arguments["steps"] == 3
        return bound.arguments

    def quantize(*args: Any, **options: Any) -> Answer:
        found = given("quantize", *args, **options)
        assert found["method"] == asked.get("method")
        assert found["rounding"] == asked.get("rounding")
        last = "reuse" not in asked
        assert found["out"] == tmp_path / ("x.safetensors" if last else "first.safetensors")
        calls.append((found["scheme"], found["text_encoder"]))
        return Answer("")

    def train(*args: Any, **options: Any) -> Answer:
        found = given("train_router", *args, **options)
        calls.append("alone" if found["artifact"] is None else found["artifact"].stem)
        return Answer("")

    monkeypatch.setattr(commands, "quantize", quantize)
    monkeypatch.setattr(commands, "train_router", train)
    bare = SimpleNamespace(header={}, tensors={})
    monkeypatch.setattr("tenuto.cli.checks.load_artifact", lambda path: bare)
    bars = Reports(lambda **event: None, threading.Event())
    whole = request(tmp_path, **asked)
    older = {k: v for k, v in whole.items() if k not in NEW or v is not None}
    for wanted in (whole, older):
        calls.clear()
        assert calibrate(wanted, bars) == {"text": "", "name": "x"}
        assert (bars.plan, calls) == (plan, told)


def test_frames_that_are_shown() -> None:
    """(Place, number of the prompt): all images, or as many frames of each video."""
    assert worker.picked(3, 1, 24) == [(0, 0), (1, 1), (2, 2)]
    assert worker.picked(30, 1, 24) == [(i, i) for i in range(24)]
    assert worker.picked(2, 5, 4) == [(0, 0), (2, 0), (5, 1), (7, 1)]
    assert worker.picked(1, 3, 24) == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.slow
def test_text_encoders_stop_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Stopped after a layer, and taken up: the same file, and no layer is done twice."""
    monkeypatch.setattr(worker, "PACE", 0)
    lines = tmp_path / "prompts.txt"
    lines.write_text("a goldfish\na lemon\n")

    def made(name: str, stop_at: float = 2.0) -> list[str]:
        stop, notes = threading.Event(), []

        def send(**event: Any) -> None:
            notes.append(event.get("note", ""))
            if event.get("total") and event["done"] / event["total"] >= stop_at:
                stop.set()

        (tmp_path / name).mkdir(exist_ok=True)
        asked = {"text_encoder": "w4", "method": "gptq", "prompts": str(lines)}
        wanted = request(tmp_path / name, **asked)
        calibrate(wanted, Reports(send, stop))
        return [note for note in notes if note.endswith("compensating")]

    whole = made("whole")
    with pytest.raises(Cancelled):
        made("stopped", 0.5)
    assert (tmp_path / "stopped" / "x.work").is_dir()
    assert 0 < len(made("stopped")) < len(whole)
    files = [tmp_path / name / "x.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert list(Artifact.load(files[1]).header["encoders"]) == ["text_encoder"]
    assert not (tmp_path / "stopped" / "x.work").exists()
