#!/usr/bin/env bash
# triton 3.9.0, torch 2.13.0 (CPU build), numpy 2.4.6, Python 3.11, Linux x86-64, no GPU needed; seen 2026-11-28.
#
# The good guess: with TRITON_INTERPRET=1, x.to(tl.float8e4nv) rounds as torch's float8_e4m3fn (to nearest, ties to even), so
# that a kernel which makes codes of 8-bit floats can be held against torch on a machine without a GPU.
#
# What happens: where rounding carries into the exponent, the carry can be lost, and the code is half of what it should be; ties
# go up instead of to even. Nothing is said. Values that do not round up to a power of two agree.
#
#   input        -124.8   62.6   31.2   15.7   1.98   0.98   100.0   3.3
#   interpreter   -64.0   64.0   16.0   16.0    1.0    1.0   104.0   3.25
#   torch        -128.0   64.0   32.0   16.0    2.0    1.0    96.0   3.25
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0
cat >"$folder/cast.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, tl.load(x + at).to(tl.float8e4nv))


x = torch.tensor([-124.8, 62.6, 31.2, 15.7, 1.98, 0.98, 100.0, 3.3])
y = torch.empty(8, dtype=torch.float8_e4m3fn)
cast[(1,)](x, y, 8)
print(y.float().tolist(), x.to(torch.float8_e4m3fn).float().tolist())
PY
seen=$(cd "$folder" && TRITON_INTERPRET=1 "$folder/venv/bin/python" cast.py)
echo "$seen"
expected="[-64.0, 64.0, 16.0, 16.0, 1.0, 1.0, 104.0, 3.25] [-128.0, 64.0, 32.0, 16.0, 2.0, 1.0, 96.0, 3.25]"
[[ "$seen" == "$expected" ]] || { echo "changed: expected $expected"; exit 1; }
