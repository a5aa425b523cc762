"""The networks of the demo models: how they are built, normalised, saved and loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from recipe_text import build_clip, build_clip_tokenizer, build_t5, build_t5_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

Size = str  # "demo" or "tiny"


def build_autoencoder(size: Size) -> AutoencoderKL:
    """An f=4 autoencoder with 4 latent channels and no attention (4.9 M parameters)."""
    channels, groups = {"demo": ((64, 128, 160), 32), "tiny": ((8, 16, 16), 4)}[size]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=groups,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def build_transformer(size: Size) -> PixArtTransformer2DModel:
    """A PixArt transformer over 16 x 16 x 4 latents (22.6 M parameters)."""
    layers, heads, head, text = {"demo": (9, 6, 64, 256), "tiny": (2, 2, 16, 32)}[size]
    model = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head, num_layers=layers,
        in_channels=4, out_channels=4, sample_size=16, patch_size=2,
        cross_attention_dim=heads * head, caption_channels=text, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    return model


def build_unet(size: Size) -> UNet2DConditionModel:
    """A U-Net over 16 x 16 x 4 latents: 16 x 16 convolutional, 8 x 8 with attention (10 M)."""
    channels, heads, groups, text = {
        "demo": ((128, 192), 3, 32, 192),
        "tiny": ((16, 32), 2, 4, 32),
    }[size]
    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels, cross_attention_dim=text,
        attention_head_dim=heads, norm_num_groups=groups,
    )  # fmt: skip
    nn.init.zeros_(model.conv_out.weight)
    for module in model.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
    return model.to(memory_format=torch.channels_last)


def build_scheduler(steps_offset: int = 0) -> DDIMScheduler:
    """DDIM over a cosine schedule, v-prediction. Trailing timesteps do not look at the offset."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=True, steps_offset=steps_offset, timestep_spacing="trailing",
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One model: how its parts are built, read and called."""

    part: str  # the denoiser's name in the pipeline
    build: Callable[[Size], nn.Module]
    read: Callable[..., nn.Module]
    build_tokenizer: Callable[[list[list[str]]], Any]
    read_tokenizer: Callable[..., Any]
    build_text: Callable[[Size, Any], nn.Module]
    read_text: Callable[..., nn.Module]
    pipeline: Callable[..., Any]
    compiled: Callable[[Any], list[nn.Module]]  # what is compiled, one by one
    masked: bool = False  # whether padding is masked in the encoder and the denoiser
    steps_offset: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # arguments of the pipeline's class
    call: dict[str, Any] = field(default_factory=dict)  # arguments of every pipeline call


KINDS = {
    "transformer": Kind(
        part="transformer",
        build=build_transformer,
        read=PixArtTransformer2DModel.from_pretrained,
        build_tokenizer=build_t5_tokenizer,
        read_tokenizer=T5Tokenizer.from_pretrained,
        build_text=build_t5,
        read_text=T5EncoderModel.from_pretrained,
        pipeline=PixArtAlphaPipeline,
        compiled=lambda model: list(model.transformer_blocks),
        masked=True,
        call={"use_resolution_binning": False, "clean_caption": False},
    ),
    "unet": Kind(
        part="unet",
        build=build_unet,
        read=UNet2DConditionModel.from_pretrained,
        build_tokenizer=build_clip_tokenizer,
        read_tokenizer=CLIPTokenizer.from_pretrained,
        build_text=build_clip,
        read_text=CLIPTextModel.from_pretrained,
        pipeline=StableDiffusionPipeline,
        compiled=lambda model: [model],  # its blocks differ: one graph compiles sooner
        steps_offset=1,  # the stock pipeline asks for it
        extra={
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
        },
    ),
}  # fmt: skip


class TextToImage(nn.Module):
    """A denoiser and its text encoder, trained together."""

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module, masked: bool) -> None:
        super().__init__()
        self.denoiser, self.text_encoder, self.masked = denoiser, text_encoder, masked

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The predicted velocity (B, 4, 16, 16)."""
        kept = mask if self.masked else None
        text = self.text_encoder(ids, attention_mask=kept)[0]
        return self.denoiser(
            noisy, timestep=timestep, encoder_hidden_states=text, encoder_attention_mask=kept,
            return_dict=False,
        )[0]  # fmt: skip


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' channel means and deviations (4,) into the 1 x 1 convolutions, in place."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.bias[4:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder beside `folder`, then put it in its place."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    fill(new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_half(model: nn.Module, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save a model in fp16, optionally with other `weights`; its own are left as they are."""
    state = weights if weights is not None else model.state_dict()
    state = {k: v.detach().cpu().half().contiguous() for k, v in state.items()}
    copy = type(model).from_config(model.config) if hasattr(model, "from_config") else None
    copy = copy if copy is not None else type(model)(model.config)
    missing = copy.half().load_state_dict(state, strict=False).missing_keys
    if set(missing) - {"encoder.embed_tokens.weight"}:  # tied to shared.weight
        raise ValueError(f"weights are missing: {missing}")
    copy.save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:  # stored as fp16, loaded as fp32 unless the caller asks otherwise
        config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + os.linesep)


def save_pipeline(
    folder: Path, kind: Kind, vae: AutoencoderKL, denoiser: nn.Module, text_encoder: nn.Module,
    tokenizer: Any, weights: dict[str, Tensor], settings: dict[str, object], flow: bool = False,
) -> None:  # fmt: skip
    """Save a diffusers folder in fp16; `weights` are those of a `TextToImage`.

    With `flow` its scheduler is Euler's of flow matching, which these pipelines do not call as it
    is: `benchmarks/flow_demo.py` has one that they do.
    """

    def pick(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def fill(new: Path) -> None:
        noise = build_scheduler(kind.steps_offset)
        scheduler = FlowMatchEulerDiscreteScheduler() if flow else noise
        parts = {kind.part: denoiser, "vae": vae, "scheduler": scheduler} | kind.extra
        pipeline = kind.pipeline(tokenizer=tokenizer, text_encoder=text_encoder, **parts)
        pipeline.save_config(new)
        tokenizer.save_pretrained(new / "tokenizer")
        scheduler.save_pretrained(new / "scheduler")
        save_half(vae, new / "vae")
        save_half(denoiser, new / kind.part, pick("denoiser."))
        save_half(text_encoder, new / "text_encoder", pick("text_encoder."))
        (new / "tenuto.json").write_text(json.dumps(settings) + os.linesep)

    replace_folder(folder, fill)
