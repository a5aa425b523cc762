"""Text encoders of transformers that no other file covers: language models, with eyes or without.

Llama, Mistral, Qwen, Gemma and what is built like them: one stack of blocks reads the text. What
lies outside it stays in full precision: embeddings and the head, which pipelines do not read, and
towers for images or sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..backbone import Backbone, Subset, layers, present
from . import generic

CLASSES = ("PreTrainedModel",)
TOWERS = ("vision", "visual", "audio", "image")  # in the name of what reads no text
STACKS = ("layers", "layer", "h", "block", "blocks")  # what lists of blocks are called
SHARED = {  # layers that share an input, in a block's order: what a scale of it folds into
    ("q_proj", "k_proj", "v_proj"): ("input_layernorm",),
    ("o_proj",): (),
    ("gate_proj", "up_proj"): ("pre_feedforward_layernorm", "post_attention_layernorm"),
    ("down_proj",): ("mlp.up_proj",),
}


def describe(module: Any) -> Backbone:
    """The blocks of the stack that reads the text; what no stack is found in is "generic"."""
    stack = text_stack(module)
    if stack is None:
        return generic.describe(module)
    blocks = tuple(f"{stack}.{i}" for i in range(len(module.get_submodule(stack))))
    subsets = tuple(found for block in blocks for found in _subsets(module, block))
    inside = tuple(f"{block}." for block in blocks)
    outside = tuple(name for name, _ in layers(module) if not name.startswith(inside))
    return Backbone("language-model", blocks, (), subsets, keep=tuple(_patterns(outside, stack)))


def text_stack(module: nn.Module) -> str | None:
    """The name of the largest list of blocks that is in no tower for something else than text."""
    sizes = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] in STACKS
        if not any(word in part for part in name.split(".") for word in TOWERS)
    }
    return max(sizes, key=sizes.__getitem__, default=None)


def _subsets(module: nn.Module, block: str) -> Iterator[Subset]:
    """Of layers called as in Llama. `o_proj` sees a value head several times: nothing folds."""
    own = module.get_submodule(block)
    for group, folds in SHARED.items():
        linears = [n for n, _ in layers(own) if n.rpartition(".")[2] in group]
        into = present(own, folds)
        if linears:
            names = tuple(f"{block}.{n}" for n in linears)
            yield Subset(names, f"{block}.{into[0]}" if into else None)


def _patterns(outside: tuple[str, ...], stack: str) -> Iterator[str]:
    """Patterns of the layers `outside`: a whole tower is one, where the stack is in another."""
    path = [*stack.split("."), ""]
    seen = set()
    for name in outside:
        parts = name.split(".")
        common = next(i for i, (a, b) in enumerate(zip([*parts, ""], path, strict=False)) if a != b)
        root = ".".join(parts[: common + 1])
        if root not in seen:
            seen.add(root)
            yield name if root == name else f"{root}.*"
