"""The form of what a header says: of which type each entry is that is read later.

One of `header.WRONG` is raised where an entry is something else. Entries that this version does not
know are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any

from .header import check_numbers

SIDE = 2**40  # of a weight: more is none
NUMBERS = (  # shown as such
    "reuse_ratio", "reuse_flops", "weight_error", "mean", "worst", "relative_error", "timestep",
)  # fmt: skip
FORMAT = {
    "bits": int, "group": int, "symmetric": bool, "per_step": bool, "smooth": bool,
    "granularity": str, "ranges": str, "dtype": str, "rotate": bool,
}  # fmt: skip


def check_forms(header: Mapping[str, Any]) -> None:
    """Every section of a header."""
    _ = str(header["family"]), str(header["model_class"])
    _check_quantized(header)
    for facts in named(header.get("encoders", {})):
        _check_quantized(facts)
    for facts in named(mapping(header.get("temporal", {})).get("modules", {})):
        wanted(str, facts["kind"])
        _check_shown(facts)
        for size in facts.get("outputs", []):
            shape(size)
    for count in mapping(header.get("left_in_float", {})).values():
        whole(count)
    for share in mapping(header.get("kept_in_float", {})).values():
        wanted(int | float, share)
    for values in mapping(header.get("in_float", {})).values():
        check_numbers(wanted(list, values))
    if "in_float" in header and not header["in_float"]:
        raise ValueError("marks of nothing fit any model")
    if header.get("route") is not None:
        _check_route(mapping(header["route"]))
    for facts in named(header.get("compact", {})):
        whole(facts["most"])
        whole(facts["crc32"])


def _check_quantized(facts: Mapping[str, Any]) -> None:
    """Schemes and layers, of a denoiser or of a text encoder."""
    for scheme in named(facts.get("schemes", {})):
        wanted(str, scheme["name"])
        for form in (scheme["weight"], scheme["activation"]):
            if form is not None:
                for key, value in mapping(form).items():
                    wanted(FORMAT[key], value)
    for layer in named(facts.get("layers", {})):
        wanted(str, layer["scheme"])
        if len(shape(layer["shape"])) < 2:
            raise ValueError("a weight has two dimensions or more")
        _check_shown(layer)
    _check_shown(mapping(facts.get("check", {})))


def _check_route(facts: Mapping[str, Any]) -> None:
    check_numbers(wanted(list, facts["timesteps"]))
    for name in wanted(list, facts["branches"]):
        wanted(str, name)
    _check_shown(facts)


def _check_shown(facts: Mapping[str, Any]) -> None:
    """Errors and shares, which may be of no number: that of a layer whose weights are all zero."""
    for key in NUMBERS:
        if facts.get(key) is not None:
            wanted(int | float, facts[key])


def wanted(kind: type | UnionType, value: Any) -> Any:
    """`value`, which is of `kind`; a truth is no number."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"no {kind}")
    return value


def whole(value: Any) -> int:
    """A whole number."""
    return wanted(int, value)


def mapping(value: Any) -> dict[str, Any]:
    """An object."""
    return wanted(dict, value)


def named(value: Any) -> list[dict[str, Any]]:
    """The objects in an object."""
    return [mapping(inner) for inner in mapping(value).values()]


def shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor that has something in it."""
    found = tuple(whole(size) for size in wanted(list, value))
    if not all(0 < size <= SIDE for size in found):
        raise ValueError("no such shape")
    return found
