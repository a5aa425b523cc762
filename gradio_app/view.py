"""What the app shows of a job and of numbers, as HTML and SVG; every text in it is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tenuto.artifact.summary import worded
from tenuto.text import printable

from .jobs import DONE, FAILED, NAMES, RUNNING, STOPPED, STOPPING, WAITING, Job

TITLES = 4000  # cells of a map that still get a tooltip each
HERE = {  # what the library says for the command, and how the page says it
    ", --low-memory,": ",",
    " (call=, or --image, --mask, --set NAME=@FILE)": ", under “The pipeline's own settings”",
    "--method says": "The setting below says",
    "give --text-encoder too": "choose their bits too",
    "for any --speedup": "for any speedup",
    "unless --speedup says": "unless another one is chosen",
}
WAITS = "It begins by itself when what is before it is done or stopped."
CELL, ROW, GAP = 12, 9, 4  # pixels of a map: a step, a branch, between blocks


def lasting(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole / 3600:.1f} h"


def counted(count: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{count} {one if count == 1 else many}"


def on_the_page(text: str) -> str:
    """A sentence of the library without options of the command, where the page has fields."""
    for of_the_command, here in HERE.items():
        text = text.replace(of_the_command, here)
    return text


def card(state: str, title: str, text: str, more: str = "") -> str:
    """A box in the look of a state; what it says is read out when it changes."""
    said = f"<strong>{escape(title)}</strong> <span>{escape(on_the_page(text))}</span>"
    return (
        f'<div class="tenuto-card tenuto-{escape(state)}" data-state="{escape(state)}">'
        f'<div role="status" aria-live="polite">{said}</div>{more}</div>'
    )


def notice(title: str, text: str) -> str:
    """Why something that was asked for is refused, beside what was pressed; read out at once."""
    said = f"<strong>{escape(title)}</strong> <span>{escape(on_the_page(text))}</span>"
    return f'<div class="tenuto-card tenuto-failed" data-state="refused" role="alert">{said}</div>'


def in_line(job: Job) -> str:
    """Beside the button that was pressed: that a job stands in line; nothing where it has begun."""
    if job.state != WAITING:
        return ""
    return card(WAITING, f"It is in line, place {job.place}.", WAITS)


def status(job: Job | None, idle: str) -> str:
    """A job in its state: nothing yet, in line, running, stopping, stopped, failed or done."""
    if job is None:
        return card("idle", "Nothing yet.", idle)
    kind, what = NAMES[job.kind].capitalize(), what_of(job)
    if job.state == WAITING:
        return card(WAITING, f"In line, place {job.place}.", WAITS, what)
    if job.state in (RUNNING, STOPPING):
        title = job.stage if job.state == RUNNING else "Stopping"
        part = f"part {job.part} of {job.parts}" if job.parts > 1 and job.part else ""
        return card(job.state, title, part, what + bar(job))
    if job.state == STOPPED and not job.begun:
        return card(STOPPED, f"{kind} not begun.", "It was taken out of the line.", what)
    if job.state == STOPPED:
        text = f"after {lasting(job.seconds)}, in “{job.stage}”."
        text += " What was finished is kept: Resume goes on there." * (job.kind == "calibrate")
        return card(STOPPED, f"{kind} stopped", text, what)
    if job.state == FAILED:
        return card(FAILED, f"{kind} failed.", job.error, what)
    return card(DONE, f"{kind} done", f"in {lasting(job.seconds)}.", what + report(job.result))


def what_of(job: Job) -> str:
    """What was asked for, in a line: whatever the fields say by now."""
    said = words_of(job)
    return f'<div class="tenuto-small tenuto-what">{escape(said)}</div>' if said else ""


def words_of(job: Job) -> str:
    """The same as a text."""
    asked = job.request
    if "shown_model" not in asked:
        return ""
    parts = [str(asked["shown_model"])]
    if job.kind == "compare":
        parts += [
            *(name or words for words, name in asked["names"].items()),
            counted(asked["count"], "image", "images"),
        ]
        if asked.get("speedup"):
            speedup = asked["speedup"]
            parts.append(f"speedup {speedup if isinstance(speedup, str) else f'{speedup:g}'}")
        parts += [f"LoRA {line}" for line in asked.get("loras", ())]
    elif job.kind == "export":
        parts += [asked["shown_artifact"], f"to {Path(asked['out']).name}"]
    else:
        parts.append(asked["scheme"] or "the denoiser keeps its weights")
        if asked["reuse"] is not None:
            parts.append(f"{asked['reuse']:.0%} reuse")
        if asked.get("text_encoder"):  # an older request lacks it
            parts.append(f"text encoders in {asked['text_encoder']}")
        parts += [asked["preset"], f"to {Path(asked['out']).name}"]
    call = {name: printable(worded(value), 40) for name, value in asked.get("call", {}).items()}
    parts += [f"{name} {value}" for name, value in call.items()]
    return ", ".join(parts)


def report(result: dict[str, Any]) -> str:
    """The words of the command that did the work."""
    text = result.get("text")
    return (
        f"<pre tabindex=0>{escape(on_the_page(text))}</pre>"
        if isinstance(text, str) and text
        else ""
    )


def bar(job: Job) -> str:
    """How far the part is, and how long it may still take."""
    left = [f"{lasting(job.left)} left in this part"] if job.left else []
    if job.left_in_all is not None and job.part < job.parts:
        left.append(f"{lasting(job.left_in_all)} {'' if left else 'left '}in all")
    about = f"about {', '.join(left)}" if left else ""
    said = [job.note, f"{lasting(job.seconds)} so far", about]
    return progress_bar(job.stage, job.done, job.total, said)


def progress_bar(label: str, done: int, total: int, words: Sequence[str]) -> str:
    """A bar, `done` of `total` long, and below it the share and `words`; empty ones are left out.

    label: what it is called for who cannot see it.
    """
    share = min(1.0, done / total) if total else 0.0
    said = " · ".join(filter(None, [f"{share:.0%}", *words]))
    return (
        f'<div class="tenuto-bar" role="progressbar" aria-label="{escape(label)}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share * 100:.0f}">'
        f'<div style="width:{share * 100:.1f}%"></div></div>'
        f'<div class="tenuto-small">{escape(said)}</div>'
    )


# --- the map of steps and branches ----------------------------------------------------------------


def step_map(found: dict[str, Any] | None, done: bool = False) -> str:
    """Steps along x, branches along y: a full cell is computed, a thin line is reused."""
    if not found and done:
        return card("idle", "No cache schedule.", "The artifact was made without one.")
    if not found:
        return card(
            "idle", "No cache schedule yet.", "Its map appears here while the router trains."
        )
    rows, branches, kinds = found["rows"], found["branches"], found["kinds"]
    steps = len(found["timesteps"])
    reused = sum(row.count(".") for row in rows) / max(1, steps * len(rows))
    said = f"{found['policy']}: {reused:.0%} of {len(rows)} × {steps} branch calls reused"
    wide, tops = steps * CELL, _tops(branches)
    cells = "".join(
        _line(row, top, branches[i], found["timesteps"], _hue(kinds, i), len(rows) * steps)
        for i, (row, top) in enumerate(zip(rows, tops, strict=True))
    )
    return (
        f'<figure class="tenuto-map"><figcaption>{escape(said)}</figcaption>'
        f'<div class="tenuto-scroll" tabindex=0 role="group" aria-label="Steps and branches">'
        f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {wide} {tops[-1] + ROW}" '
        f'width="{wide}" height="{tops[-1] + ROW}" data-cells="{len(rows) * steps}">{cells}</svg>'
        f"</div>{_legend(kinds)}</figure>"
    )


def _tops(branches: Sequence[str]) -> list[int]:
    """The upper edge of every branch's row; blocks lie apart."""
    tops, y, last = [], 0, None
    for name in branches:
        block = name.rpartition(".")[0]
        y += GAP if last not in (None, block) else 0
        tops.append(y)
        y, last = y + ROW, block
    return tops


