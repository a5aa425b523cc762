"""The networks of the demo models: how they are built, normalised, saved and loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

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


def build_text_encoder(size: Size, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 v1.1 encoder (1.9 M parameters) for `tokenizer`."""
    width, inner, layers, heads = {"demo": (256, 384, 3, 4), "tiny": (32, 48, 1, 2)}[size]
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        d_model=width, d_kv=width // heads, d_ff=inner, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1, dtype="float32",
    )  # fmt: skip
    return T5EncoderModel(config)


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


def build_scheduler() -> DDIMScheduler:
    """DDIM over a cosine schedule, v-prediction."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=True, steps_offset=0, timestep_spacing="trailing",
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One denoiser: its builder, its pipeline and the names that these use."""

    part: str  # the denoiser's name in the pipeline
    build: Callable[[Size], nn.Module]
    read: Callable[..., nn.Module]
    pipeline: Callable[..., object]
    blocks: Callable[[nn.Module], list[nn.Module]]  # what is compiled, one by one
    call: dict[str, object]  # arguments of every pipeline call


KINDS = {
    "transformer": Kind(
        "transformer",
        build_transformer,
        PixArtTransformer2DModel.from_pretrained,
        PixArtAlphaPipeline,
        lambda model: list(model.transformer_blocks),
        {"use_resolution_binning": False, "clean_caption": False},
    ),
}


class TextToImage(nn.Module):
    """A denoiser and its text encoder, trained together."""

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The predicted velocity (B, 4, 16, 16)."""
        text = self.text_encoder(ids, attention_mask=mask)[0]
        return self.denoiser(
            noisy, timestep=timestep, encoder_hidden_states=text, encoder_attention_mask=mask,
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
    tokenizer: T5Tokenizer, weights: dict[str, Tensor], settings: dict[str, object],
) -> None:  # fmt: skip
    """Save an ordinary diffusers folder in fp16; `weights` are those of a `TextToImage`."""

    def pick(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def fill(new: Path) -> None:
        parts = {kind.part: denoiser, "vae": vae, "scheduler": build_scheduler()}
        pipeline = kind.pipeline(tokenizer=tokenizer, text_encoder=text_encoder, **parts)
        pipeline.save_config(new)
        tokenizer.save_pretrained(new / "tokenizer")
        parts["scheduler"].save_pretrained(new / "scheduler")
        save_half(vae, new / "vae")
        save_half(denoiser, new / kind.part, pick("denoiser."))
        save_half(text_encoder, new / "text_encoder", pick("text_encoder."))
        (new / "tenuto.json").write_text(json.dumps(settings) + os.linesep)

    replace_folder(folder, fill)
