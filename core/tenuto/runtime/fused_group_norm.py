"""Group norms of images with channels last, in the graph of a block that is compiled.

    norm(x + plus)  ->  x * times + offset,   by `kernels/group_norm.py`
`plus` is what is added to whole channels just before: the bias of the convolution that makes x, and
a residual block's embedding of the timestep. So a compiler has one pass left, with the activation.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .kernels import group_norm
from .kernels.quantize_input import FLOATS, gpu
from .nodes import ADDS, argument, called, pairs, same, shape_of, value, written

NORMS, CONVOLUTIONS = (F.group_norm, torch.group_norm), (F.conv2d, torch.conv2d)
OPERATION: Any = group_norm.factors and group_norm.factors.default


class _Before(NamedTuple):
    """What a norm reads. parts: what is added to its channels, (B or 1, C, 1, 1) or (C,).

    bare: a convolution that loses its bias. chain: nodes that nobody else reads, the last first.
    """

    x: fx.Node
    parts: list[fx.Node]
    bare: fx.Node | None
    chain: list[fx.Node]


def norm(module: fx.GraphModule) -> int:
    """Put group norms into one operation and what it leaves; how many were."""
    graph = module.graph
    learns = torch.is_grad_enabled() and any(
        v.requires_grad for v in map(value, graph.nodes) if isinstance(v, Tensor)
    )
    if OPERATION is None or learns:
        return 0
    nodes = [n for n in graph.nodes if called(n, NORMS) and _fits(n.args[0])]
    for node in nodes:
        _put(node, _before(node))
    if nodes:
        graph.lint()
        module.recompile()
    return len(nodes)


def _fits(node: Any) -> bool:
    """Whether its value is of images with channels last, on a GPU."""
    x = value(node)
    if not isinstance(x, Tensor) or x.ndim != 4 or x.dtype not in FLOATS or not gpu(x):
        return False
    return same(x.stride(1), 1) and not same(x.stride(3), 1)


def _before(node: fx.Node) -> _Before:
    x: Any = node.args[0]
    plain = _Before(x, [], None, [])
    shape, parts, chain = shape_of(x), list[fx.Node](), list[fx.Node]()
    if called(x, ADDS) and len(x.users) == 1:
        for one, other in pairs(x):
            if shape_of(one) == shape and _of_channels(other, shape) and _fits(one):
                chain.append(x)
                parts.append(other)
                x = one
                break
    bare = None
    if called(x, CONVOLUTIONS) and len(x.users) == 1:
        bias = argument(x, 2, "bias", None)
        if isinstance(bias, fx.Node) and len(shape_of(bias)) == 1:
            parts.append(bias)
            chain.append(x)
            bare = x
    if value(x).dtype is not value(node.args[0]).dtype or written(node, chain):
        return plain
    return _Before(x, parts, bare, chain)


def _of_channels(node: Any, shape: tuple[Any, ...]) -> bool:
    own = shape_of(node)
    return len(own) == 4 and same(own[1], shape[1]) and own[2:] == (1, 1)


def _put(node: fx.Node, before: _Before) -> None:
    graph, wanted = node.graph, value(node)
    names = ("num_groups", None), ("weight", None), ("bias", None), ("eps", 1e-5)
    groups, weight, bias, eps = (argument(node, 1 + n, *own) for n, own in enumerate(names))

    def made(target: Any, *args: Any, method: bool = False) -> fx.Node:
        new = (graph.call_method if method else graph.call_function)(target, args)
        seen = [value(a) if isinstance(a, fx.Node) else a for a in args]
        example = getattr(seen[0], target)(*seen[1:]) if method else target(*seen)
        new.meta = {"example_value": example}
        return new

    with graph.inserting_before(node):
        x, plus = before.x, None
        if before.bare is not None:
            kwargs = {k: v for k, v in x.kwargs.items() if k != "bias"}
            args = (*x.args[:2], None, *x.args[3:]) if len(x.args) > 2 else x.args
            x = graph.call_function(before.bare.target, args, kwargs)  # type: ignore[arg-type]
            x.meta = dict(before.bare.meta)
        for part in before.parts:
            flat = len(shape_of(part)) == 1
            part = made("view", part, 1, -1, 1, 1, method=True) if flat else part
            plus = part if plus is None else made(operator.add, plus, part)
        pair = made(OPERATION, x, plus, groups, weight, bias, eps)
        times, offset = made(operator.getitem, pair, 0), made(operator.getitem, pair, 1)
        whole = made(operator.add, made(operator.mul, x, times), offset)
        last = made("to", whole, wanted.dtype, method=True)
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    for gone in before.chain:
        graph.erase_node(gone)
