"""`--max-memory`: quantizing keeps to it, block by block where that is needed, or says so first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tenuto import cli
from tenuto.calibration import check
from tenuto.calibration.check.peak import GIB, PROGRAM, kept_to
from tenuto.cli.arguments import size
from tenuto.errors import TenutoError
from tests.core import tiny_pipelines as small

ROOT = Path(__file__).resolve().parents[3]
TAKES = {"whole without recorded inputs": 100, "by block without recorded inputs": 40}
CALL = ["--height", "32", "--width", "32", "--steps", "1", "--device", "cpu"]
CALL += ["--set", "text_encoder_out_layers=[0,1,2]", "--set", "max_sequence_length=32"]

MEASURED = """
import re, sys
from pathlib import Path
from tenuto import cli
code = cli.main(sys.argv[2:])
# of this program: ru_maxrss is also that of the one that started it
kib = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
Path(sys.argv[1]).write_text(str(1024 * int(kib)))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.2 of 20 million weights, most of them in five blocks."""
    import diffusers

    pipe, found = small.flux2(), tmp_path_factory.mktemp("wide")
    facts = dict(pipe.transformer.config) | {
        "num_attention_heads": 28, "num_layers": 1, "num_single_layers": 4,
    }  # fmt: skip
    wide = diffusers.Flux2Transformer2DModel.from_config(facts)
    pipe.register_modules(transformer=nn.Module.to(wide, torch.bfloat16))
    pipe.save_pretrained(found)
    (found / "prompts.txt").write_text("a dog\ntwo cats\n")
    return found


def words(folder: Path, most: str, out: Path) -> list[str]:
    prompts = str(folder / "prompts.txt")
    return [
        "quantize", str(folder), "--scheme", "w8a8", "--temporal", "none", *CALL,
        "--prompts", prompts, "--max-memory", most, "--out", str(out),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("10GiB", 10 * 2**30), ("1.5 gb", 1_500_000_000), ("800M", 800_000_000), ("4096", 4096)],
)
def test_a_size(given: str, wanted: int) -> None:
    assert size(given) == wanted


@pytest.mark.parametrize("given", ["", "GiB", "-1GB", "1e9", "10 PiB", "ten"])
def test_what_is_no_size(given: str) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        size(given)


@pytest.mark.parametrize(
    ("most", "asked", "low"),
    [(100, None, False), (99, None, True), (40, None, True), (100, True, True)],
)
def test_low_memory_where_it_is_needed(most: int, asked: bool | None, low: bool) -> None:
    assert kept_to(TAKES, most, asked) is low


@pytest.mark.parametrize(("most", "asked"), [(39, None), (39, True), (99, False)])
def test_what_does_not_fit(most: int, asked: bool | None) -> None:
    with pytest.raises(TenutoError, match="--max-memory allows"):
        kept_to(TAKES, most, asked)


def test_recorded_inputs_may_lie_on_disk(folder: Path) -> None:
    """They are what more prompts cost, and only rounding on what layers see records any."""
    usual = {"scheme": "w4a8", "steps": 9, "call": {"height": 512, "width": 512}}
    one, two = (check(folder, prompts=["a"] * n, **usual) for n in (1, 2))
    assert two.memory["recorded inputs"] == 2 * one.memory["recorded inputs"] > 0
    for how in ("whole", "by block"):
        assert two.memory[how] > two.memory[f"{how} without recorded inputs"]
    found = two.memory["by block"] - two.memory["by block without recorded inputs"]
    assert found == two.memory["recorded inputs"]
    assert "on disk where memory has no room" in str(two)
    plain = check(folder, **usual | {"scheme": "w8a8"})
    assert plain.memory["recorded inputs"] == 0 and "recorded inputs" not in str(plain)


def test_it_is_said_before_anything_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "a.safetensors"
    assert cli.main(words(folder, "100MiB", out)) == 2
    said = capsys.readouterr().err.strip()
    assert "block by block" in said and "allows 0.1" in said and len(said.splitlines()) == 1
    assert not out.exists() and not out.with_suffix(".work").exists()
    assert cli.main(words(folder, "much", out)) == 2


def test_what_it_takes_grows(folder: Path) -> None:
    """With prompts, steps, image size and rounding on what layers see, and less block by block."""
    call = {"height": 64, "width": 64}
    least = check(folder, scheme="w8a8", prompts=["a"], steps=1, call=call).memory
    assert PROGRAM < least["by block"] < least["whole"]
    usual = {"scheme": "w4a8", "prompts": ["a"], "steps": 9, "call": call}
    found = check(folder, **usual).memory["by block"]
    assert found > least["by block"]
    more = {"prompts": ["a", "b"], "steps": 20, "call": {"height": 512, "width": 512}}
    for key, value in more.items():
        assert check(folder, **usual | {key: value}).memory["by block"] > found, key


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in /proc there alone")
def test_it_is_kept_to(folder: Path, tmp_path: Path) -> None:
    """The peak of a process of its own, whose whole model would not do."""
    out, used = tmp_path / "a.safetensors", tmp_path / "used"
    takes = check(
        folder, scheme="w8a8", prompts=["a", "b"], steps=1, device="cpu",
        call={"height": 32, "width": 32, "max_sequence_length": 32},
    ).memory  # fmt: skip
    most = takes["by block"] + GIB // 16
    assert most < takes["whole"]
    paths = os.pathsep.join([str(ROOT / "core"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(used), *words(folder, str(most), out)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "would be" in done.stdout, done.stdout  # it is on disk
    peak = int(used.read_text())
    assert peak <= most, f"{peak / GIB:.2f} of {most / GIB:.2f} GiB"
