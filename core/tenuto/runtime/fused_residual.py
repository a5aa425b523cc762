"""What a block adds to its input goes into the product before it, in the graph of the block.

residual + gate * product, the gate one row for all of an image, or none: with products of 8-bit
codes one operation, `kernels/finished_product.py`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .fused_rows import one_row
from .kernels import int8_fused
from .kernels.finished_product import finished_fp8, finished_int8
from .nodes import ADDS, MULTIPLIES, Match, argument, called, pairs, put_all, shape_of, value

SHAPES = ("reshape", "view", "unflatten", "contiguous", "to")
DIVIDES = (operator.truediv, torch.div)


def finish(module: fx.GraphModule) -> int:
    """Put sums into the products before them; how many there are."""
    if finished_int8 is None:
        return 0
    nodes = [n for n in module.graph.nodes if called(n, ADDS)]
    return put_all(module, nodes, lambda node: (_match(node, *pair) for pair in pairs(node)))


def _match(node: fx.Node, one: Any, residual: Any) -> Match | None:
    """The operation in place of the sum of `one`, which is a product's, and a residual."""
    shape, dtype = shape_of(node), getattr(value(node), "dtype", None)
    if not shape or any(
        shape_of(n) != shape or value(n).dtype is not dtype for n in (one, residual)
    ):
        return None
    chain: list[fx.Node] = []
    last, gate = _through(one, chain), None
    if called(last, MULTIPLIES):
        assert last is not None
        for inner, other in pairs(last):
            if shape_of(inner) == shape and one_row(other, shape):
                gate = other
                chain.append(last)
                last = _through(inner, chain)
                break
    if last is None or len(last.users) != 1 or value(last).dtype is not dtype:
        return None
    made = _operation(last, gate, residual)
    return None if made is None else Match(*made, [*chain, last])


def _through(node: Any, chain: list[fx.Node]) -> fx.Node | None:
    """What is before changes of shape and whatever changes nothing; they join the chain."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        shaped = node.op == "call_method" and node.target in SHAPES
        idle = called(node, (F.dropout,)) and not argument(node, 2, "training", True)
        whole = called(node, DIVIDES) and node.args[1:] == (1,) and not node.kwargs
        if not (shaped or idle or whole):
            return node
        before = node.args[0]
        same = shape_of(before) and shape_of(before)[-1] == shape_of(node)[-1]
        if not same or value(before).dtype is not value(node).dtype:
            return None
        chain.append(node)
        node = before
    return None


def _operation(node: fx.Node, gate: Any, residual: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The operation that stands for a product, the gate and the residual, with its arguments."""
    if called(node, (int8_fused.operation, int8_fused.operation.default)) and len(node.args) == 8:
        *given, dtype = node.args
        return finished_int8.default, (*given, gate, residual, dtype)
    if called(node, (torch._scaled_mm,)):
        names = "scale_a", "scale_b", "bias"
        scale_a, scale_b, bias = (argument(node, 2 + n, name, None) for n, name in enumerate(names))
        x, weight = node.args[:2]
        by_row = [tuple(value(s).shape) for s in (scale_a, scale_b)]
        if by_row == [(value(x).shape[0], 1), (1, value(weight).shape[1])]:
            return finished_fp8.default, (x, scale_a, weight, scale_b, bias, gate, residual)
    return None
