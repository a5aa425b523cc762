"""The models that `gpu_speed.py` measures, with random weights of real shapes, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MODELS = ("dit2", "dit16", "sdxl", "klein")


def dit(layers: int = 28, heads: int = 16, size: int = 72) -> nn.Module:
    """DiT-XL/2 at 256."""
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=size, in_channels=4, out_channels=8,
        num_layers=layers, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip


def sdxl() -> nn.Module:
    """The U-Net of SDXL."""
    import diffusers

    config: Any = dict(  # noqa: C408
        sample_size=128, addition_embed_type="text_time", addition_time_embed_dim=256,
        attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280],
        cross_attention_dim=2048, projection_class_embeddings_input_dim=2816,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**config)


def sd15() -> nn.Module:
    """The U-Net of Stable Diffusion 1.5."""
    import diffusers

    config: Any = dict(  # noqa: C408
        sample_size=64, cross_attention_dim=768, attention_head_dim=8,
        block_out_channels=[320, 640, 1280, 1280],
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**config)


def klein() -> nn.Module:
    """FLUX.2-klein-4B."""
    import diffusers

    return diffusers.Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=7680, guidance_embeds=False,
    )  # fmt: skip


def dit_inputs(rows: int) -> dict[str, Any]:
    """Of one call: noise, a timestep and a label a row."""
    labels = torch.arange(rows) % 1000
    return {"hidden_states": torch.randn(rows, 4, 32, 32), "class_labels": labels,
            "timestep": torch.full((rows,), 500)}  # fmt: skip


def sdxl_inputs() -> dict[str, Any]:
    """Of one call at 1024 with guidance."""
    added = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.ones(2, 6) * 1024}
    return {"sample": torch.randn(2, 4, 128, 128), "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, 2048),
            "added_cond_kwargs": added}  # fmt: skip


def sd15_inputs() -> dict[str, Any]:
    """Of one call at 512 with guidance."""
    return {"sample": torch.randn(2, 4, 64, 64), "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, 768)}  # fmt: skip


def klein_inputs() -> dict[str, Any]:
    """Of one call at 1024: 64 x 64 patches and 512 tokens."""
    image, text = torch.zeros(1, 4096, 4), torch.zeros(1, 512, 4)
    image[0, :, 1], image[0, :, 2] = torch.arange(4096) // 64, torch.arange(4096) % 64
    text[0, :, 3] = torch.arange(512)
    return {"hidden_states": torch.randn(1, 4096, 128), "timestep": torch.full((1,), 0.5),
            "encoder_hidden_states": torch.randn(1, 512, 7680), "img_ids": image,
            "txt_ids": text}  # fmt: skip


MAKE: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "dit2": (dit, lambda: dit_inputs(2)),
    "dit16": (dit, lambda: dit_inputs(16)),
    "sdxl": (sdxl, sdxl_inputs),
    "klein": (klein, klein_inputs),
    "sd15": (sd15, sd15_inputs),
    "dit blocks": (lambda: dit(4), lambda: dit_inputs(2)),
    "tiny": (lambda: dit(2, 2, 32), lambda: dit_inputs(2)),
}


def made(
    name: str, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in `dtype` and the arguments of a call, on the device."""
    torch.manual_seed(0)
    model, inputs = MAKE[name]
    with torch.device(device):
        denoiser = model().to(dtype).eval().requires_grad_(False)
    for weight in denoiser.parameters():  # zeros, as some layers start with, would be no work
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    torch.manual_seed(1)

    def moved(x: Any, name: str = "") -> Any:
        if isinstance(x, dict):
            return {key: moved(value, key) for key, value in x.items()}
        narrow = x.is_floating_point() and name != "timestep"
        return x.to(device, dtype) if narrow else x.to(device)

    return denoiser, moved(inputs())
