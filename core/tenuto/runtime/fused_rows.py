"""Rows are quantized together with what makes them, in the graph of a block that is compiled.

There the quantization of an input is one operation. A norm with its modulation, or an activation
with its gate, that only this operation reads goes into it: `kernels/quantize_after.py`. Inputs that
several layers share are quantized once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .kernels.quantize_after import quantize_acted, quantize_normed
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
    shape_of,
    value,
    written,
)

CASTS = ("to", "float", "half", "bfloat16", "type_as", "contiguous")
NORMS: dict[Any, tuple[str, ...]] = {  # names of what comes after the input
    F.layer_norm: ("normalized_shape", "weight", "bias", "eps"),
    torch.layer_norm: ("normalized_shape", "weight", "bias", "eps"),
    getattr(torch, "rms_norm", None): ("normalized_shape", "weight", "eps"),
    getattr(F, "rms_norm", None): ("normalized_shape", "weight", "eps"),
}


def fuse(module: fx.GraphModule) -> int:
    """Put what makes rows into their quantization; how many operations took something in."""
    if quantize_normed is None:
        return 0
    _merge(module.graph)
    nodes = [n for n in module.graph.nodes if _is_quantization(n)]
    return put_all(module, nodes, lambda node: [_normed(node) or _acted(node)])


def _is_quantization(node: fx.Node) -> bool:
    operation = torch.ops.tenuto.quantize_rows
    return node.op == "call_function" and node.target in (operation, operation.default)


def quantizes(node: fx.Node) -> bool:
    """Whether a node of a graph gives codes and scales of rows."""
    fused = quantize_normed.default, quantize_acted.default
    return _is_quantization(node) or (node.op == "call_function" and node.target in fused)


def _merge(graph: fx.Graph) -> None:
    """Quantize what several layers read once."""
    first: dict[Any, fx.Node] = {}
    for node in [n for n in graph.nodes if _is_quantization(n)]:
        earlier = first.get(node.args)
        if earlier is None or written(node, [earlier]):
            first[node.args] = node
        else:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


# --- patterns -------------------------------------------------------------------------------------


def _before(node: Any, chain: list[fx.Node]) -> Any:
    """What makes `node`, casts and dropout that is off left out; they join the chain.

    None where somebody else reads one of them.
    """
    while isinstance(node, fx.Node):
        if len(node.users) != 1:
            return None
        cast = node.op == "call_method" and node.target in CASTS and bool(shape_of(node))
        idle = called(node, (F.dropout,)) and not argument(node, 2, "training", True)
        if not (cast or idle):
            return node
        chain.append(node)
        node = node.args[0]
        if not shape_of(node):
            return None
    return None


def one_row(node: Any, shape: tuple[Any, ...]) -> bool:
    """Whether a tensor is one row for all of an image: (K,), or (B or 1, 1, ..., K)."""
    found = shape_of(node)
    if len(found) == 1:
        return same(found[0], shape[-1])
    if len(found) != len(shape) or len(shape) < 3 or not same(found[-1], shape[-1]):
        return False
    images = same(found[0], 1) or same(found[0], shape[0])
    return images and all(same(n, 1) for n in found[1:-1])


def _with(
    node: fx.Node | None, kinds: Any, shape: tuple[Any, ...], chain: list[fx.Node]
) -> tuple[fx.Node | None, Any]:
    """Of a sum or a product: what is on its way from a norm, and the row for all of an image."""
    if not called(node, kinds):
        return node, None
    assert node is not None
    for one, other in pairs(node):
        if shape_of(one) == shape and one_row(other, shape):
            chain.append(node)
            return _before(one, chain), other
    return None, None


def _normed(node: fx.Node) -> Match | None:
    """norm(x) * times + plus, each of the two or neither; 1 + times in place of times, too."""
    chain: list[fx.Node] = []
    shape, norm = shape_of(node.args[0]), _before(node.args[0], chain)
    norm, plus = _with(norm, ADDS, shape, chain)
    norm, times = _with(norm, MULTIPLIES, shape, chain)
    if norm is None or not called(norm, NORMS) or not shape:
        return None
    times, one = _more_than_one(times, chain)
    names = NORMS[norm.target]
    x, *given = norm.args
    facts = dict(zip(names, given, strict=False)) | norm.kwargs
    size, eps = facts.get("normalized_shape"), facts.get("eps", 1e-5 if "bias" in names else None)
    weight, bias = facts.get("weight"), facts.get("bias")
    whole = isinstance(size, (tuple, list)) and len(size) == 1 and same(size[0], shape[-1])
    factors = all(t is None or len(shape_of(t)) == 1 for t in (weight, bias))
    if not (whole and factors and isinstance(eps, float) and shape_of(x) == shape):
        return None
    args = (x, weight, bias, times, plus, eps, "bias" in names, node.args[1], one)
    return Match(quantize_normed.default, args, [*chain, norm])


def _more_than_one(times: Any, chain: list[fx.Node]) -> tuple[Any, bool]:
    """What is added to 1, and True, if nobody else reads the sum: that joins the chain."""
    if called(times, ADDS) and len(times.users) == 1:
        for number, other in pairs(times):
            plain = isinstance(number, (int, float)) and number == 1
            if (
                plain
                and shape_of(other) == shape_of(times)
                and value(other).dtype == value(times).dtype
            ):
                chain.append(times)
                return other, True
    return times, False


def activation(node: Any) -> str | None:
    """The name of an activation of diffusers' feed-forwards, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is F.silu:
        return None if node.kwargs.get("inplace") else "silu"
    if node.target is F.gelu:
        kind = argument(node, 1, "approximate", "none")
        return {"none": "gelu", "tanh": "gelu tanh"}.get(str(kind))
    return None


def _acted(node: fx.Node) -> Match | None:
    """[before, act(x) * gate] side by side, the first and the last of them or neither."""
    chain: list[fx.Node] = []
    before, last = None, _before(node.args[0], chain)
    if called(last, JOINS):
        assert last is not None
        parts, dim = last.args[0], argument(last, 1, "dim", 0)
        if not isinstance(parts, (tuple, list)) or len(parts) != 2:
            return None
        if dim not in (-1, len(shape_of(last)) - 1):
            return None
        chain.append(last)
        before, last = parts[0], _before(parts[1], chain)
    gate = None
    if called(last, MULTIPLIES):
        assert last is not None
        chain.append(last)
        made = ((_before(one, trial := []), other, trial) for one, other in pairs(last))
        found = next(
            ((n, g, c) for n, g, c in made if activation(n) and shape_of(n) == shape_of(g)), None
        )
        if found is None:
            return None
        last, gate = found[0], found[1]
        chain += found[2]
    act = activation(last)
    if act is None or last is None or not shape_of(last):
        return None
    args = (before, last.args[0], gate, act, node.args[1])
    return Match(quantize_acted.default, args, [*chain, last])
