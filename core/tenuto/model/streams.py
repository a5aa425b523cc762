"""Double and single blocks as FLUX.1's own code has them: key maps of all models made after it."""

from __future__ import annotations

from typing import Any

from .stand_in import size_of

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
}  # fmt: skip
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}  # fmt: skip
SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
ENDS = ("scale", "weight")  # the original code's name of a norm's weight; ComfyUI's from 0.14 on
FEED_FORWARD = ("net.0.proj", "net.2")


def double_block(
    host: str, name: str, width: int, forward: tuple[str, str] = FEED_FORWARD
) -> dict[str, Any]:
    """Prefixes of a double block. forward: what the layers of a feed-forward are called."""
    found: dict[str, Any] = {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in DOUBLE.items()}
    for stream, own in (("img", "ff"), ("txt", "ff_context")):
        found[f"{host}.{stream}_mlp.0"] = f"{name}.{own}.{forward[0]}"
        found[f"{host}.{stream}_mlp.2"] = f"{name}.{own}.{forward[1]}"
    for stream, parts in (("img", QKV), ("txt", ADDED)):
        qkv = tuple((f"{name}.attn.{part}", width) for part in parts)
        found[f"{host}.{stream}_attn.qkv"] = qkv
    return found | norms(host, name, DOUBLE_NORMS)


def single_block(host: str, name: str, width: int, rows: int) -> dict[str, Any]:
    """Prefixes of a single block. rows: of its first linear, the attention's inputs included."""
    found: dict[str, Any] = {f"{host}.{theirs}": f"{name}.{own}" for theirs, own in SINGLE.items()}
    qkv = tuple((f"{name}.attn.{part}", width) for part in QKV)
    found[f"{host}.linear1"] = (*qkv, (f"{name}.proj_mlp", rows - 3 * width))
    return found | norms(host, name, SINGLE_NORMS)


def norms(host: str, name: str, known: dict[str, str]) -> dict[str, str]:
    """The norms of queries and keys, whichever name their weight has in the host."""
    return {
        f"{host}.{theirs}.{end}": f"{name}.{own}.weight"
        for theirs, own in known.items()
        for end in ENDS
    }


def streams(module: Any) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """(prefixes, modules) of all double and single blocks of a host's `module`."""
    prefixes: dict[str, Any] = {}
    modules: dict[str, tuple[str, ...]] = {}
    for i, block in enumerate(module.double_blocks):
        host, name = f"double_blocks.{i}", f"transformer_blocks.{i}"
        modules[name] = (host,)
        prefixes |= double_block(host, name, block.img_attn.proj.out_features)
    for i, block in enumerate(module.single_blocks):
        host, name = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        modules[name] = (host,)
        rows, width = block.linear1.out_features, block.linear2.out_features
        prefixes |= single_block(host, name, width, rows)
    return prefixes, modules


def stream_layers(own: Any) -> dict[str, tuple[int, int]]:
    """The linears that `streams` asks a host about, as those of a diffusers model make them."""
    found: dict[str, tuple[int, int]] = {}
    for i in range(len(own.transformer_blocks)):
        found[f"double_blocks.{i}.img_attn.proj"] = size_of(
            own, f"transformer_blocks.{i}.attn.to_out.0"
        )
    for i in range(len(getattr(own, "single_transformer_blocks", ()))):
        name, host = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        width = size_of(own, f"{name}.attn.to_q")[1]
        rows = 3 * width + size_of(own, f"{name}.proj_mlp")[0]
        found[f"{host}.linear1"] = rows, width
        found[f"{host}.linear2"] = size_of(own, f"{name}.proj_out")
    return found
