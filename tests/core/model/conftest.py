"""Tiny models of the real classes of diffusers, random and of fixed seeds, and one call of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

B, T, SIDE = 2, 7, 4  # rows, text tokens, tokens of a side of the image


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def some(self) -> Tensor:
        """A positive number a row: a guidance scale."""
        return 1 + torch.rand(B, generator=self.generator) * 4


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers, a small configuration, and its inputs at noise level `t` in (0, 1)."""

    kind: str
    config: dict[str, Any]
    inputs: Callable[[Draw, float], dict[str, Any]]


def rows(t: float) -> Tensor:
    return torch.full((B,), t)


def places(axes: int) -> Tensor:
    """Row and column of every image token in the last two of `axes` (or the middle of four)."""
    found = torch.zeros(SIDE * SIDE, axes)
    row = 1 if axes == 4 else axes - 2
    found[:, row] = torch.arange(SIDE).repeat_interleave(SIDE)
    found[:, row + 1] = torch.arange(SIDE).repeat(SIDE)
    return found


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = HEADS | {"in_channels": 8, "num_layers": 2, "num_single_layers": 2}


# --- the calls ------------------------------------------------------------------------------------


def packed(draw: Draw, t: float, axes: int = 3, **more: Any) -> dict[str, Any]:
    """Image tokens, text tokens and where they are: the FLUX models and their kin."""
    return {
        "hidden_states": draw(B, SIDE**2, 8),
        "encoder_hidden_states": draw(B, T, 24),
        "timestep": rows(t),
        "img_ids": places(axes),
        "txt_ids": torch.zeros(T, axes),
        **more,
    }


def qwen(draw: Draw, t: float) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, SIDE**2, 8),
        "encoder_hidden_states": draw(B, T, 24),
        "encoder_hidden_states_mask": torch.ones(B, T, dtype=torch.int64),
        "timestep": rows(t),
        "img_shapes": [[(1, SIDE, SIDE)]] * B,
    }


def qwen_edit(draw: Draw, t: float) -> dict[str, Any]:
    both = {"hidden_states": draw(B, 2 * SIDE**2, 8), "img_shapes": [[(1, SIDE, SIDE)] * 2] * B}
    return qwen(draw, t) | both


def qwen_21(draw: Draw, t: float) -> dict[str, Any]:
    slots = SIDE**2 // 4  # a slot of the encoder's is 2 x 2 tokens
    mask = torch.arange(T + slots).expand(B, -1) >= T
    return qwen(draw, t) | {
        "img_mask": mask,
        "encoder_hidden_states_mask": torch.ones(B, T, dtype=torch.bool),
    }


def z_image(draw: Draw, t: float) -> dict[str, Any]:
    """Lists: a tensor a row, texts of different lengths; the timestep rises."""
    return {
        "x": [draw(4, 1, 8, 8) for _ in range(B)],
        "t": rows(1 - t),
        "cap_feats": [draw(T + i, 24) for i in range(B)],
    }


def wan(draw: Draw, t: float, channels: int = 4, text: int = T, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, channels, 3, 8, 8),
        "timestep": rows(1000 * t).long(),
        "encoder_hidden_states": draw(B, text, 24),
        **more,
    }


def krea(draw: Draw, t: float) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, SIDE**2, 8),
        "encoder_hidden_states": draw(B, T, 3, 24),
        "timestep": rows(t),
        "position_ids": torch.cat([torch.zeros(T, 3), places(3)]),
        "encoder_attention_mask": torch.ones(B, T, dtype=torch.bool),
    }


def ltx(draw: Draw, t: float, widths: tuple[int, int] = (24, 24)) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 2 * SIDE**2, 8),
        "audio_hidden_states": draw(B, 9, 8),
        "encoder_hidden_states": draw(B, T, widths[0]),
        "audio_encoder_hidden_states": draw(B, T, widths[1]),
        "timestep": rows(1000 * t),
        "sigma": rows(1000 * t),
        "num_frames": 2, "height": SIDE, "width": SIDE, "audio_num_frames": 9,
    }  # fmt: skip


def hunyuan(draw: Draw, t: float, *shape: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, *shape),
        "timestep": rows(1000 * t),
        "encoder_hidden_states": draw(B, T, 24),
        "encoder_attention_mask": torch.ones(B, T),
        **more,
    }


def second_text(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(B, 5)
    return {"encoder_hidden_states_2": draw(B, 5, 20), "encoder_attention_mask_2": mask}


def lumina(draw: Draw, t: float) -> dict[str, Any]:
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 5:] = 0
    return {
        "hidden_states": draw(B, 4, 8, 8),
        "timestep": rows(1 - t),
        "encoder_hidden_states": draw(B, T, 24),
        "encoder_attention_mask": mask,
    }