def _hue(kinds: Sequence[str], i: int) -> int:
    return list(dict.fromkeys(kinds)).index(kinds[i]) % 4


def _line(
    row: str, top: int, branch: str, times: Sequence[float], hue: int, cells: int
) -> str:  # fmt: skip
    """The cells of one branch."""
    found = []
    for step, cell in enumerate(row):
        done, x = cell == "#", step * CELL
        y, high = (top, ROW - 1) if done else (top + ROW // 2, 1)
        said = f"{branch}, step {step + 1} (t {times[step]:g}): {'computed' if done else 'reused'}"
        title = f"<title>{escape(said)}</title>" if cells <= TITLES else ""
        look = f"hue{hue}" if done else "reused"
        box = f'x="{x}" y="{y}" width="{CELL - 1}" height="{high}"'
        found.append(f'<rect class="{look}" {box}>{title}</rect>')
    return "".join(found)


def _legend(kinds: Sequence[str]) -> str:
    names = [
        f'<span><i class="hue{n % 4}"></i>{escape(kind)}</span>'
        for n, kind in enumerate(dict.fromkeys(kinds))
    ]
    names.append('<span><i class="reused"></i>reused</span>')
    return f'<div class="tenuto-legend">{"".join(names)}</div>'


# --- losses and numbers ---------------------------------------------------------------------------


def loss_curve(loss: Sequence[float]) -> str:
    """The router's loss by trajectory, with the values as a table below it."""
    if not loss:
        return ""
    wide, high, top = 360, 80, max(loss) or 1.0
    step = wide / max(1, len(loss) - 1)
    points = " ".join(
        f"{i * step:.1f},{high - value / top * high:.1f}" for i, value in enumerate(loss)
    )
    count = counted(len(loss), "trajectory", "trajectories")
    said = f"Loss of the router: {loss[-1]:.3g} after {count}"
    rows = "".join(f"<tr><td>{i + 1}</td><td>{value:.4g}</td></tr>" for i, value in enumerate(loss))
    return (
        f'<figure class="tenuto-loss"><figcaption>{escape(said)}</figcaption>'
        f'<svg role="img" aria-label="{escape(said)}" viewBox="-3 -3 {wide + 6} {high + 6}">'
        f'<polyline points="{points}"/><circle cx="{(len(loss) - 1) * step:.1f}" '
        f'cy="{high - loss[-1] / top * high:.1f}" r="3"/></svg>'
        f"<details><summary>Data</summary><table><tr><th>trajectory</th><th>loss</th></tr>{rows}"
        "</table></details></figure>"
    )


def table(rows: Sequence[tuple[str, ...]], head: Sequence[str] = ()) -> str:
    """A table whose first column names its rows."""
    first = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in row[1:])
        + "</tr>"
        for row in rows
    )
    head_row = f"<thead><tr>{first}</tr></thead>" if head else ""
    return (
        f'<div class="tenuto-scroll" tabindex=0 role="group" aria-label="Numbers">'
        f'<table class="tenuto-numbers">{head_row}<tbody>{body}</tbody></table></div>'
    )
