"""The tests inside the hosts against a Forge Neo of one's own.

    python benchmarks/check_forge.py FOLDER [--python PYTHON] [--only forge contract]

FOLDER has Neo's launch.py; PYTHON is one that starts it, and needs pytest besides. Nothing but
Python's caches is written to FOLDER, no checkpoint is read, and no page is started: tiny models of
Neo's own classes get random weights, under its own operations, model patcher and samplers.

Prints a Markdown table: passed, failed and skipped by family. `forge`: the key map is one to one,
the same weights compute what diffusers does, LoRA as Neo applies it, its own int8 checkpoints.
`contract`: what every host's adapter must hold (docs/hosts.md), through the extension's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from check_comfy import ROOT, table

SUITES = ("forge", "contract")
VERSION = re.compile(r'^(?:version|release) = "(.+)"$', re.M)
INSTALLED = """
import importlib.metadata
for name in ("torch", "comfy-kitchen", "diffusers"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "none")
"""


def about(python: str, folder: Path) -> str:
    """Which Neo, and what is installed there."""
    text = (folder / "modules_forge" / "forge_version.py").read_text(encoding="utf-8")
    command = [python, "-W", "ignore", "-c", INSTALLED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return ", ".join([f"Forge {' '.join(VERSION.findall(text))}", *done.stdout.split("\n")[:-1]])


def run(python: str, folder: Path, only: list[str], families: list[str], out: Path) -> int:
    """The tests; their report goes to `out`, as JUnit has it."""
    command = [python, "-m", "pytest", "-q", "-W", "ignore", f"--junitxml={out}"]
    command += ["-p", "no:cacheprovider", *(f"tests/hosts/{name}" for name in only)]
    if families:
        command += ["-k", " or ".join(families)]
    path = os.pathsep.join(filter(None, ("core", str(ROOT), os.environ.get("PYTHONPATH"))))
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TENUTO_FORGE": str(folder)}
    kept = {key: value for key, value in os.environ.items() if key != "TENUTO_COMFYUI"}
    return subprocess.run(command, cwd=ROOT, env=kept | given).returncode


def outcomes(report: ElementTree.Element) -> dict[str, Counter[str]]:
    """How many tests of each suite and family had which end; errors count as failed."""
    found: dict[str, Counter[str]] = {}
    for case in report.iter("testcase"):
        ends = {child.tag for child in case}
        end = "failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else ""
        suite = case.get("classname", "").removeprefix("tests.hosts.").partition(".")[0]
        name, _, inside = case.get("name", "").partition("[")
        family = re.search(r"neo (\w+)", inside) or re.search(r"([a-z]\w*)", inside)
        kind = family[1] if family is not None else name
        found.setdefault(f"{suite}: {kind}", Counter())[end or "passed"] += 1
    return dict(sorted(found.items()))


def main() -> int:
    """Returns the exit code of the tests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of Forge Neo")
    parser.add_argument("--python", default=sys.executable, help="the one that starts it")
    parser.add_argument("--only", nargs="+", default=SUITES, choices=SUITES, help="which tests")
    parser.add_argument("--families", nargs="+", default=[], help="flux, wan, ...; else all")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not (folder / "backend" / "patcher").is_dir():
        parser.error(f"{folder} has no backend/patcher: give the folder of Forge Neo")
    said = about(given.python, folder)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "report.xml"
        code = run(given.python, folder, list(given.only), given.families, out)
        report = ElementTree.parse(out).getroot()
    print(f"\n{datetime.date.today()}: {said}\n")
    print("\n".join(table(outcomes(report))))
    return code


if __name__ == "__main__":
    sys.exit(main())
