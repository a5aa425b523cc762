"""Kernels in Triton are read by its compiler, not by its interpreter alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.core.runtime.test_triton_kernels import needs_triton


@needs_triton
def test_the_compiler_takes_every_kernel(tmp_path: Path) -> None:
    """In a process of its own: a file's kernels belong to the interpreter or to the compiler."""
    script = Path(__file__).with_name("compile_kernels.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    for kernel in ("int8", "e4m3", "int4", "conv2d", "rows", "norm", "rotary", "group norm"):
        assert f"{kernel}: " in done.stdout
