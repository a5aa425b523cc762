"""The tests inside the hosts against a ComfyUI of one's own, of any version from 0.3.64 on.

    python benchmarks/check_comfy.py FOLDER [--python PYTHON] [--only test_whole_files]

FOLDER has ComfyUI's main.py; PYTHON is one that starts it, and needs pytest, diffusers and what
else `tests/hosts/setup_comfyui.sh` installs. Nothing but Python's caches is written to FOLDER: the
server that the tests start has folders of its own, and tiny checkpoints (2 GB) go to --models.
Prints a Markdown table: passed, failed and skipped by file, and how far the image of an exported
file, which the host loads without any node of ours, is from that of our own attach.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = """
import importlib.metadata, json, sys
sys.path.insert(0, sys.argv[1])
import comfyui_version
found = {"ComfyUI": comfyui_version.__version__}
for name in ("comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package", "torch", "diffusers"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = "none"
print(json.dumps(found))
"""
GAP = re.compile(r"^(\w+) (\w+): (\S+) from our own attach, (\S+) from the float model$", re.M)


def versions(python: str, folder: Path) -> dict[str, str]:
    """What is installed there."""
    command = [python, "-W", "ignore", "-c", VERSIONS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(python: str, folder: Path, models: Path, only: list[str], out: Path) -> int:
    """The tests; their report goes to `out`, as JUnit has it."""
    tests = [f"tests/hosts/{name.removesuffix('.py')}.py" for name in only] or ["tests/hosts"]
    command = [python, "-m", "pytest", "-q", "-W", "ignore", f"--junitxml={out}", *tests]
    command += ["-o", "junit_logging=system-out", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, ("core", os.environ.get("PYTHONPATH"))))
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    places = {"TENUTO_COMFYUI": str(folder), "TENUTO_COMFYUI_MODELS": str(models)}
    return subprocess.run(command, cwd=ROOT, env=os.environ | given | places).returncode


def outcomes(report: ElementTree.Element) -> dict[str, Counter[str]]:
    """How many tests of each file had which end; errors count as failed."""
    found: dict[str, Counter[str]] = {}
    for case in report.iter("testcase"):
        ends = {child.tag for child in case}
        end = "failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else ""
        place = case.get("classname", "").removeprefix("tests.hosts.")
        found.setdefault(place, Counter())[end or "passed"] += 1
    return dict(sorted(found.items()))


def table(found: dict[str, Counter[str]]) -> Iterator[str]:
    """A line a file, and all of them."""
    yield "| tests | passed | failed | skipped |\n| --- | --- | --- | --- |"
    for name, ends in (*found.items(), ("all", sum(found.values(), Counter()))):
        yield f"| {name} | {ends['passed']} | {ends['failed']} | {ends['skipped']} |"


def gaps(report: ElementTree.Element) -> Iterator[str]:
    """Exported files: relative error of the image to our own attach's, and to the float model's."""
    texts = (node.text or "" for node in report.iter("system-out"))
    rows = [found for text in texts for found in GAP.findall(text)]
    if rows:
        yield "\n| format | family | from our own attach | from the float model |\n|" + " --- |" * 4
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Returns the exit code of the tests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of ComfyUI")
    parser.add_argument("--python", default=sys.executable, help="the one that starts it")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TEST", help="files in tests/hosts"
    )
    models = Path(tempfile.gettempdir()) / "tenuto-comfyui-models"
    parser.add_argument("--models", type=Path, default=models, help="where checkpoints are kept")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not (folder / "main.py").is_file():
        parser.error(f"{folder} has no main.py: give the folder of ComfyUI")
    known = versions(given.python, folder)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "report.xml"
        place = given.models / known["ComfyUI"]  # detection and names differ between versions
        code = run(given.python, folder, place, given.only, out)
        report = ElementTree.parse(out).getroot()
    about = ", ".join(f"{name} {version}" for name, version in known.items())
    print(f"\n{datetime.date.today()}: {about}\n")
    print("\n".join((*table(outcomes(report)), *gaps(report))))
    return code


if __name__ == "__main__":
    sys.exit(main())