def latent(draw: Draw, t: float, **more: Any) -> dict[str, Any]:
    """An image of 4 channels under a prompt."""
    text = {"encoder_hidden_states": draw(B, T, 24)}
    return {"hidden_states": draw(B, 4, 8, 8), "timestep": rows(1000 * t), **text, **more}


def hidream(draw: Draw, t: float) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 4, 8, 8),
        "timesteps": rows(1000 * t),
        "encoder_hidden_states_t5": draw(B, T, 24),
        "encoder_hidden_states_llama3": draw(2, B, T, 20),
        "pooled_embeds": draw(B, 12),
    }


def minimax(draw: Draw, t: float) -> dict[str, Any]:
    """One packed row: text at t = 0, then video and audio at t."""
    video, audio = 2 * 4, 6
    kinds = torch.tensor([1] * T + [0] * video + [2] * audio)
    places = torch.arange(len(kinds))
    return {
        "hidden_states": draw(1, video, 16),
        "audio_hidden_states": draw(1, audio, 8),
        "encoder_hidden_states": draw(1, T, 24),
        "timestep": torch.tensor([0.0, 1000 * t]),
        "timestep_indices": (places >= T).long(),
        "token_tags": kinds,
        "position_ids": places[:, None].repeat(1, 3).float(),
        "text_indices": places[:T],
        "video_indices": places[T : T + video],
        "audio_indices": places[T + video :],
    }


def cosmos(draw: Draw, t: float) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 4, 1, 8, 8),
        "timestep": rows(t),
        "encoder_hidden_states": draw(B, T, 24),
        "padding_mask": torch.zeros(1, 1, 8, 8),
    }


# --- the families ---------------------------------------------------------------------------------

