"""Checkpoints in one file, as programs other than diffusers have them, made of tiny pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from tenuto.artifact.export.comfy import keys_of

CODER = (  # of the autoencoder: how a name of diffusers' begins or goes on, and ldm's own
    (r"\.mid_block\.resnets\.0", ".mid.block_1"), (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
)  # fmt: skip


def denoiser(module: nn.Module, prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """In the names of ComfyUI, by the family's own key map."""
    places = keys_of(module).places
    return {f"{prefix}{places[name].name}": x for name, x in module.state_dict().items()}


def autoencoder(module: Any) -> dict[str, Tensor]:
    """In the names of ldm, without attention."""
    found, count = {}, len(module.decoder.up_blocks)
    for name, tensor in module.state_dict().items():
        for pattern, own in CODER:
            name = re.sub(pattern, own, name)
        up = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)(.*)", name)
        if up:
            what = "upsample" if up[3] is None else f"block.{up[3]}"
            name = f"decoder.up.{count - 1 - int(up[1])}.{what}{up[4]}"
        found[f"first_stage_model.{name}"] = tensor
    return found


def stable_diffusion_file(pipe: Any, path: Path) -> Path:
    """A checkpoint of Stable Diffusion 1.5 with all its parts."""
    text = pipe.text_encoder.state_dict()
    found = denoiser(pipe.unet) | autoencoder(pipe.vae)
    known = "" if any(name.startswith("text_model.") for name in text) else "text_model."
    found |= {f"cond_stage_model.transformer.{known}{name}": x for name, x in text.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in found.items()}, path)
    return path
