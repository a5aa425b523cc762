"""`PromptFile`: what a text encoder made of prompts, in one safetensors file or in memory.

An entry is a key, facts in plain data, and a value: tensors in lists, tuples and dicts. The header
has the facts of all, so that looking for one reads no tensor. A tensor's name is a hash of it, so
that one which was damaged is noticed. Other processes may write to the file meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SHORT, TenutoError
from ..files import bits_of, stamp, write_tensors
from ..lock import one_at_a_time
from ..text import printable
from .plain import Packed, unpacked

KEY = "tenuto_prompts"  # in the metadata of the file
VERSION = "1.0"
LIMIT = 64 * 2**20  # characters of our part of the header
MOST = 2 * 2**30  # bytes of tensors in a file
ENTRIES = 20_000  # in a file
TRIES = 5  # to read what others replace meanwhile
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
        if not (path is None or isinstance(path, str | Path)):
            raise TenutoError(f"A file of states of prompts is a path, not {type(path).__name__}.")
        if not isinstance(most, int) or most < 1:
            raise TenutoError(f"most= is a number of bytes, not {printable(most, 40)}.")
        self.path = None if path is None else Path(path)
        self.most, self.fresh = most, fresh
        if self.path is not None and self.path.suffix != ".safetensors":
            raise TenutoError(f"States of prompts are in a .safetensors file, not in {path!r}.")
        self.notes: dict[str, str] = {}  # of the user of these entries, by key
        self._entries: dict[str, dict[str, Any]] = {}  # of the file
        self._new: dict[str, dict[str, Any]] = {}  # not in the file yet
        self._tensors: dict[str, Tensor] = {}  # of what is new
        self._seen: Any = None  # the file as it was when it was read
        self._noted: dict[str, str] = {}  # the notes that are in it
        self._refresh()

    def __len__(self) -> int:
        return len(self.facts())

    @property
    def unsaved(self) -> bool:
        """Whether there is something that the file does not have yet."""
        return self.path is not None and bool(self._new)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is known of every entry by its key."""
        return {key: dict(entry["facts"]) for key, entry in (self._entries | self._new).items()}

    def get(self, key: str) -> Any:
        """The value of an entry, on the CPU; None where there is none. TenutoError if damaged.

        What another process has added meanwhile is there, and what it has removed is not.
        """
        if key in self._new:
            entry = self._new[key] = self._new.pop(key)  # the one used last goes last
            return unpacked(entry["value"], self._tensors)
        for _ in range(TRIES):
            self._refresh()
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries[key] = self._entries.pop(key)
            try:
                tensors = self._stored(_tensors_of(entry["value"]))
                if any(_mark(x) != name for name, x in tensors.items()):
                    raise ValueError("a tensor in it is another one than was written")
                return unpacked(entry["value"], tensors)
            except (OSError, SafetensorError, *WRONG) as error:
                if self.path is None or stamp(self.path) == self._seen:
                    raise self._damaged(error) from error
        return None

    def check(self) -> None:
        """TenutoError if the file cannot be written, as far as that shows before."""
        if self.path is None:
            return
        place = self.path.resolve()
        try:
            if place.exists() and not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

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
        """Write what is new, with what others have written meanwhile; whole or not at all.

        One process at a time. TenutoError where that cannot be; what is new stays in memory then.
        """
        if self.path is None or not (self._new or self.notes != self._noted):
            return
        try:
            with one_at_a_time(self.path.resolve()):
                self._merge(self.path)
        except SafetensorError as error:
            raise self._damaged(error) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _merge(self, path: Path) -> None:
        self._refresh(again=True)
        self._entries = {k: v for k, v in self._entries.items() if k not in self._new}
        self._bound()
        wanted = {n for entry in self._entries.values() for n in _tensors_of(entry["value"])}
        tensors, entries = self._stored(wanted) | self._tensors, self._entries | self._new
        header = {"format_version": VERSION, "entries": entries, "notes": self.notes}
        write_tensors(path, tensors, {KEY: json.dumps(header)})
        self._entries, self._new, self._tensors = entries, {}, {}
        self._seen, self._noted = stamp(path), dict(self.notes)

    def _bound(self) -> None:
        """Let the oldest go until all have room; what is new stays longest."""
        while self._entries or self._new:
            known = self._entries | self._new
            if len(known) <= ENTRIES and _total(known.values()) <= self.most:
                break
            old = self._entries or self._new
            old.pop(next(iter(old)))
        used = {n for entry in self._new.values() for n in _tensors_of(entry["value"])}
        self._tensors = {n: x for n, x in self._tensors.items() if n in used}

    def _refresh(self, again: bool = False) -> None:
        """Look at the file's header, if the file is another one than it was."""
        if self.path is None or self.fresh:
            return
        now = stamp(self.path)
        if again or now != self._seen:
            self._entries, self._noted = self._read(self.path) if now else ({}, {})
            self.notes = {**self._noted, **self.notes}
            self._seen = now

    def _read(self, path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """The checked entries of the file's header, and its notes."""
        try:
            with path.open("rb"), safe_open(str(path), "pt") as file:
                text, names = (file.metadata() or {}).get(KEY), set(file.keys())
            if text is None:
                raise TenutoError(f"{path} is a safetensors file, but not one of prompts.")
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
            notes = {str(key): str(note) for key, note in header.get("notes", {}).items()}
        except FileNotFoundError:
            return {}, {}
        except (OSError, SafetensorError, *WRONG) as error:
            raise self._damaged(error) from error
        return entries, notes

    def _stored(self, names: set[str]) -> dict[str, Tensor]:
        """Tensors of the file by name, copied out of it: it may be replaced."""
        if not names:
            return {}
        with safe_open(str(self.path), "pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}

    def _unwritable(self, error: OSError) -> TenutoError:
        return TenutoError(f"Cannot write {self.path}: {error.strerror or error}.")

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
