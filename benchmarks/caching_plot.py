"""The plot of docs/caching.md: what skipping calls costs, and which calls half of them are.

    python benchmarks/caching_plot.py           # seconds, no model is run; needs tenuto[plot]

The line is predicted by the kernel that ships, for the 20 steps of the demo models' scheduler. The
points were measured on a GPU, with each model's own kernel (benchmarks/schedules.py), and are read
off the table of that page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tenuto.artifact.panels import BLUE, FAINT, INK, LINE, PAPER, REUSED, RUST
from tenuto.artifact.plots import image
from tenuto.caching import ForecastPlan, Programme, about_db, default_kernel
from tenuto.sampling import noises_at, prediction_of
from tenuto.sampling.skeleton import scheduler_of

ROOT = Path(__file__).resolve().parent.parent
PAGE, OUT = ROOT / "docs" / "caching.md", ROOT / "docs" / "caching.png"
STEPS, DPI, GREEN = 20, 120, "#3f8c6a"
SHARES = (30, 50, 60, 70)  # the columns of the table
ROWS = (("transformer", "transformer", RUST, "D"), ("unet", "U-Net", GREEN, "s"))


def programme() -> Programme:
    """Every plan for the demo models' run, by the kernel that ships."""
    scheduler: Any = scheduler_of("demo:unet")
    scheduler.set_timesteps(STEPS)
    times = [float(t) for t in scheduler.timesteps]
    kernel = default_kernel(prediction_of(scheduler), lambda t: noises_at(scheduler, t))
    return Programme(kernel.at(times))


def measured(page: str, model: str) -> dict[int, float]:
    """Median PSNR in dB by the share of calls skipped, in percent, from the table of the page."""
    (row,) = re.findall(rf"^\| {model} \| \*\*forecast\*\* \|(.*)\|$", page, re.MULTILINE)
    cells = [float(cell.split()[0]) for cell in row.split("|")]
    return dict(zip(SHARES, cells, strict=True))


def curve(axes: Any, errors: dict[int, float], page: str) -> None:
    """The PSNR over the share of calls that is skipped."""
    points = sorted((100 * (1 - calls / STEPS), about_db(e)) for calls, e in errors.items())
    points = [(share, db) for share, db in points if 0 < share <= 80]
    axes.plot(*zip(*points, strict=True), color=BLUE, lw=1.6, marker="o", ms=3, label="predicted")
    for model, name, colour, mark in ROWS:
        found = measured(page, model)
        said = f"measured, {name}"
        axes.plot([*found], [*found.values()], color=colour, lw=0, marker=mark, ms=6, label=said)
    axes.set_xticks(range(0, 81, 10), [f"{share} %" for share in range(0, 81, 10)])
    axes.set_xlabel("calls skipped", color=FAINT, size=9)
    axes.set_ylabel("PSNR to the full run, dB", color=FAINT, size=9)
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def strip(axes: Any, plan: ForecastPlan) -> None:
    """The steps of one run: which are computed."""
    for step, computed in enumerate(plan.computed):
        colour = BLUE if computed else REUSED
        axes.bar(step, 1, width=0.92, color=colour)
        axes.text(
            step, 0.5, f"{step + 1}", ha="center", va="center", size=8,
            color=PAPER if computed else INK,
        )  # fmt: skip
    axes.set_xlim(-0.5, STEPS - 0.5)
    axes.set_ylim(0, 1)
    axes.set_xticks([0, STEPS - 1], ["noise", "image"])
    axes.set_yticks([])
    said = f"{STEPS - plan.calls} of {STEPS} calls skipped: blue is computed, grey is forecast"
    axes.set_title(f"{said} from the last five blue ones", loc="left", size=10, color=INK)


def main() -> None:
    """Write the plot."""
    plans, page = programme(), PAGE.read_text("utf-8")
    found = Figure((7.6, 4.6), DPI, facecolor=PAPER)
    above, below = found.subplots(2, 1, height_ratios=(5, 0.8))
    curve(above, plans.errors, page)
    strip(below, plans.plan(STEPS // 2))
    for axes in (above, below):
        axes.set_facecolor(PAPER)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    found.subplots_adjust(left=0.09, right=0.98, top=0.97, bottom=0.07, hspace=0.5)
    image(found).save(OUT, optimize=True)
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
