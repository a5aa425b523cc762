"""The parts of the app without a server: infotext, PNG text, places, jobs, what is shown."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tenuto
from gradio_app import jobs, making, view
from gradio_app.bench import Bench
from gradio_app.desk import Desk
from gradio_app.failures import ended
from gradio_app.given import given, real, whole
from gradio_app.infotext import parsed, written
from gradio_app.jobs import Job
from gradio_app.pictures import restored
from gradio_app.places import Places, checked_name
from gradio_app.png import BUDGET, texts
from gradio_app.settings import Settings
from gradio_app.studio import Generated, Wanted
from tenuto.calibration.router.in_progress import so_far
from tenuto.errors import TenutoError
from tenuto.measure.sheet import difference
from tenuto.resume import Work
from tenuto.sampling.images import save_png
from tests.patience import PATIENCE

OWN = [None, None, "", "", "", "", ""]  # fields of the pipeline's own settings, left empty
SETTINGS = {
    "prompt": 'two lines,\nand "Steps: 9"', "steps": 20, "guidance": 2.5, "seed": 2**40,
    "model": "demo:unet", "artifact": "my, own", "sampler": "DDIM", "size": "64x64",
}  # fmt: skip


# --- settings in an image ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{}, {"prompt": "a Steps: 3, Seed: 1"}, {"artifact": None}, {"guidance": None},
     {"prompt": "Ünïcode ☃"}, {"model": 'a "quoted", folder: x'}],
    ids=str,
)  # fmt: skip
def test_an_infotext_tells_what_it_was_told(change: dict[str, Any], tmp_path: Path) -> None:
    settings = SETTINGS | change
    text = written(settings)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", {}, text)
    found = parsed(texts(tmp_path / "x.png")["parameters"])
    names = ("prompt", "steps", "guidance", "seed", "model", "artifact")
    assert found == {n: settings[n] for n in names if settings[n] is not None}
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.info["parameters"] == text


PROMPTS = {
    "a negative line": "a cat\nNegative prompt: not a dog\nthe end",
    "a negative line first": "Negative prompt: a cat",
    "a line of settings": "a cat\nSteps: 5, Seed: 1",
    "a line of settings last": "a cat\nNegative prompt: x\nSteps: 5, Sampler: DDIM, Seed: 1",
    "separators of lines": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\r\nk",
    "a separator at the end of a line": "a\u2028\nNegative prompt:\u2028\x85\nb",
    "30,000 characters": "a prompt, of many words: " * 1200,
    "30,000 wide characters": "\u732b\U0001f408\n" * 10_000,
    "30,000 and a negative line": '\u732b "x"\n' * 5000 + "Negative prompt: \\n",
    "escapes": 'a \\n \\u2028 "quoted", {b}: [c]',
    "control characters": "a\x1b[2Jb\x07c\x7f",
    "carriage returns and a negative line": "a\rNegative prompt: b\r\nc",
    "the field itself": 'a\nTenuto prompt: "b", Steps: 3',
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt_comes_back(name: str, tmp_path: Path) -> None:
    """Through the PNG, letter by letter, with the settings beside it."""
    settings = SETTINGS | {"prompt": PROMPTS[name].strip()}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", settings, written(settings))
    found = parsed(texts(tmp_path / "x.png")["parameters"])
    names = ("prompt", "steps", "guidance", "seed", "model", "artifact")
    assert found == {n: settings[n] for n in names}
    assert restored(Places(tmp_path), tmp_path / "x.png")["prompt"] == settings["prompt"]


def test_a_prompt_that_is_too_long_or_no_text_is_refused(tmp_path: Path) -> None:
    """Not cut in silence."""
    bench = Bench(Settings(tmp_path))
    for prompt, said in (("a" * 60_000, "at most 50000"), (["a"], "a text"), ("\ud800", "half a")):
        with pytest.raises(TenutoError, match=said):
            bench.generate("demo:unet", prompt, 1, 1, None, "", False, lambda *_: None)


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with these chunks between its first and its last."""
    every = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in every
    )


def zipped(name: bytes, size: int) -> tuple[bytes, bytes]:
    return b"zTXt", name + b"\0\0" + zlib.compress(b"a" * size, 9)


