"""Generating in the app's process: the one model that is loaded, with an artifact or without."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tenuto.caching import Speedup
from tenuto.errors import Cancelled
from tenuto.sampling import PromptCache
from tenuto.sampling.loading import Defaults, defaults
from tenuto.sampling.loras import Lora, with_loras

from .infotext import as_number, written
from .loras import described
from .settings import Settings

OnCall = Callable[[int, int], None]  # denoiser calls made, and about how many there will be
CHANGED = "artifact"  # which of the images has what is put into the model
STATES = 256 * 2**20  # bytes of prompts' states that are kept
WARM = 2  # calls that `compare_all` makes for each way without counting them, at most


@dataclass(frozen=True)
class Wanted:
    """One image, or a video. model: what `load` takes; name: as the user knows it.

    artifact: its file. call: the pipeline's own keywords, images opened. described: the same as
    plain data. inputs: where the images lie that an artifact was calibrated with. speedup: as
    `attach` takes it. loras: by their lines in the field, for both images.
    """

    model: str
    name: str
    prompt: str
    seed: int
    steps: int
    guidance: float | None
    artifact: Path | None = None
    artifact_name: str = ""
    beside: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    inputs: Path | None = None
    speedup: Speedup | None = None
    loras: Mapping[str, Lora] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything is put into the model."""
        return self.artifact is not None or self.speedup is not None


@dataclass
class Generated:
    """The images, "full" and "artifact": frames (PIL), one unless it is a video.

    numbers: a comparison, or the time. used: what was wanted, and what the artifact or the model
    has where it was left open; a speedup "auto" as the number that it was.
    """

    pictures: dict[str, list[Any]]
    seconds: float
    used: Wanted
    numbers: dict[str, Any] = field(default_factory=dict)
    sampler: str = ""

    def infotext(self, settings: Mapping[str, Any], which: str) -> str:
        """The settings of one of the images as A1111 writes them."""
        from tenuto.resources import __version__

        size = "x".join(map(str, self.pictures[which][0].size))
        return written({
            **settings,
            "sampler": self.sampler, "size": size, "version": f"tenuto {__version__}",
        })  # fmt: skip


