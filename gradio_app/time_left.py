"""How long a job of several parts may still take: its own pace, and what the check expects."""

from __future__ import annotations

from collections.abc import Sequence

SLOWER = (0.5, 20.0)  # times what the check expects, which is the least that it may take

Expected = Sequence[tuple[int, float | None]]  # parts of each use, and seconds if known


def use_of(expected: Expected, part: int) -> int:
    """Which use, from 0 on, the `part` belongs to, from 1 on; -1 before the first."""
    last = 0
    for i, (parts, _) in enumerate(expected):
        if last < part <= last + parts:
            return i
        last += parts
    return -1


def in_all(expected: Expected, part: int, left: float | None, gone: float) -> float | None:
    """Seconds; None where they are not known.

    left: seconds of this part. gone: since the first part of its use began. What comes later takes
    as much longer than expected as this does.
    """
    use = use_of(expected, part)
    if use < 0 or left is None:
        return None
    seconds = expected[use][1]
    last = sum(parts for parts, _ in expected[: use + 1]) == part
    if not last:
        if seconds is None:
            return None
        left = max(left, seconds - gone)
    factor = 1.0
    if seconds and last:
        factor = min(max((gone + left) / seconds, SLOWER[0]), SLOWER[1])
    for _, later in expected[use + 1 :]:
        if later is None:
            return None
        left += factor * later
    return left
