"""What all formats do round their file: is there room, and the small file beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, TenutoError
from ...files import write_text
from ...text import printable
from ..artifact import Artifact
from ..header import HEADER_LIMIT, WRONG
from .plan import Plan
from .report import COMPANION, Report, travelled, travelling
from .tensors_file import Spec, bytes_of, sha256


def check_room(out: Path, specs: Mapping[str, Spec]) -> None:
    """TenutoError where the disk has no room for a file of these tensors."""
    needed = sum(map(bytes_of, specs.values()))
    check_bytes(out, needed)


def check_bytes(out: Path, needed: int) -> None:
    """TenutoError where the disk has no room for so many bytes."""
    folder = next(p for p in (out.parent, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TenutoError(
            f"{out} would take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there."
        )


def companion(out: Path) -> Path:
    """The small file beside the weights in `out`."""
    return out.with_name(f"{out.stem}{COMPANION}")


def write_companion(plan: Plan, report: Report, out: Path) -> Path:
    """Write what travels with `out`, and which file it belongs to."""
    facts = travelling(plan, report) | {"weights": out.name, "sha256": sha256(out)}
    path = companion(out)
    write_text(path, json.dumps(facts, indent=1) + "\n")
    return path


def read_companion(path: Path) -> tuple[dict[str, Any], Artifact | None]:
    """(what a companion says, the artifact of its cache schedule and forecast or None).

    ArtifactError where it is damaged, or the weights beside it are other ones.
    """
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ValueError("it is too long")
        facts = json.loads(path.read_text(encoding="utf-8"))
        weights = path.with_name(Path(str(facts["weights"])).name)
        if sha256(weights) != facts["sha256"]:
            raise ArtifactError(f"{path} belongs to another {weights.name}.")
        has = "route" in facts or "forecast" in facts
        return facts, travelled(facts) if has else None
    except (OSError, *WRONG) as error:
        raise ArtifactError(f"{path} cannot be read: {printable(error)}.") from error
