#!/usr/bin/env bash
# transformers 5.17.0 and diffusers 0.42.1, CPython 3.11, no torch; seen 2026-11-28.
#
# The good guess: a thread that imports a package which another thread is just importing waits for the end of that import
# (Python's module locks), and then has the package whole: `from transformers import T5Config` works whenever it is called.
#
# What happens: both packages put another module (their lazy one) into sys.modules at the end of their own __init__. A thread
# that came during the import does wait, but then holds the module object that it looked up before, which has no names:
# ImportError for a class that exists. The same line, called again in the same thread, works. In an app that loads a model in
# one thread while a page asks for its class in another one, this fails now and then, when the server is new.
#
#   transformers   first: cannot import name 'T5Config' from 'transformers', then: found
#   diffusers      first: cannot import name 'DDPMScheduler' from 'diffusers', then: found
#   json (control) first: found, then: found
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.17.0 diffusers==0.42.1
cat >"$folder/show.py" <<'PY'
import importlib
import sys
import threading

package, seen = sys.argv[1], []


def late():
    while package not in sys.modules:  # the other thread has begun
        pass
    for _ in range(2):
        try:
            asked()
            seen.append("found")
        except ImportError as error:
            seen.append(str(error).partition(" (")[0])


def asked():
    if package == "transformers":
        from transformers import T5Config  # noqa: F401
    elif package == "diffusers":
        from diffusers import DDPMScheduler  # noqa: F401
    else:
        from json import dumps  # noqa: F401


thread = threading.Thread(target=late)
thread.start()
importlib.import_module(package)
thread.join()
print(f"first: {seen[0]}, then: {seen[1]}")
PY
tried() {
  local expected=$1 seen
  seen=$(cd "$folder" && HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore show.py "$2" 2>/dev/null)
  echo "$2 -> $seen"
  [[ "$seen" == "$expected" ]] || { echo "changed: expected $expected"; exit 1; }
}
tried "first: cannot import name 'T5Config' from 'transformers', then: found" transformers
tried "first: cannot import name 'DDPMScheduler' from 'diffusers', then: found" diffusers
tried "first: found, then: found" json
