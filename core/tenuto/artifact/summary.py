"""An artifact as people read it: a short table and its cache schedule as a map of characters."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..caching import MOST, SHORTEST, CacheSchedule, Programme, about_db, calls_for
from ..errors import TenutoError
from ..model import WHOLE
from ..text import printable
from .artifact import SECTIONS, Artifact
from .contents import schedule_of
from .forecast import at_one, kernel_of, scores_of

MAP_ROWS = 120  # branches that a step map shows
LINE = 500  # characters of a line of the table
WIDTH = 80  # columns of a table
SPEEDUPS = (1.4, 2.0, 2.5, 3.0)  # for which `inspect` shows the predicted error


def facts_of(artifact: Artifact, size: int) -> dict[str, Any]:
    """An artifact's header and what its tensors say, and those of its parts. size: of the file."""
    return {"file_bytes": size, **_facts(artifact)} | (
        {"parts": {name: _facts(part) for name, part in artifact.parts.items()}}
        if artifact.parts
        else {}
    )


def layers_by_scheme(artifact: Artifact) -> dict[str, int]:
    """How many layers have which scheme, in all parts together."""
    every = (part.header.get("layers", {}) for part in (artifact, *artifact.parts.values()))
    return dict(Counter(layer["scheme"] for layers in every for layer in layers.values()))


def _facts(artifact: Artifact) -> dict[str, Any]:
    """Of one denoiser."""
    sections = {}
    for name in SECTIONS:
        tensors = artifact.section(name)
        if tensors:
            held = sum(t.numel() * t.element_size() for t in tensors.values())
            sections[name] = {"tensors": len(tensors), "bytes": held}
    facts: dict[str, Any] = {
        "sections": sections,
        "layers_by_scheme": layers_by_scheme(artifact.alone()),
    }
    schedule = _route(artifact)
    if schedule is not None:
        facts["computed_branches_by_step"] = schedule.table.sum(1).tolist()
    return {"header": artifact.header, **facts}


def about(path: str, artifact: Artifact, size: int) -> str:
    """An artifact as people read it."""
    first = [("file", f"{path}, {mib(size)}, format {artifact.header['format_version']}")]
    lines = [*_table([*first, *_rows(artifact)]), *step_map(artifact)]
    for name, part in artifact.parts.items():
        lines += ["", f"{printable(name)}:", *_table(_rows(part)), *step_map(part)]
    return "\n".join(lines)


def _rows(artifact: Artifact) -> list[tuple[str, str]]:
    """The table of one denoiser."""
    header, facts = artifact.header, _facts(artifact)
    schedule, mark = header["schedule"], header["fingerprint"]
    guidance = schedule.get("guidance")
    span = _span(schedule.get("run") or schedule.get("timesteps", []))
    span = f"{'' if guidance is None else f', guidance {guidance:g}'}{span}"
    parameters = f"{mark.get('parameters', 0) / 1e6:.1f} M parameters"
    rows = [
        ("model", f"{printable(header['model_class'])} ({header['family']}), {parameters}"),
        ("schedule", f"{schedule.get('steps', '?')} steps{span}"),
    ]
    if schedule.get("run"):
        own = schedule["timesteps"]
        rows.append(("schedule", f"of these {counted(len(own), 'step')} here{_span(own)}"))
    rows += [("call", f"{name} {worded(value)}") for name, value in _call(schedule).items()]
    for name, held in facts["sections"].items():
        rows.append((name, f"{mib(held['bytes'])} in {counted(held['tensors'], 'tensor')}"))
        rows += [(name, line) for line in _temporal_lines(header) if name == "temporal"]
    if "temporal" not in facts["sections"]:
        rows += [("temporal", line) for line in _temporal_lines(header)]
    by_scheme = ", ".join(f"{n} in {name}" for name, n in facts["layers_by_scheme"].items())
    if by_scheme:
        rows.append(("layers", f"{by_scheme}; weight error up to {_worst(header):.3f}"))
    for kind, count in header.get("left_in_float", {}).items():
        rows.append(("layers", f"{count} {kind} in float: what it computes is its own"))
    if header.get("kept_in_float"):
        kept = header["kept_in_float"]
        count, share = counted(len(kept), "layer"), min(1.0, sum(kept.values()))
        rows.append(("layers", f"{count} kept in float, with {share:.0%} of the error"))
    rows += [("check", line) for line in check_lines(header)]
    for name, encoder in header.get("encoders", {}).items():
        count = Counter(layer["scheme"] for layer in encoder["layers"].values())
        kinds = ", ".join(f"{n} in {scheme}" for scheme, n in count.items())
        rows.append((name, f"{kinds}; weight error up to {_worst(encoder):.3f}"))
        rows += [(name, line) for line in check_lines(encoder)]
    rows += [("route", line) for line in _route_lines(header)]
    rows += [("forecast", line) for line in _forecast_lines(artifact)]
    return rows + [("made", line) for line in _made_lines(header)]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return table([(printable(name), printable(value, LINE)) for name, value in rows])


