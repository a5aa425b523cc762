"""The rows of `quality.py`: for one model, which artifacts there are, made once and kept."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tenuto as tn
from tenuto.artifact import fingerprint
from tenuto.calibration import PRESETS as ROUTE_PRESETS
from tenuto.calibration import effort, recipe_for, train_router
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import denoiser_of
from tenuto.resources import asset
from tenuto.resume import digest
from tenuto.sampling.loading import defaults, load, prompts

FULL, BF16, AUTOENCODER = "full precision", "bf16", "autoencoder alone"
W4A8, REUSE = "W4A8 (GPTQ)", 0.3  # what "W4A8 + router" is made of
START = time.perf_counter()


def note(text: str) -> None:
    """One line about what goes on, with the seconds since the start."""
    sys.stderr.write(f"{time.perf_counter() - START:7.1f} s  {text}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Row:
    """One row. make: an artifact for it; file: where one is that ships. Neither: no artifact.

    extra: made only where it is asked for by name.
    """

    name: str
    make: Callable[[], tn.Artifact] | None = None
    file: Path | None = None
    extra: bool = False

    def wanted(self, patterns: list[str]) -> bool:
        """Whether one of `patterns` (fnmatch) asks for it; "*" is all but the extra ones."""
        patterns = [p for p in patterns if p != "*" or not self.extra]
        return any(fnmatch.fnmatchcase(self.name, p) for p in patterns)


@dataclass(frozen=True)
class Kept:
    """An artifact, the hash of its file, and the seconds it took if it was made just now."""

    artifact: tn.Artifact
    sha256: str
    seconds: float | None


class Bench:
    """One model on its device, how it is sampled, and its artifacts in the folder `work`."""

    def __init__(self, model: str, device: str | None, preset: str, seed: int, work: Path) -> None:
        self.model, self.short = model, slug(model.removeprefix("demo:"))
        self.preset, self.seed, self.work = preset, seed, work
        self.pipe = load(model, device)
        self.steps, self.guidance = defaults(model)
        self.denoiser = denoiser_of(self.pipe)

    def rows(self) -> Iterator[Row]:
        """Every row, the ones without calibration first."""
        schemes, nearest = tn.schemes, RoundToNearest()
        gptq, learnt = (
            effort(p).rounding(n) for p, n in ((self.preset, "gptq"), ("thorough", "adaround"))
        )
        yield from (Row(FULL), Row(BF16), Row(AUTOENCODER))
        for path in sorted(asset("artifacts").glob(f"demo-{self.short}.*.safetensors")):
            yield Row(f"shipped {path.name.split('.')[1]}", file=path)
        w4a8, row = schemes.W4A8, replace(schemes.W4A8.weight, group=0)
        yield Row("W4A8 (round to nearest)", partial(self.quantized, w4a8, nearest))
        yield Row(W4A8, partial(self.quantized, w4a8, gptq))
        yield Row("W4A16 (GPTQ)", partial(self.quantized, schemes.W4A16, gptq))
        yield Row(f"router {REUSE:.0%}", partial(self.routed, REUSE))
        for scheme in (schemes.W8A8, schemes.FP8, schemes.FP8_STATIC):
            name = scheme.name.upper()
            yield Row(name, partial(self.quantized, scheme, nearest), extra=True)
        further = replace(learnt, iterations=600, start="gptq")
        fine = replace(w4a8, weight=replace(w4a8.weight, group=16))
        for name, scheme, rounding in (
            ("AdaRound", w4a8, learnt),
            ("AdaRound, brief", w4a8, AdaRound(300, 16)),
            ("AdaRound, symmetric", w4a8, replace(learnt, asymmetric=False)),
            ("GPTQ, symmetric", w4a8, replace(gptq, asymmetric=False)),
            ("GPTQ, AdaRound", w4a8, further),
            ("groups of 16, GPTQ", fine, gptq),
            ("groups of 16, AdaRound", fine, learnt),
        ):
            yield Row(f"W4A8 ({name})", partial(self.quantized, scheme, rounding), extra=True)
        whole = replace(w4a8, weight=row)
        yield Row("W4A8 (a range a row)", partial(self.quantized, whole, gptq), extra=True)
        for kind in ("none", "tiar", "table"):
            make = partial(self.quantized, w4a8, gptq, kind)
            yield Row(f"W4A8, time path {kind}", make, extra=True)
        yield Row("router 50%", partial(self.routed, 0.5), extra=True)
        yield Row(f"W4A8 + router {REUSE:.0%}", self.both, extra=True)

    @cached_property
    def marks(self) -> str:
        """A hash of the weights' fingerprints: other weights are another model."""
        parts = (self.denoiser, self.pipe.vae, self.pipe.text_encoder)
        return digest([fingerprint(part) for part in parts])

    def kept(self, row: Row) -> Kept | None:
        """The artifact of a row, from its file if that is there; None: it fits this model not."""
        path = row.file or self.work / f"{self.short}.{slug(row.name)}.{self.preset}.safetensors"
        seconds = None
        if not self.fits(path) and row.make is not None:
            note(f"{self.model}: making {row.name}")
            begin = time.perf_counter()
            row.make().save(path)
            seconds = round(time.perf_counter() - begin, 1)
        if not self.fits(path):
            note(f"{path.name} was made for other weights and is left out")
            return None
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return Kept(tn.Artifact.load(path), sha256, seconds)

    def fits(self, path: Path) -> bool:
        """Whether there is an artifact of this model at `path`."""
        try:
            tn.Artifact.load(path).check(self.pipe)
        except tn.ArtifactError:
            return False
        return True

    @cached_property
    def recorded(self) -> tn.Trajectory:
        """What weights are calibrated on."""
        kind = effort(self.preset)
        return self.record(kind.prompts, kind.batch, None)

    def record(self, count: int | None, batch: int, runs: int | None) -> tn.Trajectory:
        """A recording of the first `count` calibration prompts."""
        lines = prompts("default")[:count]
        return tn.record(
            self.pipe, lines, steps=self.steps, guidance=self.guidance, seed=self.seed,
            batch=batch, runs=runs,
        )  # fmt: skip

    def quantized(self, scheme: tn.Scheme, rounding: Any, temporal: str = "auto") -> tn.Artifact:
        """Weights and activations at `scheme`, the ends of the model at 8 bits."""
        recipe = recipe_for(scheme, tn.describe(self.denoiser), rounding)
        return tn.quantize(
            self.pipe, recipe, self.recorded, preset=self.preset, seed=self.seed,
            temporal=temporal,
        )  # fmt: skip

    def routed(self, reuse: float, artifact: tn.Artifact | None = None) -> tn.Artifact:
        """The default route: what `train_router` chooses at that ratio."""
        trajectory = self.record(None, ROUTE_PRESETS[self.preset].batch, 1)
        return train_router(
            self.pipe, trajectory, reuse=reuse, artifact=artifact, preset=self.preset,
            seed=self.seed,
        )  # fmt: skip

    def both(self) -> tn.Artifact:
        """W4A8 and a route that was found under it."""
        weights = self.kept(next(row for row in self.rows() if row.name == W4A8))
        assert weights is not None
        return weights.artifact | self.routed(REUSE, weights.artifact)


def slug(name: str) -> str:
    """A row's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
