"""`Session`: what is attached now, to whose sampling run, and what the last one did."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

from tenuto.errors import TenutoError

from . import artifacts, hosts
from .adapter import Installed, WebUI
from .choices import Choices
from .forecast import Watched, instead
from .options import HALF, option
from .plans import chosen_of
from .timing import Timing
from .weights import SIDE

log = logging.getLogger("tenuto")


@dataclass
class Report:
    """What one call for images did, all its passes together."""

    computed: int = 0
    reused: int = 0
    calls: int = 0  # of the network, that were computed where some could be skipped
    skipped: int = 0
    bytes: int = 0
    lora: int = 0  # layers
    lora_mode: str = SIDE
    layers: dict[str, int] = field(default_factory=dict)
    how: dict[str, int] = field(default_factory=dict)
    predicted: list[str] = field(default_factory=list)  # what skipping calls is likely to cost
    notes: list[str] = field(default_factory=list)
    speedup: float | None = None
    attached: bool = False


class Session:
    """One for the process: a host samples one image (or batch) at a time."""

    def __init__(self) -> None:
        self.installed: Installed | None = None
        self.owner: weakref.ref[Any] | None = None
        self.report, self.timing = Report(), Timing()
        self.host = WebUI()

    # --- the run of an owner ----------------------------------------------------------------------

    def begin(self) -> None:
        """A call for images begins: what a failed one may have left is taken out."""
        self.stop()
        self.report = Report()

    def start(self, p: Any, choices: Choices) -> None:
        """A sampling pass of `p` begins. TenutoError where nothing can be attached."""
        self.stop()
        self.owner = weakref.ref(p)
        if not choices.now(bool(getattr(p, "is_hr_pass", False))):
            return
        if hosts.replaced():
            raise TenutoError("An SD-Unet stands in for the model: there is nothing to attach to.")
        if hosts.detect() == "sdnext":
            raise TenutoError("SD.Next is not supported: it has no callback for an evaluation.")
        found = artifacts.find(choices.artifact)
        chosen = chosen_of(
            choices, None if found is None else artifacts.load(found),
            artifacts.scheme_of(choices.artifact), option("cache_dtype") == HALF,
            execution=str(option("execution")), lora=str(option("lora")),
        )  # fmt: skip
        refused = hosts.objection(self.host.denoiser(p.sd_model)) if chosen.weights else None
        if refused is not None:
            self.report.notes.append(refused)
            chosen = replace(chosen, weights=False)
        made = self.host.install(p.sd_model, chosen)
        if made.skips is not None:
            sampler = getattr(p, "sampler", None)
            made.patches.append(Watched(p.sd_model, sampler, made.skips.begins))
        if made.patches[1:]:  # the first one only counts
            self.installed, self.report.attached = made, True
        else:
            made.detach()
            self.report.notes += filter(None, [made.why])

    def evaluates(self, params: Any) -> None:
        """The host's callback before each evaluation, of whatever sampling run."""
        p = getattr(params.denoiser, "p", None)
        mine = p is None or (self.owner is not None and self.owner() is p)
        if mine and p is not None:
            self.timing.note(params, p.sd_model)
        if self.installed is None:
            return
        if mine:
            self.installed.run.evaluates(*step_of(params), params.denoiser)
        else:
            self.installed.run.on = False  # somebody else's images, inside of ours

    def stop(self, p: Any = None) -> None:
        """Take everything out; with `p`, only if what is attached is for it."""
        if p is not None and self.owner is not None and self.owner() is not p:
            return
        done, self.installed, self.owner = self.installed, None, None
        if done is not None:
            self._collect(done)
            done.detach()
        elif self.timing.starts:
            self.timing.keep_full()
        self.timing.begin()

    def forget(self) -> None:
        """Another checkpoint: nothing that was made of the last one is kept."""
        self.stop()
        self.host.forget()

    def _collect(self, done: Installed) -> None:
        """Adds what a pass did to the report."""
        report = self.report
        if done.cache is not None:
            report.computed += done.cache.computed
            report.reused += done.cache.reused
            report.bytes = max(report.bytes, done.cache.bytes())
        found = [(instead(done.why, done.cache), report.notes)]
        if done.skips is not None and sum(done.skips.counts):
            if not done.skips.instead:
                report.calls += done.skips.counts[0]
                report.skipped += done.skips.counts[1]
            found = [
                (done.skips.said(), report.notes), (done.skips.predicted(), report.predicted),
            ]  # fmt: skip
        for said, told in found:
            if said and said not in told:
                told.append(said)
        if done.weights.plan:
            report.layers, report.how = done.weights.plan.count(), done.weights.how()
            report.lora = max(report.lora, done.changes.count())
            report.lora_mode = done.weights.lora
        if done.run.failed is not None:
            report.notes.append(done.run.failed)
        elif done.run.evaluations:
            report.speedup = self.timing.speedup()


def step_of(params: Any) -> tuple[int, int]:
    """The step that an evaluation belongs to, and how many there are.

    The denoiser counts evaluations itself; second-order samplers make two a step. `sampling_step`
    is set when a step is done, so that it says of most evaluations the step before.
    """
    denoiser = params.denoiser
    names = ("step", "steps", "total_steps")
    done, steps, total = (getattr(denoiser, name, None) for name in names)
    if done is None or not steps or not total:
        return params.sampling_step, params.total_sampling_steps
    return min(done // max(1, total // steps), steps - 1), steps


session = Session()
