"""What all formats do round their file: is there room, and the small file beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import ArtifactError, TenutoError
from ...files import write_text
from ...text import printable
from ..artifact import Artifact
from ..header import HEADER_LIMIT, KEY, WRONG
from .plan import Plan
from .report import COMPANION, Report, travelled, travelling
from .tensors_file import Spec, bytes_of, sha256

SAFETENSORS = ".safetensors"
TRAVELS = {"route": "cache schedule", "forecast": "forecast"}


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
    """The small file beside the weights in `out`: NAME.safetensors.tenuto.json."""
    return out.with_name(f"{out.name}{COMPANION}")


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
    with _one_sentence(path):
        facts = _companion_facts(path)
        weights = path.with_name(Path(str(facts["weights"])).name)
        if sha256(weights) != facts["sha256"]:
            raise ArtifactError(f"{path} belongs to another {weights.name}.")
        return facts, travelled(facts) if applicable(facts) else None


def exported_facts(path: str | Path) -> dict[str, Any] | None:
    """What an exported file says of itself, without its schedule; None where it is none.

    path: of the weights. Only the header is read, or the companion where the format has no header
    of ours. Whether they belong together is for `read_exported` to say.
    """
    try:
        found = _facts(Path(path))
    except (OSError, SafetensorError, ArtifactError, *WRONG):
        return None
    return found


def read_exported(path: str | Path) -> tuple[dict[str, Any], Artifact]:
    """(what an exported file says of itself, the artifact of its cache schedule and forecast).

    path: of the weights. ArtifactError where it is no exported file, has neither, or is damaged.
    """
    path = Path(path)
    with _one_sentence(path):
        found = _facts(path)
        if found is None:
            raise ArtifactError(f"{path} is no file that Tenuto has exported.")
        if not applicable(found):
            raise ArtifactError(
                f"{path} is an exported model without a cache schedule or a forecast: load it as a "
                "model, there is nothing to apply."
            )
        if path.suffix.lower() != SAFETENSORS:
            return read_companion(companion(path))  # type: ignore[return-value]
        return found, travelled(found)


def applicable(facts: Mapping[str, Any]) -> list[str]:
    """What of an exported file can be applied to it: "cache schedule", "forecast"."""
    return [word for key, word in TRAVELS.items() if facts.get(key)]


def _facts(path: Path) -> dict[str, Any] | None:
    """What the header or the companion of a file says; one of WRONG where that is damaged."""
    if path.suffix.lower() != SAFETENSORS:
        return _companion_facts(companion(path)) if companion(path).is_file() else None
    with path.open("rb"), safe_open(str(path), "np") as file:
        text = (file.metadata() or {}).get(KEY, "")
    if not text or len(text) > HEADER_LIMIT:
        return None
    facts = json.loads(text)
    return facts if "format_version" not in facts and "format" in facts else None


def _companion_facts(path: Path) -> dict[str, Any]:
    if path.stat().st_size > HEADER_LIMIT:
        raise ValueError("it is too long")
    return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, *WRONG) as error:
        raise ArtifactError(f"{path} cannot be read: {printable(error)}.") from error
