"""What a pipeline's states of prompts depend on beside the call and its text encoders, as data."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .described import MARK, SCALARS, described
from .prompt_call import CALLED

VOLATILE = {"init_inputs", "init_kwargs", "files_loaded", "name_or_path", "verbose"} | {
    "deprecation_warnings"
}  # of a tokenizer: where it comes from, and what it has said already
APART = {CALLED, "hf_device_map"}  # of a pipeline: what stands here, and where it is
STEPS = ("normalizer", "pre_tokenizer", "post_processor")  # before and after a fast one's model
_words = WeakIdKeyDictionary()  # tokenizer -> (what it was, the hash of its vocabulary)


def settings_of(pipe: Any) -> dict[str, Any]:
    """All plain settings of a pipeline, its tokenizers and processors, autocast, versions.

    Truncation and padding of fast tokenizers are left out: each call sets them anew.
    """
    import diffusers
    import transformers

    parts = {k: v for k, v in vars(pipe).items() if not k.startswith("_") and k not in APART}
    registered = dict(getattr(pipe, "config", {}))
    config = {k: v for k, v in registered.items() if not k.startswith("_") and k not in parts}
    return {
        "settings": plain_of(parts) | plain_of(config) | plain_of(dict(_read(pipe))),
        "readers": {name: _reader(part) for name, part in parts.items() if _reads(part)},
        "autocast": list(_autocast(pipe)),
        "versions": [".".join(m.__version__.split(".")[:2]) for m in (diffusers, transformers)],
    }


def plain_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that can be told whole, as plain data; what is None is as good as not there."""
    found = described({k: v for k, v in values.items() if v is not None})
    return {name: value for name, value in found.items() if whole(value)}


def whole(value: Any) -> bool:
    """Whether a described value tells all of what it describes."""
    if isinstance(value, Mapping):
        return value.get(MARK, "") is not None and all(map(whole, value.values()))
    return all(map(whole, value)) if isinstance(value, list) else True


def name_of(kind: type) -> str:
    """A class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _read(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Properties that `encode_prompt` reads, such as whether there is guidance (I2VGenXL)."""
    code = getattr(inspect.unwrap(type(pipe).encode_prompt), "__code__", None)
    for name in getattr(code, "co_names", ()):
        if isinstance(getattr(type(pipe), name, None), property):
            try:
                value = getattr(pipe, name)
            except (AttributeError, TypeError):  # of a call, and there was none
                continue
            if isinstance(value, SCALARS):
                yield name, value


def _autocast(pipe: Any) -> Iterator[str]:
    """The types that autocast computes in."""
    kinds = {"cpu", "cuda", torch.device(getattr(pipe, "_execution_device", "cpu")).type} - {"meta"}
    for kind in sorted(kinds):
        if torch.is_autocast_enabled(kind):
            yield f"{kind} {torch.get_autocast_dtype(kind)}"


def _reads(part: Any) -> bool:
    """Whether this may be a tokenizer or a processor: no module, and none of diffusers' parts."""
    if part is None or isinstance(part, nn.Module) or inspect.isroutine(part):
        return False
    return hasattr(part, "__dict__") and not type(part).__module__.startswith("diffusers.")


def _reader(part: Any) -> dict[str, Any]:
    """What a tokenizer or a processor does, with those that it has inside."""
    own = {k: v for k, v in vars(part).items() if not (k.startswith("_") or k.endswith("_file"))}
    found = {"class": name_of(type(part))}
    found |= plain_of({k: v for k, v in own.items() if k not in VOLATILE})
    found |= {name: _reader(inner) for name, inner in own.items() if _is_reader(inner)}
    if not hasattr(part, "get_vocab"):
        return found
    named = [str(part.special_tokens_map), str(part.added_tokens_decoder)]
    backend = getattr(part, "backend_tokenizer", None)
    steps = [getattr(backend, name, None) for name in STEPS]
    states = [None if step is None else step.__getstate__().decode() for step in steps]
    return found | {"named": named, "steps": states, "words": _words_of(part, backend)}


def _is_reader(part: Any) -> bool:
    return type(part).__module__.startswith("transformers.") and hasattr(part, "__dict__")


def _words_of(tokenizer: Any, backend: Any) -> str:
    """A hash of the vocabulary and the merges of a tokenizer."""
    facts = id(backend), len(tokenizer)
    known = _words.get(tokenizer)
    if known is None or known[0] != facts:
        if backend is not None:
            content = backend.model.__getstate__()
        else:
            pieces = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", str)()
            text = [tokenizer.get_vocab(), repr(getattr(tokenizer, "bpe_ranks", "")), repr(pieces)]
            content = json.dumps(text, sort_keys=True).encode()
        made = hashlib.sha256(content).hexdigest()
        known = _words[tokenizer] = facts, made
    return known[1]
