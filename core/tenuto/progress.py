"""Progress of long work: what `on_progress` is called with, and several parts on one scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Progress = Callable[[int, int, str], None]


def parts(
    on_progress: Progress | None, sizes: Mapping[str, int], *, named: bool = False
) -> dict[str, Progress]:
    """The progress of each part of a job, from 0 to a total of its own, on the scale of the whole.

    sizes: what each part is worth, in the order in which they are done; the whole is their sum.
    named: notes begin with the name of the part.
    """
    whole, before = sum(sizes.values()), 0
    found: dict[str, Progress] = {}
    for name, size in sizes.items():
        found[name] = _part(on_progress, name if named else "", before, size, whole)
        before += size
    return found


def _part(on_progress: Progress | None, name: str, before: int, size: int, whole: int) -> Progress:
    def progress(done: int, total: int, note: str) -> None:
        if on_progress is not None:
            on_progress(before + size * done // max(1, total), whole, f"{name} {note}".strip())

    return progress
