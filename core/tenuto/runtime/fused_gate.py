"""What a gated feed-forward makes of its first layer goes into that layer's product.

value * act(gate), both of them halves of one product of 8-bit codes, is one operation in the graph
of a block: `kernels/gated_product.py`. Where a quantized layer reads it, codes are made with it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .fused_rows import activation
from .kernels import int8_fused
from .kernels.gated_product import gated_fp8, gated_fp8_rows, gated_int8, gated_int8_rows
from .kernels.quantize_after import quantize_acted
from .nodes import MULTIPLIES, argument, called, pairs, same, shape_of, value, written

VIEWS = ("reshape", "view")
DIVIDES = (torch.chunk, torch.split)


class _Found:
    """A product whose halves meet, and what is between."""

    def __init__(self, value: Any, act: str, gate: Any, chain: list[fx.Node]) -> None:
        self.value, self.act, self.gate = value, act, gate
        self.chain = chain  # of nodes that nobody else reads, from the last to the first
        self.views: list[fx.Node] = []
        self.first = False
        self.product: fx.Node | None = None

    def complete(self) -> bool:
        """Whether both are the halves of one product that nobody else reads."""
        halves = self.value, self.gate
        if not all(called(n, (operator.getitem,)) and len(n.users) == 1 for n in halves):
            return False
        places, parts = [n.args[1] for n in halves], halves[0].args[0]
        if sorted(map(str, places)) != ["0", "1"] or halves[1].args[0] is not parts:
            return False
        self.first = places[1] == 0
        node = _divided(parts)
        if node is None:
            return False
        self.chain += [*halves, parts]
        while node.op == "call_method" and len(node.users) == 1:
            if node.target not in (*VIEWS, "unflatten") or not _keeps_columns(node):
                return False
            self.views.append(node)
            node = node.args[0]
        self.product = node
        self.chain += [*self.views, node]
        return len(node.users) == 1

    def operation(self, rows: str | None) -> tuple[Any, tuple[Any, ...]] | None:
        """What stands for it, with its arguments. rows: of the codes; None: there are none."""
        node, then = self.product, (self.act, self.first)
        assert node is not None
        if called(node, (int8_fused.operation, int8_fused.operation.default)):
            *given, dtype = node.args
            found = gated_int8.default if rows is None else gated_int8_rows.default
            return found, (*given, *then, dtype, *_known(rows))
        if called(node, (torch._scaled_mm,)):
            names = "scale_a", "scale_b", "bias"
            x, weight = node.args[:2]
            scales = [argument(node, 2 + n, name, None) for n, name in enumerate(names)]
            by_row = [tuple(value(s).shape) for s in scales[:2]]
            if by_row == [(value(x).shape[0], 1), (1, value(weight).shape[1])]:
                found = gated_fp8.default if rows is None else gated_fp8_rows.default
                given = x, scales[0], weight, scales[1], scales[2]
                return found, (*given, *then, value(node).dtype, *_known(rows))
        return None


def gate(module: fx.GraphModule) -> int:
    """Put gated halves into the products before them; how many there are."""
    if gated_int8 is None:
        return 0
    count = sum(map(_put, [n for n in module.graph.nodes if _starts(n)]))
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _starts(node: fx.Node) -> bool:
    return called(node, MULTIPLIES) or called(node, (quantize_acted.default,))


def _put(node: fx.Node) -> bool:
    """One in the place of `node`, if it is one."""
    rows: str | None = None
    if called(node, (quantize_acted.default,)):
        before, x, other, act, kind = node.args
        rows, found = str(kind), _Found(other, str(act), x, [])
        if before is not None or other is None or act == "none" or not found.complete():
            return False
    else:
        made = next((f for f in _products(node) if f.complete()), None)
        if made is None:
            return False
        found = made
    columns, dtype = value(found.product).shape[1], value(found.product).dtype
    if not isinstance(columns, int) or columns % 2:
        return False
    if rows is None and value(node).dtype is not dtype:
        return False
    operation = found.operation(rows)
    if operation is None or written(node, found.chain):
        return False
    _replace(node, found, operation, columns // 2, rows)
    return True


def _products(node: fx.Node) -> Iterator[_Found]:
    """A product as that of a value and of an activated gate, in both orders."""
    for one, other in pairs(node):
        act = activation(other)
        if act is not None and len(other.users) == 1:
            yield _Found(one, act, other.args[0], [other])


def _replace(
    node: fx.Node, found: _Found, operation: tuple[Any, Any], columns: Any, rows: str | None
) -> None:
    graph = node.graph
    example = value(found.product)
    with graph.inserting_before(node):
        new = graph.call_function(*operation)
        if rows is None:
            new.meta = {"example_value": _example(example, columns, example.dtype)}
            last = _viewed(graph, new, found.views, columns)
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
        else:
            known = [value(user) for user in node.users]
            new.meta = {}
            for user, seen in zip(list(node.users), known, strict=True):
                wide = columns if user.args[1] == 0 else 1
                part = graph.call_function(operator.getitem, (new, user.args[1]))
                part.meta = {"example_value": _example(example, wide, seen.dtype)}
                last = _viewed(graph, part, found.views, wide)
                last.meta = dict(user.meta)
                user.replace_all_uses_with(last)
                graph.erase_node(user)
    graph.erase_node(node)
    for gone in found.chain:
        if not gone.users:
            graph.erase_node(gone)


def _viewed(graph: fx.Graph, node: fx.Node, views: list[fx.Node], columns: Any) -> fx.Node:
    """`node` in the shape that the product was given, with other columns."""
    for view in reversed(views):
        sizes = view.args[1:] if view.target == "unflatten" else (*view.args[1:-1], columns)
        new = graph.call_method(str(view.target), (node, *sizes))
        new.meta = {"example_value": getattr(value(node), str(view.target))(*map(_seen, sizes))}
        node = new
    return node


def _example(like: Any, columns: Any, dtype: torch.dtype) -> Any:
    return like.new_empty((like.shape[0], columns), dtype=dtype)


def _seen(size: Any) -> Any:
    """A size as the example has it, where it is a node."""
    if isinstance(size, (tuple, list)):
        return tuple(map(_seen, size))
    return value(size) if isinstance(size, fx.Node) else size


def _divided(parts: Any) -> Any:
    """What a node takes the two halves of, along its columns; None: it does something else."""
    if not isinstance(parts, fx.Node) or len(parts.users) != 2:
        return None
    method = parts.op == "call_method" and parts.target in ("chunk", "split")
    if not (method or called(parts, DIVIDES)):
        return None
    node, dim = parts.args[0], argument(parts, 2, "dim", 0)
    shape, names = shape_of(node), ("chunks", "split_size_or_sections", "split_size")
    if not shape or dim not in (-1, len(shape) - 1):
        return None
    size = parts.args[1] if len(parts.args) > 1 else None
    size = next((parts.kwargs[name] for name in names if name in parts.kwargs), size)
    if parts.target in ("chunk", torch.chunk):
        return node if size == 2 else None
    pieces = list(size) if isinstance(size, (tuple, list)) else [size, size]
    even = len(pieces) == 2 and all(isinstance(n, int) and same(2 * n, shape[-1]) for n in pieces)
    return node if even else None


def _keeps_columns(node: fx.Node) -> bool:
    """Whether a view is of rows alone, its sizes one by one."""
    if node.kwargs or not shape_of(node) or not shape_of(node.args[0]):
        return False
    if node.target == "unflatten":
        return len(node.args) == 3 and isinstance(node.args[1], int) and node.args[1] == 0
    if any(isinstance(size, (tuple, list)) for size in node.args[1:]):
        return False
    return same(shape_of(node)[-1], shape_of(node.args[0])[-1])


def _known(rows: str | None) -> tuple[str, ...]:
    return () if rows is None else (rows,)