QWEN = HEADS | {
    "patch_size": 2, "in_channels": 8, "out_channels": 2, "num_layers": 2,
    "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
FLUX2 = FLUX | {
    "patch_size": 1, "joint_attention_dim": 24, "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
LTX2 = HEADS | {
    "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "audio_in_channels": 8,
    "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 24,
    "rope_double_precision": False,
}  # fmt: skip
GATED = {
    "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "perturbed_attn": True,
    "audio_cross_attn_mod": True, "use_prompt_embeddings": False,
}  # fmt: skip
HUNYUAN = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1,
    "text_embed_dim": 24, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
VIDEO = HUNYUAN | {"num_single_layers": 2, "pooled_projection_dim": 12, "patch_size": 2}
VIDEO15 = HUNYUAN | {
    "in_channels": 9, "patch_size": 1, "patch_size_t": 1, "text_embed_2_dim": 20,
    "image_embed_dim": 12, "target_size": 64,
}  # fmt: skip
IMAGE = HUNYUAN | {"num_single_layers": 2, "patch_size": (1, 1), "rope_axes_dim": (8, 8)}
SANA = {
    "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 3, "num_cross_attention_heads": 3, "cross_attention_head_dim": 8,
    "cross_attention_dim": 24, "caption_channels": 24, "sample_size": 8,
}  # fmt: skip
FAMILIES: dict[str, Tiny] = {
    "qwen_image": Tiny("QwenImageTransformer2DModel", QWEN, qwen),
    "qwen_image edit": Tiny("QwenImageTransformer2DModel", QWEN | {"zero_cond_t": True}, qwen_edit),
    "qwen_image 2.1": Tiny(
        "QwenImage21Transformer2DModel",
        HEADS | {
            "patch_size": 1, "in_channels": 8, "out_channels": 8, "num_layers": 2,
            "context_in_dim": 24, "mlp_ratio": 3, "axes_dims_rope": (4, 6, 6),
        },
        qwen_21,
    ),
    "z_image": Tiny(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2,
            "n_kv_heads": 2, "cap_feat_dim": 24, "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        z_image,
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        FLUX2 | {"guidance_embeds": True},
        lambda draw, t: packed(draw, t, axes=4, guidance=draw.some()),
    ),
    "flux2 klein": Tiny(
        "Flux2Transformer2DModel",
        FLUX2 | {"guidance_embeds": False},
        lambda draw, t: packed(draw, t, axes=4),
    ),
    "flux3": Tiny(
        "Flux3Transformer2DModel",
        FLUX | {
            "cond_in_channels": 8, "joint_attention_dim": 24, "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda draw, t: packed(draw, t, axes=4),
    ),
    "wan": Tiny("WanTransformer3DModel", WAN, wan),
    "wan image-to-video": Tiny(
        "WanTransformer3DModel",
        WAN | {"in_channels": 12, "image_dim": 12, "added_kv_proj_dim": 24},
        lambda draw, t: wan(draw, t, 12, 512, encoder_hidden_states_image=draw(B, 5, 12)),
    ),
    "wan vace": Tiny(
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0, 1], "vace_in_channels": 6},
        lambda draw, t: wan(draw, t, control_hidden_states=draw(B, 6, 3, 8, 8)),
    ),
    "wan chronoedit": Tiny("ChronoEditTransformer3DModel", WAN, wan),
    "wan skyreels": Tiny(
        "SkyReelsV2Transformer3DModel",
        WAN | {"inject_sample_info": True},
        lambda draw, t: wan(draw, t, fps=[0, 1]),
    ),
    "krea2": Tiny(
        "Krea2Transformer2DModel",
        HEADS | {
            "in_channels": 8, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 48,
            "timestep_embed_dim": 32, "text_hidden_dim": 24, "num_text_layers": 3,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
            "text_intermediate_size": 32, "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2, "axes_dims_rope": (4, 6, 6),
        },
        krea,
    ),
    "ltx2": Tiny("LTX2VideoTransformer3DModel", LTX2, ltx),
    "ltx2 gated": Tiny(
        "LTX2VideoTransformer3DModel", LTX2 | GATED, lambda draw, t: ltx(draw, t, (32, 16))
    ),
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        FLUX | {
            "patch_size": 1, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 32, "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        lambda draw, t: packed(draw, t, attention_mask=torch.ones(B, T + SIDE**2)),
    ),
    "hunyuan_video": Tiny(
        "HunyuanVideoTransformer3DModel",
        VIDEO | {"patch_size_t": 1, "guidance_embeds": True},
        lambda draw, t: hunyuan(
            draw, t, 4, 2, 8, 8, pooled_projections=draw(B, 12), guidance=1000 * draw.some()
        ),
    ),
    "hunyuan_video first frame": Tiny(
        "HunyuanVideoTransformer3DModel",
        VIDEO | {"guidance_embeds": False, "image_condition_type": "token_replace"},
        lambda draw, t: hunyuan(draw, t, 4, 2, 8, 8, pooled_projections=draw(B, 12)),
    ),
    "hunyuan_video 1.5": Tiny(
        "HunyuanVideo15Transformer3DModel",
        VIDEO15,
        lambda draw, t: hunyuan(
            draw, t, 9, 2, 4, 4, **second_text(draw), image_embeds=torch.zeros(B, 3, 12)
        ),
    ),
    "hunyuan_image": Tiny(
        "HunyuanImageTransformer2DModel",
        IMAGE | {"text_embed_2_dim": 20},
        lambda draw, t: hunyuan(draw, t, 4, 4, 4, **second_text(draw)),
    ),
    "hunyuan_image distilled": Tiny(
        "HunyuanImageTransformer2DModel",
        IMAGE | {"guidance_embeds": True, "use_meanflow": True},
        lambda draw, t: hunyuan(
            draw, t, 4, 4, 4, guidance=1000 * draw.some(), timestep_r=100 * draw.some()
        ),
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24,
            "num_layers": 2, "num_refiner_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1,
            "multiple_of": 8, "axes_dim_rope": (4, 4, 4), "axes_lens": (64, 16, 16),
            "cap_feat_dim": 24,
        },
        lumina,
    ),
    "sana": Tiny("SanaTransformer2DModel", SANA, latent),
    "sana sprint": Tiny(
        "SanaTransformer2DModel",
        SANA | {"guidance_embeds": True},
        lambda draw, t: latent(draw, t, guidance=draw.some()),
    ),
    "hidream": Tiny(
        "HiDreamImageTransformer2DModel",
        HEADS | {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "num_single_layers": 2, "caption_channels": [24, 20], "text_emb_dim": 12,
            "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16), "llama_layers": [0, 1, 1, 0],
        },
        hidream,
    ),
    "minimax_h3": Tiny(
        "MiniMaxH3Transformer3DModel",
        HEADS | {
            "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 48,
            "in_channels": 4, "audio_in_channels": 8, "patch_size": (1, 2, 2), "text_dim": 24,
            "freq_dim": 32, "time_embed_hidden_dim": 24, "time_embed_dim": 12, "rope_freq_dim": 2,
        },
        minimax,
    ),
    "anima": Tiny(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 24, "adaln_lora_dim": 8,
            "max_size": (4, 16, 16), "rope_scale": (1.0, 4.0, 4.0), "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        cosmos,
    ),
    "sd3 medium": Tiny(
        "SD3Transformer2DModel",
        HEADS | {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
            "pooled_projection_dim": 12, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        lambda draw, t: latent(draw, t, pooled_projections=draw(B, 12)),
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        FLUX | {
            "patch_size": 1, "joint_attention_dim": 24, "pooled_projection_dim": 12,
            "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
        },
        lambda draw, t: packed(
            draw, t, pooled_projections=draw(B, 12), guidance=draw.some()
        ),
    ),
}  # fmt: skip


# --- models that no family knows ------------------------------------------------------------------

UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4,
}  # fmt: skip
CROSS = {"cross_attention_dim": 24, "attention_head_dim": 4}


