"""`Check`: what is known of a model before anything is computed, as data and as lines to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...artifact.summary import counted, table
from ...errors import TenutoError

QUANTIZE, ENCODERS, ROUTER, COMPARE = USES = ("quantize", "text-encoder", "train-router", "compare")
WHOLE = "taken whole"  # of a block that is a branch itself
UNITS = ((3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Problem:
    """One sentence on what does not work, or not as one would think.

    stops: of `USES` those that it makes impossible. concerns: those that it is worth a word before;
    a problem of no use is only listed.
    """

    sentence: str
    stops: tuple[str, ...] = ()
    concerns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """What `tenuto.check` found out.

    model, pipeline: class names. known: whether a family file, or the user, describes the model.
    weights: numbers of parameters: "all" of the denoiser, "quantized", in "branches" and
    "time-only" modules. layers: {scheme: {"layers", "weights"}}. floats: what stays in float, each
    {"why", "layers", "weights", "names"} with a few of the names. temporal: modules that can become
    tables; None: found when a run is recorded. blocks: how many. branches: {kind: how many}.
    encoders: {name: {"class", "weights", "quantizable", "why"}}. further: {name: class} of other
    networks that are called at every step and stay as they are. hosts: classes of ComfyUI and the
    WebUIs that take an artifact of the model. memory: bytes; see `estimates.memory` and `peaks`.
    time: seconds and calls; see `estimates.time_of`. size: bytes of the denoiser "in 16 bits" and
    of its "codes" in an artifact.
    """

    model: str
    pipeline: str | None = None
    family: str = ""
    known: bool = False
    weights: Mapping[str, int] = field(default_factory=dict)
    scheme: str = ""
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    floats: tuple[Mapping[str, Any], ...] = ()
    temporal: tuple[str, ...] | None = ()
    blocks: int = 0
    branches: Mapping[str, int] = field(default_factory=dict)
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    further: Mapping[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    time: Mapping[str, Any] = field(default_factory=dict)
    size: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def stopping(self, *uses: str) -> list[str]:
        """What makes one of these uses impossible (any of all), a sentence each."""
        wanted = set(uses or USES)
        return [p.sentence for p in self.problems if wanted & set(p.stops)]

    def warnings(self, *uses: str) -> list[str]:
        """What does not stop them but should be known, a sentence each."""
        wanted = set(uses or USES)
        stopping = self.stopping(*uses)
        found = (p for p in self.problems if wanted & {*p.concerns, *p.stops})
        return [p.sentence for p in found if p.sentence not in stopping]

    def refuse(self, use: str) -> None:
        """TenutoError with the first sentence that makes `use` impossible, if there is one."""
        for sentence in self.stopping(use):
            raise TenutoError(sentence)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data, and "stops": {use: sentences}."""
        return asdict(self) | {"stops": {use: self.stopping(use) for use in USES}}

    def __str__(self) -> str:
        """A short table, then what does not work."""
        lines = table([*self.rows()]) or [f"model  {self.model}"]
        for problem in self.problems:
            lines.append(f"{_beginning(problem.stops)}: {problem.sentence}")
        return "\n".join(lines)

    def rows(self) -> Iterator[tuple[str, str]]:
        """(what, what is known of it), in the order of the table; none where there is no family.

        Costs of a use are under its name, one of `USES`.
        """
        if not self.family:
            return
        of = f" of {self.pipeline}" if self.pipeline else ""
        yield "model", f"{self.model}{of}, {millions(self.weights['all'])} parameters"
        yield "family", self.family if self.known else "none: described by its lists of blocks"
        made = ", ".join(f"{facts['layers']} in {name}" for name, facts in self.layers.items())
        yield "quantized", f"{self._share('quantized')} of the weights: {made or 'no layer'}"
        for facts in self.floats:
            share = percent(facts["weights"], self.weights["all"])
            yield "in float", f"{counted(facts['layers'], 'part')} ({share}): {facts['why']}"
        yield "time-only", self._time_only()
        kinds = ", ".join(f"{n} {WHOLE if k == 'block' else k}" for k, n in self.branches.items())
        parts = f"{counted(self.blocks, 'block')}: {kinds or 'nothing'}"
        yield "can be reused", f"{parts}, {self._share('branches')} of the weights"
        for name, facts in self.encoders.items():
            how = "can be quantized" if facts["quantizable"] else facts["why"]
            size = millions(facts["weights"])
            yield "text encoder", f"{name}, {facts['class']}, {size} parameters: {how}"
        for name, cls in self.further.items():
            yield "stays as it is", f"{name}, {cls}"
        yield "in hosts", self._hosts()
        yield from self._costs()

    def _share(self, key: str) -> str:
        return percent(self.weights[key], self.weights["all"])

    def _time_only(self) -> str:
        if self.temporal is None:
            return "looked for when a run is recorded"
        count = counted(len(self.temporal), "module")
        become = "a table" if len(self.temporal) == 1 else "tables"
        return f"{count} that can become {become}, {self._share('time-only')} of the weights"

    def _hosts(self) -> str:
        if not self.hosts:
            return "not: the artifact is for diffusers"
        return f"the artifact fits {' and '.join(self.hosts)}"

    def _costs(self) -> Iterator[tuple[str, str]]:
        if self.size.get("codes"):
            codes, whole = self.size["codes"], self.size["in 16 bits"]
            yield "file", f"about {gib(codes)} for the denoiser, which has {gib(whole)} in 16 bits"
        if self.memory:
            free = self.memory["free"]
            known = "" if free is None else f"; {gib(free)} are free"
            yield "memory", f"about {gib(self.memory['needed'])} on {self.memory['on']}{known}"
            if size := self.memory.get("recorded inputs"):
                place = "in memory, or on disk where memory has no room"
                yield "recorded inputs", f"about {gib(size)} {place}"
        for use, facts in self.time.get("uses", {}).items():
            took = between(facts["seconds"], facts["seconds_at_most"])
            yield use, f"{took}, {facts['calls']:,} calls of the denoiser with one image"
        if self.time.get("how"):
            yield "estimated", self.time["how"]


def _beginning(stops: tuple[str, ...]) -> str:
    if not stops:
        return "note"
    return "nothing works" if set(stops) >= set(USES) else f"no {', no '.join(stops)}"


def percent(part: float, whole: int = 1) -> str:
    """A share in words that do not say 0 % or 100 % of what is not."""
    share = 100 * part / max(1, whole)
    if 0 < share < 0.1:
        return "below 0.1 %"
    if 99.9 < share < 100:
        return "above 99.9 %"
    return f"{share:.1f} %" if share < 10 or 99 < share < 100 else f"{share:.0f} %"


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def between(least: float, most: float) -> str:
    """How long something takes, at the least and at most, in seconds: "about 2 min to 6 min"."""
    return f"about {duration(least)} to {duration(most)}" if most >= 1 else "under a second"


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there is one."""
    size, unit = next((u for u in UNITS if seconds >= u[0]), UNITS[-1])
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
