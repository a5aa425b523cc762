"""The check before Start without a server: what is said, in what time, and what is not begun."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gradio_app import check_view, jobs, quality
from gradio_app.bench import Bench
from gradio_app.checking import looked_at
from gradio_app.settings import Settings
from tenuto.errors import TenutoError
from tenuto.sampling import loading
from tests.patience import PATIENCE

OWN = [None, None, "", "", "", "", ""]  # fields of the pipeline's own settings, left empty
ENDS = "import sys; sys.stdin.readline(); sys.exit(7)"


@pytest.fixture
def bench(tiny_pixart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With the model `tiny`, which the test may change, and workers that end at once."""
    shutil.copytree(tiny_pixart_folder, tmp_path / "roots" / "tiny")
    monkeypatch.setattr(jobs, "WORKER", ENDS)

    def loaded(*arguments: Any) -> Any:
        raise AssertionError("the model was loaded")

    importlib.import_module("tenuto.cli.session")  # or it would keep what is put in its place here
    monkeypatch.setattr(loading, "load", loaded)
    return Bench(Settings(tmp_path / "out", (tmp_path / "roots",), device="cpu"))


def values(**changes: Any) -> list[Any]:
    """Those of the fields of the tab."""
    found = {
        "model": "tiny", "name": "x", "scheme": "w4a8", "preset": "quick", "reuse": 30,
        "steps": "20", "guidance": "", "seed": 0, "iterations": "", "prompts": "", "encoder": "",
        "method": "gptq", "rounding": "",
    }  # fmt: skip
    own = changes.pop("own", OWN)
    return [*(found | changes).values(), *own]


