"""The memory that is named before a job is about what rounding takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tenuto.calibration.check.peak import rounding_of
from tests.patience import PATIENCE

CODE = """
import re, sys, torch
from pathlib import Path
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.compensation import gram_of, mirrored
from tenuto.numerics import schemes

def peak():
    # of this program: ru_maxrss is also that of the one it was forked from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
rows, columns, form = int(sys.argv[1]), int(sys.argv[2]), getattr(schemes, sys.argv[3]).weight
GPTQ().weight(torch.randn(64, 64), form, torch.eye(64)[None], torch.randn(64, 64)[None])
weight, x = torch.randn(rows, columns), torch.randn(64, columns)
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now: imports took more
before = peak()
GPTQ().weight(weight, form, mirrored(gram_of(x[None])), torch.randn(rows, columns)[None])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in /proc there alone")
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(512, 4096), (4096, 1024), (2048, 2048)])
@pytest.mark.parametrize("scheme", ["COMFY_W4A8", "W4A8"])
def test_what_rounding_takes(shape: tuple[int, int], scheme: str) -> None:
    """In a process of its own, within 20 %: wide, high and square weights."""
    words = [sys.executable, "-c", CODE, *map(str, shape), scheme]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert rounding_of(*shape) == pytest.approx(int(done.stdout), rel=0.2)
