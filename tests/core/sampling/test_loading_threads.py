"""Threads that load at once, as the app does when it starts and somebody is quick."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import PATIENCE

CODE = """
import threading
from tenuto.sampling.libraries import silence
from tenuto.sampling.loading import class_of, load

found, calls = {}, {
    "pipe": lambda: type(load("demo:unet")), "silence": lambda: silence(False) or True,
    "one": lambda: class_of("demo:unet"), "other": lambda: class_of("demo:transformer")}
ready = threading.Barrier(len(calls))
def note(name):
    ready.wait()
    found[name] = calls[name]()
threads = [threading.Thread(target=note, args=[name]) for name in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 4 and all(found.values()) and found["pipe"] is found["one"], found
"""


def test_threads_never_see_half_a_library() -> None:
    """In a process that has imported neither diffusers nor transformers yet."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], check=True, timeout=PATIENCE)