def settings_of(wanted: Wanted, which: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """What a PNG says of itself. call: as plain data."""
    own = which == CHANGED
    return {
        "model": wanted.name, "prompt": wanted.prompt, "steps": wanted.steps,
        "guidance": wanted.guidance, "seed": wanted.seed,
        "artifact": (wanted.artifact_name or None) if own else None,
        "speedup": wanted.speedup if own else None,
    } | described(wanted.loras) | ({"call": dict(call)} if call else {})  # fmt: skip


class Studio:
    """Keeps the model that was generated with last, and stops generating when it is asked to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loading = threading.Lock()
        self._model, self._pipe = "", None
        self._stop = threading.Event()
        self.stops = 0  # how often it was asked to stop: for who generates several images
        self.prompts = PromptCache(most=STATES)

    def stop(self) -> None:
        """Stop the image that is being generated, at its next denoiser call."""
        self.stops += 1
        self._stop.set()

    def pipe(self, model: str) -> Any:
        """The pipeline of `model`, loaded unless it is the last one."""
        from tenuto.cli.checks import device_of
        from tenuto.cli.console import Bars
        from tenuto.cli.session import loaded

        with self._loading:
            if self._model != model:
                self._model, self._pipe = "", None  # free its memory first
                self._pipe = loaded(model, device_of(self.settings.device), Bars(io.StringIO()))
                self._pipe.set_progress_bar_config(disable=True)
                self._model = model
            return self._pipe

    def _forget(self) -> None:
        """Load the model anew for the next image."""
        with self._loading:
            self._model, self._pipe = "", None

    def generate(self, wanted: Wanted, on_call: OnCall, stops: int) -> Generated:
        """One image, or two: beside it the one of full precision, from the same noise.

        stops: what `self.stops` was when the image was asked for. Cancelled if it is more by now.
        """
        from tenuto.cli.checks import load_artifact
        from tenuto.cli.session import sampling_of

        self._stop.clear()
        if self.stops != stops:
            raise Cancelled
        artifact = None if wanted.artifact is None else load_artifact(wanted.artifact)
        sampling = sampling_of(
            wanted.model, steps=wanted.steps, guidance=wanted.guidance, call=wanted.call,
            device=self.settings.device, artifact=artifact, file=wanted.artifact,
            images=wanted.inputs,
        )  # fmt: skip
        pipe = self.pipe(wanted.model)
        sampling.checked(pipe)
        wanted = replace(wanted, guidance=sampling.guidance, call=sampling.called(pipe))
        beside = wanted.beside and wanted.changes
        calls = 2 * (wanted.steps + WARM) if beside else wanted.steps
        loras = with_loras(pipe, [*wanted.loras.values()], self._forget)
        with loras, self._watched(pipe, calls, on_call):
            if beside:  # it measures whole calls: the text encoder runs in each
                found = _beside(pipe, artifact, wanted)
            else:
                found = _alone(pipe, artifact, wanted, self.prompts)
        speedup = as_number(wanted.speedup, found.numbers["reuse_ratio"])
        found.used = replace(found.used, speedup=speedup)
        found.sampler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
        return found

    @contextmanager
    def _watched(self, pipe: Any, total: int, on_call: OnCall) -> Iterator[None]:
        """Count the denoiser's calls, and leave at the next one when generating is to stop."""
        from tenuto.model import denoisers_of, watched

        done = 0

        def before(name: str, args: Any, kwargs: Any) -> None:
            nonlocal done
            if self._stop.is_set():
                raise Cancelled
            on_call(min(done, total), total)
            done += 1

        with ExitStack() as watching:
            for denoiser in denoisers_of(pipe).values():
                watching.enter_context(watched(denoiser, before=before))
            yield


def _alone(pipe: Any, artifact: Any, wanted: Wanted, prompts: PromptCache) -> Generated:
    from tenuto.cli.session import attached_to
    from tenuto.sampling.images import generate_images

    before, encodes = (prompts.found, prompts.made), hasattr(pipe, "encode_prompt")
    known = prompts.used_by(pipe) if encodes else nullcontext()
    with attached_to(pipe, artifact, "auto", wanted.speedup) as attached, known:
        start = time.perf_counter()
        images = generate_images(
            pipe, wanted.prompt, negative=None, steps=wanted.steps, guidance=wanted.guidance,
            seed=wanted.seed, count=1, call=wanted.call,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        execution = attached.execution() if attached else {"mode": "float", "layers": {}}
        counts = attached.counts() if attached else {}
        forecast = attached.forecast() if attached else None
    reused, made = (sum(count[i] for count in counts.values()) for i in (1, 0))
    numbers = {
        "execution": execution, "reuse_ratio": reused / (reused + made) if reused else 0.0,
        "asked_speedup": wanted.speedup, "forecast": forecast,
        "calls": [made, reused] if wanted.speedup else None,
        "prompt_reused": prompts.found > before[0] and prompts.made == before[1],
    }  # fmt: skip
    which = CHANGED if wanted.changes else "full"
    return Generated({which: images}, seconds, wanted, numbers)


def _beside(pipe: Any, artifact: Any, wanted: Wanted) -> Generated:
    import torch

    from tenuto.measure import ARTIFACT, FULL, compare_all
    from tenuto.sampling.images import to_images

    start = time.perf_counter()
    found, generated = compare_all(
        pipe, {ARTIFACT: artifact}, [wanted.prompt], count=1, steps=wanted.steps,
        guidance=wanted.guidance, call=wanted.call, seed=wanted.seed, execution="auto", floor=False,
        speedup=wanted.speedup,
    )  # fmt: skip
    pictures = {
        name: to_images(torch.cat(generated[key].batches))
        for name, key in (("full", FULL), (CHANGED, ARTIFACT))
    }
    more = {"said": found[ARTIFACT].speed_note(), "asked_speedup": wanted.speedup}
    numbers = found[ARTIFACT].to_json() | more
    return Generated(pictures, time.perf_counter() - start, wanted, numbers)


def defaults_of(model: str, artifact: Path | None = None) -> Defaults:
    """Steps and guidance of a model, or of the artifact that is used with it."""
    from tenuto.artifact import read_header
    from tenuto.cli.checks import damage_told

    if artifact is None:
        return defaults(model)
    with damage_told(artifact):
        return Defaults.read(read_header(artifact)["schedule"])
