"""`PromptCache`: prompts are encoded once, and their states serve in every later run.

    cache = tn.PromptCache("prompts.safetensors")
    with cache.used_by(pipe):
        image = pipe("a golden retriever").images[0]

What is stored is all that the pipeline's `encode_prompt` returns, by what it is called with: the
texts and every option, whatever their names. So nothing here knows a pipeline, and a run takes the
same way with stored states as without.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from ..model import Leave, denoisers_of, encoders_of, map_tensors, watched
from ..model.parts import ENCODER
from .described import MARK, described
from .encoder_mark import encoder_mark
from .prompt_call import CACHED, Names, dry_run, equal, named, quiet
from .prompt_file import MOST, PromptFile

COPIES = re.compile(r"num_\w+_per_prompt")  # how often a call makes each image
SETTING = re.compile(r"(?!_).*(template|token|prompt|max_).*")  # of a pipeline, for its texts


class Unknown(TenutoError):
    """A prompt whose states are not there, of a pipeline that cannot make them."""


class PromptCache:
    """States of prompts in a safetensors file, or in memory where `file` is None.

    most: bytes of them that are kept; the oldest go first. `found` and `made` count prompts' calls
    of encoders that were spared and done. TenutoError if the file is another one or damaged.
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
        they are unknown and no encoder is there to make them. States that depend on more than
        texts, images and plain settings are computed as ever. One thread at a time.
        """
        with self._in_place(pipe, mark, None):
            try:
                yield self
            finally:
                self.file.save()

    def encode(
        self, pipe: Any, prompt: str | Sequence[str], *, mark: str | None = None, **call: Any
    ) -> dict[str, Any]:
        """Keywords for `pipe(**keywords)` with the states of `prompt` in its place.

        mark: as of `used_by`. call: any keywords of the pipeline's own call, which come back too:
        those that guide or change states are needed here. The pipeline is run up to its denoiser,
        and once more with the keywords that come out: TenutoError if those do not give the
        denoiser the same inputs.
        """
        names, kind = Names(type(pipe)), type(pipe)
        one = {k: v for k, v in call.items() if not COPIES.fullmatch(k)}
        with self._in_place(pipe, mark, names):
            texts = prompt if isinstance(prompt, str) else list(prompt)  # Z-Image writes to it
            first = dry_run(pipe, one | {"prompt": texts})
        self.file.save()
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
            raise TenutoError(
                f"{type(pipe).__name__} encodes no prompts in a step of its own (encode_prompt): "
                "their states cannot be kept."
            )
        call = _Call(self, pipe, own, mark, names, make)
        before = vars(pipe).get("encode_prompt")
        vars(pipe)["encode_prompt"] = call
        try:
            yield
        finally:
            del vars(pipe)["encode_prompt"]
            if before is not None:
                vars(pipe)["encode_prompt"] = before


class _Call:
    """`encode_prompt` of a pipeline, by its stored states where there are some."""

    def __init__(
        self, cache: PromptCache, pipe: Any, own: Any, mark: str | None, names: Names | None,
        make: bool,
    ) -> None:  # fmt: skip
        self.cache, self.pipe, self.own, self.names = cache, pipe, own, names
        self.mark, self.make = mark, make
        self.signature = inspect.signature(own)
        self.__signature__ = self.signature
        setattr(self, CACHED, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._states(args, kwargs)
        if self.names is not None:
            self.names.note(sys._getframe(1), out)
        return out

    def _states(self, args: Any, kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        facts = self._facts(bound.arguments)
        if facts is None:
            if self.names is not None or not self.make:
                raise Unknown("The states of this call do not depend on prompts alone.")
            return self.own(*args, **kwargs)
        text = _hash(facts)
        mark, has = self.mark or encoder_mark(self.pipe), bool(encoders_of(self.pipe))
        if mark is None:
            raise Unknown(
                f"Nothing says whose states of prompts this {type(self.pipe).__name__} can take: "
                "it has no text encoder, and no folder of its own is on this machine. Load it "
                "from a folder, or name its encoder (mark=)."
            )
        key = _key(text, mark)
        found = self.cache.file.get(key)
        if found is not None:
            self.cache.found += 1
            place = bound.arguments.get("device") or self.pipe._execution_device
            return map_tensors(lambda x: x.to(place, copy=True), found)  # some write to them
        if not has or not self.make:
            raise Unknown(
                f"{self.cache.file.path or 'The cache'} has no states of this prompt and these "
                "settings by this text encoder: load the pipeline with its text encoder once."
            )
        out = self.own(*args, **kwargs)
        about = {"text": text, "encoder": mark, "prompts": facts["call"].get("prompt")}
        self.cache.file.put(key, out, about)
        self.cache.made += 1
        return out

    def _facts(self, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """All that states depend on, but for the encoder; None where that cannot be said."""
        flat = dict(arguments)
        for name, p in self.signature.parameters.items():
            if p.kind is p.VAR_KEYWORD:
                flat |= flat.pop(name)
        if any(isinstance(v, Tensor) or _tensors(v) for k, v in flat.items() if "prompt" in k):
            return None  # states are given already
        if not any(map(ENCODER.fullmatch, vars(self.pipe))):
            return None  # of encoders by other names nothing is known
        wanted = {k: str(v) if k == "dtype" else v for k, v in flat.items() if k != "device"}
        lone = {k: [v] for k, v in wanted.items() if "prompt" in k and isinstance(v, str)}
        call = described(wanted | lone)  # one text is a list of one
        if not _whole(call):
            return None
        return {"pipeline": _name(type(self.pipe)), "call": call, "more": settings_of(self.pipe)}


def settings_of(pipe: Any) -> dict[str, Any]:
    """What else changes the states of a pipeline's prompts: tokenizers, templates, versions."""
    import diffusers
    import transformers

    parts = vars(pipe)
    plain = {k: v for k, v in parts.items() if SETTING.fullmatch(k)}
    sizes = {
        name: [type(part).__name__, len(part)]
        for name, part in parts.items()
        if name.startswith("tokenizer") and hasattr(part, "__len__")
    }
    versions = [".".join(m.__version__.split(".")[:2]) for m in (diffusers, transformers)]
    known = {k: v for k, v in described(plain).items() if k not in sizes and _whole(v)}
    return {"settings": known, "tokenizers": sizes, "versions": versions}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value)


def _whole(value: Any) -> bool:
    """Whether a described value tells all of what it describes."""
    if isinstance(value, Mapping):
        return value.get(MARK, "") is not None and all(map(_whole, value.values()))
    return all(map(_whole, value)) if isinstance(value, list) else True


def _hash(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _key(text: str, mark: str) -> str:
    return hashlib.sha256(f"{text} {mark}".encode()).hexdigest()
