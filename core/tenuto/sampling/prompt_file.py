"""`PromptFile`: what a text encoder made of prompts, in one safetensors file or in memory.

An entry is a key, facts in plain data, and a value: tensors in lists, tuples and dicts. The header
has the facts of all, so that looking for one reads no tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SHORT, TenutoError
from ..files import bits_of, write_tensors
from ..text import printable
from .plain import Packed, unpacked

KEY = "tenuto_prompts"  # in the metadata of the file
VERSION = "1.0"
LIMIT = 64 * 2**20  # characters of our part of the header
MOST = 2 * 2**30  # bytes of tensors in a file
WRONG = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)


class PromptFile:
    """Entries by key, the oldest first: at most `most` bytes of them, then the oldest go.

    path: of the file, which need not be there yet; None: in memory alone. TenutoError where it is
    another file or damaged: its header is checked at once, no tensor is read before it is wanted.
    fresh: what is in the file is not looked at, and replaced.
    """

    def __init__(
        self, path: str | Path | None = None, most: int = MOST, fresh: bool = False
    ) -> None:
        self.path = None if path is None else Path(path)
        self.most, self.fresh = most, fresh
        if self.path is not None and self.path.suffix != ".safetensors":
            raise TenutoError(f"States of prompts are in a .safetensors file, not in {self.path}.")
        self._entries, self._new = self._read(), dict[str, dict[str, Any]]()
        self._tensors: dict[str, Tensor] = {}  # of what is not in the file

    def __len__(self) -> int:
        return len(self.facts())

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is known of every entry by its key."""
        return {key: dict(entry["facts"]) for key, entry in (self._entries | self._new).items()}

    def get(self, key: str) -> Any:
        """The value of an entry, on the CPU; None where there is none. TenutoError if damaged."""
        if key in self._new:
            entry = self._new[key] = self._new.pop(key)  # the one used last goes last
            return unpacked(entry["value"], self._tensors)
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries[key] = self._entries.pop(key)
        try:
            return unpacked(entry["value"], self._stored(_tensors_of(entry["value"])))
        except (OSError, SafetensorError, *WRONG) as error:
            raise self._damaged(error) from error

    def put(self, key: str, value: Any, facts: Mapping[str, Any]) -> bool:
        """Take an entry; False, and nothing taken, if the value cannot be stored or is too large.

        It is in the file after `save`. What goes in its place is the oldest.
        """
        store = Packed(_mark)
        try:
            packed = store.put(value)
        except TypeError:
            return False
        tensors = {name: x.detach().cpu().clone() for name, x in store.tensors.items()}
        if _size(tensors) > self.most:
            return False
        self._entries.pop(key, None)
        self._tensors |= tensors
        sizes = {name: x.nbytes for name, x in tensors.items()}
        self._new[key] = {"facts": dict(facts), "value": packed, "sizes": sizes}
        self._bound()
        return True

    def save(self) -> None:
        """Write what is new, with what others have written meanwhile; whole or not at all."""
        if self.path is None or not self._new:
            return
        known = self._read()
        self._entries = {k: known[k] for k in known if k not in self._new}
        self._bound()
        wanted = {n for entry in self._entries.values() for n in _tensors_of(entry["value"])}
        try:
            tensors = self._stored(wanted) | self._tensors
            header = {"format_version": VERSION, "entries": self._entries | self._new}
            write_tensors(self.path, tensors, {KEY: json.dumps(header)})
        except SafetensorError as error:
            raise self._damaged(error) from error
        except OSError as error:
            said = error.strerror or error
            raise TenutoError(f"Cannot write {self.path}: {said}.") from error
        self._entries, self._new, self._tensors = self._entries | self._new, {}, {}

    def _bound(self) -> None:
        """Let the oldest go until all have room; what is new stays longest."""
        while _total({**self._entries, **self._new}.values()) > self.most:
            old = self._entries or self._new
            old.pop(next(iter(old)))
        used = {n for entry in self._new.values() for n in _tensors_of(entry["value"])}
        self._tensors = {n: x for n, x in self._tensors.items() if n in used}

    def _read(self) -> dict[str, dict[str, Any]]:
        """The checked entries of the file's header; none where there is no file."""
        if self.fresh or self.path is None or not self.path.exists():
            return {}
        try:
            with self.path.open("rb"), safe_open(str(self.path), "pt") as file:
                text, names = (file.metadata() or {}).get(KEY), set(file.keys())
            if text is None:
                raise TenutoError(f"{self.path} is a safetensors file, but not one of prompts.")
            if len(text) > LIMIT:
                raise ValueError("its header is too long")
            header = json.loads(text)
            version = str(header["format_version"])
            if version.split(".")[0] != VERSION.split(".")[0]:
                raise ValueError(f"format version {version}, and this Tenuto reads {VERSION}")
            entries = dict(header["entries"])
            for entry in entries.values():
                if not names.issuperset(_tensors_of(entry["value"])):
                    raise ValueError("a tensor is missing")
                dict(entry["facts"])
            _total(entries.values())
        except (OSError, SafetensorError, *WRONG) as error:
            raise self._damaged(error) from error
        return entries

    def _stored(self, names: set[str]) -> dict[str, Tensor]:
        """Tensors of the file by name, copied out of it: it may be replaced."""
        if not names:
            return {}
        with safe_open(str(self.path), "pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}

    def _damaged(self, error: BaseException) -> TenutoError:
        said = getattr(error, "strerror", None) or printable(error, 120)
        text = f"{self.path} cannot be read as states of prompts: {said.rstrip('.')}."
        return TenutoError(printable(text, SHORT))


def _mark(x: Tensor) -> str:
    """A hash of a tensor's type, shape and bytes: equal ones are stored once."""
    text = f"{x.dtype}{tuple(x.shape)}".encode() + bits_of(x).numpy().tobytes()
    return hashlib.sha256(text).hexdigest()[:32]


def _tensors_of(value: Any) -> set[str]:
    """The names of the tensors in a packed value; one of WRONG if it is none."""
    kind, content = value
    if kind == "tensor":
        return {str(content)}
    if kind == "dict":
        return {n for pair in content for part in pair for n in _tensors_of(part)}
    if kind in ("list", "tuple"):
        return {n for part in content for n in _tensors_of(part)}
    if kind != "plain":
        raise ValueError("unknown kind of value")
    return set()


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in tensors.values())


def _total(entries: Any) -> int:
    """Bytes of all tensors of entries, each once; one of WRONG if they are no such entries."""
    sizes = {str(n): int(size) for entry in entries for n, size in entry["sizes"].items()}
    if any(size < 0 for size in sizes.values()):
        raise ValueError("a negative size")
    return sum(sizes.values())
