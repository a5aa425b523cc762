"""What a pipeline calls its text encoders with: the inputs that they are calibrated on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TenutoError
from ..model import Leave, Signature, denoisers_of, encoders_of, map_tensors, watched
from .pipeline_call import PipelineCall, unprompted
from .reads import Reads
from .trajectory import Call

BATCH = 8
MASK = "attention_mask"
QUOTED = 'a sign with the words "{}"'
HELD_OUT = 1  # `Call.row` of what calibration is not to see
STATE = ("past_key_values", "cache_position")  # of earlier calls, which a call by itself has not

Row = dict[str, Any]  # the inputs of a call of one row


def encoder_calls(
    pipe: Any,
    prompts: Sequence[str],
    batch: int = BATCH,
    *,
    steps: int = 20,
    call: Mapping[str, Any] | None = None,
    held_out: Sequence[str] = (),
) -> dict[str, list[Call]]:
    """What each text encoder of a pipeline is called with for `prompts` and the empty one.

    Every row of input once, `batch` in a call, and then those of `held_out` that are new, in calls
    whose `row` says so. steps and call: as in `record`, but for embeddings of prompts; of the run,
    only what comes before the denoiser is done, and what an encoder generates is not recorded. An
    encoder that is not called for any gets the prompts as words to be written in the image.
    TenutoError if the pipeline calls none.
    """
    asked = _Asked(pipe)
    for quoted in (False, True):  # some encoders read nothing but words that are to be written
        for mark, lines in ((0, ("", *prompts)), (HELD_OUT, tuple(held_out))):
            lines = [QUOTED.format(line) for line in lines if line] if quoted else lines
            if lines and asked.wanted:
                asked(mark, PipelineCall(pipe, lines, steps, None, unprompted(call)), batch)
        asked.wanted = {name for name, rows in asked.seen.items() if not rows}
    found = {
        name: calls_of(
            asked.rows(name, 0), batch, held_out=asked.rows(name, HELD_OUT), read=reads.found()
        )
        for name, reads in asked.reads.items()
    }
    if not any(found.values()):
        raise TenutoError(f"{type(pipe).__name__} calls no text encoder that Tenuto knows.")
    return {name: calls for name, calls in found.items() if calls}


class _Asked:
    """What the encoders of a pipeline were called with, each row once, and what was read."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.encoders = pipe, encoders_of(pipe)
        self.reads = {name: Reads() for name in self.encoders}
        self.seen: dict[str, dict[bytes, tuple[int, Row]]] = {name: {} for name in self.encoders}
        self.wanted = set(self.encoders)
        self.generating = 0

    def __call__(self, mark: int, asked: PipelineCall, batch: int) -> None:
        """Record what comes before the denoiser for all prompts of `asked`."""

        def leave(*_: Any) -> None:
            raise Leave

        count = len(asked.prompts)
        with ExitStack() as watching:
            for denoiser in denoisers_of(self.pipe).values():
                watching.enter_context(watched(denoiser, before=leave))
            for name in self.wanted:
                watching.enter_context(self._watched(name, mark))
            size = batch if asked.together else 1
            for start in range(0, count, size):
                with suppress(Leave), torch.no_grad():
                    asked(asked.denoiser, start, min(size, count - start), "latent")

    def rows(self, name: str, mark: int) -> list[Row]:
        """What an encoder was asked under this mark and not before."""
        return [row for own, row in self.seen[name].values() if own == mark]

    @contextmanager
    def _watched(self, name: str, mark: int) -> Iterator[None]:
        encoder, seen, reads = self.encoders[name], self.seen[name], self.reads[name]
        facts, fixed = Signature(encoder), without_cache(encoder)

        def keep(_: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = facts.inputs(args, kwargs)
            if self.generating or not isinstance(inputs.get("input_ids"), Tensor):
                return
            inputs = {k: v for k, v in inputs.items() if k not in STATE} | fixed
            for row in _rows(inputs):
                seen.setdefault(_key(row), (mark, row))

        def read(_: str, args: Any, kwargs: Any, out: Any) -> None:
            if not self.generating:
                reads.watch(out)

        with self._not_generating(encoder), watched(encoder, before=keep, after=read):
            yield

    @contextmanager
    def _not_generating(self, encoder: nn.Module) -> Iterator[None]:
        """While the encoder generates (better prompts, say), nothing is recorded."""
        own = getattr(encoder, "generate", None)
        if own is None:
            yield
            return

        def generate(*args: Any, **kwargs: Any) -> Any:
            self.generating += 1
            try:
                return own(*args, **kwargs)
            finally:
                self.generating -= 1

        before = vars(encoder).get("generate")
        vars(encoder)["generate"] = generate
        try:
            yield
        finally:
            del vars(encoder)["generate"]
            if before is not None:
                vars(encoder)["generate"] = before


def without_cache(encoder: nn.Module) -> dict[str, Any]:
    """The keyword of a language model by which it keeps no keys and values for a next call."""
    config: Any = getattr(encoder, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = inspect.signature(type(encoder).forward).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in known.values())
    able = "use_cache" in known or (passed_on and getattr(text, "use_cache", False))
    return {"use_cache": False} if able else {}


# --- rows -----------------------------------------------------------------------------------------


def _axis(x: Tensor, count: int) -> int | None:
    """Where a tensor of a call of `count` rows has them; None: nowhere, as values of images."""
    if x.ndim == 3 and len(x) == 3 and x.shape[1] == count:
        return 1  # places in three axes (3, B, L)
    return 0 if x.ndim and len(x) == count else None


def _rows(inputs: Row) -> Iterator[Row]:
    """The rows of one call, each as a call of its own; what has no rows stays as it is."""
    count = len(inputs["input_ids"])

    def cut(x: Tensor, row: int) -> Tensor:
        axis = _axis(x, count)
        return (x if axis is None else x.narrow(axis, row, 1)).detach().cpu()

    for row in range(count):
        yield map_tensors(lambda x, row=row: cut(x, row), inputs)


def _key(row: Row) -> bytes:
    """A text by its tokens, without what a batch was filled up with."""
    ids, mask = row["input_ids"], row.get(MASK)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        ids = ids[mask > 0]
    return ids.numpy().tobytes()


def calls_of(
    rows: Sequence[Row],
    batch: int = BATCH,
    *,
    held_out: Sequence[Row] = (),
    read: tuple[int | str, ...] = (),
    by_length: bool = False,
) -> list[Call]:
    """Rows of input by argument, each a call of one row, as calls of `batch` rows.

    Shorter ones are filled up with tokens that do not count. `attention_mask` says what counts.
    held_out: further rows, in calls of `row` `HELD_OUT`. read: as in `Call`. by_length: the longest
    rows come first, and each call is as long as its own.
    """
    if by_length and len({row["input_ids"].shape[1] for row in (*rows, *held_out)}) > 1:
        found = []
        for mark, some in ((0, _longest_first(rows)), (HELD_OUT, _longest_first(held_out))):
            for start in range(0, len(some), batch):
                # one token more than the longest: a model makes a mask for each call, or for none
                found += _split([(mark, _filled(some[start : start + batch], 1))], batch)
        return [replace(call, run=run, read=read) for run, call in enumerate(found)]
    given = _filled([*rows, *held_out])
    marked = [(0, given[: len(rows)]), (HELD_OUT, given[len(rows) :])]
    split = _split(marked, batch)
    full = {bool(call.counted.all()) for call in split if call.counted is not None}
    if len(full) > 1:  # with nothing to leave out, a model makes no mask: all are to have one
        given = _filled(given, 1)
        split = _split([(0, given[: len(rows)]), (HELD_OUT, given[len(rows) :])], batch)
    return [replace(call, run=run, read=read) for run, call in enumerate(split)]


def _longest_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row["input_ids"].shape[1])


