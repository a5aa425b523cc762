"""What a block makes of a step alone, in a graph of its own: it need not wait for what is before.

Modulations come from the timestep, a class or a pooled prompt, by products of a row an image. They
do not depend on the tokens, yet stand before the first use of these in every block: a fourth of the
time of DiT-XL/2 with two images. The graph of a block that is compiled is parted in two, and
`side_branch.py` lets the first part of every block run beside the blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .nodes import is_random, value, writes
from .side_branch import Asked, ahead

FEW = 8  # rows of an image that a step has: shifts, scales and gates of a block
MOST = 2**20  # elements of what is made ahead: all of it stays in memory until the call's end
VIEWS = (
    "chunk", "split", "unbind", "unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten",
    "permute", "transpose", "expand", "getitem",
)  # fmt: skip
PRODUCTS = (F.linear, torch._scaled_mm, torch.matmul, torch.addmm, torch.mm, torch.bmm)
Compile = Callable[[fx.GraphModule, Sequence[Any]], Any]


class TwoParts:
    """A block's compiled graph in two: what is made ahead is given to the rest."""

    def __init__(
        self, first: Any, second: Any, early: list[int], late: list[int], asked: Asked
    ) -> None:
        self.first, self.second, self.asked = first, second, asked
        self.early, self.late = early, late  # places of what they take

    def __call__(self, *inputs: Any) -> Any:
        early, late = ([inputs[n] for n in places] for places in (self.early, self.late))
        return self.second(*late, *ahead(self.first, early, self.asked))


def compiled_apart(module: fx.GraphModule, inputs: Sequence[Any], finish: Compile) -> Any:
    """The graph of a block, in two parts that `finish` has made of them; None: it has one part."""
    graph = module.graph
    early = _early(graph)
    if not any(map(_is_product, early)):
        return None
    rest = [n for n in graph.nodes if n not in early and n.op != "placeholder"]
    if not any(map(_is_product, rest)):
        return None  # tokens without images, (S, K), look like what a step has
    late = set(rest)
    for node in reversed(graph.nodes):
        if node in early and _is_view(node) and not late.isdisjoint(node.users):
            late.add(node)  # of what was made the rest takes its own pieces
            if early.isdisjoint(node.users):
                early.remove(node)
    made = [n for n in graph.nodes if n in early and n not in late and not late.isdisjoint(n.users)]
    tensors = all(isinstance(value(n), Tensor) for n in made)
    if not tensors or any(_reaches_over(n, early, {*made}) for n in graph.nodes if writes(n)):
        return None
    given = [n for n in graph.nodes if n.op == "placeholder"]
    used, kept = ([n for n in given if not some.isdisjoint(n.users)] for some in (early, late))
    values = dict(zip(given, inputs, strict=True)) | {n: value(n) for n in made}
    parts = (
        finish(_part(module, early, used, [], tuple(made)), [values[n] for n in used]),
        finish(_part(module, late, kept, made, rest[-1].args[0]), [values[n] for n in kept + made]),
    )
    asked = tuple(n for n, node in enumerate(used) if not _is_own(node))
    return TwoParts(*parts, [given.index(n) for n in used], [given.index(n) for n in kept], asked)


def _early(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that no token's values reach."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            far = isinstance(value(node), Tensor) and not _of_a_step(value(node))
        else:
            large = isinstance(value(node), Tensor) and not _below(value(node).numel(), MOST)
            number = not isinstance(value(node), (Tensor, tuple, list))
            far = large or number or is_random(node) or any(n in late for n in node.all_input_nodes)
        if far or node.op == "output":
            late.add(node)
    return {n for n in graph.nodes if n not in late and n.op != "placeholder"}


def _of_a_step(x: Tensor) -> bool:
    """Whether a tensor has no tokens, by its shape: (B,), (B, K), (B, few, K); weights are such."""
    return x.ndim <= 2 or all(_below(n, FEW) for n in x.shape[1:-1])


def _below(number: Any, most: int) -> bool:
    """Whether a size is known and no larger."""
    return isinstance(number, int) and number <= most


def _is_view(node: fx.Node) -> bool:
    """Whether a node shows what is there in another shape, or parts of it."""
    name = str(getattr(node.target, "__name__", node.target))
    if name not in VIEWS or not node.all_input_nodes:
        return False
    source = node.all_input_nodes[0]
    return isinstance(value(source), Tensor) or _is_view(source)


def _reaches_over(node: fx.Node, early: set[fx.Node], made: set[fx.Node]) -> bool:
    """Whether an operation writes to something that is not its own part's alone."""
    root = node.all_input_nodes[0] if node.all_input_nodes else node
    while _is_view(root):
        root = root.all_input_nodes[0]
    return root.op == "placeholder" or root in made or (root in early) is not (node in early)


def _is_product(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = str(node.target)
    own = name.startswith("tenuto") and ("int8" in name or "fp8" in name)
    return own or node.target in PRODUCTS


def _is_own(node: fx.Node) -> bool:
    """Whether an input is the block's own, a weight: it is there before the call."""
    return str(node.target).lower().startswith("l_self_")


def _part(
    module: fx.GraphModule, nodes: set[fx.Node], given: list[fx.Node], made: list[fx.Node],
    answer: Any,
) -> fx.GraphModule:  # fmt: skip
    """Some nodes as a graph of its own, that takes `given`, then `made`, and returns `answer`."""
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        known[node] = graph.node_copy(node)
    for node in made:
        known[node] = graph.placeholder(f"ahead_{node.name}")
        known[node].meta = {"example_value": value(node)}
    for node in module.graph.nodes:
        if node in nodes and node.op != "output":
            known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(fx.map_arg(answer, known.__getitem__))
    graph.lint()
    return fx.GraphModule(module, graph)
