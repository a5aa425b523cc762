"""The U-Net of Stable Diffusion 1.x, 2.x and XL (diffusers; ldm, sgm and ComfyUI by key map)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..backbone import Backbone, Branch, Subset
from ..key_map import KeyMap, keymap
from ..stand_in import StandIn, standing

CLASSES = ("UNet2DConditionModel",)
HOSTS = ("UNetModel", "IntegratedUNet2DConditionModel")  # the second is Forge's
KINDS = {"attn1": "attention", "attn2": "cross-attention", "ff": "feed-forward"}
INNER = "transformer_blocks"
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
OUTER = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip


def describe(module: Any) -> Backbone:
    """Residual blocks and transformer blocks, in the order in which they run."""
    blocks = list(_blocks(module))
    branches: list[Branch] = []
    for name in blocks:
        child = module.get_submodule(name)
        if getattr(child, "conv1", None) is not None:
            branches.append(Branch(name, "resnet", name))
        else:
            found = (part for part in KINDS if getattr(child, part, None) is not None)
            branches += [Branch(f"{name}.{part}", KINDS[part], name) for part in found]
    embeddings = tuple(n for n, _ in module.named_modules() if n.endswith("time_emb_proj"))
    return Backbone(
        family="unet",
        blocks=tuple(blocks),
        branches=tuple(branches),
        subsets=tuple(_subsets(blocks, module)),
        temporal=_temporal(module, embeddings),
        ends=("conv_in", "conv_out", "time_embedding.*", "add_embedding.*", "*.time_emb_proj"),
    )


def _temporal(module: Any, embeddings: tuple[str, ...]) -> tuple[str, ...]:
    """Labels and sizes are added after the time embedding, the guidance of LCM inside it."""
    if getattr(module.time_embedding, "cond_proj", None) is not None:
        return ()
    added = ("add_embedding", "class_embedding")
    mixed = any(getattr(module, name, None) is not None for name in added)
    return ("time_embedding",) if mixed else ("time_embedding", *embeddings)


def _blocks(module: Any) -> Iterator[str]:
    """ResnetBlock2D and BasicTransformerBlock by level: they alternate inside one level."""
    levels = [f"down_blocks.{i}" for i in range(len(module.down_blocks))]
    levels += ["mid_block"] if getattr(module, "mid_block", None) is not None else []
    levels += [f"up_blocks.{i}" for i in range(len(module.up_blocks))]
    for level in levels:
        found = [
            f"{level}.{name}"
            for name, child in module.get_submodule(level).named_modules()
            if getattr(child, "conv1", None) is not None or name.split(".")[-2:-1] == [INNER]
        ]
        yield from sorted(found, key=_place)


def _place(name: str) -> tuple[int, ...]:
    """resnets.i before attentions.i; inner blocks in their own order; samplers of a level last."""
    found = re.search(r"\.(resnets|attentions)\.(\d+)", name)
    if found is None:
        return (10**6,)
    kind, index = found.groups()
    inner = re.findall(r"transformer_blocks\.(\d+)", name)
    return int(index), int(kind == "attentions"), *(int(i) for i in inner)


def _subsets(blocks: list[str], module: Any) -> Iterator[Subset]:
    for name in blocks:
        child = module.get_submodule(name)
        if getattr(child, "attn1", None) is not None:
            yield Subset(tuple(f"{name}.attn1.{p}" for p in ("to_q", "to_k", "to_v")))
        if getattr(child, "attn2", None) is not None:
            yield Subset(tuple(f"{name}.attn2.{p}" for p in ("to_k", "to_v")))


def key_map(module: Any) -> KeyMap:
    """Where the parts of a `UNetModel` are; its blocks are lists of layers, counted through."""
    prefixes: dict[str, Any] = dict(OUTER)
    modules = {"time_embedding": ("time_embed",), "add_embedding": ("label_emb.0",)}
    for host, name in _layers(module):
        layer = module.get_submodule(host)
        modules[name] = (host,)
        prefixes[host] = name
        if hasattr(layer, "in_layers"):
            prefixes |= {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in RESIDUAL.items()}
        elif hasattr(layer, "op"):
            prefixes[f"{host}.op"] = f"{name}.conv"
        inner = (n for n, _ in layer.named_modules() if n.startswith(INNER))
        modules |= {f"{name}.{n}": (f"{host}.{n}",) for n in inner}
    return keymap(module, "UNet2DConditionModel", prefixes, modules)


def _layers(module: Any) -> Iterator[tuple[str, str]]:
    """(host, canonical) of every residual block, transformer, down- and upsampler."""
    level = place = 0
    for number, block in enumerate(module.input_blocks):
        if number and hasattr(block[0], "op"):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            level, place = level + 1, 0
        elif number:
            yield from _parts(f"input_blocks.{number}", block, f"down_blocks.{level}", place)
            place += 1
    found = {"resnets": 0, "attentions": 0}
    for number, layer in enumerate(module.middle_block):
        kind = "resnets" if hasattr(layer, "in_layers") else "attentions"
        yield f"middle_block.{number}", f"mid_block.{kind}.{found[kind]}"
        found[kind] += 1
    level = place = 0
    for number, block in enumerate(module.output_blocks):
        yield from _parts(f"output_blocks.{number}", block, f"up_blocks.{level}", place)
        last = any(_is_upsampler(layer) for layer in block)
        level, place = (level + 1, 0) if last else (level, place + 1)


def _parts(host: str, block: Any, level: str, place: int) -> Iterator[tuple[str, str]]:
    for number, layer in enumerate(block):
        if _is_upsampler(layer):
            yield f"{host}.{number}", f"{level}.upsamplers.0"
        else:
            kind = "resnets" if hasattr(layer, "in_layers") else "attentions"
            yield f"{host}.{number}", f"{level}.{kind}.{place}"


def _is_upsampler(layer: Any) -> bool:
    return hasattr(layer, "conv") and not hasattr(layer, "in_layers")


def stand_in(module: Any) -> StandIn:
    """A `UNetModel` of the same layers, counted through as there."""
    holders, count = ["input_blocks.0.0"], 0
    for block in module.down_blocks:
        for place in range(len(block.resnets)):
            count += 1
            holders += _level(f"input_blocks.{count}", block, place)
        if getattr(block, "downsamplers", None):
            count += 1
            holders.append(f"input_blocks.{count}.0.op")
    middle = module.mid_block
    order = [(0, middle.resnets[0])]
    pairs = zip(getattr(middle, "attentions", ()), middle.resnets[1:], strict=False)
    order += list(enumerate((layer for pair in pairs for layer in pair), 1))
    for number, layer in order:
        holders += _layer(f"middle_block.{number}", layer)
    count = 0
    for block in module.up_blocks:
        for place in range(len(block.resnets)):
            found = _level(f"output_blocks.{count}", block, place)
            last = place == len(block.resnets) - 1
            if last and getattr(block, "upsamplers", None):
                number = 1 + bool(getattr(block, "attentions", None))
                found = [*found, f"output_blocks.{count}.{number}.conv"]
            holders, count = holders + found, count + 1
    return standing(module, holders=holders)


def _level(host: str, block: Any, place: int) -> list[str]:
    """The holders of one residual block, and of the transformer after it."""
    found = _layer(f"{host}.0", block.resnets[place])
    attentions = getattr(block, "attentions", None)
    return found + (_layer(f"{host}.1", attentions[place]) if attentions else [])


def _layer(host: str, layer: Any) -> list[str]:
    if hasattr(layer, "conv1"):
        return [f"{host}.in_layers"]
    inner = (name for name, _ in layer.named_modules() if name.startswith(INNER))
    return [host, *(f"{host}.{name}" for name in inner)]