def _split(marked: Sequence[tuple[int, list[Row]]], batch: int) -> list[Call]:
    found = []
    for mark, rows in marked:
        size = batch if all(_is_text(row) for row in rows) else 1
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            inputs = {key: map_tensors(_joined, *(row[key] for row in some)) for key in some[0]}
            mask = inputs.get(MASK)
            known = isinstance(mask, Tensor) and mask.shape == inputs["input_ids"].shape
            counted = mask.float() if known and mask is not None else None
            found.append(Call(0, mark, 0.0, inputs, counted))
    return found


def _is_text(row: Row) -> bool:
    """Whether all of a row has rows: values of images have none, and stay in a call of one."""
    return all(_axis(x, 1) is not None for x in row.values() if isinstance(x, Tensor))


def _joined(*rows: Tensor) -> Tensor:
    axis = _axis(rows[0], 1)
    return rows[0] if axis is None else torch.cat(rows, axis)


def _filled(rows: Sequence[Row], more: int = 0) -> list[Row]:
    """`rows` of equal length, that of the longest and `more` tokens, all with a mask then."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    longest = max(lengths, default=0) + more
    if all(length == longest for length in lengths):
        return list(rows)
    masked = [row | {MASK: _mask(row)} for row in rows]
    left = any(not row[MASK][0, 0] for row in masked)
    unused = [row["input_ids"][row[MASK] == 0] for row in masked]
    token = int(next((ids[0] for ids in unused if len(ids)), 0))

    def fill(row: Row, length: int) -> Row:
        pad = (longest - length, 0) if left else (0, longest - length)
        return {
            key: F.pad(x, pad, value=token if key == "input_ids" else 0)
            if isinstance(x, Tensor) and x.shape[-1:] == (length,) and _of_tokens(key, x)
            else x
            for key, x in row.items()
        }

    return [fill(row, length) for row, length in zip(masked, lengths, strict=True)]


def _of_tokens(key: str, x: Tensor) -> bool:
    """Whether an argument has a number a token, and not values of an image."""
    return key == MASK or not x.is_floating_point()


def _mask(row: Row) -> Tensor:
    found = row.get(MASK)
    return found if isinstance(found, Tensor) else torch.ones_like(row["input_ids"])
