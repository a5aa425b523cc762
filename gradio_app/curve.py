"""What a forecast costs over the calls that it skips, as SVG: the curve of one run."""

from __future__ import annotations

from html import escape

from .speedup import Outlook

WIDE, HIGH, LEFT, BELOW, RIGHT = 360, 120, 34, 18, 8  # pixels; LEFT and BELOW for the numbers
LOW, TOP, STEP = 20, 70, 10  # dB


def curve(seen: Outlook) -> str:
    """PSNR over the share of skipped calls: predicted, measured where it was, and where one is."""
    points = sorted((seen.steps - calls, seen.decibels(calls)) for calls in seen.errors)
    points = [point for point in points if point[0]]
    if not points:
        return ""
    most = max(skipped for skipped, _ in points)
    now = seen.steps - seen.calls
    line = " ".join(f"{_x(n, most):.1f},{_y(db):.1f}" for n, db in points)
    marks = "".join(
        f'<circle class="measured" cx="{_x(n, most):.1f}" cy="{_y(db):.1f}" r="3">'
        f"<title>{n} of {seen.steps} skipped: {db:.1f} dB measured</title></circle>"
        for n, db in sorted(seen.measured.items())
        if 0 < n <= most
    )
    here = ""
    if seen.db is not None:
        here = f'<circle class="here" cx="{_x(now, most):.1f}" cy="{_y(seen.db):.1f}" r="4.5"/>'
    said = f"Predicted PSNR by calls skipped, in a run of {seen.steps} steps"
    said += ". Circles: measured at calibration" if marks else ""
    return (
        f'<figure class="tenuto-curve"><figcaption>{escape(said)}</figcaption>'
        f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {WIDE} {HIGH}" '
        f'data-points="{len(points)}">{_grid(seen.steps, most)}<polyline points="{line}"/>'
        f"{marks}{here}</svg>{_table(seen, points)}</figure>"
    )


def _x(skipped: int, most: int) -> float:
    return LEFT + skipped / most * (WIDE - LEFT - RIGHT)


def _y(db: float) -> float:
    share = (min(max(db, LOW), TOP) - LOW) / (TOP - LOW)
    return HIGH - BELOW - share * (HIGH - BELOW - 8)


def _grid(steps: int, most: int) -> str:
    """Lines and numbers: dB at the left, the share of skipped calls below."""
    found = []
    for db in range(LOW, TOP + 1, STEP):
        found.append(
            f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{_y(db):.1f}" y2="{_y(db):.1f}"/>'
            f'<text x="{LEFT - 5}" y="{_y(db) + 3:.1f}" text-anchor="end">'
            f"{db}{' dB' if db == TOP else ''}</text>"
        )
    for share in range(0, 100, 20):
        place = share / 100 * steps
        if place <= most:
            x = LEFT + place / most * (WIDE - LEFT - RIGHT)
            found.append(f'<text x="{x:.1f}" y="{HIGH - 4}" text-anchor="middle">{share} %</text>')
    return "".join(found)


def _table(seen: Outlook, points: list[tuple[int, float]]) -> str:
    """The same in numbers, folded."""
    measured = bool(seen.measured)
    head = "<th>calls computed</th><th>predicted, dB</th>" + "<th>measured, dB</th>" * measured
    rows = "".join(
        f"<tr><td>{seen.steps - n} of {seen.steps}</td><td>{db:.1f}</td>"
        + (f"<td>{_shown(seen.measured.get(n))}</td>" if measured else "")
        + "</tr>"
        for n, db in points
    )
    return f"<details><summary>Data</summary><table><tr>{head}</tr>{rows}</table></details>"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
