"""Forge Neo's own classes, tiny, and what its loader puts round them; for the tests in its folder.

They are built of the folder that TENUTO_FORGE names. Nothing of Neo is copied here.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FORGE = os.environ.get("TENUTO_FORGE")
FAMILIES = (
    "unet", "sdxl", "flux", "flux2", "chroma", "qwen_image", "lumina2", "z_image", "wan",
)  # fmt: skip
FRAMES = ("qwen_image", "wan")  # their samples have a dimension of time
CPU = torch.device("cpu")
UNET: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "num_heads": 8, "num_head_channels": -1,
    "use_spatial_transformer": True, "transformer_depth": [1, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 0, 0],
}  # fmt: skip
CLASSES: dict[str, tuple[str, str, str]] = {  # family: file, class, what Neo's loader guesses
    "unet": ("unet", "IntegratedUNet2DConditionModel", "SD15"),
    "sdxl": ("unet", "IntegratedUNet2DConditionModel", "SDXL"),
    "flux": ("flux", "IntegratedFluxTransformer2DModel", "FluxSchnell"),
    "flux2": ("flux", "IntegratedFluxTransformer2DModel", "Flux2K4B"),
    "chroma": ("chroma", "IntegratedChromaTransformer2DModel", "Chroma"),
    "qwen_image": ("qwen", "QwenImageTransformer2DModel", "QwenImage"),
    "lumina2": ("lumina", "NextDiT", "Lumina2"),
    "z_image": ("lumina", "NextDiT", "ZImage"),
    "wan": ("wan", "WanModel", "WAN21_T2V"),
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {  # beside what ComfyUI's class of the family gets
    "flux2": {"txt_ids_dims": [3]},
    "chroma": {"txt_ids_dims": [], "vec_in_dim": None},
}


def start(folder: str) -> None:
    """As Neo's launcher: its packages by their own names, a CPU for a device."""
    packages = Path(folder) / "modules_forge" / "packages"
    sys.path[:0] = [folder, str(packages)]
    given, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    try:
        importlib.import_module("backend.memory_management")
    finally:
        sys.argv = given
    samplers = types.ModuleType("k_diffusion")
    samplers.__path__ = [str(packages / "k_diffusion")]
    sys.modules["k_diffusion"] = samplers
    torch.set_num_threads(1)


def facts_of(family: str, comfy: dict[str, Any], width: int) -> dict[str, Any]:
    """The sizes of a tiny model. comfy: what ComfyUI's class of this family gets; width: of text.

    Neo's classes take the same names, but for the U-Net and Qwen-Image.
    """
    if family == "unet":
        return UNET | {"context_dim": width}
    if family == "sdxl":
        return UNET | {
            "context_dim": width, "use_linear_in_transformer": True, "num_classes": "sequential",
            "adm_in_channels": 6 * 8 + width,
        }  # fmt: skip
    if family == "qwen_image":
        return {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64,
            "out_channels": 16, "num_layers": 2, "joint_attention_dim": width,
            "axes_dims_rope": (4, 6, 6),
        }  # fmt: skip
    return comfy | MORE.get(family, {})


def model_of(family: str, facts: dict[str, Any], operations: Any = None) -> nn.Module:
    """Neo's class under its operations, in float32, as its loader marks it. No values yet."""
    operated = importlib.import_module("backend.operations").using_forge_operations
    file, name, _ = CLASSES[family]
    kind = getattr(importlib.import_module(f"backend.nn.{file}"), name)
    copied = {key: list(v) if isinstance(v, list) else v for key, v in facts.items()}
    with operated(operations=operations, device=CPU, dtype=torch.float32):
        made = kind(**copied)
    return marked(made.eval().requires_grad_(False), torch.float32)


def marked(model: Any, dtype: torch.dtype) -> Any:
    """What Neo's loader notes on a model: what it is kept in, and where."""
    model.storage_dtype = model.computation_dtype = dtype
    model.load_device = model.offload_device = model.initial_device = CPU
    return model


def sd_model_of(family: str, model: nn.Module) -> Any:
    """The part of Neo's engine that an extension meets: a UnetPatcher round its KModel."""
    args = importlib.import_module("backend.args")
    args.dynamic_args.ops = args.dynamic_args.ops or "ForgeOperations"
    guesses = importlib.import_module("huggingface_guess.model_list")
    guess = getattr(guesses, CLASSES[family][2])
    settings = dict(guess.sampling_settings)
    config = SimpleNamespace(sampling_settings=settings, memory_usage_factor=1.0)
    predictions = importlib.import_module("backend.modules.k_prediction")
    kind = guess.model_type(SimpleNamespace(), {}).name
    if kind == "EPS":
        sizes = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
        predictor = predictions.Prediction(
            sigma_data=1.0, prediction_type="epsilon", beta_schedule="linear", **sizes
        )
    else:
        name = "PredictionDiscreteFlow" if kind == "FLOW" else "PredictionFlux"
        predictor = getattr(predictions, name)(config)
    patcher = importlib.import_module("backend.patcher.unet").UnetPatcher.from_model(
        model=model, diffusers_scheduler=None, config=config, k_predictor=predictor
    )
    return SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher))


def given_to(family: str, text: Tensor) -> dict[str, Any]:
    """What a call gets beside the prompt's states."""
    if family == "flux":
        return {"y": text[:, 0]}
    if family == "sdxl":
        zeros = torch.tensor(([1.0] * 4 + [0.0] * 4) * 6)  # six sizes of 0: cosines, then sines
        return {"y": torch.cat([text[:, 0], zeros.expand(len(text), -1)], 1)}
    return {"num_tokens": text.shape[1]} if family in ("lumina2", "z_image") else {}


def call(family: str, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """One call of a bare denoiser of Neo's; `t` (B,) on 0..1000."""
    thousands = family in ("unet", "sdxl", "wan")
    frames = x[:, :, None] if family in FRAMES else x
    out = denoiser(frames, t if thousands else t / 1000, context=text, **given_to(family, text))
    return out[:, :, 0] if family in FRAMES else out


def denoised(family: str, sd_model: Any, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """One call by Neo's KModel, with what its sampling function says of the rows."""
    model = sd_model.forge_objects.unet.model
    frames = x[:, :, None] if family in FRAMES else x
    options = {"cond_or_uncond": [0], "sigmas": sigma}
    out = model.apply_model(
        frames, sigma, c_crossattn=text, transformer_options=options, **given_to(family, text)
    )
    return out[:, :, 0] if family in FRAMES else out
