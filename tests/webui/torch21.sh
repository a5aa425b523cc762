#!/usr/bin/env bash
# Usage: torch21.sh DIR [pytest arguments]
#
# Runs the tests of core/ and webui_ext/ on what A1111 1.10.1 carries: Python 3.10, torch 2.1.2, NumPy 1.26.2, safetensors 0.4.2,
# in an environment of its own, DIR. diffusers and transformers are there for the tests that build models with them; hosts need
# neither. Their versions are of that torch's time, so that what they lack is missing for the tests too.
#
# PYTHON picks the interpreter; 3.10 comes with `uv python install 3.10`, pyenv or the distribution. TORCH has pip's words for torch, as in
# the README's section on installing: the CPU build is much smaller than the CUDA build, which a plain install brings.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,/^set /p' "$0" | sed -e '$d' -e 's/^# \{0,1\}//' >&2; exit 2; }
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
shift
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3.10}
PY=$DIR/bin/python

pip() { "$PY" -m pip --disable-pip-version-check install --quiet --no-compile "$@"; }

"$PY" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$DIR"
# shellcheck disable=SC2086
"$PY" -c 'import torch; assert torch.__version__.startswith("2.1.2")' 2>/dev/null || pip ${TORCH:-torch==2.1.2}
pip torch==2.1.2 numpy==1.26.2 safetensors==0.4.2 pillow==9.5.0 matplotlib==3.8.4 'pytest>=9' tqdm diffusers==0.32.2 transformers==4.44.2 sentencepiece

cd "$ROOT"
[ $# -ge 1 ] || set -- tests/core/model tests/core/numerics tests/core/sampling tests/core/caching tests/core/artifact tests/core/runtime tests/webui
PYTHONPATH=core OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE exec "$PY" -m pytest -W ignore -m "not slow" "$@"
