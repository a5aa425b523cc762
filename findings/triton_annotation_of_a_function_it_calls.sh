#!/usr/bin/env bash
# triton 3.9.0, torch 2.13.0 (CPU build), numpy 2.4.6, Python 3.11, Linux x86-64, no GPU needed; seen 2026-11-29.
#
# The good guess: annotations of a @triton.jit function that are no `tl.constexpr` mean nothing, above all under `from __future__
# import annotations`; and a kernel that runs in the interpreter (TRITON_INTERPRET=1) compiles.
#
# What happens: in a jit function that a kernel calls, the annotation of a *parameter* is compiled as if it were read: `a: Any` is
# "a global variable" that is no constexpr, and the kernel does not compile. `a: tl.tensor` does, and so does `Any` as the result's
# annotation. The interpreter runs all of them, so that tests without a GPU see nothing. Kernels can be compiled without a GPU for
# a given target (triton.compile with a GPUTarget), which is what finds it.
#
#   interpreter: any 2.0, result 2.0, tensor 2.0
#   sm_80:       any CompilationError, result compiles, tensor compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0
cat >"$folder/kernels.py" <<'PY'
from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl


@triton.jit
def one(a: Any):
    return a + 1


@triton.jit
def two(a) -> Any:
    return a + 1


@triton.jit
def three(a: tl.tensor) -> tl.tensor:
    return a + 1


@triton.jit
def any_(x):
    tl.store(x, one(tl.load(x)))


@triton.jit
def result(x):
    tl.store(x, two(tl.load(x)))


@triton.jit
def tensor(x):
    tl.store(x, three(tl.load(x)))


for name, kernel in (("any", any_), ("result", result), ("tensor", tensor)):
    if os.environ.get("TRITON_INTERPRET"):
        import torch

        x = torch.ones(1)
        kernel[(1,)](x)
        print(name, x.item(), end=" ")
        continue
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        triton.compile(ASTSource(kernel, {"x": "*fp32"}), target=GPUTarget("cuda", 80, 32))
        print(name, "compiles", end=" ")
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        assert "global variable" in str(error), error
        print(name, "global variable", end=" ")
PY
export TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$folder/cache"
seen=$(cd "$folder" && TRITON_INTERPRET=1 "$folder/venv/bin/python" kernels.py && "$folder/venv/bin/python" kernels.py)
echo "$seen"
expected="any 2.0 result 2.0 tensor 2.0 any global variable result compiles tensor compiles "
[[ "$seen" == "$expected" ]] || { echo "changed: expected $expected"; exit 1; }
