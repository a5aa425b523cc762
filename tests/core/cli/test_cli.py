"""The command: what it refuses and how, what it prints where, and that stopped work goes on."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tenuto import attach, cli
from tenuto.artifact.artifact import Artifact
from tenuto.artifact.compact import expanded
from tenuto.cli import commands
from tenuto.cli.console import Bars
from tenuto.errors import TenutoError
from tenuto.sampling.loading import load
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
QUANTIZE = ("quantize", "MODEL", "--scheme", "w8a8", "--prompts", "p.txt", "--out", "o.safetensors")
UNITS = ["temporal", "outside", *(f"transformer_blocks.{i}" for i in range(3))]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in that holds p.txt, two prompts."""
    (tmp_path / "p.txt").write_text("a red dog\n\na photo of the blue cat on snow\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tiny_pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W8A8 artifact of the tiny model, made by the command."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "p.txt").write_text("a red dog\na blue cat\n")
    out = folder / "a.safetensors"
    arguments = ["quantize", str(tiny_pixart_folder), "--scheme", "w8a8", "--out", str(out)]
    assert cli.main([*arguments, "--prompts", str(folder / "p.txt")]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["a.safetensors", "p.txt"]
    return out


def start(*arguments: str | Path, code: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own; `code` runs before it."""
    code = f"import sys\nfrom tenuto import cli\n{code}\nsys.exit(cli.main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "core"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_size for p in sorted(folder.rglob("*"))}


def fits_and_leads_on(text: str, command: str) -> bool:
    """Lines of at most 80 columns, and a last one that names the command to run next."""
    *lines, last = text.splitlines()
    return max(map(len, lines)) <= 80 and last.startswith(f"Next: tenuto {command} ")


def one_sentence(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("tenuto") and "Traceback" not in err
    return lines[0]


# --- bad input ------------------------------------------------------------------------------------


def artifact_like(header: dict[str, object], path: Path) -> None:
    save_file({"weights/x": torch.zeros(1)}, path, {"tenuto": json.dumps(header)})


def bad_files(folder: Path, good: Path) -> None:
    """Everything that a user could take for an artifact."""
    (folder / "random.safetensors").write_bytes(bytes(range(7, 107)))
    (folder / "empty.safetensors").touch()
    (folder / "short.safetensors").write_bytes(good.read_bytes()[:-100])
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:200])
    with (folder / "huge.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 5 * 2**30))
        file.truncate(5 * 2**30 + 8)  # sparse: the header is as long as it says
    save_file({"x": torch.zeros(1)}, folder / "stranger.safetensors")
    artifact = Artifact.load(good)
    header = {k: v for k, v in artifact.header.items() if k != "temporal"}
    header.pop("forecast")  # its tensor is left out below
    artifact_like({**header, "format_version": "2.0"}, folder / "later.safetensors")
    artifact_like({**header, "layers": 7}, folder / "odd.safetensors")
    bare = {key: header[key] for key in ("format_version", "family", "model_class", "fingerprint")}
    artifact_like({**bare, "schedule": {}}, folder / "bare.safetensors")
    family = {"family": "dit", "model_class": "DiTTransformer2DModel", "layers": {}}
    Artifact({**header, **family}).save(folder / "family.safetensors")
    mark = header["fingerprint"]
    values = [value + 1 for value in mark["values"]]
    other = {**header, "layers": {}, "fingerprint": {**mark, "values": values}}
    Artifact(other).save(folder / "another.safetensors")


GENERATE = ("generate", "MODEL", "--prompt", "a")
WITH = (*GENERATE, "--artifact")
BAD = {
    "unknown command": (("draw",), "No such command 'draw'"),
    "unknown option": (("inspect", "x", "--colour"), "No such option: --colour"),
    "unknown option of all": (("--colour",), "No such option: --colour"),
    "no model": (("generate", "--prompt", "a"), "Missing argument 'MODEL'"),
    "no out": (("quantize", "MODEL"), "Missing option '--out'"),
    "no value": ((*GENERATE, "--steps"), "'--steps' requires an argument"),
    "one too many": (("inspect", "x", "y"), "unexpected extra argument"),
    "unknown execution": ((*GENERATE, "--execution", "fp8"), "--execution: 'fp8' is not one of"),
    "no artifact there": (("inspect", "none.safetensors"), "Cannot read none.safetensors"),
    "random bytes": (("inspect", "random.safetensors"), "random.safetensors is not an artifact"),
    "empty file": (("inspect", "empty.safetensors"), "empty.safetensors is not an artifact"),
    "truncated": (("inspect", "short.safetensors"), "truncated or damaged"),
    "cut in the header": (("inspect", "cut.safetensors"), "cut.safetensors is not"),
    "header of 5 GB": (("inspect", "huge.safetensors", "--json"), "too large"),
    "not ours": (("inspect", "stranger.safetensors"), "not a Tenuto artifact"),
    "later version": (("inspect", "later.safetensors"), "version 2.0"),
    "forged header": (("inspect", "odd.safetensors"), "odd.safetensors"),
    "no schedule": ((*WITH, "bare.safetensors"), "bare.safetensors"),
    "a folder": (("inspect", "."), "Cannot read ."),
    "truncated, to draw with": ((*WITH, "short.safetensors"), "truncated"),
    "other family": ((*WITH, "family.safetensors"), "DiTTransformer2DModel"),
    "other model": ((*WITH, "another.safetensors"), "another model"),
    "other model, measured": (
        ("compare", "MODEL", "--artifact", "another.safetensors", "--prompts", "p.txt"),
        "another model",
    ),
    "nothing to compare": (("compare", "MODEL", "--artifact", "none"), "Cannot read none"),
    "unknown temporal choice": (
        (*QUANTIZE, "--temporal", "half"),
        "none, tiar, table, int8, select, auto",
    ),
    "nothing to quantize": (
        ("quantize", "MODEL", "--prompts", "p.txt", "--out", "o.safetensors"),
        "--text-encoder",
    ),
    "unknown width": ((*QUANTIZE, "--text-encoder", "w3"), "w8 or w4"),
    "unknown method": ((*QUANTIZE, "--text-encoder", "w4", "--method", "magic"), "awq, clip, gptq"),
    "method alone": ((*QUANTIZE, "--method", "awq"), "--text-encoder"),
    "unknown rounding": ((*QUANTIZE, "--rounding", "up"), "adaround, clip, gptq, nearest"),
    "rounding of 8 bits": ((*QUANTIZE, "--rounding", "gptq"), "weights below 8 bits"),
    "under no cache": (
        (*QUANTIZE, "--scheme", "w4a8", "--under-cache"),
        "give --speedup or --reuse",
    ),
    "nothing under a cache": (
        (*QUANTIZE, "--under-cache", "--speedup", "2"),
        "see no recorded call",
    ),
    "unknown demo": (("quantize", "demo:nothing", *QUANTIZE[2:]), "no demo model 'nothing'"),
    "unknown demo to show": (("demo", "--model", "nothing"), "no demo model 'nothing'"),
    "no such folder": (("generate", "./none", "--prompt", "a"), "There is no folder ./none"),
    "not a model folder": (("generate", ".", "--prompt", "a"), "no model_index.json"),
    "a file as a model": (("generate", "p.txt", "--prompt", "a"), "p.txt is a file"),
    "unknown scheme": ((*QUANTIZE, "--scheme", "w9z1"), "Unknown scheme 'w9z1'"),
    "unknown preset": ((*QUANTIZE, "--preset", "best"), "Unknown preset 'best'"),
    "unknown router preset": (
        ("train-router", "MODEL", "--preset", "best", "--out", "o.safetensors"),
        "Unknown preset 'best'",
    ),
    "unknown device": ((*QUANTIZE, "--device", "tpu9"), "no device 'tpu9'"),
    "device without values": ((*GENERATE, "--device", "meta"), "no device 'meta'"),
    "no steps": ((*GENERATE, "--steps", "0"), "--steps: takes a whole number of 1 or more"),
    "half a step": ((*GENERATE, "--steps", "0.5"), "--steps"),
    "too many steps": ((*GENERATE, "--steps", "1001"), "at most 1000 steps"),
    "no pictures": ((*GENERATE, "--batch", "-1"), "--batch"),
    "nothing counted": (("compare", "MODEL", "--artifact", "x", "--count", "0"), "--count"),
    "infinite guidance": ((*GENERATE, "--guidance", "inf"), "--guidance"),
    "negative seed": ((*GENERATE, "--seed", "-1"), "--seed"),
    "compiled, with nothing": ((*GENERATE, "--compile"), "give --artifact or --speedup"),
    "captured, with nothing": ((*GENERATE, "--graphs"), "give --artifact or --speedup"),
    "no prompt": (("generate", "MODEL", "--prompt", " "), "--prompt"),
    "all reused": (("train-router", "MODEL", "--reuse", "1", "--out", "o"), "--reuse"),
    "slower": (("train-router", "MODEL", "--speedup", "1", "--out", "o"), "--speedup"),
    "two aims": (
        ("train-router", "MODEL", "--speedup", "2", "--reuse", "0.3", "--out", "o"),
        "not both",
    ),
    "no training": (("train-router", "MODEL", "--iterations", "0", "--out", "o"), "--iterations"),
    "prompts not there": ((*QUANTIZE, "--prompts", "none.txt"), "Cannot read none.txt"),
    "no prompts in it": ((*QUANTIZE, "--prompts", "blank.txt"), "blank.txt holds no prompt"),
    "prompts not text": ((*QUANTIZE, "--prompts", "latin.txt"), "latin.txt is not a text file"),
    "out is a folder": ((*QUANTIZE, "--out", "folder"), "Cannot write folder"),
    "out below a file": ((*QUANTIZE, "--out", "p.txt/o"), "Cannot write p.txt/o"),
    "out not writable": ((*QUANTIZE, "--out", "/proc/none/o"), "Cannot write /proc/none/o"),
    "no artifact by its name": ((*QUANTIZE, "--out", "a.bin"), "ends in .safetensors, and a.bin"),
    "no PNG by its name": ((*GENERATE, "--out", "a.jpg"), "ends in .png, not a.jpg"),
    "picture not writable": ((*GENERATE, "--out", "/proc/none/o.png"), "Cannot write"),
    "work folder taken": ((*QUANTIZE, "--out", "mine.safetensors"), "mine.work, which is taken"),
    "demo out is a file": (("demo", "--out", "p.txt"), "tenuto"),
}


@pytest.fixture(scope="module")
def bad_folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    bad_files(folder, made)
    (folder / "p.txt").write_text("a red dog\n")
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "folder").mkdir()
    (folder / "mine.work").mkdir()
    (folder / "mine.work" / "letters.txt").write_text("not ours")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(
    name: str,
    bad_folder: Path,
    tiny_pixart_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On stderr, with exit code 2, and nothing is written."""
    arguments, words = BAD[name]
    monkeypatch.chdir(bad_folder)
    before = tree(bad_folder)
    code = cli.main([str(tiny_pixart_folder) if a == "MODEL" else a for a in arguments])
    out, err = capfd.readouterr()
    assert code == 2
    assert words in one_sentence(err)
    assert not out
    assert tree(bad_folder) == before


def test_what_only_the_model_tells_is_refused_without_a_trace(
    here: Path,
    tiny_pixart_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A speedup out of reach is known after the recording: that goes too."""
    monkeypatch.setattr("tenuto.cli.checks.prompts", lambda name: ["a red dog"])
    before = tree(here)
    code = cli.main(
        ["train-router", str(tiny_pixart_folder), "--speedup", "50", "--out", "o.safetensors"]
    )
    assert code == 2
    note, *said = capfd.readouterr().err.splitlines(keepends=True)
    assert note.startswith("tenuto: note: 4 steps are few")
    assert "not 50" in one_sentence("".join(said))
    assert tree(here) == before


def test_a_model_that_would_be_unpickled_is_refused(
    tiny_pixart_folder: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights in any other format than safetensors are not touched."""
    import shutil

    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        model = here / f"pickled-{part}"
        shutil.copytree(tiny_pixart_folder, model)
        (weights,) = (model / part).glob("*.safetensors")
        weights.unlink()
        other = name if part == "transformer" else "pytorch_model"
        (model / part / f"{other}.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        assert cli.main(["generate", str(model), "--prompt", "a"]) == 2
        said = one_sentence(capfd.readouterr().err)
        assert "has no weights in safetensors, and nothing else is read" in said


def test_bad_input_in_a_process_of_its_own(here: Path) -> None:
    (here / "x.safetensors").write_bytes(b"\xff" * 100)
    process = start("inspect", "x.safetensors", "--json")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert "x.safetensors" in one_sentence(err)


# --- what is printed where ------------------------------------------------------------------------


def test_compare_prints_one_object(here: Path, made: Path, tiny_pixart_folder: Path) -> None:
    process = start(
        "compare", tiny_pixart_folder, "--artifact", made, "--prompts", "p.txt", "--count", "2",
        "--json", code="import tenuto.cli.session as c; old = c.load\n"
        "c.load = lambda *a: (print('noise'), old(*a))[1]",
    )  # fmt: skip
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert {
        "psnr_db", "ssim", "lpips", "bf16_floor_psnr_db", "reuse_ratio", "reuse_flops",
        "int8_weight_share", "seconds_per_picture", "speedup", "resident_weight_bytes",
        "peak_memory_bytes", "execution", "device", "threads", "versions", "steps", "guidance",
        "count", "note",
    } <= set(found)  # fmt: skip
    weights = load_file(next(tiny_pixart_folder.glob("transformer/*.safetensors")))
    header = Artifact.load(made).header
    low, kept = (
        sum(weights[f"{name}.weight"].numel() for name in header[part])
        for part in ("layers", "kept_in_float")
    )
    assert found["execution"]["mode"] == "int8" and kept
    assert found["int8_weight_share"] == pytest.approx(low / (low + kept), rel=1e-3)
    assert found["note"] is None or "slower" in found["note"]
    assert set(found["psnr_db"]) == {"median", "p5"}
    assert found["psnr_db"]["median"] > 25
    assert (found["steps"], found["guidance"], found["count"]) == (4, 2.0, 2)
    assert "noise" in err and "it/s" not in err


def test_inspect_shows_header_and_facts(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(made), "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert not err
    assert found["header"] == Artifact.load(made).header
    assert found["file_bytes"] == made.stat().st_size
    assert sum(found["layers_by_scheme"].values()) == len(found["header"]["layers"])
    assert set(found["sections"]) == {"weights", "temporal", "forecast"}
    assert len(found["header"]["temporal"]["modules"]["adaln_single"]["cosine_error"]) == 4
    assert cli.main(["inspect", str(made)]) == 0
    text = capfd.readouterr().out
    assert fits_and_leads_on(text.replace(str(made), "a.safetensors"), "inspect")
    assert f"{len(found['header']['layers'])} in w8a8" in text and "4 steps, guidance 2" in text
    assert "table: 1 module, 1 - cosine" in text
    assert "PixArtTransformer2DModel (pixart)" in text


def test_help_has_an_example_for_each_command(capfd: pytest.CaptureFixture[str]) -> None:
    for name in commands.__all__:
        command = name.replace("_", "-")
        assert cli.main([command, "--help"]) == 0
        text = capfd.readouterr().out
        assert f"example: tenuto {command}" in " ".join(text.split())
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"tenuto \d+\.\d+\.\d+\n", capfd.readouterr().out)


class Stream(io.StringIO):
    """A stream that is or is not a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_bars_show_at_once_on_a_terminal_and_elsewhere_after_ten_seconds() -> None:
    for terminal in (True, False):
        stream = Stream(terminal)
        with Bars(stream) as bars:
            for label in ("Recording", "Quantizing"):
                progress = bars(label)
                for done in range(3):
                    progress(done, 2, f"part {done}")
        shown = stream.getvalue()
        assert ("Recording" in shown and "Quantizing: 100%" in shown) == terminal
        assert terminal or not shown


def test_a_slow_bar_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenuto.progress.SOONEST", 0.05)
    stream = Stream(False)
    with Bars(stream) as bars:
        progress = bars("Recording")
        progress(0, 4, "first")
        time.sleep(0.1)
        progress(2, 4, "second")
    assert re.search(r"Recording: 50 %, 00:\d\d so far, 00:\d\d left, second", stream.getvalue())


# --- the main job ---------------------------------------------------------------------------------


def test_generate_draws_a_grid_that_says_how_it_was_made(
    here: Path, made: Path, tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, prompt = str(tiny_pixart_folder), "A red dog, on snow!"
    common = ["generate", model, "--prompt", prompt, "--negative", "a cat", "--seed", "3"]
    assert cli.main([*common, "--batch", "3"]) == 0
    text = capfd.readouterr().out
    assert fits_and_leads_on(text, "quantize") and "--negative 'a cat'" in text
    with Image.open(here / "a-red-dog-on-snow-3.png") as picture:
        assert picture.size == (66, 66)
        said = json.loads(picture.info["tenuto"])
        third = picture.crop((0, 34, 32, 66)).tobytes()
    assert said["prompt"] == prompt and said["negative"] == "a cat"
    assert (said["steps"], said["guidance"], said["seed"], said["batch"]) == (4, 2.0, 3, 3)
    assert cli.main([*common[:-1], "5", "--out", "sub/one.png"]) == 0
    with Image.open(here / "sub" / "one.png") as picture:
        apart = max(abs(a - b) for a, b in zip(picture.tobytes(), third, strict=True))
        assert apart <= 2, "image i has seed + i, alone or in a batch, but for the last rounding"
    assert cli.main([*common, "--artifact", str(made), "--steps", "2"]) == 0
    with Image.open(here / "a-red-dog-on-snow-3-2.png") as picture:  # the name was taken
        said = json.loads(picture.info["tenuto"])
        assert (said["artifact"], said["steps"]) == ("a.safetensors", 2)
        assert picture.size == (32, 32)


def test_execution_is_as_asked(
    here: Path, made: Path, tiny_pixart_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """compare measures int8, generate draws with what is not slower, unless told otherwise."""

    seen: list[str] = []

    def note(*args: Any, **options: Any) -> Any:
        seen.append(options.get("execution", "default"))
        return attach(*args, **options)

    monkeypatch.setattr("tenuto.cli.session.attach", note)
    monkeypatch.setattr(importlib.import_module("tenuto.measure.compare"), "attach", note)
    model, file = str(tiny_pixart_folder), str(made)
    draw = ["generate", model, "--prompt", "a", "--steps", "1", "--artifact", file]
    measured = ["compare", model, "--artifact", file, "--count", "1", "--steps", "1"]
    for arguments, default in ((draw, "auto"), (measured, "int8")):
        for asked in ([], ["--execution", "float"], ["--execution", "auto"]):
            assert cli.main([*arguments, *asked]) == 0
            assert seen.pop() == (asked[1] if asked else default)
        assert cli.main([*arguments, "--execution", "fp8"]) == 2
        assert "int8" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "compiled", "captured"),
    [([], False, "auto"), (["--compile"], True, "auto"), (["--graphs"], False, "auto"),
     (["--no-graphs"], False, False), (["--compile", "--no-graphs"], True, False)],
)  # fmt: skip
def test_compare_measures_what_generate_runs(
    asked: list[str], compiled: bool, captured: Any, tiny_pixart_folder: Path,
    here: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[dict[str, Any]] = []

    def note(*args: Any, **options: Any) -> Any:
        seen.append(options)
        raise TenutoError("seen")

    monkeypatch.setattr("tenuto.cli.session.attach", note)
    monkeypatch.setattr("tenuto.measure.compare_all", note)
    shared = [str(tiny_pixart_folder), "--steps", "2", "--speedup", "2", *asked]
    for command in (["generate", "--prompt", "a"], ["compare", "--prompts", "p.txt"]):
        assert cli.main([*command, *shared]) == 2
    assert [(s["compile"], s["graphs"]) for s in seen] == [(compiled, captured)] * 2


def test_a_compact_artifact_is_the_same_one(
    here: Path, made: Path, tiny_pixart_folder: Path
) -> None:
    arguments = ["quantize", str(tiny_pixart_folder), "--scheme", "w8a8", "--prompts", "p.txt"]
    assert cli.main([*arguments, "--compact", "--out", "small.safetensors"]) == 0
    assert (here / "small.safetensors").stat().st_size < made.stat().st_size
    small, whole = Artifact.load(here / "small.safetensors"), Artifact.load(made)
    again = expanded(small, load(str(tiny_pixart_folder)))
    assert "compact" in small.header and again.header.keys() == whole.header.keys()
    assert again.tensors.keys() == whole.tensors.keys()
    alike = (key for key in whole.tensors if not key.startswith("forecast/"))  # of other prompts
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in alike)
    assert cli.main(["inspect", "small.safetensors"]) == 0


def test_text_encoders_alone_and_beside_the_denoiser(
    here: Path, tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One section more in the file, no work left; `inspect` and `compare` tell of it."""
    start = ["quantize", str(tiny_pixart_folder), "--prompts", "p.txt", "--text-encoder", "w4"]
    assert cli.main([*start, "--method", "awq", "--out", "encoder.safetensors"]) == 0
    text = capfd.readouterr().out
    assert "text_encoder:" in text and fits_and_leads_on(text, "compare")
    assert cli.main([*start, "--scheme", "w8a8", "--out", "both.safetensors"]) == 0
    assert not list(here.glob("*.work"))
    alone, both = (Artifact.load(here / f"{name}.safetensors") for name in ("encoder", "both"))
    assert {key.split("/")[0] for key in alone.tensors} == {"encoder"}
    assert alone.header["made"]["encoder"]["method"] == "awq"
    assert {"encoder", "weights"} <= {key.split("/")[0] for key in both.tensors}
    capfd.readouterr()
    assert cli.main(["inspect", "both.safetensors"]) == 0
    assert "w4a16" in capfd.readouterr().out
    measured = ["compare", str(tiny_pixart_folder), "--artifact", "both.safetensors"]
    assert cli.main([*measured, "--count", "1", "--steps", "1", "--json"]) == 0
    states = json.loads(capfd.readouterr().out)["encoders"]["text_encoder"]
    assert cli.main([*measured, "--count", "1", "--steps", "1"]) == 0
    text = capfd.readouterr().out
    assert fits_and_leads_on(text, "generate") and "--steps 1 --prompt TEXT" in text
    assert 0.9 < states["cosine"]["mean"] < 1 and states["bf16"]["relative_l2"] > 0


def test_a_router_joins_the_artifact(
    here: Path,
    made: Path,
    tiny_pixart_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tenuto.cli.checks.prompts", lambda name: ["a red dog", "a blue cat"])
    code = cli.main(
        ["train-router", str(tiny_pixart_folder), "--artifact", str(made), "--reuse", "0.25",
         "--iterations", "2", "--out", "both.safetensors"]
    )  # fmt: skip
    text = capfd.readouterr().out
    assert code == 0 and tree(here).keys() == {"both.safetensors", "p.txt"}
    assert fits_and_leads_on(text, "compare")
    both, first = Artifact.load(here / "both.safetensors"), Artifact.load(made)
    assert both.header["layers"] == first.header["layers"]
    assert both.tensors.keys() > first.tensors.keys()
    assert both.header["route"]["reuse_ratio"] == pytest.approx(0.25, abs=0.05)
    assert re.search(r"0\.attn1 +#[#.]{3}\n", text), "the step map"


# --- long work ------------------------------------------------------------------------------------

SAVES = """
import tenuto.resume as w
old = w.Work.save
def save(self, unit, tensors):
    old(self, unit, tensors)
    print("saved", unit, file=sys.stderr, flush=True)
w.Work.save = save
"""


def saved(err: str) -> list[str]:
    return re.findall(r"saved (\S+)", err)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_interrupted_work_goes_on_and_ends_in_the_same_bytes(
    here: Path, tiny_pixart_folder: Path
) -> None:
    """Ctrl-C after the first unit, SIGKILL after another one: nothing finished is done again."""
    command = ("quantize", tiny_pixart_folder, "--scheme", "w4a8", "--prompts", "p.txt", "--out")
    whole = start(*command, "whole.safetensors", code=SAVES)
    _, err = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0 and saved(err) == ["trajectory", *UNITS], err
    work = here / "cut.work"

    process = start(*command, "cut.safetensors", code=SAVES)
    wait_for(work / "temporal.safetensors", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    last = err.splitlines()[-1]
    assert last == "tenuto: stopped; the same command resumes, from cut.work."
    assert "Traceback" not in err
    done = saved(err)
    assert done[:2] == ["trajectory", "temporal"] and len(done) < 5
    assert not (here / "cut.safetensors").exists() and work.is_dir()

    process = start(*command, "cut.safetensors", code=SAVES)
    wait_for(work / "transformer_blocks.0.safetensors", process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert not (here / "cut.safetensors").exists()
    kept = [unit for unit in UNITS if (work / f"{unit}.safetensors").exists()]
    assert kept[:3] == UNITS[:3] and len(kept) < 5

    process = start(*command, "cut.safetensors", code=SAVES)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert saved(err) == [unit for unit in UNITS if unit not in kept]
    assert (here / "cut.safetensors").read_bytes() == (here / "whole.safetensors").read_bytes()
    assert not work.exists()
    assert not list(here.glob(".*.part"))
    with safe_open(here / "cut.safetensors", framework="pt") as file:
        assert len(list(file.keys())) >= 100
