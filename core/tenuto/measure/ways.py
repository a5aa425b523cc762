"""The ways to generate that a comparison times: in full precision, with an artifact, in bf16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..artifact import Artifact, schedule_of
from ..model import Leave, device_and_dtype, multiply_adds, parts_of, watched
from ..runtime import Calls, Tenuto
from ..sampling import Sample, answered_once
from .bf16 import bf16_arithmetic, bf16_floor
from .memory import PeakMemory, resident_weight_bytes
from .paired_runs import FirstCall, Way, first_call

FULL, ARTIFACT, BF16 = "full precision", "artifact", "bf16"


@dataclass
class Facts:
    """What is known beside images and times. Everything is of all denoisers, by `parts_of`.

    work: multiply-adds of one call by denoiser and branch, "" the whole. runs: calls of each
    denoiser, where there are several.
    """

    work: dict[str, dict[str, int]]
    float_bytes: int
    arithmetic: str  # of bf16
    artifact_bytes: int = 0
    calls: dict[str, list[int]] = field(default_factory=dict)  # branch: [computed, reused]
    runs: Counter[str] = field(default_factory=Counter)
    execution: dict[str, Any] = field(default_factory=dict)
    int8_share: float | None = None
    peak: int | None = None
    peak_source: str = ""

    def note(self, attached: Tenuto, before: dict[str, list[int]], peak: PeakMemory) -> None:
        """What an attached artifact says of itself after it has generated."""
        self.execution, self.int8_share = attached.execution(), attached.int8_weight_share()
        self.artifact_bytes = resident_weight_bytes(*parts_of(attached.handle).values())
        for name, counts in attached.counts().items():
            known = self.calls.setdefault(name, [0, 0])
            self.calls[name] = [known[i] + counts[i] - before[name][i] for i in (0, 1)]
        if peak.bytes is not None:
            self.peak, self.peak_source = max(self.peak or 0, peak.bytes), peak.source

    def reuse(self) -> tuple[float, float]:
        """Shares that were reused: of the branch calls, and of the whole's multiply-adds."""
        reused = work = called = 0.0
        for name, (computed, again) in self.calls.items():
            part, _, branch = name.rpartition("/")
            share = again / max(1, computed + again) * self._runs(part)
            reused, called = reused + share, called + self._runs(part)
            work += share * self.work[part][branch]
        whole = sum(counts[""] * self._runs(part) for part, counts in self.work.items())
        return reused / max(1, called), work / max(1, whole)

    def _runs(self, part: str) -> int:
        return self.runs[part] if len(self.work) > 1 else 1


def first_calls(
    model: Any, sample: Sample, seed: int, batch: int, whole: bool
) -> tuple[dict[str, FirstCall], int]:
    """`first_call` of each denoiser that a run reaches.

    Of several, each computes once on the way there: what is asked next is then not quite what it
    would be, but of the same form.
    """
    found = parts_of(model)
    if len(found) == 1:
        call, steps = first_call(found[""], sample, seed, batch, whole)
        return {"": call}, steps
    calls: dict[str, FirstCall] = {}
    times: set[float] = set()

    def note(name: str, timestep: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, (args, kwargs))
        times.add(timestep)
        if len(calls) == len(found) and not whole:
            raise Leave

    with answered_once(model, note), suppress(Leave):
        sample(found[""], seed, batch)
    return calls, len(times)


def facts_of(
    model: Any, artifacts: Mapping[str, Artifact], calls: Mapping[str, FirstCall]
) -> dict[str, Facts]:
    """What is known of each artifact before anything is generated."""
    found, work = parts_of(model), dict[str, dict[str, int]]()
    own = [artifact.by_denoiser(model) for artifact in artifacts.values()]
    for name, call in calls.items():
        schedules = [schedule_of(parts[name]) for parts in own if name in parts]
        branches = {branch for schedule in schedules if schedule for branch in schedule.branches}
        work[name] = multiply_adds(found[name], *call, names=sorted(branches))
    size = resident_weight_bytes(*found.values())
    arithmetic = bf16_arithmetic(device_and_dtype(found[""])[0])
    return {name: Facts(work, size, arithmetic) for name in artifacts}


def ways_of(
    model: Any,
    artifacts: Mapping[str, Artifact],
    calls: Mapping[str, FirstCall],
    facts: Mapping[str, Facts],
    put_on: Callable[[Artifact], Tenuto],
    floor: bool,
    how: Calls | None = None,
    warm: Callable[[Any], Any] | None = None,
) -> dict[str, Way]:
    """The ways to generate; each makes one call on entry that is not timed: it packs weights.

    put_on: attaches an artifact. how: what is done round the calls of the others. warm: a run on
    entry that is not timed either, in which blocks are compiled and calls captured.
    """
    how, warm = how or Calls(), warm or (lambda denoiser: None)
    found = parts_of(model)
    device, dtype = device_and_dtype(found[""])

    @contextmanager
    def attached(name: str) -> Iterator[Any]:
        on = put_on(artifacts[name])
        with on, PeakMemory(device) as peak, ExitStack() as counting:
            called(found)
            warm(found[""])
            before = on.counts()
            for part in on.parts.values():
                part.clock.begin()  # that call is no part of the run that comes
            for part, denoiser in found.items() if len(found) > 1 else ():
                count = partial(_count, facts[name].runs, part)
                counting.enter_context(watched(denoiser, before=count))
            yield found[""]
            peak.read()
            facts[name].note(on, before, peak)

    @contextmanager
    def plain(denoisers: Mapping[str, nn.Module]) -> Iterator[Any]:
        given = denoisers[""] if len(denoisers) == 1 else denoisers
        with ExitStack() as on:
            for patch in (p for d in denoisers.values() for p in how.of(d, False)[1]):
                on.callback(patch.remove)
            called(denoisers)
            warm(given)
            yield given

    def called(denoisers: Mapping[str, nn.Module]) -> None:
        for name, (args, kwargs) in calls.items():
            denoisers[name](*args, **kwargs)

    ways: dict[str, Way] = {FULL: lambda: plain(found)}
    ways |= {name: partial(attached, name) for name in artifacts}
    if floor and dtype is not torch.bfloat16:
        twins, arithmetic = _in_bf16(found, calls)
        for known in facts.values():
            known.arithmetic = arithmetic
        if twins is not None:
            ways[BF16] = partial(plain, twins)
    return ways


def _count(runs: Counter[str], part: str, *_: Any) -> None:
    runs[part] += 1


def _in_bf16(
    denoisers: Mapping[str, nn.Module], calls: Mapping[str, FirstCall]
) -> tuple[dict[str, nn.Module] | None, str]:
    """`bf16_floor` of all that are called; none of them where one cannot be."""
    twins, arithmetic = dict(denoisers), ""
    for name, call in calls.items():
        twin, arithmetic = bf16_floor(denoisers[name], *call)
        if twin is None:
            return None, arithmetic
        twins[name] = twin
    return twins, arithmetic
