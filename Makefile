# make demo    installs Tenuto into .venv and runs the main job on a model that ships: pictures in demo-out/
# make test    installs what the tests need, then format, lint, types and every test, those of the hosts last
# make app     installs the app too and opens it in a browser: generate, calibrate, compare, export
# make hosts   the tests inside the hosts alone: real ComfyUI modules and server, real ldm U-Net, in .venv-comfy
# make site    the pages of docs/ as a site to read in a browser: build/site/index.html
# make check   format, lint, types and site alone        make fmt   formats and fixes
# make venv    installs and stops                  make clean deletes .venv* and what the commands wrote
#
# PYTHON picks the interpreter. TORCH picks torch's build: the constraints fix its version, and the index that pip asks
# decides the rest. The README says how to get the small CPU build where a plain install would bring CUDA.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch
BIN    := .venv/bin
COMFY  ?= .venv-comfy
# As many tests at once as there are processors, a file on one of them; each computes on one thread then.
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -lt 8 ] && echo "$$n" || echo 8)
# In the order of the files: by their number of tests, slow files of one test would be left for the end.
# One that hangs is ended, and says where it was; the longest takes two minutes.
AT_ONCE := -n $(JOBS) --dist loadfile --no-loadscope-reorder --timeout 900
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# Where it is set, as in many containers, each of the many processes of the tests would compile every library anew.
unexport PYTHONDONTWRITEBYTECODE
TOO_OLD := Tenuto's make needs Python 3.11 or newer: make PYTHON=/path/to/python3.11

.PHONY: demo app test hosts check fmt venv site clean

demo: .venv/.base
	$(BIN)/tenuto demo --model transformer --out demo-out
	@echo "Pictures: $(CURDIR)/demo-out/demo.png    Numbers: $(CURDIR)/demo-out/demo.json"

app: .venv/.app
	$(BIN)/tenuto app

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(AT_ONCE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(AT_ONCE) --durations=8
	$(MAKE) hosts

# An environment of its own: ComfyUI brings other versions of what Tenuto uses, and its process must hold nothing of ours.
hosts: $(COMFY)/.ready
	PYTHONPATH=core OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TENUTO_COMFYUI="$(abspath $(COMFY))/ComfyUI" \
	  $(COMFY)/venv/bin/python -m pytest -W ignore tests/hosts $(AT_ONCE) --durations=8

check: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(MAKE) site

fmt: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: .venv/.test

# A link to a file of the repository is plain text there: the site has the pages and their pictures alone.
site: .venv/.test
	rm -rf build/pages build/site && mkdir -p build/pages/example_workflows
	cp docs/* build/pages && cp example_workflows/*.j* build/pages/example_workflows
	for page in docs/*.md; do sed -E -e 's#\]\(\.\./example_workflows/#](example_workflows/#g' \
	  -e 's#\[([^]]*)\]\(\.\./[^)]*\)#\1#g' "$$page" >"build/pages/$${page##*/}"; done
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf .venv .venv-comfy build dist demo-out .pytest_cache .ruff_cache core/tenuto.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that TORCH may name another index without the rest coming from there.
.venv/.base: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "Installing Tenuto into .venv: a few minutes, once"
	$(PIP) $(TORCH)
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/.app: .venv/.base
	$(PIP) --no-build-isolation --editable '.[app]'
	@touch $@

.venv/.test: .venv/.base
	$(PIP) --no-build-isolation --editable '.[test]'
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; \
	  else echo "Without Chromium the app's page is not tested: apt install chromium" >&2; fi; }
	@touch $@

$(COMFY)/.ready: tests/hosts/setup_comfyui.sh constraints.txt
	@echo "Installing ComfyUI and ldm for the tests of the hosts into $(COMFY): a few minutes, once"
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" tests/hosts/setup_comfyui.sh $(COMFY)
	@touch $@

# Debian and Ubuntu keep the venv module in a package of its own: root gets it, others are told.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(TOO_OLD)" >&2; exit 2; }
	@$(PYTHON) -m venv --clear .venv || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get -q update && apt-get -q install -y python3-venv; \
	  else echo "Python's venv module is missing: apt install python3-venv" >&2; exit 2; fi; \
	  $(PYTHON) -m venv --clear .venv; }
