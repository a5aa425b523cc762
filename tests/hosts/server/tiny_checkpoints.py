"""Tiny random checkpoints that ComfyUI's own loaders accept: tiny_checkpoints.py ROOT MODELS.

The classes are those of the ComfyUI in ROOT, so that every file has the keys and shapes which that
version expects; detection fixes widths, the rest is as small as runs. A file that is there is kept.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILES = {
    "sd15": "checkpoints/tiny_sd15", "sd3": "checkpoints/tiny_sd3",
    "pixart": "diffusion_models/tiny_pixart", "flux": "diffusion_models/tiny_flux",
    "clip": "text_encoders/tiny_clip_l", "vae4": "vae/tiny_taesd4", "vae16": "vae/tiny_taesd16",
}  # fmt: skip


def values(module: nn.Module, draw: torch.Generator, prefix: str = "") -> dict[str, Tensor]:
    """Random fp16 weights of `module` under `prefix`; activations stay finite through any depth."""
    found = {}
    for name, old in module.state_dict().items():
        noise = torch.randn(old.shape, generator=draw) if old.is_floating_point() else old
        if name.endswith(("vae_scale", "vae_shift")):
            noise = torch.full(old.shape, float(name.endswith("scale")))
        elif old.is_floating_point() and old.ndim >= 2:
            table = "embedding" in name and "patch" not in name
            noise = noise * 0.7 * (0.02 if table else old[0].numel() ** -0.5)
        elif old.is_floating_point():
            noise = noise * 0.05 + float(name.endswith(("weight", "scale")))
        half = noise.half() if noise.is_floating_point() else noise
        found[prefix + name] = half.contiguous()
    return found


def unet(make: dict[str, Any]) -> nn.Module:
    """320 channels, context 768 and a convolutional proj_in make it SD 1.5."""
    kind = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    return kind(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, channel_mult=[1, 1],
        num_res_blocks=[1, 1], use_spatial_transformer=True, transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=768,
        num_heads=8, num_head_channels=-1, use_linear_in_transformer=False, use_checkpoint=False,
        legacy=False, **make,
    )  # fmt: skip


def mmdit(make: dict[str, Any]) -> nn.Module:
    """Width is 64 times depth."""
    kind = importlib.import_module("comfy.ldm.modules.diffusionmodules.mmdit").MMDiT
    context = {"in_features": 4096, "out_features": 128}
    return kind(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=2,
        adm_in_channels=2048, num_patches=64 * 64, pos_embed_max_size=64,
        pos_embed_scaling_factor=None, qk_norm="rms",
        context_embedder_config={"target": "torch.nn.Linear", "params": context}, **make,
    )  # fmt: skip


def pixart(make: dict[str, Any]) -> nn.Module:
    """Two blocks; needs images of 272 pixels or more."""
    kind = importlib.import_module("comfy.ldm.pixart.pixartms").PixArtMS
    return kind(depth=2, micro_condition=False, model_max_length=300, **make)


def flux(make: dict[str, Any]) -> nn.Module:
    """One block of each sort, at full width: 1.1 GB."""
    model = importlib.import_module("comfy.ldm.flux.model")
    later = {field.name for field in dataclasses.fields(model.FluxParams)} & {"txt_ids_dims"}
    return model.Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096,
        hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=1,
        axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=False,
        **{key: [] for key in later}, **make,
    )  # fmt: skip


def clip(draw: torch.Generator, prefix: str = "") -> dict[str, Tensor]:
    """A whole CLIP-L: of missing keys ComfyUI only warns, and computes with what memory holds."""
    model = importlib.import_module("comfy.sd1_clip").SDClipModel(device="cpu", dtype=torch.float32)
    found = values(model.transformer, draw, prefix)
    return found | {f"{prefix}text_projection.weight": torch.eye(768).half()}


def taesd(draw: torch.Generator, channels: int, prefix: str = "") -> dict[str, Tensor]:
    """A tiny autoencoder."""
    kind = importlib.import_module("comfy.taesd.taesd").TAESD
    return values(kind(latent_channels=channels), draw, prefix)


def built(kind: str, draw: torch.Generator, make: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of one file."""
    makers: dict[str, Callable[..., nn.Module]] = {
        "sd15": unet, "sd3": mmdit, "pixart": pixart, "flux": flux,
    }  # fmt: skip
    if kind == "clip":
        return clip(draw)
    if kind.startswith("vae"):
        return taesd(draw, int(kind[3:]))
    whole = kind in ("sd15", "sd3")
    found = values(makers[kind](make), draw, "model.diffusion_model." if whole else "")
    if whole:
        text = "cond_stage_model." if kind == "sd15" else "text_encoders.clip_l."
        found |= clip(draw, f"{text}transformer.")
        found |= taesd(draw, 4 if kind == "sd15" else 16, "first_stage_model.")
    return found


def missing(models: Path) -> Iterator[tuple[str, Path]]:
    """(kind, path) of what is not there yet."""
    for kind, name in FILES.items():
        path = models / f"{name}.safetensors"
        if not path.exists():
            yield kind, path


@torch.no_grad()
def main(root: str, models: Path) -> None:
    """Write what is missing, each file whole or not at all."""
    wanted = list(missing(models))
    if not wanted:
        return
    sys.path.insert(0, root)
    sys.argv = [sys.argv[0], "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    operations = importlib.import_module("comfy.ops").disable_weight_init
    for kind, path in wanted:
        draw = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(built(kind, draw, {"dtype": torch.float32, "operations": operations}), part)
        part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
