"""The layer around the commands: options as the functions have them, help, completion, bars."""

from __future__ import annotations

import inspect
import io
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from tqdm import tqdm
from typer.core import TyperGroup

from tenuto import cli
from tenuto.cli import commands
from tenuto.cli import program as declared
from tenuto.cli.arguments import spelled
from tenuto.cli.calls import OPTIONS
from tenuto.cli.console import Answer, Bars
from tenuto.errors import ArtifactError, TenutoError
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "core"), "OMP_NUM_THREADS": "1"}
LONG = "transformer_blocks.27.attn1.to_out.0 compensating"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """asked(*arguments): what the function of a command is called with, which is not run."""

    def found(*arguments: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def note(**options: Any) -> Answer:
            seen.update(options)
            return Answer("")

        with monkeypatch.context() as patch:
            for name in commands.__all__:
                patch.setattr(commands, name, note)
            assert cli.main(arguments) == 0
        assert isinstance(seen.pop("bars"), Bars)
        return seen

    return found


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", commands.__all__)
def test_options_are_those_of_the_function(name: str) -> None:
    """The same names and defaults, apart from --json, which is printed and not computed.

    The options of the pipeline's own call come as one, `call`.
    """
    options = dict(inspect.signature(getattr(declared, name)).parameters)
    takes = dict(inspect.signature(getattr(commands, name)).parameters)
    options.pop("as_json", None)
    takes.pop("bars")
    if "given" in options:
        own = {"given", *OPTIONS} - ({"negative"} if name == "generate" else set())
        assert own <= set(options) and takes.pop("call").default is None
        options = {key: option for key, option in options.items() if key not in own}
    assert set(options) <= set(takes)
    given = {"prompts"} if name == "train_router" else set()  # the app's alone
    assert set(takes) - set(options) == given
    for key, option in options.items():
        default = tuple(option.default) if isinstance(option.default, list) else option.default
        assert default == takes[key].default, key
    command = typer.main.get_command(declared.program)
    assert isinstance(command, TyperGroup)
    for param in command.commands[name.replace("_", "-")].params:
        assert getattr(param, "help", None), f"{name} says nothing of {param.name}"


def test_a_command_is_called_with_what_was_given(asked: Any, capfd: Any) -> None:
    shared = ("--steps", "5", "--guidance", "2.5", "--seed", "3", "--device", "cpu")
    found = asked("quantize", "m", "--out", "o", "--text-encoder", "w4", "--compact", *shared)
    assert found == {
        "model": "m", "out": Path("o"), "scheme": None, "text_encoder": "w4", "method": None,
        "temporal": "auto", "table_budget": None, "rounding": None, "preset": "quick",
        "prompts": None, "steps": 5, "guidance": 2.5, "seed": 3, "device": "cpu",
        "low_memory": None, "compact": True,
        "max_memory": None, "speedup": None, "reuse": None, "under_cache": False,
        "measure": None, "config": None, "call": {},
    }  # fmt: skip
    assert asked("train-router", "m", "--out", "o", "--speedup", "1.6")["speedup"] == 1.6
    for given, wanted in (("1.6", 1.6), ("auto", "auto")):
        for command in (("generate", "m", "--prompt", "x"), ("compare", "m")):
            assert asked(*command, "--speedup", given)["speedup"] == wanted
    assert asked("quantize", "m", "--out", "o", "--no-measure")["measure"] is False
    assert asked("compare", "m", "--artifact", "a")["seed"] == 10_000
    assert asked("generate", "m", "--prompt", "x", "--execution", "int8")["execution"] == "int8"
    assert asked("app", "--no-browser", "--port", "7")["no_browser"] is True


def test_the_pipelines_own_call(asked: Any, tmp_path: Path) -> None:
    """Options of their own and --set NAME=VALUE, of every command that samples."""
    picture, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.new("RGBA", (6, 4), "red").save(picture)
    Image.new("RGB", (6, 4), "white").save(mask)
    options = ("--height", "32", "--frames", "5", "--negative", "blur", "--image", str(picture))
    options += ("--mask", str(mask), "--set", "strength=0.5", "--set", "cfg-normalization=true")
    options += ("--set", f"control_image=@{picture}", "--set", "second_prompt=a dog")
    for command in (
        ("quantize", "m", "--out", "o", "--scheme", "w8a8"), ("train-router", "m", "--out", "o"),
        ("compare", "m", "--artifact", "a"), ("generate", "m", "--prompt", "x"),
    ):  # fmt: skip
        found = asked(*command, *options)
        call = found["call"]
        pictures = [call.pop(name) for name in ("image", "mask_image", "control_image")]
        assert [p.mode for p in pictures] == ["RGB", "L", "RGB"]
        assert [p.filename for p in pictures] == ["photo.png", "mask.png", "photo.png"]
        negative = found.get("negative") or call.pop("negative_prompt")
        assert negative == "blur"
        assert call == {
            "height": 32, "num_frames": 5, "strength": 0.5, "cfg_normalization": True,
            "second_prompt": "a dog",
        }  # fmt: skip


def test_options_with_no_value_and_with_several(asked: Any) -> None:
    """`--plot [PNG]` and `--roots DIR...`, before and after the other arguments."""
    for arguments, plot in (
        (("f",), None), (("f", "--plot"), True), (("f", "--plot", "--layer", "x"), True),
        (("f", "--plot", "b.png"), Path("b.png")), (("--plot=b.png", "f"), Path("b.png")),
        (("--plot", "b.png", "f"), Path("b.png")),
    ):  # fmt: skip
        found = asked("inspect", *arguments)
        assert (found["file"], found["plot"]) == (Path("f"), plot)
    roots = [Path("a"), Path("b")]
    assert asked("app")["roots"] == []
    assert asked("app", "--roots", "a", "b", "--listen")["roots"] == roots
    assert asked("app", "--roots", "a", "--roots=b")["roots"] == roots
    assert spelled(["--", "--plot"], optional=["--plot"]) == ["--", "--plot"]


# --- the functions --------------------------------------------------------------------------------


def test_the_functions_print_nothing_and_raise(
    tmp_path: Path, tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Called from Python, as the app does."""
    model, out = str(tiny_pixart_folder), tmp_path / "x.png"
    answer = commands.generate(model, prompt="a lemon", steps=1, batch=2, out=out)
    assert answer.text.startswith(f"{out}: 2 images of 1 step in ") and out.is_file()
    assert answer.next.startswith("tenuto quantize ")
    with pytest.raises(ArtifactError, match="Cannot read"):
        commands.inspect(tmp_path / "none.safetensors")
    with pytest.raises(TenutoError, match="not both"):
        commands.train_router(model, out=tmp_path / "r.safetensors", reuse=0.3, speedup=2)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_says_that_nothing_was_written(tiny_pixart_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tenuto import cli\nimport tenuto.cli.session as session\n"
        "def load(*args): raise KeyboardInterrupt\n"
        "session.load = load\nsys.exit(cli.main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "generate", str(tiny_pixart_folder), "--prompt", "a"],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "tenuto: stopped; nothing was written.\n"


# --- what is shown --------------------------------------------------------------------------------


def test_a_model_without_a_command_is_checked(asked: Any, tmp_path: Path, capfd: Any) -> None:
    """What is not there and looks like no model stays a command that there is none of."""
    for model in ("demo:unet", str(tmp_path), "org/name", "./models/x"):
        assert asked(model) == asked("check", model)
        assert asked(model, "--scheme", "w4a8") == asked("check", model, "--scheme", "w4a8")
    assert cli.main(["quantise", "demo:unet"]) == 2
    assert "No such command 'quantise'. Did you mean 'quantize'?" in capfd.readouterr().err


def test_no_argument_at_all_is_the_help(capfd: Any) -> None:
    assert cli.main([]) == 0
    alone = capfd.readouterr()
    assert cli.main(["--help"]) == 0
    assert alone == capfd.readouterr() and "train-router" in alone.out


def test_help_fits_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """80 columns, in panels, and no word of another kind for what the field has one for."""
    for name in ("", *commands.__all__):
        assert cli.main([*([name.replace("_", "-")] if name else []), "--help"]) == 0
        text = capfd.readouterr().out
        assert all(len(line) <= 80 for line in text.splitlines()) and "─ Options ─" in text
        assert not re.search(r"\b(draws?|drawn|pictures?|holds?|held|routes?|lay)\b", text)


def test_help_names_no_type(capfd: pytest.CaptureFixture[str]) -> None:
    """What takes a value has a word of its own for it; switches take none."""
    for name in ("", *commands.__all__):
        assert cli.main([*([name.replace("_", "-")] if name else []), "--help"]) == 0
        text = capfd.readouterr().out
        assert "--help" in text and not re.search(r"<\w+>", text), name


@pytest.mark.parametrize("name", commands.__all__)
def test_help_names_options_that_the_command_has(name: str) -> None:
    program = typer.main.get_command(declared.program)
    assert isinstance(program, TyperGroup)
    params = program.commands[name.replace("_", "-")].params
    known = {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
    for param in params:
        said = set(re.findall(r"--[a-z][a-z-]*", getattr(param, "help", "") or ""))
        assert said <= known, param.name


def test_help_says_what_a_seed_is_of() -> None:
    program = typer.main.get_command(declared.program)
    assert isinstance(program, TyperGroup)
    said = {
        name: next((str(getattr(p, "help", "")) for p in command.params if "--seed" in p.opts), "")
        for name, command in program.commands.items()
    }
    images = {name for name, help in said.items() if help.startswith("Seed of the first image")}
    assert images == {"generate", "compare"}
    assert "image" in said["quantize"] and said["quantize"] == said["train-router"]
    assert said["text-encoder"] and "image" not in said["text-encoder"]


def test_a_shell_completes_commands_options_and_values() -> None:
    for words, wanted in (
        ("tenuto tra", ["train-router"]), ("tenuto quantize --rou", ["--rounding"]),
        ("tenuto quantize m --scheme w8a8", ["w8a8", "w8a8-static"]),
        ("tenuto generate m --execution i", ["int8"]), ("tenuto inspect a --pl", ["--plot"]),
    ):  # fmt: skip
        asked = {
            "_TENUTO_COMPLETE": "complete_bash", "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-m", "tenuto.cli"], env=ENVIRONMENT | asked, capture_output=True,
            text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
        assert run.stdout.split() == wanted


def test_an_answer_fits_a_terminal_and_says_what_is_next() -> None:
    text = "  sentence " + "with words " * 20 + "\n" + "x" * 90 + "\nshort"
    lines = str(Answer(text, next="tenuto inspect a")).splitlines()
    assert all(len(line) <= 80 for line in lines if "x" * 90 not in line)
    assert lines[1].startswith("    with") and "x" * 90 in lines
    assert lines[-2:] == ["short", "Next: tenuto inspect a"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_long_note_leaves_the_bar_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of the note stay, and a wider terminal shows more of it."""
    for columns, shown in ((80, "transformer"), (140, LONG)):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        with Bars(stream) as bars:
            progress = bars("Training the router")
            progress(0, 2, LONG)
            progress(1, 2, LONG)
            bars._bar.ncols, bars._bar.dynamic_ncols = columns, None
            bars._bar.refresh()
            line = stream.getvalue().split("\r")[-1]
        assert len(line.rstrip()) <= columns and shown in line
        assert line.rstrip().endswith("mpensating")
        assert re.search(r" 50%\|.{12}\| ", line), line


def test_a_log_has_lines_with_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """No carriage return and no bar, from us or a library: a person reads the file of a job."""
    monkeypatch.setattr("tenuto.progress.SOONEST", 0.05)
    stream = io.StringIO()
    with Bars(stream) as bars:
        progress = bars("Quantizing")
        for done in range(5):
            progress(done, 4, f"block {done}")
            time.sleep(0.06)
        bars.close()
        for _ in tqdm(range(3), **bars.settings("Generating")):
            time.sleep(0.06)
    lines = stream.getvalue().splitlines()
    assert all(
        re.fullmatch(r"\w+: \d+ %, [\d:]+ so far, ([\d:?]+ left|soon over).*", line)
        for line in lines
    )
    assert any(line.startswith("Quantizing: 50 %") and "block 2" in line for line in lines), lines
    assert [line for line in lines if "100 %" in line][-1].startswith("Generating")
    assert len(lines) == len(set(lines)) and not {"\r", "\x1b"} & set(stream.getvalue())


def test_short_work_writes_no_line_and_without_a_stream_nothing_does() -> None:
    stream = io.StringIO()
    for bars in (Bars(stream), Bars()):
        with bars:
            progress = bars("Recording")
            for done in range(3):
                progress(done, 2, "")
    assert stream.getvalue() == ""


def test_no_bars_of_other_libraries_on_a_terminal(tiny_pixart_folder: Path, tmp_path: Path) -> None:
    """What a person sees while a model is loaded and used: our bar alone."""
    main, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-m", "tenuto.cli", "generate", str(tiny_pixart_folder), "--prompt", "a",
         "--steps", "2", "--out", str(tmp_path / "x.png")],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=end,
    )  # fmt: skip
    os.close(end)
    seen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait(PATIENCE) == 0
    labels = set(re.findall(r"([A-Z][\w .]*):\s+\d+%", seen.decode()))
    assert labels == {"Generating"}, seen.decode()
