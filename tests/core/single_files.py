"""Checkpoints in one file, as programs other than diffusers have them, made of tiny pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tenuto.artifact.export.comfy import keys_of
from tenuto.model import swapped
from tests.core import family_pipelines, tiny_pipelines

CODER = (  # of the autoencoder: how a name of diffusers' begins or goes on, and ldm's own
    (r"\.mid_block\.resnets\.0", ".mid.block_1"), (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
)  # fmt: skip
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_LAYERS = (
    ("text_model.encoder.layers.", "resblocks."), ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
)  # fmt: skip


def denoiser(module: nn.Module, prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """In the names of ComfyUI, by the family's own key map."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, place in keys_of(module).places.items():
        tensor = module.state_dict()[name]
        tensor = swapped(tensor) if place.swapped else tensor
        parts.setdefault(prefix + place.name, []).append((place.rows[0], tensor))
    return {
        name: torch.cat([x for _, x in sorted(rows, key=lambda row: row[0])])
        if len(rows) > 1
        else rows[0][1]
        for name, rows in parts.items()
    }


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


def clip(model: Any, prefix: str) -> dict[str, Tensor]:
    """A text encoder as it is in files of Stable Diffusion 1.5, SDXL (the first) and 3."""
    text = model.state_dict()
    known = "" if any(name.startswith("text_model.") for name in text) else "text_model."
    return {f"{prefix}transformer.{known}{name}": x for name, x in text.items()}


def open_clip(model: Any, prefix: str) -> dict[str, Tensor]:
    """A text encoder as it is in files of Stable Diffusion 2 and SDXL (the second)."""
    found, text = dict[str, Tensor](), dict(model.state_dict())
    for name, own in OPEN_CLIP.items():
        tensor = text.pop(name)
        found[f"{prefix}{own}"] = tensor.T if own == "text_projection" else tensor
    for name in [name for name in text if ".q_proj." in name]:
        parts = [text.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        text[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
    for name, tensor in text.items():
        for pattern, own in OPEN_LAYERS:
            name = name.replace(pattern, own)
        found[f"{prefix}transformer.{name}"] = tensor
    return found


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    """A file with these tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, path)
    return path


def stable_diffusion_file(pipe: Any, path: Path) -> Path:
    """A checkpoint of Stable Diffusion 1.5 with all its parts."""
    text = clip(pipe.text_encoder, "cond_stage_model.")
    return written(denoiser(pipe.unet) | autoencoder(pipe.vae) | text, path)


def sdxl_file(pipe: Any, path: Path) -> Path:
    """A checkpoint of SDXL with all its parts."""
    text = clip(pipe.text_encoder, "conditioner.embedders.0.")
    text |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return written(denoiser(pipe.unet) | autoencoder(pipe.vae) | text, path)


def sd3_file(pipe: Any, path: Path) -> Path:
    """A checkpoint of Stable Diffusion 3 with all its parts; of T5 where the pipeline has it."""
    text = clip(pipe.text_encoder, "text_encoders.clip_l.")
    text |= clip(pipe.text_encoder_2, "text_encoders.clip_g.")
    if pipe.text_encoder_3 is not None:
        text |= t5(pipe.text_encoder_3)
    return written(denoiser(pipe.transformer) | autoencoder(pipe.vae) | text, path)


def flux_file(pipe: Any, path: Path) -> Path:
    """A checkpoint of FLUX with all its parts, as ComfyUI saves one."""
    text = clip(pipe.text_encoder, "text_encoders.clip_l.") | t5(pipe.text_encoder_2)
    coder = {
        name.replace("first_stage_model.", "vae."): x for name, x in autoencoder(pipe.vae).items()
    }
    return written(denoiser(pipe.transformer) | coder | text, path)


def t5(model: Any) -> dict[str, Tensor]:
    """A T5 encoder as it is in files of Stable Diffusion 3 and FLUX, which have its words once."""
    own = {name: x for name, x in model.state_dict().items() if "embed_tokens" not in name}
    return {f"text_encoders.t5xxl.transformer.{name}": x for name, x in own.items()}


def sdxl() -> Any:
    """Tiny SDXL; as in the real one, its text encoders differ in width."""
    pipe = family_pipelines.sdxl().model
    return type(pipe)(**pipe.components | {"text_encoder_2": wide_clip()}, add_watermarker=False)


def sd3(with_t5: bool = False) -> Any:
    """Tiny Stable Diffusion 3 (with T5: 3.5 medium), made as its files want it."""
    pipe = (family_pipelines.sd35() if with_t5 else family_pipelines.sd3()).model
    pipe = type(pipe)(**pipe.components | {"text_encoder_2": wide_clip()})
    torch.nn.init.eye_(pipe.text_encoder.text_projection.weight)  # files have none
    return pipe


def wide_clip() -> nn.Module:
    """A second CLIP encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=24,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return tiny_pipelines.randomized(CLIPTextModelWithProjection(config))
