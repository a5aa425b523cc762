"""The panels of a plot: each fills matplotlib axes with one thing that an artifact says by step.

Lengths are in points (1/72 inch). Step i is at x = i in every panel. No text is parsed as math.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..text import printable
from .contents import Band, Curve, Gaps, StepMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER, INK, FAINT, LINE = "#fbfbf9", "#181a1e", "#63676f", "#deddd7"
BLUE, RUST, GREEN, VIOLET = "#3465a4", "#c9603a", "#3f8c6a", "#8462b2"
REUSED, OTHER, PALE = "#e2e0d8", "#7a7f87", "#d6e0ee"
COLOURS = {
    "attention": BLUE,
    "cross-attention": RUST,
    "feed-forward": GREEN,
    "residual block": VIOLET,
}
MORE = ("#2f8fa3", "#b08a2e", "#b5527f")  # for kinds of other names, in the order of the rows
LEFT, WIDTH, CURVES = 190, 520, 110  # names, plot, height of curves
ROWS, ROW, LEAST = 430, 13, 1  # of the map: all rows, the highest row, the lowest
ROOMY, NAME = 9, 10  # a row so high has its kind beside it; the least distance of names
EDGE, LETTER = 22, 5  # left of all words; about the width of a letter of a legend
MARKS = 60  # steps up to which each value has a mark

Panel = tuple[float, Callable[["Axes"], None]]  # height, and what fills the axes


def across(steps: int) -> float:
    """The width of all panels: half a point for a step at least."""
    return max(WIDTH, steps / 2)


def map_panel(route: StepMap) -> Panel:
    """The cache schedule, first branch on top; blocks are apart."""
    steps, count, blocks = len(route.timesteps), len(route.branches), route.blocks()
    row = max(LEAST, min(ROW, int(2 * ROWS / count) / 2))  # whole pixels
    starts = [n for n in range(count) if n == 0 or blocks[n] != blocks[n - 1]]

    def fill(axes: Axes) -> None:
        axes.imshow(cells(route).numpy(), aspect="auto", interpolation="nearest")
        wide, line = steps - 0.5, dict[str, Any](colors=PAPER)
        if row >= 4:
            axes.hlines([n - 0.5 for n in range(1, count)], -0.5, wide, lw=0.6, **line)
        if row * count >= 4 * len(starts):
            thick = 2.5 if row >= 4 else 1
            axes.hlines([n - 0.5 for n in starts[1:]], -0.5, wide, lw=thick, **line)
        if across(steps) / steps >= 4:
            axes.vlines([n - 0.5 for n in range(1, steps)], -0.5, count - 0.5, lw=0.6, **line)
        axes.set_ylim(count - 0.5, -0.5)
        _names(axes, route, starts, row)
        said = f"{route.reused:.1%} of the branch calls reuse"
        _heading(axes, f"Cache schedule, {fit(route.policy, 40)}: {said}", "compute")
        _kinds(axes, route)
        _steps(axes, route.timesteps)

    return row * count, fill


def cells(route: StepMap) -> Tensor:
    """uint8 (N, T, 3): a computed cell in the colour of its kind, a reused one pale."""
    known = kind_colours(route)
    colours = torch.tensor([_rgb(known[kind]) for kind in route.kinds()], dtype=torch.uint8)
    pale = torch.tensor(_rgb(REUSED), dtype=torch.uint8)
    return torch.where(route.table.t()[:, :, None], colours[:, None], pale)


def kind_colours(route: StepMap) -> dict[str, str]:
    """The colour of every kind of branch, in the order of the rows."""
    more = iter(MORE)
    kinds = dict.fromkeys(route.kinds())
    return {kind: COLOURS.get(kind) or next(more, OTHER) for kind in kinds}


def _rgb(colour: str) -> list[int]:
    return list(bytes.fromhex(colour[1:]))


def _kinds(axes: Axes, route: StepMap) -> None:
    """The legend of the map: as many kinds as there is room for, all others, reuse."""
    found, rows, start = kind_colours(route), [], 10 * LETTER
    room = across(len(route.timesteps)) - start - 20 * LETTER
    for kind, colour in found.items():
        room -= (min(len(kind), 24) + 6) * LETTER
        if room < 0 or colour == OTHER:
            rows.append(("others", OTHER))
            break
        rows.append((kind or "all", colour))
    _legend(axes, [*rows, ("reuse", REUSED)], start / across(len(route.timesteps)))


def _names(axes: Axes, route: StepMap, starts: Sequence[int], row: float) -> None:
    """Blocks at the left, and the kinds beside their rows where there is room."""
    blocks, last, roomy = route.blocks(), -NAME, row >= ROOMY
    rows = zip(route.kinds(), blocks, route.branches, strict=True)
    kinds = ["" if block == branch else kind for kind, block, branch in rows]
    for n in starts:
        if (n - last) * row >= NAME:
            last = n
            name = fit(words(blocks[n]), 20 if roomy and kinds[n] else 32)
            place: dict[str, Any] = (
                {"xytext": (EDGE - LEFT, -row / 2)}
                if roomy
                else {"xytext": (-8, -max(row / 2, 3)), "ha": "right"}
            )
            place["va"] = "center_baseline"
            _say(axes, name, (0, 1 - n / len(blocks)), size=8, color=INK, **place)
    shown = [(n, fit(kind, 17)) for n, kind in enumerate(kinds) if kind and roomy]
    axes.set_yticks([n for n, _ in shown], [kind for _, kind in shown], size=7, parse_math=False)


def words(block: str) -> str:
    """A block's name as people read it: "transformer_blocks.3" is "block 3"."""
    found: list[str] = []
    for part in block.split("."):
        if part.isdigit() and found:
            found[-1] += f" {part}"
        elif part in ("blocks", "transformer_blocks"):
            found.append("block")
        else:
            part = part.removesuffix("_blocks").removesuffix("_block").removesuffix("s")
            found.append(part.replace("_", " ").strip())
    return ", ".join(found[:-1] if len(found) > 1 and found[-1] == "block 0" else found)