def sample(draw: Draw, t: float, *shape: int, **more: Any) -> dict[str, Any]:
    return {"sample": draw(B, *shape), "timestep": rows(1000 * t), **more}


def text(draw: Draw, frames: int = 1) -> dict[str, Any]:
    """A prompt for every frame."""
    return {"encoder_hidden_states": draw(B, T, 24).repeat_interleave(frames, dim=0)}


UNKNOWN: dict[str, Tiny] = {
    "unet 2d": Tiny(
        "UNet2DModel",
        UNET | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4,
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda draw, t: sample(draw, t, 3, 8, 8),
    ),
    "unet motion": Tiny(
        "UNetMotionModel",
        UNET | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 24, "num_attention_heads": 2, "motion_num_attention_heads": 2,
        },
        lambda draw, t: sample(draw, t, 4, 3, 8, 8, **text(draw, 3)),
    ),
    "unet 3d": Tiny(
        "UNet3DConditionModel",
        UNET | CROSS | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda draw, t: sample(draw, t, 4, 3, 8, 8, **text(draw)),
    ),
    "unet image-to-video": Tiny(
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 24, "num_attention_heads": (2, 4), "num_frames": 3,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
        },
        lambda draw, t: sample(draw, t, 3, 8, 8, 8, **text(draw), added_time_ids=draw(B, 3)),
    ),
    "unet kandinsky 3": Tiny(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2,
            "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 24, "encoder_hid_dim": 24,
        },
        lambda draw, t: sample(
            draw, t, 4, 8, 8, **text(draw), encoder_attention_mask=torch.ones(B, T)
        ),
    ),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24,
            "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
            "max_text_seq_length": T,
        },
        lambda draw, t: latent(draw, t, hidden_states=draw(B, 3, 4, 8, 8)),
    ),
    "auraflow": Tiny(
        "AuraFlowTransformer2DModel",
        HEADS | {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2,
            "num_single_dit_layers": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        latent,
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        HEADS | {
            "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2,
            "caption_channels": 24,
        },
        lambda draw, t: latent(
            draw, t, hidden_states=draw(B, 2 * SIDE**2, 8), num_frames=2, height=SIDE, width=SIDE,
            encoder_attention_mask=torch.ones(B, T, dtype=torch.int64),
        ),
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        HEADS | {
            "patch_size": 2, "num_layers": 2, "pooled_projection_dim": 12, "in_channels": 4,
            "text_embed_dim": 24, "time_embed_dim": 8, "max_sequence_length": T,
        },
        lambda draw, t: latent(
            draw, t, hidden_states=draw(B, 4, 2, 8, 8),
            encoder_attention_mask=torch.ones(B, T, dtype=torch.bool),
        ),
    ),
}  # fmt: skip


# --- fixtures -------------------------------------------------------------------------------------


def built(tiny: Tiny) -> nn.Module:
    """The model, of the same weights each time; zeros are filled: they would hide faults."""
    import diffusers

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # those of diffusers
        torch.manual_seed(0)
        model = getattr(diffusers, tiny.kind)(**tiny.config).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """A tiny model and its calls."""

    name: str
    tiny: Tiny
    model: nn.Module

    def inputs(self, seed: int = 0, t: float = 0.7) -> dict[str, Any]:
        """Everything but the timestep is of this seed."""
        return self.tiny.inputs(Draw(seed), t)

    def __call__(self, seed: int = 0, t: float = 0.7) -> Any:
        """The model's answer."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of diffusers and torch
            return self.model(**self.inputs(seed, t))


@pytest.fixture(params=FAMILIES, scope="module")
def known(request: pytest.FixtureRequest) -> Case:
    """Each model that a family file covers."""
    return Case(request.param, FAMILIES[request.param], built(FAMILIES[request.param]))


@pytest.fixture(params=UNKNOWN, scope="module")
def unknown(request: pytest.FixtureRequest) -> Case:
    """Each model that no family file covers."""
    return Case(request.param, UNKNOWN[request.param], built(UNKNOWN[request.param]))


@pytest.fixture(scope="session")
def odd() -> Callable[[str], Case]:
    """Any one of both, by its name."""
    every = FAMILIES | UNKNOWN
    return lambda name: Case(name, every[name], built(every[name]))


@pytest.fixture(scope="session")
def covered() -> set[str]:
    """The names of the families in `FAMILIES`."""
    return {name.split()[0] for name in FAMILIES}
