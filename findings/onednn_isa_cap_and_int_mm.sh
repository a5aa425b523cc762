#!/usr/bin/env bash
# torch 2.13.0 (CPU build), numpy 2.4.6, Python 3.11, Linux x86-64, a processor with AVX-512 VNNI; seen 2026-11-28.
#
# The good guess: ONEDNN_MAX_CPU_ISA, oneDNN's own switch to try slower instruction sets, changes the speed of an integer
# product and nothing else, since int8 x int8 summed in int32 is exact in any order.
#
# What happens: under AVX512_CORE or AVX2, torch._int_mm gives wrong sums, silently, for codes of 8 bits. torch asks the
# processor whether it has VNNI, sees that it does, and takes oneDNN; oneDNN asks the variable, and without VNNI its product
# adds pairs in 16 bits, which saturate. On a processor that really has no VNNI torch takes another path. So a test that plays
# an older processor by this variable sees errors that no such processor shows. Weights of at most 64 stay exact.
#
#   AVX512_CORE_VNNI  8 bits: 0 of 4096 wrong     at most 64: 0 of 4096 wrong
#   AVX512_CORE       8 bits: 4096 of 4096 wrong  at most 64: 0 of 4096 wrong
#   AVX2              8 bits: 4096 of 4096 wrong  at most 64: 0 of 4096 wrong
set -euo pipefail
grep -q avx512_vnni /proc/cpuinfo || { echo "needs a processor with AVX-512 VNNI: nothing was tried"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/product.py" <<'PY'
import torch

torch.manual_seed(0)
a = torch.randint(-128, 128, (64, 1024), dtype=torch.int8)
b = torch.randint(-128, 128, (1024, 64), dtype=torch.int8)
wrong = [int((torch._int_mm(a, w).long() != a.long() @ w.long()).sum()) for w in (b, b.clamp(-64, 64))]
print(f"8 bits: {wrong[0]} of 4096 wrong, at most 64: {wrong[1]} of 4096 wrong")
PY
expect() {
  local seen
  seen=$(ONEDNN_MAX_CPU_ISA=$1 "$folder/venv/bin/python" "$folder/product.py")
  echo "$1: $seen"
  [[ "$seen" == $2 ]] || { echo "changed: expected $2"; exit 1; }
}
expect AVX512_CORE_VNNI "8 bits: 0 of*at most 64: 0 of*"
expect AVX512_CORE "8 bits: [1-9]*at most 64: 0 of*"
expect AVX2 "8 bits: [1-9]*at most 64: 0 of*"
