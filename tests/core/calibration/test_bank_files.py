"""Recorded inputs on disk: the same artifact, little memory, and nothing is left of them."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tenuto as tn
from tenuto.calibration import bank_files
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.bank import Bank, Rows, banked
from tenuto.calibration.bank_files import COPIES, GIB, BankFiles, Columns
from tenuto.calibration.check import peak
from tenuto.calibration.presets import recipe_for
from tenuto.calibration.replay import inputs_of, outputs
from tenuto.errors import Cancelled, TenutoError
from tenuto.model import describe
from tenuto.sampling.trajectory import Call

MIB = 2**20


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these tiny banks were large."""
    monkeypatch.setattr(bank_files, "SMALL", 0)


def on_disk(folder: Path) -> BankFiles:
    return BankFiles(folder, lambda: 0)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that are made from now on."""
    found, usual = list[int](), BankFiles.made

    def made(self: BankFiles, size: int) -> Any:
        found.append(size)
        return usual(self, size)

    monkeypatch.setattr(BankFiles, "made", made)
    return found


def quantized(
    tiny: Any, recorded: Any, kind: str, rounding: Any, form: Any = None, **options: Any
) -> Any:
    model = tiny(kind).to(memory_format=form or torch.preserve_format)
    recipe = recipe_for(tn.schemes.W4A8, describe(model), rounding)
    return tn.quantize(model, recipe, recorded(kind), temporal="none", **options)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("pixart", None), ("unet", None), ("unet", torch.channels_last), ("sd3", None)],
)
def test_the_artifact_is_the_same(
    tiny: Any, recorded: Any, kind: str, form: Any, large: None, monkeypatch: Any, tmp_path: Path
) -> None:
    """Chosen by what memory quantizing may take; stopped in between and resumed, too."""
    rounding = GPTQ(rows=8, sweeps=1) if kind == "unet" else AdaRound(iterations=2, batch=4)
    quantized(tiny, recorded, kind, rounding, form, work=tmp_path / "one").save(tmp_path / "memory")
    made, work = counted(monkeypatch), tmp_path / "work"

    def stop(done: int, total: int, note: str) -> None:
        assert all(p.suffix == ".safetensors" or p.name == "manifest.json" for p in work.iterdir())
        if done > total / 2:
            raise Cancelled

    given = {"max_memory": 1, "work": work}
    with pytest.raises(Cancelled):
        quantized(tiny, recorded, kind, rounding, form, **given, on_progress=stop)
    assert made
    quantized(tiny, recorded, kind, rounding, form, **given).save(tmp_path / "disk")
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


@pytest.mark.parametrize("by_call", [False, True])
def test_every_row_comes_back(
    tiny: Any, recorded: Any, kind: str, by_call: bool, large: None, tmp_path: Path
) -> None:
    denoiser, calls = tiny(kind), recorded(kind).calls
    block, files = describe(denoiser).blocks[1], on_disk(tmp_path)
    given = denoiser, block, calls, "cpu", by_call
    bank, other = inputs_of(*given), inputs_of(*given, files)
    assert bank.files is None and other.files is files and len(files.maps) >= 2
    for key, tensor in bank.tensors.items():
        assert torch.equal(other.tensors[key], tensor)
    found = outputs(denoiser.get_submodule(block), other, "cpu", size=3)
    assert_close(found, outputs(denoiser.get_submodule(block), bank, "cpu", size=3))
    assert len(files.maps) == len(other.tensors) + 1 and not list(tmp_path.iterdir())
    del other, found
    assert not files.maps, "files end with the tensors"


@pytest.mark.skipif(sys.platform != "linux", reason="no system that says what is mapped")
def test_little_of_it_is_in_memory(tmp_path: Path) -> None:
    """Written and read in parts, all in an order of its own, and whole."""
    files, process = on_disk(tmp_path), psutil.Process()
    files.choose(1)
    columns = Columns(files, 16)
    before, most, calls = process.memory_info().shared, 0, []  # of files, and not of the heap
    for number in range(16):
        hidden = torch.full((4, 2**20), float(number))  # 16 MiB
        calls.append((((Rows(0),), {}), columns.put([hidden]), number))
        del hidden
        most = max(most, process.memory_info().shared)
    bank = banked("block", calls, files)
    del calls
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    for index in bank.parts(order, 4):
        (hidden,), _ = bank.rows(index, "cpu")
        assert torch.equal(hidden.amax(1), (index // 4).float()) and hidden.std(1).max() == 0
        del hidden
        most = max(most, process.memory_info().shared)
    assert most - before < 48 * MIB < bank.tensors[0].nbytes
    assert bank.tensors[0].sum() == 4 * 2**20 * sum(range(16))
    files.forget()
    assert process.memory_info().shared - before < 64 * MIB


@pytest.mark.parametrize("form", [None, torch.channels_last])
def test_inputs_are_written_once(form: Any, large: None, monkeypatch: Any, tmp_path: Path) -> None:
    """Those of all calls lie in one row in a file, and what they share has one of its own."""
    sizes = counted(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Twice()).to(
        memory_format=form or torch.preserve_format
    )
    draw = torch.randn(9, 2, 3, 4, 4).split(1)
    calls = [
        Call(0, i, float(i), {"input": x[0].to(memory_format=form or torch.preserve_format)})
        for i, x in enumerate(draw)
    ]
    files = on_disk(tmp_path)
    bank, expected = (
        inputs_of(model, "1", calls, "cpu", files=files),
        inputs_of(model, "1", calls, "cpu"),
    )
    assert torch.equal(bank.tensors[0], expected.tensors[0])
    assert bank.tensors[0].stride() == expected.tensors[0].stride()
    assert sizes == [bank.tensors[0].nbytes] == [len(m) for m in files.maps]


def test_files_side_by_side(large: None, tmp_path: Path) -> None:
    """The system may map one file right behind another one: they are two all the same."""
    files = on_disk(tmp_path)
    files.choose(1)
    parts = [files.empty((1, mmap.PAGESIZE), torch.uint8).fill_(n) for n in range(32)]
    ordered = sorted(parts, key=lambda part: part.data_ptr())
    assert torch.equal(files.joined(ordered), torch.cat(ordered))
    for pair in pairwise(ordered):
        assert torch.equal(files.joined(pair), torch.cat(pair))


MANY = """
import resource
from tenuto.calibration import bank_files
from tenuto.calibration.bank_files import BankFiles
from tenuto.calibration.chain import Chain
from tests.core.calibration.test_answers import made, same

