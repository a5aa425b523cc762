"""Reading and changing the graphs that Dynamo hands to a backend, for what is fused in them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

MULTIPLIES, ADDS = (operator.mul, torch.mul), (operator.add, torch.add)
JOINS = (torch.cat, torch.concat)
SPECIAL = {"__setitem__", *(f"__{name}__" for name in dir(operator) if name.startswith("i"))}


@dataclass
class Match:
    """An operation with its arguments, in place of `chain` and of the node after it."""

    target: Any
    args: tuple[Any, ...]
    chain: list[fx.Node] = field(default_factory=list)


def value(node: Any) -> Any:
    """The example that a graph has of a node's value."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def shape_of(node: Any) -> tuple[Any, ...]:
    """Of a tensor of floats; () of all else."""
    found = value(node)
    floats = isinstance(found, Tensor) and found.dtype.is_floating_point
    return tuple(found.shape) if floats else ()


def called(node: Any, targets: Any) -> bool:
    """Whether a node calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument of a call, by place or name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def pairs(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The two arguments of a sum or a product, in both orders."""
    if len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, whatever an image's size is."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def written(node: fx.Node, chain: Sequence[fx.Node]) -> bool:
    """Whether something is written in place between the first of `chain` and `node`."""
    wanted = set(chain)
    at: Any = node.prev
    while wanted and at.op != "root":
        wanted.discard(at)
        if writes(at):
            return True
        at = at.prev
    return False


def writes(node: fx.Node) -> bool:
    """Whether an operation may write to what it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    special = name in SPECIAL or f"__{name}__" in SPECIAL
    plain = name.endswith("_") and not name.endswith("__")
    return special or plain or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def put(graph: fx.Graph, node: fx.Node, match: Match) -> None:
    """A match in place of a node, and of what only that read."""
    with graph.inserting_before(node):
        new = graph.call_function(match.target, match.args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for gone in match.chain:  # from the last to the first
        if not gone.users:
            graph.erase_node(gone)


def put_all(
    module: fx.GraphModule, nodes: Iterable[fx.Node], found: Callable[[fx.Node], Iterable[Any]]
) -> int:
    """Put the first match that `found` has of each node in its place; how many there were.

    Not where something is written in between.
    """
    count = 0
    for node in nodes:
        made = (m for m in found(node) if m is not None and not written(node, m.chain))
        match = next(made, None)
        if match is not None:
            put(module.graph, node, match)
            count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws numbers."""
    name = str(getattr(node.target, "__name__", node.target))
    if "dropout" in name:
        return bool(argument(node, 2, "training", True))
    return name.startswith(("rand", "normal", "bernoulli", "multinomial"))