def test_texts_of_a_png_have_one_budget(tmp_path: Path) -> None:
    """A thousand texts of 200 kB each: those that nobody asks for are not even unpacked."""
    file = tmp_path / "x.png"
    many = [zipped(b"t%d" % i, 200_000) for i in range(1000)]
    file.write_bytes(png_of(*many, (b"tEXt", b"parameters\0Steps: 3"), zipped(b"parameters", 9)))
    tracemalloc.start()
    assert texts(file) == {"parameters": "Steps: 3"}
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    for chunks in (
        [zipped(b"parameters", BUDGET + 1)],
        [zipped(b"tenuto", BUDGET // 2), zipped(b"parameters", BUDGET // 2 + 1)],
        [(b"tEXt", b"parameters\0" + b"a" * (BUDGET + 1))],
    ):
        file.write_bytes(png_of(*chunks))
        with pytest.raises(TenutoError, match="too long"):
            texts(file)
    file.write_bytes(png_of(zipped(b"tenuto", BUDGET // 2), zipped(b"parameters", BUDGET // 2)))
    assert {name: len(text) for name, text in texts(file).items()} == {
        "tenuto": BUDGET // 2, "parameters": BUDGET // 2,
    }  # fmt: skip


def test_another_programs_infotext() -> None:
    text = (
        "a cat, (masterpiece:1.2) <lora:x:1>\non snow\nNegative prompt: bad, ugly\nhands\n"
        'Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234,'
        ' Size: 512x768, Model hash: 0123abcd, Model: sd15, Lora hashes: "x: 1, y: 2", Version: 1'
    )  # fmt: skip
    assert parsed(text) == {
        "prompt": "a cat, (masterpiece:1.2) <lora:x:1>\non snow", "steps": 28, "guidance": 7,
        "seed": 1234, "model": "sd15", "call": {"negative_prompt": "bad, ugly\nhands"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "Steps:", "Steps: x, Seed: nan, CFG scale: inf", 'Steps: "',
     "Steps: 1e9, Seed: -1", "Steps: 2.5", ":" * 5000, "Steps: 1, " + "a: " * 5000,
     '{"a": [' * 3000, "__import__('os').system('x')"],
    ids=range(11),
)  # fmt: skip
def test_nonsense_sets_no_number(text: str) -> None:
    assert not {"seed", "guidance"} & set(parsed(text))
    assert parsed(text).get("steps") in (None, 1)


# --- names and paths ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "my.artifact-2_b", "W8", "x" * 81])
def test_names(name: str) -> None:
    assert checked_name(f" {name}.safetensors ") == name


def test_places_know_their_own_files_only(tmp_path: Path) -> None:
    roots = tmp_path / "roots"
    for name in ("one", "deep/er/two", ".hidden/three"):
        (roots / name).mkdir(parents=True)
        (roots / name / "model_index.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "made.safetensors").touch()
    (tmp_path / "else.safetensors").touch()
    (out / "link.safetensors").symlink_to(tmp_path / "else.safetensors")
    places = Places(out, (roots,))
    assert places.models() == ["demo:transformer", "demo:unet", "deep/er/two", "one"]
    assert places.model("one") == str(roots / "one") == places.model(str(roots / "one"))
    assert places.artifacts("one") == ["made"]
    assert "shipped:demo-unet.w8a8" in places.artifacts("demo:unet")
    with pytest.raises(TenutoError, match="no artifact"):
        places.artifact("link")
    with pytest.raises(TenutoError, match="already"):
        places.new_artifact("made")
    assert [places.comparison().name for _ in range(2)] == ["0001", "0002"]


def test_numbers_are_checked() -> None:
    assert (given("", whole, "x", 1, 9), given(" 3 ", whole, "x", 1, 9)) == (None, 3)
    for value in (
        "x",
        2.5,
        0,
        10,
        float("nan"),
        float("inf"),
        None,
        [1],
        True,
        10**400,
        "1" * 5000,
    ):
        with pytest.raises(TenutoError, match="The x is a"):
            whole(value, "The x", 1, 9)
    with pytest.raises(TenutoError, match="from 0 to 1"):
        real(2, "The share", 0, 1)


def test_what_cannot_be_calibrated_is_refused_without_a_trace(tmp_path: Path) -> None:
    bench = Bench(Settings(tmp_path))
    good = {"model": "demo:unet", "name": "x", "scheme": "w8a8", "preset": "quick", "reuse": None}
    for change, words in (
        ({"scheme": None}, "nothing to calibrate"), ({"scheme": "w9"}, "Unknown scheme"),
        ({"text_encoder": "w3"}, "w8 or w4"), ({"method": "awq"}, "--text-encoder"),
        ({"text_encoder": "w8", "method": "magic"}, "awq, clip, gptq, nearest"),
        ({"rounding": "gptq"}, "Only weights below 8 bits"),
        ({"scheme": None, "reuse": 0.3, "rounding": "gptq"}, "Only weights below 8 bits"),
        ({"scheme": "w4a8", "rounding": "up"}, "Unknown rounding"),
        ({"preset": "best"}, "Unknown preset"), ({"reuse": 2}, "share"), ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"), ({"model": "x"}, "no model"),
    ):  # fmt: skip
        with pytest.raises(TenutoError, match=words):
            bench.calibrate(**(good | change))
    with pytest.raises(TenutoError, match="one artifact or more"):
        bench.compare("demo:unet", [], 4)
    assert not list(tmp_path.iterdir())


def test_a_stop_before_the_image_begins_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the press of Generate and the first of its steps."""
    bench = Bench(Settings(tmp_path, device="cpu"))
    begin = bench.studio.generate

    def stopped_first(*wanted: Any) -> Generated:
        bench.stop(None, "generate")
        return begin(*wanted)

    monkeypatch.setattr(bench.studio, "generate", stopped_first)
    values = ["demo:unet", "a", 7, 1, 2.0, "", False, False, "A", 1, [], 1, "", *OWN]
    first, *_, last = making.made_now(bench, *values)
    assert "loading the model" in first[0] and 'data-state="running"' in first[2]
    assert "Stopped." in last[2] and len(first) == len(last) == 11
    assert not (tmp_path / "pictures").exists()


def test_what_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the place of a folder stands for a full disk."""
    bench = Bench(Settings(tmp_path))
    wanted = Wanted("demo:unet", "demo:unet", "a", 1, 1, None)
    drawn = Generated({"full": [Image.new("RGB", (8, 8))]}, 1.0, wanted)
    monkeypatch.setattr(bench.studio, "generate", lambda *_: drawn)
    for name in ("pictures", "comparisons", "unfinished"):
        (tmp_path / name).write_text("in the way")
    for call in (
        lambda: bench.generate("demo:unet", "a", 1, 1, None, "", False, lambda *_: None),
        lambda: bench.calibrate("demo:unet", "x", "w4a8", "quick", None),
        lambda: bench.compare("demo:unet", ["shipped:demo-unet.w8a8"], 1),
    ):
        with pytest.raises(TenutoError, match=r"^Cannot write .*\.$"):
            call()
        assert bench.desk.busy == "", "it is free again"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x.json"))

    monkeypatch.setattr("gradio_app.places.write_text", full)
    with pytest.raises(TenutoError, match=r"^Cannot write x\.json: No space left on device\.$"):
        Bench(Settings(tmp_path / "other")).calibrate("demo:unet", "x", "w4a8", "quick", None)


# --- jobs -----------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, threading, time
def say(**event): print(json.dumps(event), flush=True)
request = json.loads(sys.stdin.readline())
"""
BEHAVIOUR = {
    "done": "say(stage='Work', done=1, total=2, note='half'); say(result={'name': 'x'})",
    "failed": "say(error='It cannot be.'); sys.exit(2)",
    "crashed": "sys.exit(7)",
    "half a line": "say(stage='Work', done=1, total=2, note='half');"
    """print('{"result": {"na', end='', flush=True); os.kill(os.getpid(), 9)""",
    "noise": r"""os.write(1, b'\xff\xfe\n[1]\nnull\n"x"\n{"stage": 1}\n' + b'[' * 99999);"""
    "sys.exit(7)",
    "noise between": r"""os.write(1, b'\xff[\n'); say(result={'name': 'x'})""",
    "obeys": "threading.Thread(target=lambda: (sys.stdin.read(), sys.exit())).start();"
    "say(stage='Work', done=1, total=9, note='')\nsys.stdin.read()",
    "deaf": "say(stage='Work', done=1, total=9, note='')\nwhile True: time.sleep(1)",
}  # fmt: skip


def job(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(jobs, "WORKER", FAKE + BEHAVIOUR[how])
    return Job("calibrate", {"out": "x"}, tmp_path / "log")


@pytest.mark.parametrize(
    ("how", "state", "error"),
    [("done", "done", ""), ("failed", "failed", "It cannot be."),
     ("crashed", "failed", "The worker ended by itself (exit code 7)."),
     ("half a line", "failed", ended(-9)),
     ("noise", "failed", "The worker ended by itself (exit code 7)."),
     ("noise between", "done", "")],
)  # fmt: skip
def test_a_job_ends_in_its_state(
    how: str, state: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, seen = Desk(), []
    found = desk.start(job(how, tmp_path, monkeypatch), lambda job: seen.append(job.state))
    assert found.over.wait(PATIENCE)
    assert (found.state, found.error, seen) == (state, error, [state])
    with desk.turn("an image"):  # it is free again
        assert desk.busy == "image" and not desk.line
    assert escaped(view.status(found, ""))


@pytest.mark.parametrize("how", ["obeys", "deaf"])
def test_a_stop_stops_even_who_does_not_listen(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk()
    found = desk.start(job(how, tmp_path, monkeypatch))
    while found.stage != "Work":
        time.sleep(0.01)
    found.stop()
    assert found.state in ("stopping", "stopped")  # who listens may have ended by now
    found.stop()
    assert found.over.wait(PATIENCE)
    assert found.state == "stopped"


def test_who_sees_which_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    assert desk.job("", "calibrate") is None
    first = desk.start(job("done", tmp_path, monkeypatch))
    first.over.wait(PATIENCE)
    second = desk.start(job("deaf", tmp_path, monkeypatch))
    assert desk.job(first.id, "calibrate") is second, "what runs is shown to everyone"
    assert desk.job("unknown", "calibrate") is second
    assert desk.job(second.id, "compare") is None
    desk.close()
    assert second.state == "stopped"
    assert desk.job(first.id, "calibrate") is first


def test_the_time_left_is_of_this_part() -> None:
    found = Job("calibrate", {}, Path("log"))
    found.state = "running"
    found.take({"stage": "Quantizing", "part": 2, "done": 600, "total": 1000})
    found.stage_began -= 10
    assert found.left is None, "resumed at 600, and nothing more done"
    found.take({"stage": "Quantizing", "part": 2, "done": 800, "total": 1000})
    assert found.left == pytest.approx(10, rel=0.01)


def test_what_the_fields_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not chosen is None; how text encoders round counts only where there are any."""
    from gradio_app.calibrate_fields import asked

    monkeypatch.setattr(jobs, "WORKER", FAKE + BEHAVIOUR["done"])
    bench = Bench(Settings(tmp_path))
    for scheme, reuse, encoder, method, rounding in (
        ("w8a8", 30, "", "gptq", ""), ("", 0, "w4", "awq", ""), ("w4a16", 0, "w8", "rtn", "nearest")
    ):  # fmt: skip
        options = ["", "", 0, "", ""]
        job = bench.calibrate(
            *asked(
                bench,
                "demo:unet",
                "x",
                scheme,
                "quick",
                reuse,
                *options,
                encoder,
                method,
                rounding,
                *OWN,
            )
        )
        assert job.over.wait(PATIENCE)
        found = [job.request[k] for k in ("scheme", "reuse", "text_encoder", "method", "rounding")]
        share = reuse / 100 or None
        want = [scheme, share, encoder, method if encoder else None, rounding]
        assert found == [value or None for value in want]
        assert bench.places.unfinished() == []


def test_the_fields_show_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked with these values, filled with the same; nothing is filled when it is over."""
    from gradio_app import calibrate_fields as calibrate
    from gradio_app import compare

    own = [None, None, "48", "64", "", "blur", "clip_skip = 1"]  # as they are read
    monkeypatch.setattr(jobs, "WORKER", FAKE + BEHAVIOUR["deaf"])
    bench = Bench(Settings(tmp_path))
    for values in (
        [
            "demo:unet",
            "mine",
            "w4a8",
            "standard",
            45,
            "6",
            "2.5",
            3,
            "40",
            "a\nb",
            "w4",
            "awq",
            "",
            *own,
        ],
        ["demo:transformer", "other", "", "quick", 0, "", "", 0, "", "", "w8", "gptq", "", *OWN],
    ):
        job = bench.calibrate(*calibrate.asked(bench, *values))
        *filled, accordion = calibrate.filled(bench, job)
        assert filled == values and getattr(accordion, "open", False) is (values[-7:] != OWN)
        bench.stop(job.id, "calibrate")
        assert job.over.wait(PATIENCE) and "mine" not in map(str, calibrate.filled(bench, job))
    values = ["demo:unet", ["shipped:demo-unet.w8a8"], 5, "4", "", 77, "float", "a\nb", 1.0, ""]
    job = bench.compare(*values[:-2], speedup=values[-2], loras=values[-1])
    model, artifacts, *rest, _, chosen = compare.filled(bench, job)
    assert [model, artifacts.value, *rest] == [*values, *OWN] and chosen == values[:2]
    bench.desk.close()


def test_a_request_of_an_older_version_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks what was added since: resumed by its name, or by the same settings once more."""
    monkeypatch.setattr(jobs, "WORKER", FAKE + BEHAVIOUR["crashed"])
    bench = Bench(Settings(tmp_path))
    wanted = {"model": "demo:unet", "name": "x", "scheme": "w4a8", "preset": "quick"}
    job = bench.calibrate(**wanted, reuse=None)
    assert job.over.wait(PATIENCE)
    new = {"text_encoder", "method", "rounding", "call"}
    ours = {"out", "first", "prompts", "device", "inputs"}
    old = {name: value for name, value in job.request.items() if name not in new | ours}
    assert len(old) == len(job.request) - 9
    for begin in (lambda: bench.resume("x"), lambda: bench.calibrate(**wanted, reuse=None)):
        bench.places.keep_request("x", old)
        assert begin().over.wait(PATIENCE)
    bench.places.keep_request("x", old)
    with pytest.raises(TenutoError, match="other settings"):
        bench.calibrate(**wanted, reuse=None, rounding="nearest")


def test_resume_opens_models_below_the_roots_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever path a request holds: the name is looked up anew, and all else is checked."""
    monkeypatch.setattr(jobs, "WORKER", FAKE + BEHAVIOUR["crashed"])
    for name in ("roots/mine", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
    bench = Bench(Settings(tmp_path / "out", (tmp_path / "roots",)))
    job = bench.calibrate("mine", "x", "w4a8", "quick", None)
    assert job.over.wait(PATIENCE)
    request = {
        k: v
        for k, v in job.request.items()
        if k not in ("out", "first", "prompts", "device", "inputs")
    }
    bench.places.keep_request("x", request | {"model": str(tmp_path / "elsewhere")})
    job = bench.resume("x")
    assert job.over.wait(PATIENCE)
    assert job.request["model"] == str(tmp_path / "roots" / "mine")
    for change in (
        {"shown_model": str(tmp_path / "elsewhere")}, {"shown_model": ["mine"]}, {"seed": "x"},
        {"preset": "best"}, {"prompts_text": [1]}, {"scheme": {"a": 1}}, {"steps": -1},
        {"call": {"a colour": 1}}, {"call": [1]},
    ):  # fmt: skip
        bench.places.keep_request("x", request | change)
        with pytest.raises(TenutoError):
            bench.resume("x")
    bench.places.keep_request("x", {"scheme": "w4a8"})
    with pytest.raises(TenutoError, match="damaged"):
        bench.resume("x")


# --- what is shown --------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script>\"'&"


def escaped(html: str) -> bool:
    return "<script" not in html and "alert('x')" not in html


def test_every_text_is_escaped() -> None:
    found = Job("calibrate", {}, Path("log"))
    event = {"stage": EVIL, "note": EVIL, "part": 1, "parts": 2, "done": 1, "total": 2}
    found.take(event)
    assert escaped(view.status(found, EVIL)) and escaped(view.status(None, EVIL))
    for state in (jobs.STOPPED, jobs.FAILED, jobs.DONE):
        found.state, found.error, found.result = state, EVIL, {"text": EVIL}
        assert escaped(view.status(found, ""))
    route = {
        "policy": EVIL, "branches": [EVIL], "kinds": [EVIL], "timesteps": [9.0, 1.0], "rows": ["#."]
    }  # fmt: skip
    assert escaped(view.step_map(route)) and escaped(view.table([(EVIL, EVIL)], [EVIL, EVIL]))


def test_a_card_says_what_was_asked_for() -> None:
    asked = {
        "shown_model": EVIL, "scheme": "w4a8", "reuse": 0.45, "text_encoder": "w8",
        "preset": "quick", "out": "/somewhere/mine.safetensors",
    }  # fmt: skip
    encoders = asked | {"shown_model": "m", "scheme": None, "reuse": None, "text_encoder": "w4"}
    for request, said in (
        (asked, "w4a8, 45% reuse, text encoders in w8, quick, to mine.safetensors"),
        (encoders, "m, the denoiser keeps its weights, text encoders in w4, quick, to mine"),
        (encoders | {"scheme": "w8a8", "text_encoder": None}, "m, w8a8, quick, to mine"),
    ):
        found = Job("calibrate", request, Path("log"))
        for state in (jobs.RUNNING, jobs.STOPPING, jobs.STOPPED, jobs.FAILED, jobs.DONE):
            found.state = state
            html = view.status(found, "")
            assert said in html and escaped(html) and "/somewhere" not in html
    other = {"shown_model": "m", "names": {"a": "a", "b": "shipped:b"}, "count": 8}
    assert "m, a, shipped:b, 8 images" in view.status(Job("compare", other, Path("log")), "")


def test_the_map_has_a_cell_for_every_call() -> None:
    branches = [f"blocks.{b}.{k}" for b in range(2) for k in ("attn1", "ff")]
    html = view.step_map({
        "policy": "router so far", "branches": branches, "kinds": ["attention", "feed-forward"] * 2,
        "timesteps": [900.0, 500.0, 100.0], "rows": ["###", "#.#", "#..", "###"],
    })  # fmt: skip
    assert html.count("<rect") == html.count("<title>") == 12
    assert html.count(": reused</title>") == 3
    assert 'aria-label="router so far: 25% of 4 × 3 branch calls reused"' in html


def test_the_router_so_far(tmp_path: Path) -> None:
    assert so_far(tmp_path / "none") is None
    about = {"about": {"trajectory": {"timesteps": [3.0, 1.0]}, "branches": ["a.attn1", "a.ff"]}}
    work = Work(tmp_path / "x.work", about)
    assert so_far(tmp_path / "x.work") is None
    for number in (1, 2):
        state = {"logits": torch.tensor([[5.0, 5.0], [-1.0, 1.0]]) * number,
                 "history": torch.tensor([[0.5, 0.1, 1.0]] * number)}  # fmt: skip
        work.save(f"router/{number:05d}", state)
    found = so_far(tmp_path / "x.work")
    assert found is not None and found.loss == (0.5, 0.5)
    assert found.map.table.tolist() == [[True, True], [False, True]]
    save_file({"logits": torch.zeros(3)}, tmp_path / "x.work" / "router%2F00003.safetensors")
    assert so_far(tmp_path / "x.work") is None, "of something else"


def test_a_difference_of_pictures() -> None:
    one, other = Image.new("RGB", (2, 2), (10, 20, 200)), Image.new("RGB", (2, 2), (12, 20, 100))
    assert difference(one, other, 8).getpixel((0, 0)) == (16, 0, 255)
    with pytest.raises(TenutoError, match="cannot be compared"):
        difference(one, Image.new("RGB", (3, 2)))


# --- the process ----------------------------------------------------------------------------------

LEAN = """
import sys, contextlib
from tenuto import cli
with contextlib.suppress(SystemExit):
    cli.main(["--help"])
for name in ("generate", "app"):
    cli.main([name, "--help"])
cli.main(["inspect", "none"])
cli.main(["app", "--listen"])
from tenuto.cli.app import module
module("worker"), module("bench")
print([m for m in ("gradio", "fastapi", "webview", "diffusers") if m in sys.modules])
"""


def test_gradio_is_loaded_by_the_app_alone() -> None:
    """Neither by the other commands nor by the worker."""
    root = Path(__file__).resolve().parents[2] / "core"
    run = subprocess.run(
        [sys.executable, "-c", LEAN], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.stdout.splitlines()[-1] == "[]"


def test_an_installation_without_gradio_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tenuto import cli
    from tenuto.cli import app

    find = app.importlib.util.find_spec
    monkeypatch.setattr(
        app.importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["app"]) == 2
    assert "pip install 'tenuto[app]'" in capfd.readouterr().err


def test_a_window_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_app import window

    monkeypatch.setattr(window.importlib.util, "find_spec", lambda name: None)
    assert "pywebview is not installed" in str(window.missing())
    monkeypatch.setattr(window.importlib.util, "find_spec", lambda name: name)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        assert "no screen" in str(window.missing())


def test_a_model_that_fails_while_it_generates_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlucky(*args: Any, **options: Any) -> Any:
        raise RuntimeError(f"no luck {EVIL}")

    bench = Bench(Settings(tmp_path))
    monkeypatch.setattr(bench, "generate", unlucky)
    values = ["demo:unet", *["x"] * 7, "A", 1, [], 1, "", *OWN]
    *_, (_, _, card, *_) = making.made_now(bench, *values)
    assert "RuntimeError: no luck" in card and "Generating failed" in card and escaped(card)
    assert "RuntimeError" in capsys.readouterr().err


def test_a_request_is_kept_as_it_was_asked(tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.keep_request("x", {"scheme": "w8a8", "prompts_text": "ü"})
    assert places.unfinished() == ["x"] and places.request("x") == {
        "scheme": "w8a8", "prompts_text": "ü",
    }  # fmt: skip
    (tmp_path / "unfinished" / "y.json").write_text(json.dumps([1]))
    assert places.request("y") is None and places.request("none") is None
    Work(tmp_path / "x.work", {})
    places.forget("x", whole=True)
    assert places.request("x") is None and not (tmp_path / "x.work").exists()


def test_threads_do_not_pass_each_other() -> None:
    """Of many that come at once one has the desk at a time, and each gets it."""
    desk, got, there = Desk(), [], set()

    def come(number: int) -> None:
        with desk.turn("an image"):
            there.add(number)
            got.append(set(there))
            time.sleep(0.01)
            there.remove(number)

    threads = [threading.Thread(target=come, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(min(one) for one in got if len(one) == 1) == [*range(20)] and desk.busy == ""


def test_only_a_tick_stops_what_watches_a_job() -> None:
    """Any other answer may come late, when a click has begun the next job."""
    import gradio as gr

    from gradio_app.fields import goes_on

    on = gr.Timer(active=True)
    assert goes_on([on, "said"]) == [on, "said"]
    assert goes_on([gr.Timer(active=False), "said"]) == [gr.skip(), "said"]


def test_the_page_names_no_options_of_the_command() -> None:
    """Where the library says one, the page says its own; each of these is still said there."""
    from gradio_app.view import HERE, card, notice, on_the_page

    library = "".join(p.read_text("utf-8") for p in Path(tenuto.__file__).parent.rglob("*.py"))
    library = re.sub(r'"\n\s*f?"', "", library)
    for sentence, here in HERE.items():
        assert sentence in library, sentence
        assert "--" not in on_the_page(f"a {sentence} b") and here in on_the_page(sentence)
        assert "--" not in card("idle", "a", sentence) + notice("a", sentence)


def test_a_late_look_hides_no_question(tmp_path: Path) -> None:
    """Whether to discard is asked until it is answered, or until something runs."""
    from gradio_app.calibrate import seen

    bench, job = Bench(Settings(tmp_path)), Job("calibrate", {"out": "a.safetensors"}, Path("log"))
    assert seen(bench, job)[6].visible is False
    job.state = jobs.STOPPED
    assert seen(bench, job)[6] == seen(bench, None)[6] == {"__type__": "update"}
