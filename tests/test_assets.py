"""The recipe of the demo models: every stage runs, tiny and on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_stage_of_the_recipe_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "assets" / "train.py"), "--smoke", "--out", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo-transformer" / "model_index.json").is_file()
    assert (tmp_path / "grid.png").is_file()
    assert '"grid": true' in done.stdout