def words(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", html)).split())


def last(bench: Bench, **changes: Any) -> str:
    *_, said = looked_at(bench, *values(**changes))
    return said


def of_another_library(bench: Bench) -> None:
    file = bench.places.roots[0] / "tiny" / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    file.write_text(json.dumps(config))


def test_what_is_shown_of_a_model_that_can_be_calibrated(bench: Bench) -> None:
    first, *_, said = looked_at(bench, *values())
    assert words(first) == "Checking. The configuration of tiny is read."
    assert 'data-state="done"' in said
    text = words(said)
    for part in (
        "It can be calibrated. It takes", "of memory,", "Family pixart", "in w4a8",
        "Full precision 4 parts", "Time path 1 module", "Can be reused 3 blocks",
        "calls of the denoiser",
    ):  # fmt: skip
        assert part in text, (part, text)
    for part in ("Quantizing", "Cache schedule"):  # how long depends on the machine
        assert re.search(f"{part} (about [0-9.]+ .* to [0-9.]+ |under a second)", text), (
            part,
            text,
        )
    assert "--" not in text, "no option of the command"
    assert text.count("Memory about") == 1


def test_only_what_is_wanted_is_told(bench: Bench) -> None:
    """Of an encoder alone, of a schedule alone: no rows of the rest."""
    encoder = words(last(bench, scheme="", reuse=0, encoder="w8"))
    assert (
        "Text encoder text_encoder, T5EncoderModel" in encoder
        and "Quantiz" not in encoder
        and "reused" not in encoder
    )
    schedule = words(last(bench, scheme=""))
    assert "Can be reused" in schedule and "Quantizing" not in schedule
    assert "Cache schedule" not in words(last(bench, reuse=0))


def test_what_is_worth_a_word_is_no_refusal(bench: Bench) -> None:
    said = last(bench, steps="4")
    assert 'data-state="stopped"' in said and "It can be calibrated." in words(said)
    assert "<li>4 steps are few for a cache schedule" in said


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": "1"}, "With one step there is nothing to reuse."),
    ({"steps": "2000"}, "The number of steps is a number from 1 to 1000, not 2000."),
    ({"own": [None, None, "", "", "", "", "hight = 9"]}, "takes no hight"),
    ({"scheme": "", "reuse": 0}, "there is nothing to calibrate"),
    ({"steps": "x"}, "The number of steps is a number"),
    ({"model": "none"}, "There is no model 'none'"),
    ({"model": None}, "There is no model"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_what_the_check_refuses_is_not_started(
    bench: Bench, changes: dict[str, Any], sentence: str
) -> None:
    """The same sentence under the check and by Start, and nothing of it is left."""
    from gradio_app.calibrate_fields import asked

    said = last(bench, **changes)
    assert 'data-state="failed"' in said and sentence in words(said)
    with pytest.raises(TenutoError, match=re.escape(sentence)):
        bench.calibrate(*asked(bench, *values(**changes)))
    assert not bench.places.unfinished() and not bench.desk.busy
    assert not (bench.places.out / "inputs").exists(), "a check keeps no image"


def test_quantized_weights_stop_what_would_quantize_them_alone(bench: Bench) -> None:
    from gradio_app.calibrate_fields import asked

    of_another_library(bench)
    assert "quantized by torchao already" in words(last(bench))
    with pytest.raises(TenutoError, match="quantized by torchao already"):
        bench.calibrate(*asked(bench, *values()))
    assert 'data-state="failed"' not in last(bench, scheme="", reuse=0, encoder="w8")
    job = bench.calibrate(*asked(bench, *values(scheme="", reuse=0, encoder="w8")))
    assert job.over.wait(PATIENCE) and job.kind == "calibrate"


def test_a_resumed_calibration_is_checked_too(bench: Bench) -> None:
    from gradio_app.calibrate_fields import asked

    job = bench.calibrate(*asked(bench, *values()))
    assert job.over.wait(PATIENCE)
    bench.places.keep_request("x", job.request)
    of_another_library(bench)
    with pytest.raises(TenutoError, match="quantized by torchao already"):
        bench.resume("x")
    assert bench.places.unfinished() == ["x"], "it may go on with the model as it was"


def test_a_check_can_be_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the configuration and the rest, as Gradio leaves a generator."""
    from tenuto.cli import session

    monkeypatch.setattr(session, "check", lambda *_, **__: pytest.fail("it went on"))
    going = looked_at(bench, *values())
    assert [words(next(going)), words(next(going))] == [
        "Checking. The configuration of tiny is read."
    ] * 2
    going.close()
    monkeypatch.setattr(type(bench.desk), "busy", "calibrate")
    assert len([*looked_at(bench, *values())]) == 2, "a calibration has begun"


def test_what_only_loading_tells(bench: Bench) -> None:
    """A denoiser that cannot be built from its configuration: Start tries."""
    index = bench.places.roots[0] / "tiny" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "Unknown"}))
    assert check_view.UNKNOWN in words(last(bench))
    assert bench.calibrate("tiny", "y", "w8a8", "quick", None).over.wait(PATIENCE)


def test_texts_are_escaped(bench: Bench) -> None:
    evil = "<script>alert(1)</script>"
    for said in (last(bench, model=evil), check_view.working(evil)):
        assert "<script" not in said and "alert(1)" in said


def test_the_quality_to_expect(bench: Bench) -> None:
    """Of a model that ships what was measured; of another that it was not, and a prediction."""
    said = words(last(bench, reuse=30, encoder="w4"))
    assert "Expected quality: weights not measured on your model: 35 to 37 dB on the two" in said
    assert "cache schedule not measured on your model: 43 to 48 dB on the two that ship" in said
    assert "text encoders not measured on your model;" in said
    assert "predicted by the forecast that ships, not measured on your model" in said
    said = words(last(bench, reuse=45, scheme="w6a8"))
    assert "weights not measured on your model; the tab Compare measures it" in said
    assert "cache schedule not measured on your model; the tab Compare" in said
    said = words(last(bench, model="demo:unet", scheme="w8a8", reuse=0))
    assert "weights 45.4 dB was measured on this model (64 prompts, 20 steps)" in said
    assert "your model" not in said and "cache schedule" not in said.lower()
    assert "forecast" not in words(last(bench, steps="4")), "too short to skip calls"


def test_what_is_said_of_quality_was_measured() -> None:
    """The numbers are those of the table in the documentation."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text("utf-8")
    rows = {"w8a8": "W8A8, every layer", "w4a8": "W4A8 by GPTQ", "w4a16": "W4A16 by GPTQ"}
    for model, column in (("demo:transformer", 2), ("demo:unet", 5)):
        known = {rows[scheme]: value for scheme, value in quality.MEASURED[model].items()}
        known["30 % of branch calls reused"] = quality.ROUTED[model]
        for name, value in known.items():
            line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
            assert line.split("|")[column].split()[0] == f"{value}", (model, name)
