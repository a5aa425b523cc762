"""Products of layers that share an input as one, in compiled blocks on a GPU.

In the graph of a block the products of one input whose weights lie side by side in memory become
one, whose result is split again. See `side_by_side.py` and `kernels/joint_linear.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fused_rows import quantizes
from .kernels import int8_fused
from .kernels.joint_linear import beside, joint_fp8, joint_int8
from .nodes import argument, value

SHAPES = ("reshape", "view", "expand", "contiguous")


@dataclass(frozen=True)
class _Product:
    """A node that multiplies: the quantization of its input, and its arguments."""

    node: fx.Node
    source: fx.Node
    joint: Any
    before: tuple[Any, ...]  # what all of one input share: rows, scales, zero point
    own: tuple[Any, ...]  # a weight, and what else a product has of its own
    bias: Any
    dtype: torch.dtype


def join(module: fx.GraphModule, inputs: Sequence[Any]) -> int:
    """Put products of one input together; how many there are then. inputs: of the graph."""
    if joint_fp8 is None:
        return 0
    graph = module.graph
    given = [n for n in graph.nodes if n.op == "placeholder"]
    values = dict(zip(given, inputs, strict=False))
    groups: dict[Any, list[_Product]] = {}
    for found in filter(None, map(_product, graph.nodes)):
        if all(node in values for node in found.own):
            key = found.source, found.joint, found.dtype, found.bias is None
            groups.setdefault(key, []).append(found)
    some = [group for group in groups.values() if len(group) > 1 and _lie(group, values)]
    for group in some:
        _put(graph, group)
    if some:
        graph.lint()
        module.recompile()
    return len(some)


def _lie(group: Iterable[_Product], values: dict[fx.Node, Any]) -> bool:
    weights = [values[product.own[0]] for product in group]
    if not all(type(w) in (Tensor, nn.Parameter) for w in weights):
        return False
    return beside([w.t() for w in weights]) is not None


def _product(node: fx.Node) -> _Product | None:
    if node.op != "call_function":
        return None
    if node.target is torch._scaled_mm:
        source = _source(node.args[0])
        names = "scale_a", "scale_b", "bias", "out_dtype"
        scale_a, scale_b, bias, dtype = (argument(node, 2 + n, name, None)
                                         for n, name in enumerate(names))  # fmt: skip
        if source is None or _source(scale_a) is not source or dtype is not torch.bfloat16:
            return None
        before, own = (node.args[0], scale_a), (node.args[1], scale_b)
        return _Product(node, source, joint_fp8.default, before, own, bias, dtype)
    operation = int8_fused.operation
    if node.target in (operation, operation.default) and len(node.args) == 8:
        x, x_scale, zero, weight, scale, sums, bias, dtype = node.args
        source = _source(x)
        if source is None or _source(x_scale) is not source or zero is not None:
            return None
        before, own = (x, x_scale, None), (weight, scale, sums)
        assert isinstance(dtype, torch.dtype)
        return _Product(node, source, joint_int8.default, before, own, bias, dtype)
    return None


def _source(node: Any) -> fx.Node | None:
    """The quantization that codes or scales come from, whatever shape they were given."""
    while isinstance(node, fx.Node):
        if quantizes(node):
            return node
        shape = node.op == "call_method" and node.target in SHAPES
        if not (shape or (node.op == "call_function" and node.target is operator.getitem)):
            return None
        node = node.args[0]
    return None


def _put(graph: fx.Graph, group: list[_Product]) -> None:
    first = group[0]
    sizes = [int(product.own[0].meta["example_value"].shape[1]) for product in group]
    with graph.inserting_before(first.node):
        bias = None
        if first.bias is not None:
            parts = [_copied(graph, product.bias, first.dtype) for product in group]
            bias = graph.call_function(torch.cat, (parts,))
            _known(bias, lambda *each: torch.cat(each), parts)
        lists = [[product.own[n] for product in group] for n in range(len(first.own))]
        joint = graph.call_function(first.joint, (*first.before, *lists, bias, first.dtype))
        parts = graph.call_function(torch.split, (joint, sizes), {"dim": -1})
        made = [graph.call_function(operator.getitem, (parts, n)) for n in range(len(group))]
    for product, new in zip(group, made, strict=True):
        new.meta = dict(product.node.meta)
        product.node.replace_all_uses_with(new)
        graph.erase_node(product.node)


def _copied(graph: fx.Graph, bias: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A bias in the output's type: it may be cast only after the first product."""
    while bias.op == "call_method" and bias.target == "to":
        bias = bias.all_input_nodes[0]
    cast = graph.call_method("to", (bias, dtype))
    _known(cast, lambda x: x.to(dtype), [bias])
    return cast


def _known(node: fx.Node, call: Callable[..., Tensor], given: Sequence[fx.Node]) -> None:
    """Give a new node the example of its value: `early_part.py` asks for it."""
    if all(isinstance(value(n), Tensor) for n in given):
        node.meta = {"example_value": call(*map(value, given))}
