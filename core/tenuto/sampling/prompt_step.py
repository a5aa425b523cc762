"""`Step`: `encode_prompt` of one pipeline, which asks a cache first and tells it what it made."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TenutoError
from ..model import encoders_of, map_tensors, watched
from ..model.parts import ENCODER
from .described import described
from .encoder_mark import encoder_mark, folder_mark
from .prompt_call import CACHED, CALLED, Names
from .prompt_settings import name_of, settings_of, whole

if TYPE_CHECKING:
    from .prompt_cache import PromptCache

SHOWN = 500  # characters of a prompt in a file's header
log = logging.getLogger("tenuto")


class Unknown(TenutoError):
    """A prompt whose states are not there, of a pipeline that cannot make them."""


class Step:
    """What stands in the place of `encode_prompt` while a cache is used, until `leave`.

    mark, names, make: as of `PromptCache`; without `make` no encoder is run.
    """

    def __init__(
        self, cache: PromptCache, pipe: Any, own: Any, mark: str | None, names: Names | None,
        make: bool,
    ) -> None:  # fmt: skip
        self.cache, self.pipe, self.own, self.names = cache, pipe, own, names
        self.mark, self.make = mark, make
        self.before = vars(pipe).get(CALLED)
        self.signature = inspect.signature(own)
        self.__signature__ = self.signature
        setattr(self, CACHED, True)

    def leave(self) -> None:
        """Put back what was there; a use of a cache that began later may go on."""
        outer = vars(self.pipe).get(CALLED)
        if outer is self:
            del vars(self.pipe)[CALLED]
            if self.before is not None:
                vars(self.pipe)[CALLED] = self.before
        while isinstance(outer, Step):
            if outer.before is self:
                outer.own, outer.before = self.own, self.before
            outer = outer.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The states, on the pipeline's device: TenutoError as of `PromptCache.used_by`."""
        out = self._states(args, kwargs)
        if self.names is not None:
            self.names.note(sys._getframe(1), out)
        return out

    def _states(self, args: Any, kwargs: Any) -> Any:
        facts = self._facts(args, kwargs)
        if facts is None:
            self._may_vary()
            return self.own(*args, **kwargs)
        mark = self._mark()
        found = self._found(_key(facts, mark))
        if found is not None:
            self.cache.found += 1
            place = self._bound(args, kwargs).get("device") or self.pipe._execution_device
            return map_tensors(lambda x: x.to(place, copy=True), found)  # some write to them
        if not self.make or not encoders_of(self.pipe):
            raise Unknown(
                f"{self.cache.file.path or 'The cache'} has no states of this prompt and these "
                "settings by this text encoder: load the pipeline with its text encoder once."
            )
        self.cache.file.check()
        again = _copied(args), _copied(kwargs)  # Z-Image writes to its list of prompts
        out, random = self._made(args, kwargs)
        if random:
            self._may_vary()
            return out
        self._put(facts, mark, out)
        self.cache.made += 1
        after = self._facts(*again)
        if after is not None and after != facts:  # Sana sets its tokenizer's side: so is the next
            self._put(after, mark, self.own(*again[0], **again[1]))
        return out

    def _may_vary(self) -> None:
        """Unknown where states have to be those of the prompts alone."""
        if self.names is not None or not self.make:
            raise Unknown("The states of this call do not depend on prompts alone.")

    def _mark(self) -> str:
        """Of the text encoders; Unknown where nothing says which they are."""
        mark = self.mark
        if mark is None and encoders_of(self.pipe):
            mark = encoder_mark(self.pipe)
        elif mark is None:
            mark = folder_mark(self.pipe, self.cache.file.notes)
        if mark is None:
            raise Unknown(
                f"Nothing says whose states of prompts this {type(self.pipe).__name__} can take: "
                "it has no text encoder, and no folder of its own on this machine has one set of "
                "them. Load it from a folder, or name its encoder (mark=)."
            )
        return mark

    def _found(self, key: str) -> Any:
        try:
            return self.cache.file.get(key)
        except TenutoError as error:
            if not self.make or not encoders_of(self.pipe):
                raise
            log.warning("%s The prompt is encoded anew.", error)
            return None

    def _made(self, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """What `encode_prompt` gives, and whether random numbers are in it."""
        missing = [n for n, x in vars(self.pipe).items() if ENCODER.fullmatch(n) and x is None]
        device = torch.device(getattr(self.pipe, "_execution_device", "cpu"))
        before = _chance(device)
        with _ran_beside(self.pipe) as beside:
            try:
                out = self.own(*args, **kwargs)
            except (AttributeError, TypeError, ValueError) as error:
                if not missing:
                    raise
                raise Unknown(
                    f"{self.cache.file.path or 'The cache'} has no states of this prompt, and "
                    f"{', '.join(missing)} is not there to make them: load it, or leave out all."
                ) from error
        if beside:
            raise TenutoError(
                f"{type(self.pipe).__name__} encodes prompts with {', '.join(sorted(beside))} too, "
                "of which states of text encoders tell nothing: call it without a prompt cache."
            )
        return out, not all(map(torch.equal, before, _chance(device)))

    def _put(self, facts: Mapping[str, Any], mark: str, out: Any) -> None:
        texts = facts["call"].get("prompt")
        shown = [x[:SHOWN] if isinstance(x, str) else x for x in texts or ()]
        about = {"encoder": mark, "prompts": shown}
        self.cache.file.put(_key(facts, mark), out, about)

    def _bound(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """All arguments by name."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        flat = dict(bound.arguments)
        for name, p in self.signature.parameters.items():
            if p.kind is p.VAR_KEYWORD:
                flat |= flat.pop(name)
        return flat

    def _facts(self, args: Any, kwargs: Any) -> dict[str, Any] | None:
        """All that states depend on, but for the encoder; None where that cannot be said."""
        flat = self._bound(args, kwargs)
        if any(isinstance(v, Tensor) or _tensors(v) for k, v in flat.items() if "prompt" in k):
            return None  # states are given already
        if not any(map(ENCODER.fullmatch, vars(self.pipe))):
            return None  # of encoders by other names nothing is known
        wanted = {k: str(v) if k == "dtype" else v for k, v in flat.items() if k != "device"}
        lone = {k: [v] for k, v in wanted.items() if "prompt" in k and isinstance(v, str)}
        call = described(wanted | lone)  # one text is a list of one
        if not whole(call):
            return None
        return {"pipeline": name_of(type(self.pipe)), "call": call, "more": settings_of(self.pipe)}


def _copied(value: Any) -> Any:
    """Lists in it anew."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    parts = [_copied(v) for v in value] if type(value) in (list, tuple) else None
    return value if parts is None else type(value)(parts)


def _chance(device: torch.device) -> list[Tensor]:
    """The states of the generators that a call can draw from without being given one."""
    found = [torch.get_rng_state()]
    if device.type == "cuda":
        found.append(torch.cuda.get_rng_state(device))
    return found


@contextmanager
def _ran_beside(pipe: Any) -> Iterator[set[str]]:
    """The parts of a pipeline, other than its text encoders, whose modules run meanwhile."""
    names, known = set[str](), encoders_of(pipe)
    parts = {n: x for n, x in vars(pipe).items() if isinstance(x, nn.Module) and n not in known}
    with ExitStack() as watching:
        for name, part in parts.items():
            inner = [n for n, _ in part.named_modules()]
            noted = watched(part, inner, before=lambda *_, name=name: names.add(name))
            watching.enter_context(noted)
        yield names


def _tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value)


def _key(facts: Mapping[str, Any], mark: str) -> str:
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(f"{text} {mark}".encode()).hexdigest()