def band_panel(ranges: Band) -> Panel:
    """The activation range of a layer between its two ends, over the steps."""
    x, low, high = range(len(ranges.timesteps)), ranges.low.tolist(), ranges.high.tolist()

    def fill(axes: Axes) -> None:
        axes.fill_between(x, low, high, color=PALE, lw=0)
        for values in (high, low):
            axes.plot(x, values, color=BLUE, **_curve(len(x)))
        axes.margins(y=0.08)
        axes.grid(axis="y", color=LINE, lw=0.6)
        axes.set_axisbelow(True)
        _heading(axes, f"Activation range at the input of {fit(ranges.layer, 44)}", ranges.note)
        _steps(axes, ranges.timesteps, 10)

    return CURVES, fill


def gaps_panel(errors: Gaps) -> Panel:
    """The errors of the temporal features over the steps, on a logarithmic scale."""
    mean, worst = (v.clamp_min(1e-16).tolist() for v in (errors.mean, errors.worst))
    lines = [("worst module", worst, RUST), ("mean of all modules", mean, BLUE)]
    lines = lines[1:] if mean == worst else lines

    def fill(axes: Axes) -> None:
        axes.set_yscale("log")
        for _, values, colour in lines:
            axes.plot(range(len(values)), values, color=colour, **_curve(len(values)))
        axes.set_ylim(*_powers([*mean, *worst]))
        axes.grid(axis="y", color=LINE, lw=0.6)
        axes.set_axisbelow(True)
        axes.minorticks_off()
        said = f"Temporal features of {errors.note}"
        _heading(axes, f"{said}: 1 - cosine to full precision")
        if len(lines) > 1:
            _legend(axes, [(name, colour) for name, _, colour in lines])
        _steps(axes, errors.timesteps, 10)

    return CURVES, fill


