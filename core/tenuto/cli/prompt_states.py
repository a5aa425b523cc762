"""What `tenuto generate --prompt-cache FILE` does: no text encoder where the states are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..sampling import PromptCache
from ..sampling.encoder_mark import codes_mark, encoder_mark, note_folder, noted_folder
from ..sampling.images import TOGETHER, generate_images
from ..sampling.loading import encoder_names
from ..sampling.loras import Lora, add_loras
from .console import Bars
from .session import Sampling, loaded, pipeline


@dataclass(frozen=True)
class Asked:
    """The images that are generated: `count` of one prompt, the first with the noise of `seed`."""

    prompt: str
    negative: str | None
    seed: int
    count: int
    sampling: Sampling

    def images(self, pipe: Any) -> list[Any]:
        """They, by a pipeline."""
        how = self.sampling
        return generate_images(
            pipe, self.prompt, negative=self.negative, steps=how.steps, guidance=how.guidance,
            seed=self.seed, count=self.count, call=how.called(pipe),
        )  # fmt: skip


class PromptStates:
    """A file with states of prompts, if one was asked for, and what it was good for in a run.

    The states of an artifact's quantized encoders are others than those of the model's own, and so
    may be those of a model with LoRAs, which are put on its encoders too: these are loaded then.
    """

    def __init__(self, file: Path | None, loras: Sequence[Lora] = ()) -> None:
        self.file, self.mark, self.loras = file, "", loras
        self.cache = None if file is None else PromptCache(file)
        self.spared = False

    def pipeline(
        self, model: str, asked: Asked, bars: Bars, artifact: Artifact | None, file: Path | None
    ) -> Any:
        """As `session.pipeline`; without text encoders where all states are known."""
        given = model, asked.sampling, bars, artifact, file
        if self.loras:
            pipe = pipeline(*given)
            add_loras(pipe, self.loras)
            return pipe
        names = () if self.cache is None else encoder_names(model)
        if self.cache is None or not names:
            return pipeline(*given)
        if not len(self.cache.file):
            self.cache.file.check()
            return self._noted(pipeline(*given, parts={}), artifact)
        pipe = pipeline(*given, parts=dict.fromkeys(names))
        known = noted_folder(pipe, self.cache.file.notes)
        if known is not None:
            self.mark = _with(artifact, known)
            calls = {min(asked.count, TOGETHER), asked.count % TOGETHER} - {0}
            some = [replace(asked, count=count) for count in calls]
            self.spared = all(
                self.cache.knows(pipe, lambda a=a: a.images(pipe), self.mark) for a in some
            )
        if self.spared:
            return pipe
        there = {name: part for name, part in pipe.components.items() if part is not None}
        pipe = loaded(model, asked.sampling.device, bars, parts=there)
        return pipe if self.mark else self._noted(pipe, artifact)

    def _noted(self, pipe: Any, artifact: Artifact | None) -> Any:
        """Mark a pipeline that was loaded just now; the file keeps the mark of its folder."""
        mark = encoder_mark(pipe)
        if self.cache is not None and mark is not None:
            note_folder(pipe, self.cache.file.notes, mark)
            self.mark = _with(artifact, mark)
        return pipe

    def used_by(self, pipe: Any) -> AbstractContextManager[Any]:
        """A context in which `pipe` takes states out of the file and puts new ones into it."""
        if self.cache is None:
            return nullcontext()
        return self.cache.used_by(pipe, self.mark or None)

    def lines(self) -> list[str]:
        """What came of it, in one line."""
        if self.cache is None:
            return []
        if self.spared:
            return [
                f"The states of the prompt are those in {self.file}: no text encoder was loaded."
            ]
        if self.cache.found and not self.cache.made:
            why = "a file in its folder has another time or place"
            return [
                f"The states of the prompt are those in {self.file}. The text encoder was loaded "
                f"to see that it is the same: {'a LoRA may change it' if self.loras else why}."
            ]
        if self.cache.file.unsaved:
            return [f"The states of the prompt could not be written to {self.file}."]
        if self.cache.made:
            return [
                f"The states of the prompt are now in {self.file}"
                + ("." if self.loras else ": the next run of it loads no text encoder.")
            ]
        return ["The states of this call cannot be kept: they depend on more than the prompt."]


def _with(artifact: Artifact | None, mark: str) -> str:
    """The mark of encoders with what the artifact puts into them."""
    codes = {} if artifact is None else artifact.section("encoder")
    if artifact is None or not codes:
        return mark
    facts = json.dumps(artifact.header.get("encoders"), sort_keys=True)
    return f"{mark} {codes_mark(codes)} {facts}"