def _span(times: list[float]) -> str:
    return f", timesteps {times[0]:g} to {times[-1]:g}" if times else ""


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Names in one column, values in the next, at most 80 wide; a repeated name is shown once."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    last, lines = "", []
    for name, value in rows:
        parts = textwrap.wrap(
            value, max(WIDTH - width, 30), subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        for part in parts or [""]:
            lines.append(f"{'' if name == last else name:<{width}}{part}".rstrip())
            last = name
    return lines


def check_lines(header: dict[str, Any]) -> Iterator[str]:
    """How far off recorded calls were, of a denoiser or an encoder; nothing in older files."""
    found = header.get("check", {})
    if found.get("relative_error") is not None:
        step = found.get("timestep")
        where = "recorded prompts" if step is None else f"a recorded call at timestep {step:g}"
        yield f"the output is {found['relative_error']:.2%} off in {where}"


def _worst(header: dict[str, Any]) -> float:
    return max((layer.get("weight_error", 0.0) for layer in header["layers"].values()), default=0.0)


def _temporal_lines(header: dict[str, Any]) -> Iterator[str]:
    """One line a kind: how many time-only modules, and how far their features are off."""
    modules = header.get("temporal", {}).get("modules", {}).values()
    kinds = Counter(facts["kind"] for facts in modules)
    for kind, count in kinds.items():
        errors = [f for f in modules if f["kind"] == kind]
        mean = sum(f["mean"] for f in errors) / count
        worst = max(f["worst"] for f in errors)
        error = f"1 - cosine {mean:.1e} mean, {worst:.1e} worst step"
        yield f"{kind}: {counted(count, 'module')}, {error}"


def _route_lines(header: dict[str, Any]) -> Iterator[str]:
    route = header.get("route")
    if not route:
        return
    what = WHOLE.kind if route.get("branches") == [WHOLE.name] else "branch call"
    held = f"{route['reuse_ratio']:.1%} of the {what}s are reused"
    work = route.get("reuse_flops")
    yield f"{route['policy']}: {held}" + ("" if work is None else f", {work:.1%} of the work")
    if route.get("scores"):
        yield "squared error of the result, by candidate:"
    for name, score in sorted(route.get("scores", {}).items(), key=lambda row: _order(row[1])):
        shown = f"{score:.4g}" if isinstance(score, int | float) else json.dumps(score)
        yield f"  {printable(shown, 40):>10}  {name}"


def _forecast_lines(artifact: Artifact) -> Iterator[str]:
    """What the forecast was recorded on, and for a few speedups what is predicted and measured."""
    kernel = kernel_of(artifact)
    if kernel is None:
        return
    facts, steps = artifact.header["forecast"], len(kernel.timesteps)
    default = facts.get("default")
    used = "for any --speedup" if default is None else f"{default:.3g} x unless --speedup says"
    yield f"{used}, from {counted(kernel.images, 'image')} of {counted(steps, 'step')}"
    scores, one, programme = scores_of(facts), at_one(facts), Programme(kernel)
    for speedup in SPEEDUPS if SHORTEST <= steps <= MOST else ():
        calls = calls_for(programme.errors, steps, speedup)
        if calls < steps:
            error, found = programme.errors[calls], scores.get(steps - calls)
            said = f"error {error:.1e}, about {about_db(error, one):.0f} dB"
            yield f"  {speedup:g} x: {counted(calls, 'call')} of {steps}, predicted {said}" + (
                "" if found is None else f"; measured {found[0]:.1f} dB"
            )


def _order(score: Any) -> float:
    return float(score) if isinstance(score, int | float) else math.inf


def _call(schedule: dict[str, Any]) -> dict[str, Any]:
    """What else the pipeline was called with."""
    found = schedule.get("call", {})
    return found if isinstance(found, dict) else {}


def worded(value: Any) -> str:
    """A keyword's value as it is read: a file by its name."""
    if isinstance(value, dict) and "sha256" in value:
        kinds = (kind for kind in ("file", "image", "tensor", "array", "type") if kind in value)
        return str(next((value[kind] for kind in kinds), "?"))
    return str(value)


def _made_lines(header: dict[str, Any]) -> Iterator[str]:
    made = dict(header.get("made") or {})
    calibration = made.pop("calibration", None) or {}
    if "preset" in header:
        made = {"preset": header["preset"]} | made
    yield ", ".join(f"{name} {value}" for name, value in made.items())
    if calibration:
        images = calibration.get("batch", 0) * calibration.get("runs", 0)
        yield (
            f"calibrated on {counted(images, 'image')} of {calibration.get('steps')} steps, "
            f"seed {calibration.get('seed')}, prompts {calibration.get('prompts')}"
        )


def step_map(artifact: Artifact) -> list[str]:
    """The route as steps by branches, one character a cell; empty without a route."""
    schedule = _route(artifact)
    if schedule is None:
        return []
    names = [_short(name) for name in schedule.branches]
    width = max(len(name) for name in names) + 2
    table = schedule.table
    steps = max(WIDTH - width, 20)  # in one part of the map
    lines = []
    for first in range(0, len(table), steps):
        part = table[first : first + steps]
        which = (
            "each step" if len(part) == len(table) else f"steps {first + 1} to {first + len(part)}"
        )
        lines += ["", f"computed (#) and reused (.) at {which}, first to last:"]
        for name, column in list(zip(names, part.t().tolist(), strict=True))[:MAP_ROWS]:
            lines.append(f"{name:<{width}}{''.join('#' if cell else '.' for cell in column)}")
    if len(names) > MAP_ROWS:
        lines.append(f"... and {len(names) - MAP_ROWS} more branches")
    return lines


def _route(artifact: Artifact) -> CacheSchedule | None:
    """`schedule_of`; a damaged one gives a ValueError, which the command turns into a sentence."""
    try:
        return schedule_of(artifact)
    except TenutoError as error:
        raise ValueError(str(error).removesuffix(".")) from error


def _short(name: str) -> str:
    return printable((name or WHOLE.kind).replace("transformer_blocks.", "").replace("blocks.", ""))


def counted(number: int, noun: str) -> str:
    """A number of things: 1 step, 2 steps."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def mib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"