def curve_panel(curve: Curve) -> Panel:
    """The PSNR of a forecast over the calls that it skips: predicted, and measured where it was."""
    places, dots = sorted(curve.predicted), sorted(curve.measured)
    values = [curve.predicted[place] for place in places]

    def fill(axes: Axes) -> None:
        axes.plot(places, values, color=BLUE, **_curve(len(places)))
        axes.plot(
            dots, [curve.measured[n] for n in dots], color=RUST, lw=0, marker="D", ms=6,
            clip_on=False,
        )  # fmt: skip
        axes.margins(y=0.08)
        axes.grid(axis="y", color=LINE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.5, curve.steps - 0.5)
        shares = range(0, 100, 10)
        axes.set_xticks([share * curve.steps / 100 for share in shares], [f"{s}%" for s in shares])
        said = f"Forecast, {curve.note}: PSNR to the full run in dB"
        _heading(axes, said, "" if dots else "predicted, not measured")
        if dots:
            _legend(axes, [("predicted", BLUE), ("measured", RUST)])
        where: dict[str, Any] = {"ha": "right", "va": "top"}
        _say(axes, "calls skipped", (0, 0), (-8, -4), size=8, color=FAINT, **where)

    return CURVES, fill


def _powers(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around all values, with a little room."""
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    room = 0.03 * (high - low)
    return 10 ** (low - room), 10 ** (high + room)


def _curve(steps: int) -> dict[str, Any]:
    return {"lw": 1.2, "marker": "o" if steps <= MARKS else "", "ms": 3, "clip_on": False}


def _heading(axes: Axes, title: str, note: str = "") -> None:
    """The two lines above a panel."""
    _say(axes, fit(title, 90), (0, 1), (EDGE - LEFT, 26), size=11, color=INK)
    _say(axes, fit(note, 100), (0, 1), (0, 6), size=8.5, color=FAINT)


def _say(axes: Axes, text: str, place: Any, xytext: Any, **how: Any) -> None:
    axes.annotate(
        text, place, xytext, xycoords="axes fraction", textcoords="offset points",
        annotation_clip=False, parse_math=False, **how,
    )  # fmt: skip


def _legend(axes: Axes, rows: Sequence[tuple[str, str]], start: float = 0) -> None:
    """Words and their colours, in one line below the heading; start: its left end in the axes."""
    from matplotlib.patches import Patch

    found = axes.legend(
        [Patch(color=colour) for _, colour in rows],
        [fit(name.lstrip("_"), 24) for name, _ in rows],
        loc="lower left", bbox_to_anchor=(start, 1), ncols=len(rows), frameon=False, fontsize=8.5,
        labelcolor=FAINT, handlelength=1, handleheight=1, handletextpad=0.5, columnspacing=1.4,
        borderaxespad=0.5, borderpad=0,
    )  # fmt: skip
    for text in found.get_texts():
        text.set_parse_math(False)


def _steps(axes: Axes, timesteps: Sequence[float], down: float = 4) -> None:
    """Numbers of the steps (from 1) and their timesteps, as many as there is room for.

    down: how far below the axes.
    """
    steps, form = len(timesteps), ".0f" if max(map(abs, timesteps)) >= 20 else ".3g"
    labels = [f"{number}\n{t:{form}}" for number, t in enumerate(timesteps, 1)]
    letters = max(len(line) for label in labels for line in label.split("\n"))
    least = (letters + 1) * 5.2 * steps / across(steps)  # steps that a label covers
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000) if n >= least)
    axes.set_xlim(-0.5, steps - 0.5)
    axes.set_xticks(range(0, steps, every), labels[::every])
    axes.tick_params(axis="x", pad=down)
    where: dict[str, Any] = {"ha": "right", "va": "top"}
    _say(axes, "step\ntimestep", (0, 0), (-8, -down), size=8, color=FAINT, **where)


def fit(text: str, most: int) -> str:
    """`text` on one line of so many characters: the middle is left out, and what has no glyph."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font, text = get_font(findfont(FontProperties())), printable(text, 10 * most)
    if len(text) > most:
        text = f"{text[: most // 2 - 1]}...{text[2 - most // 2 :]}"
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in text)