bank_files.SMALL = 0
model, blocks, calls = made(6)
calls = [calls[0]] * 100
files = BankFiles({folder!r}, lambda: 0)
chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", lambda: made(6)[0], files)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for block in blocks:
    same(chain, model, made(6)[0], block, calls)
    assert files.used and (block == blocks[0] or chain.answers[model].columns)
    chain.passed(block)
"""


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no such limit that a process could lower"
)
def test_few_files_are_open(tmp_path: Path) -> None:
    """A process may have 1,024 on many systems, and a preset records hundreds of calls."""
    run = subprocess.run(
        [sys.executable, "-c", MANY.format(folder=str(tmp_path))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# --- where they go --------------------------------------------------------------------------------


def test_memory_or_disk(tmp_path: Path, caplog: Any) -> None:
    for room, folder, used in ((99, tmp_path, True), (100, tmp_path, False), (0, None, False)):
        files = BankFiles(folder, lambda room=room: room)
        files.choose(100 // COPIES)
        assert files.used is used
    assert len([r for r in caplog.records if "go to disk" in r.message]) == 1
    files = BankFiles(tmp_path, lambda: 0)
    files.choose(100)
    small = files.empty((2, 3), torch.float32)
    assert small.shape == (2, 3) and not files.maps, "not worth a file"


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")(COPIES * GIB - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(TenutoError, match=r"has room .* about 4\.00 GiB") as told:
        on_disk(tmp_path).choose(GIB)
    assert len(str(told.value)) <= 300
    files = on_disk(tmp_path)
    files.choose(1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(TenutoError, match="has room for the recorded inputs"):
        files.empty((MIB,), torch.float32)
    files.folder = tmp_path / "none"
    with pytest.raises(TenutoError, match="No such file"):
        files.empty((MIB,), torch.float32)


def test_what_they_may_take(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free, or what is left of what was allowed, less the work on a block."""
    model = tiny("pixart")
    given = model, describe(model), torch.device("cpu")
    monkeypatch.setattr(peak, "free_memory", lambda device: 8 * GIB)
    free = peak.room_for_banks(*given, None)
    assert 5.9 * GIB < free < 6 * GIB
    taken = psutil.Process().memory_info().rss
    left = peak.room_for_banks(*given, taken + GIB)
    assert abs(left - (GIB - (6 * GIB - free))) < 256 * MIB
    assert peak.room_for_banks(*given, 2**50) == free
    monkeypatch.setattr(peak, "processes", lambda: namedtuple("several", "size")(2))
    assert abs(peak.room_for_banks(*given, None) - (free - 3 * GIB)) < MIB


def test_a_bank_alone_is_in_memory() -> None:
    bank = Bank(((Rows(0),), {}), {0: torch.zeros(4, 3)}, {}, torch.zeros(4, dtype=torch.int64))
    bank.forget()
    assert torch.equal(bank.of(bank.tensors[0], torch.tensor([2])), torch.zeros(1, 3))
