"""A pipeline's states of prompts as keywords of its call: under which names, and if they fit."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from ..model import Leave, denoisers_of, tensors_in, watched

CALLED = "encode_prompt"
CACHED = "from_cache"  # of an `encode_prompt` that has states of prompts and may need no encoder


def encodes(pipe: Any) -> bool:
    """Whether a pipeline can be given texts: it has an encoder, or states of a cache."""
    return getattr(pipe, "text_encoder", None) is not None or hasattr(
        vars(pipe).get(CALLED), CACHED
    )


class Names:
    """What a pipeline's `__call__` names the outputs of each `encode_prompt` in its source.

    `given`: name -> output, of the calls that were noted. TenutoError if no source says it.
    """

    def __init__(self, kind: type) -> None:
        self.given: dict[str, Any] = {}
        self._kind = kind.__name__
        call = inspect.unwrap(kind.__call__)
        self._code, self._lines = call.__code__, dict(_assigned(call))

    def note(self, frame: Any, out: Any) -> None:
        """Take what a call in `frame` returned; TenutoError where its names are not known."""
        names = self._lines.get(frame.f_lineno) if frame.f_code is self._code else None
        values = out if isinstance(out, tuple) else (out,)
        if names is None or len(names) != len(values):
            raise TenutoError(
                f"{self._kind} does not say what its states of prompts are called: use `with "
                "cache.used_by(pipe)` round its call."
            )
        self.given |= {n: v for n, v in zip(names, values, strict=True) if v is not None}


def _assigned(call: Any) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, names) of every `a, b = self.encode_prompt(...)`, once for each of its lines."""
    try:
        lines, first = inspect.getsourcelines(call)
    except OSError:
        return
    for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
        value = getattr(node, "value", None)
        if not (isinstance(node, ast.Assign) and isinstance(value, ast.Call)):
            continue
        if isinstance(value.func, ast.Attribute) and value.func.attr == CALLED:
            targets = node.targets[0]
            parts = targets.elts if isinstance(targets, ast.Tuple) else [targets]
            names = tuple(getattr(part, "id", "_") for part in parts)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                yield first + line - 1, names


def named(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that a pipeline takes of what it calls its states.

    Texts that it would take by default beside them are left out by None.
    """
    parameters = inspect.signature(kind.__call__).parameters
    found = {name: value for name, value in given.items() if name in parameters}
    for text in ("prompt", "negative_prompt"):
        parameter = parameters.get(text)
        states = any(n.startswith(f"{text}_embeds") for n in found)
        if parameter is not None and parameter.default is not None and states:
            found[text] = None
    return found


def dry_run(pipe: Any, call: Mapping[str, Any]) -> list[Any]:
    """The inputs of the denoiser's first call in `pipe(**call)`, which is left there."""
    seen: list[Any] = []

    def leave(name: str, args: Any, kwargs: Any) -> None:
        seen.extend((args, kwargs))
        raise Leave

    given = dict(call)
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        given["generator"] = torch.Generator("cpu").manual_seed(0)  # the caller's stays as it is
    with ExitStack() as watching, suppress(Leave), torch.no_grad(), quiet(pipe):
        for denoiser in denoisers_of(pipe).values():
            watching.enter_context(watched(denoiser, before=leave, first=True))
        pipe(**given)
    return seen


def equal(one: Any, other: Any) -> bool:
    """Whether two denoiser calls have the same tensors in the same places."""
    a, b = list(tensors_in(one)), list(tensors_in(other))
    return len(a) == len(b) > 0 and all(map(_same, a, b))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = vars(pipe).get("_progress_bar_config")
    vars(pipe)["_progress_bar_config"] = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        del vars(pipe)["_progress_bar_config"]
        if before is not None:
            vars(pipe)["_progress_bar_config"] = before
