#!/usr/bin/env bash
# torch 2.13.0 (CPU build; the same was seen with 2.11.0 on an NVIDIA H200), Python 3.11; seen 2026-11-29.
#
# The good guess: torch.set_autocast_cache_enabled(False) is of no concern to compiled code while autocast is off: nothing
# is cast, so nothing is kept. Whoever captures a CUDA graph switches it off to be safe: what autocast keeps is freed when it
# ends, and torch.cuda.make_graphed_callables asks for it to be off.
#
# What happens: the switch is among what torch.compile guards by, whether autocast is on or not. With the other value the same
# call on the same tensor is compiled once more, though the code has nothing to do with autocast. In a capture that means a
# compiler that times its kernels while the stream is being captured, and the capture fails with "operation failed due to a
# previous error during capture". The first capture of code that was compiled and run before is thus the one that fails.
#
#   compilations after a first call                         1
#   after a second one                                      1
#   after one with autocast's cache off, autocast off       2
#   after one with the cache on again                       2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/show.py" <<'PY'
import torch

made = 0


def backend(graph, inputs):
    global made
    made += 1
    return graph.forward


call = torch.compile(lambda x: x + 1, backend=backend)
x, seen = torch.ones(3), []
assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
for cache in (True, True, False, True):
    torch.set_autocast_cache_enabled(cache)
    call(x)
    seen.append(made)
print(*seen)
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/show.py" 2>/dev/null)
echo "compilations: $seen"
[[ "$seen" == "1 1 2 2" ]] || { echo "changed: expected 1 1 2 2"; exit 1; }
