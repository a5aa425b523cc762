"""The quality benchmark on a tiny pipeline: its rows, and that a row is measured once."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from benchmarks.quality_pictures import tf32
from benchmarks.quality_rows import BF16, FULL
from benchmarks.quality_table import markdown


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        device=None, preset="quick", seed=0, work=tmp_path / "work", out=tmp_path / "out.jsonl",
        pictures=0, count=2, batch=2, fid_batch=2, tf32=False, rows=[FULL, BF16, "W4A8 (round*"],
    )  # fmt: skip


def test_rows_are_measured_once_and_make_a_table_and_a_picture(
    args: argparse.Namespace, tiny_pixart_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = quality.Quality(args, str(tiny_pixart_folder), None)
    rows = list(first.rows())
    assert [row["row"] for row in rows] == [FULL, BF16, "W4A8 (round to nearest)"]
    full, low, w4a8 = rows
    assert full["psnr_db"]["median"] is None and low["psnr_db"] == full["bf16_floor_psnr_db"]
    assert low["resident_weight_bytes"]["artifact"] * 2 == full["resident_weight_bytes"]["float"]
    assert w4a8["int8_weight_share"] > 0.5 and w4a8["calibration_seconds"] > 0
    assert all(row["versions"]["torch"] and row["date"] and row["chip"] for row in rows)
    assert "| W4A8 (round to nearest) | - | - |" in markdown(rows)
    first.picture(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    with args.out.open("a") as file:
        file.write('{"cut off')

    monkeypatch.setattr(quality.Quality, "measured", lambda *_: pytest.fail("measured again"))
    again = list(quality.Quality(args, str(tiny_pixart_folder), None).rows())
    assert json.dumps(again) == json.dumps(rows)
    args.count = 3
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        next(quality.Quality(args, str(tiny_pixart_folder), None).rows())


def test_a_row_after_a_line_that_was_cut_off_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"cut off')
    quality.emit({"key": {"row": "a"}, "value": 1}, path)
    assert list(quality.known(path).values()) == [{"key": {"row": "a"}, "value": 1}]


def test_the_arithmetic_of_the_machine_comes_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
