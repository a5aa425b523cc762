"""Tiny denoisers of classes of diffusers that no family file knows, newer ones among them."""

from __future__ import annotations

from typing import Any

import torch

from tests.core.model.conftest import HEADS, B, Draw, T, Tiny, places, rows

TEXT = 24  # width of a text's states
PLACE = 65536  # where Ideogram 4 counts the places of an image from
OF_TEXT, OF_IMAGE = 3, 2  # Ideogram 4's marks of a token


def image(draw: Draw, t: float, channels: int = 4, **more: Any) -> dict[str, Any]:
    """An image of 8 x 8 latents, a prompt, and a timestep of 0 to 1,000."""
    return {
        "hidden_states": draw(B, channels, 8, 8), "encoder_hidden_states": draw(B, T, TEXT),
        "timestep": rows(1000 * t), **more,
    }  # fmt: skip


def sizes(*names: str) -> dict[str, Any]:
    """Pairs of numbers of pixels, such as a size to be imitated."""
    return {name: torch.full((B, 2), 64.0) for name in names}


def in_one(draw: Draw, t: float) -> dict[str, Any]:
    """Ideogram 4: the tokens of text and image in one row, each with its place and its mark."""
    kinds = torch.cat((torch.full((T,), OF_TEXT), torch.full((16,), OF_IMAGE))).expand(B, -1)
    text = torch.arange(T)[:, None].expand(-1, 3)
    places_ = torch.cat((text, places(3).long() + PLACE)).expand(B, -1, -1)
    of_text, of_image = kinds[..., None] == OF_TEXT, kinds[..., None] == OF_IMAGE
    return {
        "hidden_states": draw(B, T + 16, 8) * of_image, "timestep": rows(t),
        "encoder_hidden_states": draw(B, T + 16, TEXT) * of_text, "position_ids": places_,
        "segment_ids": torch.ones_like(kinds), "indicator": kinds,
    }  # fmt: skip


def packed(draw: Draw, t: float) -> dict[str, Any]:
    """Tokens of 2 x 2 latents with their places, as FLUX.1 takes them."""
    return {
        "hidden_states": draw(B, 16, 8), "encoder_hidden_states": draw(B, T, TEXT),
        "timestep": rows(t), "img_ids": places(3), "txt_ids": torch.zeros(T, 3),
    }  # fmt: skip


FLUX = HEADS | {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
COG = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT,
    "time_embed_dim": 16, "condition_dim": 8,
}  # fmt: skip

FURTHER: dict[str, Tiny] = {
    "CogView 4": Tiny(
        "CogView4Transformer2DModel",
        COG | {"pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8)},
        lambda draw, t: image(draw, t, **sizes("original_size", "target_size", "crop_coords")),
    ),
    "GLM-Image": Tiny(
        "GlmImageTransformer2DModel",
        COG | {"prior_vq_quantizer_codebook_size": 32},
        lambda draw, t: image(
            draw, t, prior_token_id=torch.arange(16).expand(B, -1),
            prior_token_drop=torch.zeros(B, 16, dtype=torch.bool),
            **sizes("target_size", "crop_coords"),
        ),
    ),
    "ERNIE-Image": Tiny(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64,
            "in_channels": 4, "out_channels": 4, "text_in_dim": TEXT, "rope_axes_dim": (4, 4, 8),
        },
        lambda draw, t: {
            "hidden_states": draw(B, 4, 8, 8), "timestep": rows(1000 * t),
            "text_bth": draw(B, T, TEXT), "text_lens": torch.full((B,), T),
        },
    ),
    "Ideogram 4": Tiny(
        "Ideogram4Transformer2DModel",
        HEADS | {
            "in_channels": 8, "num_layers": 2, "intermediate_size": 64, "adaln_dim": 16,
            "llm_features_dim": TEXT, "mrope_section": (4, 2, 2),
        },
        in_one,
    ),
    "FIBO 2": Tiny(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2,
            "cap_feat_dim": TEXT, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4,
            "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 4, 8),
            "axes_lens": (64, 16, 16),
        },
        lambda draw, t: {
            "hidden_states": draw(B, 4, 8, 8), "timestep": rows(t),
            "encoder_hidden_states": draw(B, 2, T, TEXT),
        },
    ),
    "LongCat-Image": Tiny(
        "LongCatImageTransformer2DModel", FLUX | {"pooled_projection_dim": TEXT}, packed
    ),
    "Ovis-Image": Tiny("OvisImageTransformer2DModel", FLUX | {"out_channels": 8}, packed),
    "Kandinsky 5": Tiny(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": TEXT, "in_text_dim2": 12, "time_dim": 16, "model_dim": 32, "ff_dim": 64,
            "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 8),
        },
        lambda draw, t: {
            "hidden_states": draw(B, 1, 8, 8, 4), "encoder_hidden_states": draw(B, T, TEXT),
            "pooled_projections": draw(B, 12), "timestep": rows(1000 * t),
            "visual_rope_pos": (torch.arange(1), torch.arange(4), torch.arange(4)),
            "text_rope_pos": torch.arange(T),
        },
    ),
    "JoyImage-Edit": Tiny(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT,
            "num_layers": 2, "rope_dim_list": [4, 6, 6],
        },
        lambda draw, t: image(draw, t, hidden_states=draw(B, 4, 1, 8, 8)),
    ),
    "Nucleus-Image": Tiny(
        "NucleusMoEImageTransformer2DModel",
        HEADS | {
            "in_channels": 8, "out_channels": 2, "num_layers": 5, "joint_attention_dim": TEXT,
            "axes_dims_rope": (8, 4, 4), "num_experts": 4, "moe_intermediate_dim": 16,
            "capacity_factors": 2.0, "mlp_ratio": 8.0,
        },
        lambda draw, t: {
            "hidden_states": draw(B, 16, 8), "encoder_hidden_states": draw(B, T, TEXT),
            "encoder_hidden_states_mask": torch.ones(B, T, dtype=torch.int64),
            "timestep": rows(t), "img_shapes": [(1, 4, 4)] * B,
        },
    ),
    "PRX": Tiny(
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "context_in_dim": TEXT, "hidden_size": 32, "num_heads": 2,
            "depth": 2, "axes_dim": [8, 8],
        },
        lambda draw, t: image(draw, t, timestep=rows(t)),
    ),
    "Wan-Animate": Tiny(
        "WanAnimateTransformer3DModel",
        HEADS | {
            "in_channels": 12, "latent_channels": 4, "out_channels": 4, "text_dim": TEXT,
            "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "image_dim": 8, "rope_max_seq_len": 32,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda draw, t: image(
            draw, t, hidden_states=draw(B, 12, 3, 8, 8), pose_hidden_states=draw(B, 4, 2, 8, 8),
            encoder_hidden_states_image=draw(B, 5, 8), face_pixel_values=draw(B, 3, 5, 16, 16),
        ),
    ),
    "Sana-Video": Tiny(
        "SanaVideoTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT,
            "sample_size": 8,
        },
        lambda draw, t: image(draw, t, hidden_states=draw(B, 4, 2, 8, 8)),
    ),
}  # fmt: skip
