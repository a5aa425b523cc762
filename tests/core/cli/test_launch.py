"""`tenuto quantize` in several processes: the bytes of one, killed and resumed too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tenuto import cli
from tenuto.model import denoiser_of
from tenuto.sampling.processes import NEEDED
from tests.core import tiny_pipelines as small
from tests.core.sampling.test_processes import launch, several
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
UNITS = 3  # that are finished when a process is killed


@several
def test_two_processes_make_what_one_makes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Recording, blocks one by one from disk, ranges and the check; one of two is killed once."""
    pipe, model, prompts = small.flux2(), tmp_path / "model", tmp_path / "prompts.txt"
    nn.Module.to(denoiser_of(pipe), torch.bfloat16)
    pipe.save_pretrained(model, max_shard_size="100KB")
    prompts.write_text("a dog\ntwo cats\na red bus\na house\na boat\n")
    words = [
        "quantize", str(model), "--scheme", "w4a8-static", "--prompts", str(prompts), "--steps",
        "2", "--low-memory", "--height", "32", "--width", "32", "--set",
        "text_encoder_out_layers=[0,1,2]", "--set", "max_sequence_length=32", "--device", "cpu",
        "--out",
    ]  # fmt: skip
    alone, shared = tmp_path / "alone.safetensors", tmp_path / "shared.safetensors"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the others have
    try:
        assert cli.main([*words, str(alone)]) == 0
    finally:
        torch.set_num_threads(threads)
    work = shared.with_suffix(".work")
    with launch(["-m", "tenuto.cli", *words, str(shared)]) as (first, second):
        while len(list(work.glob("*.safetensors"))) < UNITS and first.poll() is None:
            time.sleep(0.02)
        second.kill()
        assert first.wait(PATIENCE) == 2
        _, said = first.communicate()
        assert "Another process of this job has ended" in said, said
    assert work.exists() and not shared.exists()
    with launch(["-m", "tenuto.cli", *words, str(shared)]) as (first, second):
        answer, said = first.communicate(timeout=PATIENCE)
        other, other_said = second.communicate(timeout=PATIENCE)
    assert first.returncode == 0 and second.returncode == 0, said + other_said
    assert "2 processes share the work" in said
    assert "Calibrated on 5 prompts" in answer and not other and "tenuto" not in other_said
    assert shared.read_bytes() == alone.read_bytes()
    assert not work.exists()


@several
def test_what_accelerate_starts(tmp_path: Path) -> None:
    """With --cpu one process, without a word of its own; with --multi_gpu two, without a GPU."""
    script = tmp_path / "say.py"
    script.write_text(
        "import sys\n"
        "from tenuto.cli.console import Bars\n"
        "from tenuto.cli.run import _say_processes\n"
        "from tenuto.sampling import launched\n"
        "with launched() as here:\n"
        "    _say_processes(here.size, Bars(sys.stdout if here.first else None))\n"
    )
    for how, said in (("--multi_gpu", "2 processes share"), ("--cpu", "has started one process")):
        words = [how, "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        words += ["--dynamo_backend", "no", "--main_process_port", "0", str(script)]
        found = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *words], capture_output=True,
            text=True, timeout=PATIENCE, env=os.environ | {"PYTHONPATH": str(ROOT / "core")},
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("tenuto: note:") == 1 and said in found.stdout, found.stderr


def test_other_commands_run_in_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in NEEDED:
        monkeypatch.setenv(name, "2")
    assert cli.main(["train-router", "demo:unet", "--out", "a.safetensors"]) == 2
    assert "train-router runs in one process" in capsys.readouterr().err
