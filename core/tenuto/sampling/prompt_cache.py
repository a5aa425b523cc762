"""`PromptCache`: prompts are encoded once, and their states serve in every later run.

    cache = tn.PromptCache("prompts.safetensors")
    with cache.used_by(pipe):
        image = pipe("a golden retriever").images[0]

What is stored is all that the pipeline's `encode_prompt` returns, by what it is called with: the
texts and every option, whatever their names. So nothing here knows a pipeline, and a run takes the
same way with stored states as without.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import TenutoError
from ..model import Leave, denoisers_of, watched
from ..text import printable
from .prompt_call import Names, dry_run, equal, named, quiet
from .prompt_file import MOST, PromptFile
from .prompt_step import Step, Unknown

__all__ = ["PromptCache", "Unknown"]

COPIES = re.compile(r"num_\w+_per_prompt")  # how often a call makes each image
log = logging.getLogger("tenuto")


class PromptCache:
    """States of prompts in a safetensors file, or in memory where `file` is None.

    most: bytes of them that are kept; the oldest go first. `found` and `made` count prompts' calls
    of encoders that were spared and done. States carry no gradients. TenutoError if the file is
    another one or damaged.
    """

    def __init__(self, file: str | Path | None = None, *, most: int = MOST) -> None:
        self.file = PromptFile(file, most)
        self.found = self.made = 0
        self._right: set[tuple[Any, ...]] = set()  # kinds of calls whose keywords were checked

    @contextmanager
    def used_by(self, pipe: Any, mark: str | None = None) -> Iterator[PromptCache]:
        """While it lasts, `pipe` takes the states that are known, and leaves those it makes.

        mark: of its text encoders, else what they are at each call, or what is in the pipeline's
        folder (of a hub id: on this machine, no network) if they are not loaded. TenutoError where
        it has no `encode_prompt`, and in mid-call where nothing says whose states it can take, or
        they are unknown and no encoder is there to make them; where `encode_prompt` runs another
        part of the pipeline than its text encoders; and where states are made that cannot be
        written to the file, before any step. States that depend on more than texts, images and
        plain settings, or on chance, are computed as ever. One thread at a time, and no copies
        of `pipe` that are made meanwhile.
        """
        with self._in_place(pipe, mark, None):
            try:
                yield self
            finally:
                self.save()

    def save(self) -> None:
        """Write what is new to the file; where that fails, a warning, and it stays in memory."""
        try:
            self.file.save()
        except TenutoError as error:
            if self.file.unsaved:
                log.warning("%s The states of prompts that are new stay in memory.", error)

    def encode(
        self, pipe: Any, prompt: str | Sequence[str], *, mark: str | None = None, **call: Any
    ) -> dict[str, Any]:
        """Keywords for `pipe(**keywords)` with the states of `prompt` in its place.

        mark: as of `used_by`. call: any keywords of the pipeline's own call, which come back too:
        those that guide or change states are needed here. The pipeline is run up to its denoiser,
        and once more with the keywords that come out: TenutoError if those do not give the
        denoiser the same inputs.
        """
        if not _are_texts(prompt):
            raise TenutoError(f"A prompt is a text or some texts, not {printable(prompt, 80)}.")
        if not hasattr(pipe, "encode_prompt"):
            raise _no_step(pipe)
        names, kind = Names(type(pipe)), type(pipe)
        one = {k: v for k, v in call.items() if not COPIES.fullmatch(k)}
        with self._in_place(pipe, mark, names):
            texts = prompt if isinstance(prompt, str) else list(prompt)  # Z-Image writes to it
            first = dry_run(pipe, one | {"prompt": texts})
        self.save()
        states = named(kind, names.given)
        rest = {k: v for k, v in one.items() if k not in states and "prompt" not in k}
        asked = kind, *sorted(states), *sorted(rest)
        if asked not in self._right:
            if not equal(first, dry_run(pipe, states | rest)):
                raise TenutoError(
                    f"What {kind.__name__} makes of prompts cannot be given to it in keywords: "
                    "use `with cache.used_by(pipe)` round its call."
                )
            self._right.add(asked)
        return states | rest | {k: v for k, v in call.items() if COPIES.fullmatch(k)}

    def knows(self, pipe: Any, call: Callable[[], Any], mark: str | None = None) -> bool:
        """Whether the states of every prompt of `call()`, which calls `pipe`, are there.

        No encoder and no denoiser is run: it is left before them. False, too, where the call fails.
        """

        def leave(*_: Any) -> None:
            raise Leave

        before = self.found
        try:
            with ExitStack() as watching, torch.no_grad(), quiet(pipe):
                watching.enter_context(self._in_place(pipe, mark, None, make=False))
                for denoiser in denoisers_of(pipe).values():
                    watching.enter_context(watched(denoiser, before=leave, first=True))
                call()
        except Leave:
            return True
        except Exception:  # what a pipeline without encoders cannot do, one with them may
            return False
        finally:
            self.found = before
        return False

    @contextmanager
    def _in_place(
        self, pipe: Any, mark: str | None, names: Names | None, make: bool = True
    ) -> Iterator[None]:
        """`encode_prompt` of one pipeline asks here first."""
        own = getattr(pipe, "encode_prompt", None)
        if own is None:
            raise _no_step(pipe)
        step = Step(self, pipe, own, mark, names, make)
        vars(pipe)["encode_prompt"] = step
        try:
            yield
        finally:
            step.leave()


def _no_step(pipe: Any) -> TenutoError:
    return TenutoError(
        f"{type(pipe).__name__} encodes no prompts in a step of its own (encode_prompt): "
        "their states cannot be kept."
    )


def _are_texts(prompt: Any) -> bool:
    texts = isinstance(prompt, list | tuple) and all(isinstance(x, str) for x in prompt)
    return isinstance(prompt, str) or (texts and len(prompt) > 0)
