"""Two threads that load at once, as the app does when it starts and somebody is quick."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import threading
from tenuto.sampling.loading import class_of, load

found = {}
def note(name, what):
    found[name] = what()
threads = [threading.Thread(target=note, args=pair) for pair in (
    ("pipe", lambda: type(load("demo:unet"))), ("one", lambda: class_of("demo:unet")),
    ("other", lambda: class_of("demo:transformer")))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found["pipe"] is found["one"] is not None and found["other"] is not None, found
"""


def test_threads_never_see_half_a_library() -> None:
    """diffusers and transformers import lazily; in a process that has imported neither yet."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], check=True, timeout=300)
