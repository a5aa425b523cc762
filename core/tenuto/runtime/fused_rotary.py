"""Queries and keys are normed and turned in one pass, in the graph of a block that is compiled.

As diffusers writes rotary embeddings, see `kernels/rotary.py`:
    (x.float() * cos + rotated.float() * sin).to(x.dtype)
        rotated: stack([-b, a], -1).flatten(3) or cat([-b, a], -1) of the pairs [a, b] of x
    view_as_real(view_as_complex(x.float().reshape(..., -1, 2)) * turns).flatten(3).type_as(x)
A `torch.rms_norm` of each head that nobody else reads goes in, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .kernels import rotary
from .nodes import (
    ADDS,
    JOINS,
    MULTIPLIES,
    Match,
    argument,
    called,
    pairs,
    put_all,
    same,
    value,
)

BACK = ("to", "type_as", "float", "half", "bfloat16")  # to the type of the query
NORMS = (getattr(torch, "rms_norm", None), getattr(torch.nn.functional, "rms_norm", None))
FLAT, SHAPED = ("flatten", "reshape", "view"), ("reshape", "view", "unflatten")
OPERATION: Any = rotary.turn and rotary.turn.default


def turn(module: fx.GraphModule) -> int:
    """Put what norms and turns a query into one operation; how many were."""
    if OPERATION is None:
        return 0
    graph = module.graph
    learns = torch.is_grad_enabled() and any(
        v.requires_grad for v in map(value, graph.nodes) if isinstance(v, Tensor)
    )
    nodes = [] if learns else [n for n in graph.nodes if _method(n, BACK)]

    def found(node: fx.Node) -> Iterator[Match | None]:
        return (_match(node, *some) for some in (*_of_pairs(node), *_of_numbers(node)))

    return put_all(module, nodes, found)


Found = tuple[Any, Any, Any, bool, set[Any]]  # x, cos, sin, whether by halves, what is between


def _of_pairs(node: Any) -> Iterator[Found]:
    """The first way: `node` casts x cos + rotated sin back."""
    total = node.args[0]
    for left, right in pairs(total) if called(total, ADDS) else ():
        if not (called(left, MULTIPLIES) and called(right, MULTIPLIES)):
            continue
        for (mine, cos), (other, sin) in ((a, b) for a in pairs(left) for b in pairs(right)):
            (x, casts), (rotated, more) = _wide(mine), _wide(other)
            found = _rotated(x, rotated)
            if found is not None and _fits(x, cos, 1) and _fits(x, sin, 1):
                chain = {total, left, right, *casts, *more, *found[1]}
                yield x, cos, sin, found[0], chain


def _rotated(x: Any, rotated: Any) -> tuple[bool, list[Any]] | None:
    """Whether `rotated` is [-b, a] of the pairs of x: by halves or not, and what is between."""
    joined, halves = rotated, True
    if _method(rotated, FLAT) and called(rotated.args[0], (torch.stack,)):
        joined, halves = rotated.args[0], False
    elif not called(rotated, JOINS):
        return None
    parts, dim = joined.args[0], argument(joined, 1, "dim", 0)
    if len(parts) != 2 or dim not in (-1, 3 if halves else 4):
        return None
    minus, a = parts
    if not called(minus, (operator.neg, torch.neg)):
        return None
    b = minus.args[0]
    if not (_is_part(a, 0) and _is_part(b, 1) and a.args[0] is b.args[0]):
        return None
    unbound = a.args[0]
    shaped: Any = unbound.args[0] if _method(unbound, ("unbind",)) else None
    if not _method(shaped, SHAPED) or shaped.args[0] is not x:
        return None
    place = 3 if halves else 4
    if argument(unbound, 1, "dim", 0) not in (place, place - 5) or not _paired(x, shaped, place):
        return None
    return halves, [rotated, joined, minus, a, b, unbound, shaped]


def _of_numbers(node: Any) -> Iterator[Found]:
    """The second way: `node` casts complex products back."""
    flat = node.args[0]
    real: Any = flat.args[0] if _method(flat, FLAT) else None
    product: Any = real.args[0] if called(real, (torch.view_as_real,)) else None
    for number, turns in pairs(product) if called(product, MULTIPLIES) else ():
        shaped: Any = number.args[0] if called(number, (torch.view_as_complex,)) else None
        if not _method(shaped, SHAPED) or not _fits(shaped.args[0], turns, 2):
            continue
        x, casts = _wide(shaped.args[0])
        if isinstance(value(x), Tensor) and _paired(x, shaped, 4):
            yield x, turns, None, False, {flat, real, product, number, shaped, *casts}


def _match(
    node: fx.Node, x: Any, cos: Any, sin: Any, halves: bool, chain: set[Any]
) -> Match | None:
    """The operation in place of `node` and of what leads to it from x, or from a norm before."""
    mine, made = value(x), value(node)
    if made.dtype != mine.dtype or not isinstance(mine.shape[-1], int) or not rotary.runs_on(mine):
        return None
    own = {*chain, node}
    if any(user not in own for n in chain for user in n.users):
        return None  # somebody else reads what is between
    weight, eps = None, 0.0
    norm = _norm(x) if all(user in own for user in x.users) else None
    if norm is not None:
        chain = chain | {x}
        x, weight, eps = norm
    if sin is None:  # complex numbers
        with node.graph.inserting_before(node):
            both = node.graph.call_function(torch.view_as_real, (cos,))
            cos, sin = (node.graph.call_method("select", (both, -1, n)) for n in (0, 1))
    order = {n: place for place, n in enumerate(node.graph.nodes)}
    last = sorted(chain, key=lambda n: -order[n])
    return Match(OPERATION, (x, weight, eps, cos, sin, halves), last)


def _norm(x: Any) -> tuple[Any, Any, float] | None:
    """Of a norm of each head with a weight: its input, the weight, and what is added."""
    if not called(x, NORMS):
        return None
    names = ("input", "normalized_shape", "weight", "eps")
    given = dict(zip(names, x.args, strict=False)) | x.kwargs
    source, size, weight, eps = (given.get(name) for name in names)
    mine, seen = value(x), value(source)
    alike = isinstance(seen, Tensor) and seen.dtype == mine.dtype
    one = isinstance(size, (tuple, list)) and len(size) == 1
    if not (alike and one and isinstance(weight, fx.Node) and isinstance(eps, float)):
        return None
    return source, weight, eps


# --- parts ----------------------------------------------------------------------------------------


def _method(node: Any, names: tuple[str, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def _is_part(node: Any, number: int) -> bool:
    return called(node, (operator.getitem,)) and node.args[1] == number


def _wide(node: Any) -> tuple[Any, list[Any]]:
    """What a cast to fp32 is of, and the cast; of anything else the node itself."""
    cast = _method(node, ("float",)) or (
        _method(node, ("to",)) and node.args[1:] == (torch.float32,)
    )
    return (node.args[0], [node]) if cast else (node, [])


def _fits(x: Any, angles: Any, share: int) -> bool:
    """Whether angles (A, B, C, D / share) are of x (A, B, C, D); A, B and C may be 1 or missing.

    share: 2: complex numbers, one a pair; 1: fp32, one a column.
    """
    mine, their = value(x), value(angles)
    if not isinstance(mine, Tensor) or not isinstance(their, Tensor):
        return False
    kind = torch.complex64 if share == 2 else torch.float32
    if mine.ndim != 4 or not 1 <= their.ndim <= 4 or their.dtype is not kind:
        return False
    sizes = zip(mine.shape[-2::-1], their.shape[-2::-1], strict=False)
    columns = same(their.shape[-1] * share, mine.shape[-1])
    return columns and all(same(b, 1) or same(a, b) for a, b in sizes)


def _paired(x: Any, shaped: Any, place: int) -> bool:
    """Whether `shaped` is x (A, B, C, D) with its pairs at dimension `place` of five."""
    mine, made = value(x), value(shaped)
    if mine.ndim != 4 or made.ndim != 5 or not same(made.shape[place], 2):
        return False
    rest = same(made.shape[7 - place] * 2, mine.shape[-1])
    return rest and all(same(m, n) for m, n in zip(mine.shape[:3], made.shape[:3], strict=True))
