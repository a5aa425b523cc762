"""What the app does when a button is pressed or its API is called, without any of Gradio in it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tenuto.errors import TenutoError
from tenuto.files import clear_parts, whole_file, write_text
from tenuto.sampling.model_folders import hub_cache

from . import folders
from .call import checked, prompted
from .desk import Desk
from .given import disk_told, given, real, whole, words
from .infotext import LONGEST
from .inputs import bounded
from .jobs import DONE, FAILED, STOPPED, WAITING, Job
from .loras import chosen
from .memory import give_back
from .pictures import saved
from .places import Places, checked_name
from .requests import CHOSEN, HOW, STEPS, calibration, comparison, expected
from .settings import Settings
from .speedup import asked
from .studio import OnCall, Studio, Wanted

NO_ARTIFACT = ""
GENERATE = "generate"  # is no job, but can be stopped like one


class Bench:
    """The places, the desk at which one thing is done at a time, and the model that is loaded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        added = [] if settings.listen else folders.kept(settings.out)
        self.places = Places(settings.out, settings.roots, hub_cache(), added)
        self.desk, self.studio = Desk(), Studio(settings)

    # --- generate -------------------------------------------------------------------------------

    def generate(
        self,
        model: str,
        prompt: str,
        seed: float | None,
        steps: float,
        guidance: Any,
        artifact: str,
        beside: bool,
        on_call: OnCall,
        call: Any = None,
        speedup: Any = None,
        on_wait: Callable[[int], None] = lambda place: None,
        stops: int | None = None,
        loras: Any = "",
    ) -> dict[str, Any]:
        """Generate and save, when it is its turn: on_wait(place) is called while it is in line.

        Stopped meanwhile it raises Cancelled; stops is the studio's count of stops when Generate
        was pressed, where that was before now. Returns paths of "full" and "artifact",
        numbers, seconds and infotext.

        seed: None takes one by chance. call: what else the pipeline takes. speedup: skip calls by
        the artifact's forecast, or by the one that ships; "auto": as many as are predicted unseen;
        None: as the artifact says. loras: a line each, NAME or NAME:WEIGHT.
        """
        prompt, folder = words(prompt, "The prompt", LONGEST), self.places.model(model)
        if not prompted(folder):
            prompt = ""
        elif not prompt:
            raise TenutoError("Say what to generate: the prompt is empty.")
        file = self.places.artifact(artifact) if artifact else None
        count = whole(steps, *STEPS)
        wanted = Wanted(
            folder, model, prompt,
            given(seed, whole, "The seed", 0, 2**53, absent=random.randrange(2**32)),
            count, given(guidance, real, "Guidance", 0, 1000), file, artifact or "", beside,
            checked(folder, call, self.places.inputs), self.places.inputs,
            asked(folder, [file] if file else (), speedup), chosen(self.places, folder, loras),
        )  # fmt: skip
        stops = self.studio.stops if stops is None else stops
        text = f"{model}, {prompt}"
        with self.desk.turn(text, on_wait, lambda: self.studio.stops != stops):
            try:
                found = self.studio.generate(wanted, on_call, stops)
            finally:
                give_back()
        made = saved(self.places, found)
        bounded(self.places, self.desk.requests)
        return made

    @disk_told()
    def added(self, path: str | Path, name: str) -> str:
        """Take an artifact file into the output folder, if it is one; returns its name."""
        from tenuto.cli.checks import load_artifact

        source, name = Path(path), checked_name(Path(name).name)
        if source.suffix != ".safetensors":
            raise TenutoError("An artifact is a .safetensors file; nothing else is opened.")
        try:
            load_artifact(source)
        except TenutoError as error:  # its path is of no use to anyone
            raise TenutoError(str(error).replace(str(source), source.name)) from error
        target = self.places.new_artifact(name)
        with whole_file(target) as part:
            shutil.copyfile(source, part)
        return target.stem

    # --- calibrate ------------------------------------------------------------------------------

    def calibrate(
        self,
        model: str,
        name: str,
        scheme: str | None,
        preset: str,
        reuse: float | None,
        steps: Any = None,
        guidance: Any = None,
        seed: float = 0,
        iterations: Any = None,
        prompts: str = "",
        text_encoder: str | None = None,
        method: str | None = None,
        rounding: str | None = None,
        call: Any = None,
    ) -> Job:
        """Start a calibration; TenutoError if it is refused. The same request resumes.

        text_encoder, method and rounding are those of `tenuto quantize`; call is what else the
        pipeline takes.
        """
        name = checked_name(name)
        chosen: dict[str, Any] = dict(
            zip(CHOSEN, (scheme, preset, text_encoder, method, rounding), strict=True)
        )
        how: dict[str, Any] = dict(
            zip(HOW, (reuse, steps, guidance, seed, iterations, prompts), strict=True)
        )
        request = calibration(self.places, model, chosen, how, call)
        begun, lacking = self.places.request(name), dict.fromkeys(chosen) | {"call": {}}
        if begun is not None and lacking | begun != request:  # it may be older
            raise TenutoError(
                f"{name} was begun with other settings: resume it, discard it or choose another "
                "name."
            )
        return self._started(name, request)

    def resume(self, name: str) -> Job:
        """Go on with an unfinished calibration. What was kept of it is checked like a new one."""
        name = checked_name(name)
        known = self.places.request(name)
        if known is None:
            raise TenutoError(f"There is no unfinished calibration {name!r}.")
        chosen = {key: known.get(key) for key in CHOSEN}  # an older request lacks some
        try:
            how = {key: known[key] for key in HOW}
            call = known.get("call", {})
            request = calibration(self.places, known["shown_model"], chosen, how, call)
        except KeyError as error:
            raise TenutoError(f"What was asked of {name} is damaged: discard it.") from error
        return self._started(name, request)

    @disk_told()
    def _started(self, name: str, request: dict[str, Any]) -> Job:
        out, before = self.places.new_artifact(name), self.places.request(name)
        self.desk.check_free(str(out))
        times = expected(self.places, request, self.settings.device)
        lines = request["prompts_text"]
        file = self.places.aside(name, ".prompts.txt") if lines else None
        files = {
            "out": str(out), "first": str(self.places.aside(name, ".safetensors")),
            "prompts": None if file is None else str(file), "device": self.settings.device,
            "inputs": str(self.places.inputs),
        }  # fmt: skip
        job = Job("calibrate", request | files, self.places.aside(name, ".log"), times)
        self.places.keep_request(name, request)
        if file is not None:
            write_text(file, lines + "\n")
        bounded(self.places, [job.request, *self.desk.requests])
        try:
            return self.desk.start(job, lambda job: self._over(name, job, before is not None))
        except TenutoError:
            if before is None:
                self.places.forget(name)
            raise

    def _over(self, name: str, job: Job, known: bool) -> None:
        """Forget what is done, and what was refused before anything of it was finished.

        known: whether it was unfinished before; else it is forgotten when it leaves the line.
        """
        clear_parts(self.places.out / f"{name}.safetensors")  # of a killed worker
        works = [
            folder / f"{name}.work"
            for folder in (self.places.out, self.places.aside(name, "").parent)
        ]
        begun = (
            any(work.exists() for work in works) or self.places.aside(name, ".safetensors").exists()
        )
        left = job.state == STOPPED and not job.begun and not known
        if job.state == DONE or ((job.state == FAILED or left) and not begun):
            self.places.forget(name)

    @disk_told()
    def discard(self, name: str) -> None:
        """Give up an unfinished calibration; what was finished of it is gone."""
        name = checked_name(name)
        self.desk.check_free(str(self.places.out / f"{name}.safetensors"))
        self.places.forget(name, whole=True)

    # --- compare --------------------------------------------------------------------------------

    @disk_told()
    def compare(
        self,
        model: str,
        artifacts: Sequence[str],
        count: float,
        steps: Any = None,
        guidance: Any = None,
        seed: float | None = None,
        execution: str = "int8",
        prompts: str = "",
        call: Any = None,
        speedup: Any = None,
        loras: Any = "",
    ) -> Job:
        """Start a comparison; TenutoError if it is refused. call: what else the pipeline takes.

        speedup: as in `generate`, of all the artifacts; it can be compared without any. "auto": of
        each as many as are predicted unseen. loras: as in `generate`, for full precision too.
        """
        request = comparison(
            self.places, model, artifacts, count, steps, guidance, seed, execution, prompts, call,
            speedup, loras,
        ) | {"device": self.settings.device}  # fmt: skip
        bounded(self.places, [request, *self.desk.requests])
        folder = self.places.comparison()
        request["folder"] = str(folder)
        if request["prompts_text"]:
            write_text(folder / "prompts.txt", request["prompts_text"] + "\n")
            request["prompts"] = str(folder / "prompts.txt")
        try:
            return self.desk.start(Job("compare", request, folder / "log.txt"))
        except TenutoError:
            shutil.rmtree(folder)
            raise

    def stop(self, key: Any, kind: str) -> None:
        """Stop a job, if it runs, or an image; it has stopped when this returns, or is about to.

        What stands in line leaves it; what is next begins.
        """
        if kind == GENERATE:
            self.studio.stop()
        job = self.desk.job(key, kind)
        if job is not None and job.state == WAITING:
            self.desk.remove(job.id)
        elif job is not None and job.alive:
            job.stop()
            job.over.wait(1)

    def facts(self, key: Any, kind: str) -> dict[str, Any]:
        """A job as plain data, for the API."""
        job = self.desk.job(key, kind)
        if job is None:  # an image is no job
            return {"state": self.desk.image if kind == GENERATE else "none"}
        return job.facts()
