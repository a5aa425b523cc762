"""The tests inside the hosts: the same tiny models in diffusers, in ComfyUI and in ldm.

They run in the environment that `make hosts` sets up and are not collected anywhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "hosts"))  # forge_neo.py lies there
import forge_neo  # noqa: E402

COMFYUI = os.environ.get("TENUTO_COMFYUI")
FAMILIES = ("unet", "pixart", "sd3", "flux")
NEWER = (
    "flux2", "wan", "wan_vace", "lumina2", "chroma", "hunyuan_video", "hunyuan_video15",
    "hunyuan_image", "z_image",
)  # fmt: skip
SIZE = {"unet": 8, "pixart": 36, "sd3": 8, "flux": 8}  # of the latent
CHANNELS = {"unet": 4, "pixart": 4, "sd3": 16, "flux": 16}
WIDTH = 24  # of the prompt's embedding

if COMFYUI is None:
    collect_ignore_glob = ["test_*.py", "server/test_*.py"]
    if forge_neo.FORGE is None:
        collect_ignore_glob += ["contract/test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """ComfyUI reads the command line when it is imported, if told to; without, it asks CUDA."""
    if COMFYUI is None:
        if forge_neo.FORGE is not None:
            forge_neo.start(forge_neo.FORGE)
        return
    sys.path.insert(0, COMFYUI)
    given, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.model_management")
    sys.argv = given
    torch.set_num_threads(1)
    # k_diffusion's own __init__ wants what training needs; its samplers do not
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["k_diffusion"] = package


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


# --- tiny models ----------------------------------------------------------------------------------


def in_diffusers(family: str) -> nn.Module:
    """A tiny model of diffusers' class."""
    import diffusers

    if family == "unet":
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=WIDTH,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    if family == "pixart":
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4,
            out_channels=8, cross_attention_dim=32, sample_size=64, caption_channels=WIDTH,
            use_additional_conditions=False,
        )  # fmt: skip
    if family == "sd3":
        return diffusers.SD3Transformer2DModel(
            num_attention_heads=2, attention_head_dim=64, num_layers=2, caption_projection_dim=128,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, pos_embed_max_size=16,
            sample_size=16, in_channels=16, out_channels=16, qk_norm="rms_norm",
        )  # fmt: skip
    if family == "flux":
        return diffusers.FluxTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 6, 6),
            in_channels=64,
        )  # fmt: skip
    kind, facts = DIFFUSERS[family]
    return getattr(diffusers, kind)(**facts)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = HEADS | {
    "in_channels": 16, "out_channels": 16, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 48,
    "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
HUNYUAN = HEADS | {
    "in_channels": 16, "out_channels": 16, "num_refiner_layers": 2, "text_embed_dim": WIDTH,
    "patch_size": 2, "patch_size_t": 1, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2": ("Flux2Transformer2DModel", HEADS | {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2,
        "joint_attention_dim": WIDTH, "timestep_guidance_channels": 256,
        "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
    }),
    "wan": ("WanTransformer3DModel", WAN),
    "wan_vace": ("WanVACETransformer3DModel", WAN | {
        "vace_layers": [0, 1], "vace_in_channels": 16,
    }),
    "sdxl": ("UNet2DConditionModel", {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
        "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + WIDTH,
    }),
    "qwen_image": ("QwenImageTransformer2DModel", HEADS | {
        "in_channels": 64, "out_channels": 16, "num_layers": 2, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }),
    "lumina2": ("Lumina2Transformer2DModel", {
        "sample_size": 8, "in_channels": 16, "hidden_size": 32, "num_layers": 2,
        "num_refiner_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 32, 32), "cap_feat_dim": WIDTH,
    }),
    "chroma": ("ChromaTransformer2DModel", HEADS | {  # ComfyUI counts on as many blocks
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 64,
        "approximator_hidden_dim": 32, "approximator_layers": 2,
    }),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", HUNYUAN | {
        "num_layers": 1, "num_single_layers": 2, "pooled_projection_dim": WIDTH,
        "guidance_embeds": False,
    }),
    "hunyuan_video15": ("HunyuanVideo15Transformer3DModel", HUNYUAN | {
        "num_layers": 2, "text_embed_2_dim": 1472, "image_embed_dim": 12, "patch_size": 1,
    }),
    "hunyuan_image": ("HunyuanImageTransformer2DModel", HEADS | {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 2,
        "num_refiner_layers": 2, "patch_size": (1, 1), "text_embed_dim": WIDTH,
        "text_embed_2_dim": 1472, "rope_axes_dim": (8, 8),
    }),
    "z_image": ("ZImageTransformer2DModel", {  # an inner width of 1024 is fixed
        "in_channels": 16, "dim": 1024, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 32,
        "n_kv_heads": 32, "cap_feat_dim": WIDTH, "axes_dims": [8, 12, 12],
        "axes_lens": [128, 32, 32],
    }),
}  # fmt: skip


LDM_UNET: dict[str, Any] = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_heads": 8,
    "context_dim": WIDTH, "use_spatial_transformer": True, "legacy": False,
    "use_checkpoint": False, "channel_mult": [1, 2],
}  # fmt: skip
WAN_COMFY: dict[str, Any] = {
    "in_dim": 16, "dim": 32, "ffn_dim": 48, "freq_dim": 32, "text_dim": WIDTH, "num_heads": 2,
    "num_layers": 2,
}  # fmt: skip
NEXT = {"patch_size": 2, "in_channels": 16, "qk_norm": True, "cap_feat_dim": WIDTH}
VIDEO: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "context_in_dim": WIDTH, "hidden_size": 32,
    "mlp_ratio": 4.0, "num_heads": 2, "axes_dim": [4, 6, 6], "theta": 256, "qkv_bias": True,
    "guidance_embed": False, "meanflow": False,
}  # fmt: skip
COMFY: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("SD15", LDM_UNET | {
        "num_res_blocks": [1, 1], "transformer_depth": [1, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 0, 0], "num_head_channels": -1,
        "use_linear_in_transformer": False, "adm_in_channels": None,
    }),
    "pixart": ("PixArtSigma", {
        "hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": WIDTH,
        "micro_condition": False, "model_max_length": 300,
    }),
    "sd3": ("SD3", {
        "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 2,
        "adm_in_channels": WIDTH, "num_patches": 256, "pos_embed_max_size": 16,
        "pos_embed_scaling_factor": None, "qk_norm": "rms", "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128},
        },
    }),
    "flux": ("FluxSchnell", {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": WIDTH,
        "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True,
        "guidance_embed": False,
    }),
    "flux2": ("Flux2", {
        "in_channels": 16, "out_channels": 16, "patch_size": 1, "vec_in_dim": None,
        "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 3.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 2, "axes_dim": [4, 4, 4, 4], "theta": 2000, "qkv_bias": False,
        "guidance_embed": False, "global_modulation": True, "mlp_silu_act": True,
        "ops_bias": False,
    }),
    "wan": ("WAN21_T2V", WAN_COMFY | {"model_type": "t2v"}),
    "wan_vace": ("WAN21_Vace", WAN_COMFY | {
        "model_type": "vace", "vace_layers": 2, "vace_in_dim": 16,
    }),
    "lumina2": ("Lumina2", NEXT | {
        "dim": 32, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 1,
        "multiple_of": 16, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32],
    }),
    "chroma": ("Chroma", {
        "in_channels": 64, "out_channels": 64, "patch_size": 2, "context_in_dim": WIDTH,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True,
        "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 2,
    }),
    "hunyuan_video": ("HunyuanVideo", VIDEO | {
        "vec_in_dim": WIDTH, "depth": 1, "depth_single_blocks": 2, "patch_size": [1, 2, 2],
        "byt5": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    }),
    "hunyuan_video15": ("HunyuanVideo", VIDEO | {
        "vec_in_dim": None, "depth": 2, "depth_single_blocks": 0, "patch_size": [1, 1, 1],
        "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 12,
    }),
    "hunyuan_image": ("HunyuanImage21", VIDEO | {
        "vec_in_dim": None, "depth": 1, "depth_single_blocks": 2, "patch_size": [1, 1],
        "axes_dim": [8, 8], "byt5": True, "use_cond_type_embedding": False, "vision_in_dim": None,
    }),
    "z_image": ("ZImage", NEXT | {
        "dim": 1024, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 32, "n_kv_heads": 32,
        "multiple_of": 1, "ffn_dim_multiplier": 8 / 3, "axes_dims": [8, 12, 12],
        "axes_lens": [128, 32, 32], "rope_theta": 256.0, "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }),
}  # fmt: skip


def randomized(module: nn.Module) -> nn.Module:
    """Random weights, of the same seed each time, with which nothing stays zero."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            if p.ndim > 1:
                width = 0.2 if "table" in name or "embed" in name else 1.2 / math.sqrt(p[0].numel())
                p.copy_(torch.randn(p.shape, generator=draw) * width)
            else:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
                p.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module.eval()


def take_over_(host: nn.Module, source: nn.Module) -> nn.Module:
    """Put the weights of a diffusers model into a host's, by the key map of its family."""
    from tenuto.model import families
    from tenuto.model.key_map import swapped

    keys = families.names_in_host(host)
    assert keys is not None
    values, theirs = dict(source.named_parameters()), dict(host.named_parameters())
    assert values.keys() == keys.places.keys(), "a canonical name has no place, or a wrong one"
    filled = dict.fromkeys(theirs, 0)
    with torch.no_grad():
        for name, place in keys.places.items():
            value = swapped(values[name]) if place.swapped else values[name]
            theirs[place.name][slice(*place.rows)].copy_(value)
            filled[place.name] += value.numel()
        if hasattr(source, "pos_embed") and getattr(host, "pos_embed", None) is not None:
            host.pos_embed.copy_(source.pos_embed.pos_embed)
    left = [name for name, p in theirs.items() if filled[name] != p.numel()]
    unused = ("y_embedding", "norm_final")
    assert all(any(x in name for x in unused) for name in left), "no canonical name has its rows"
    with torch.no_grad():
        for name in left:  # as it lay in memory: of what may be NaN nothing can be asked
            theirs[name].fill_(1.0)
    return host.eval()


@pytest.fixture(scope="session")
def original() -> Callable[[str], nn.Module]:
    """original(family): a new tiny model of diffusers, the same weights each time."""
    return lambda family: randomized(in_diffusers(family))


@pytest.fixture(scope="session")
def in_ldm(original: Callable[[str], nn.Module]) -> Callable[[], nn.Module]:
    """in_ldm(): the U-Net in the real ldm code."""

    def build() -> nn.Module:
        from ldm.modules.diffusionmodules.openaimodel import UNetModel

        facts = LDM_UNET | {"num_res_blocks": 1, "attention_resolutions": [1]}
        return take_over_(UNetModel(**facts), original("unet"))

    return build


# What versions after 0.3.75 ask for besides: the class of a model's parameters, and its values.
LATER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux": ("flux", "FluxParams", {"txt_ids_dims": []}),
    "flux2": ("flux", "FluxParams", {"txt_ids_dims": [3]}),
    "chroma": ("chroma", "ChromaParams", {"txt_ids_dims": [], "vec_in_dim": None}),
    "hunyuan_video": ("hunyuan_video", "HunyuanVideoParams", {"meanflow_sum": False}),
    "hunyuan_video15": ("hunyuan_video", "HunyuanVideoParams", {"meanflow_sum": True}),
    "hunyuan_image": ("hunyuan_video", "HunyuanVideoParams", {"meanflow_sum": False}),
}


def later(family: str) -> dict[str, Any]:
    """Those values that this version's class of parameters knows."""
    if family not in LATER:
        return {}
    package, name, values = LATER[family]
    params = getattr(importlib.import_module(f"comfy.ldm.{package}.model"), name)
    known = {field.name for field in dataclasses.fields(params)}
    return {key: value for key, value in values.items() if key in known}


def comfy_model(family: str, layers: dict[str, Any] | None = None) -> Any:
    """ComfyUI's model without weights. layers: what a file says of quantized ones."""
    from comfy import supported_models

    name, facts = COMFY[family]
    config = getattr(supported_models, name)(facts | later(family))
    config.set_inference_dtype(torch.float32, torch.float32 if layers else None)
    if layers:  # by the name before 0.4 and since
        config.layer_quant_config = config.quant_config = layers
    return config.get_model({}, "")


@pytest.fixture(scope="session")
def from_file() -> Callable[..., Any]:
    """from_file(family, path): ComfyUI's model with the weights of a file, as it loads them.

    As its loader does once it has seen which model a file is of; that takes sizes of real ones.
    """

    def build(family: str, path: Path) -> Any:
        from comfy import model_detection, utils

        tensors, metadata = utils.load_torch_file(str(path), return_metadata=True)
        if hasattr(model_detection, "detect_layer_quantization"):
            layers = model_detection.detect_layer_quantization(metadata)
        else:
            tensors, metadata = utils.convert_old_quants(tensors, "", metadata=metadata)
            layers = utils.detect_layer_quantization(tensors, "")
        model = comfy_model(family, layers)
        model.load_model_weights(tensors, "")
        return model.eval()

    return build


@pytest.fixture(scope="session")
def in_comfy(original: Callable[[str], nn.Module]) -> Callable[[str], Any]:
    """in_comfy(family): a MODEL of ComfyUI (a ModelPatcher) round the same weights."""

    def build(family: str) -> Any:
        from comfy.model_patcher import ModelPatcher

        model = comfy_model(family)
        take_over_(model.diffusion_model, original(family))
        model.diffusion_model.requires_grad_(False)
        cpu = torch.device("cpu")
        return ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)

    return build


def facts_in_neo(family: str) -> dict[str, Any]:
    """The sizes of Forge Neo's tiny models."""
    return forge_neo.facts_of(family, COMFY.get(family, ("", {}))[1], WIDTH)


@pytest.fixture(scope="session")
def neo_facts() -> Callable[[str], dict[str, Any]]:
    """neo_facts(family)."""
    return facts_in_neo


@pytest.fixture(scope="session")
def in_neo(original: Callable[[str], nn.Module]) -> Callable[..., Any]:
    """in_neo(family): the part of Forge Neo's engine that holds a denoiser of the same weights."""

    def build(family: str) -> Any:
        made = forge_neo.model_of(family, facts_in_neo(family))
        model = take_over_(made, original(family))
        return forge_neo.sd_model_of(family, model)

    return build


# --- calls of the bare denoisers ------------------------------------------------------------------


@pytest.fixture(scope="session")
def coded_artifact() -> Callable[[nn.Module], Any]:
    """coded_artifact(denoiser of a host): w8a16 codes of its blocks, rounded to nearest."""
    from tenuto import Artifact, describe, schemes
    from tenuto.artifact.host_names import canonicalized
    from tenuto.model import layers
    from tenuto.numerics import QTensor

    def build(denoiser: nn.Module) -> Artifact:
        scheme, blocks = schemes.W8A16, tuple(f"{block}." for block in describe(denoiser).blocks)
        made = Artifact.new(denoiser, {"timesteps": [900.0, 500.0], "steps": 2, "guidance": 1.0})
        made.header["schemes"], made.header["layers"] = {"s": scheme.to_json()}, {}
        for name, layer in layers(denoiser):
            if name.startswith(blocks):
                codes = QTensor.nearest(layer.weight.detach(), scheme.weight)
                made.tensors |= {f"weights/{k}": v for k, v in codes.tensors(name).items()}
                made.header["layers"][name] = {"scheme": "s", "shape": list(layer.weight.shape)}
        return canonicalized(made, denoiser)

    return build


@pytest.fixture(scope="session")
def prompts() -> Callable[[list[int]], Tensor]:
    """prompts(seeds): embeddings (B, 5, WIDTH); seed -1 is the empty prompt."""

    def build(seeds: list[int]) -> Tensor:
        draws = [torch.Generator().manual_seed(7000 + s) for s in seeds]
        return torch.stack([torch.randn(5, WIDTH, generator=g) for g in draws])

    return build


def call(family: str, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """One call of a bare denoiser, of diffusers or of a host; `t` (B,) on 0..1000."""
    pooled = text[:, 0]
    if family in (*NEWER, "sdxl", "qwen_image"):
        there = hasattr(denoiser, "config")
        return (
            in_place(family, denoiser, x, t, text)
            if there
            else (in_comfyui(family, denoiser, x, t, text))
        )
    if not hasattr(denoiser, "config"):
        if family == "unet":
            return denoiser(x, t, context=text)
        if family == "flux":
            return denoiser(x, t / 1000, text, y=pooled)
        return denoiser(x, t, context=text, **({"y": pooled} if family == "sd3" else {}))
    if family == "unet":
        return denoiser(x, t, encoder_hidden_states=text).sample
    if family == "pixart":
        return denoiser(x, encoder_hidden_states=text, timestep=t).sample[:, :4]
    if family == "sd3":
        given = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return denoiser(x, timestep=t, **given).sample
    return packed(denoiser, x, t / 1000, text, pooled)


def in_comfyui(family: str, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """A newer model of ComfyUI; a video is one frame."""
    if family in ("lumina2", "z_image"):
        return denoiser(x, t / 1000, text, num_tokens=text.shape[1])
    if family == "flux2":
        return denoiser(x, t / 1000, text)
    if family == "chroma":
        return denoiser(x, t / 1000, text, guidance=torch.zeros(len(x)))
    if family == "hunyuan_image":
        return denoiser(x, t, text, txt_byt5=glyphs(len(x)))
    more: dict[str, Any] = {"y": text[:, 0]} if family == "hunyuan_video" else {}
    if family == "wan_vace":
        more = {"vace_context": control(x)[:, None, :, None], "vace_strength": [0.5]}
    return denoiser(x[:, :, None], t, text, **more)[:, :, 0]


def in_place(family: str, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The same call of the diffusers class."""
    count, length = len(x), text.shape[1]
    mask = torch.ones(count, length)
    if family == "z_image":
        rows = [image[:, None] for image in x]
        return -torch.stack(denoiser(rows, 1 - t / 1000, list(text)).sample)[:, :, 0]
    if family == "sdxl":
        more = {"text_embeds": text[:, 0], "time_ids": torch.zeros(count, 6)}
        return denoiser(x, t, encoder_hidden_states=text, added_cond_kwargs=more).sample
    if family == "qwen_image":
        side = x.shape[-1] // 2
        out = denoiser(
            nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=text, encoder_hidden_states_mask=mask.long(),
            timestep=t / 1000, img_shapes=[[(1, side, side)]] * count,
        ).sample.transpose(1, 2)  # fmt: skip
        return nn.functional.pixel_shuffle(out.unflatten(2, (side, side)), 2)
    if family == "lumina2":
        return -denoiser(
            x, timestep=1 - t / 1000, encoder_hidden_states=text,
            encoder_attention_mask=mask.long(),
        ).sample  # fmt: skip
    if family in ("flux2", "chroma"):
        return tokens_of(family, denoiser, x, t / 1000, text)
    given: dict[str, Any] = {"encoder_hidden_states": text, "timestep": t}
    if family == "hunyuan_video":
        given |= {"pooled_projections": text[:, 0], "encoder_attention_mask": mask}
    if family == "wan_vace":
        given |= {
            "control_hidden_states": control(x)[:, :, None],
            "control_hidden_states_scale": torch.tensor([0.5, 0.5]),
        }  # fmt: skip
    if family == "hunyuan_video15":  # no glyphs, no image
        given |= {
            "encoder_attention_mask": mask, "encoder_hidden_states_2": torch.zeros(count, 3, 1472),
            "encoder_attention_mask_2": torch.zeros(count, 3),
            "image_embeds": torch.zeros(count, 2, 12),
        }  # fmt: skip
    if family == "hunyuan_image":
        given |= {
            "encoder_attention_mask": mask, "encoder_hidden_states_2": glyphs(count),
            "encoder_attention_mask_2": torch.ones(count, 3),
        }  # fmt: skip
        return denoiser(x, **given).sample
    return denoiser(x[:, :, None], **given).sample[:, :, 0]


def control(x: Tensor) -> Tensor:
    """What VACE is to keep to: the same at every step."""
    draw = torch.Generator().manual_seed(6)
    return torch.randn(1, *x.shape[1:], generator=draw).expand_as(x)


def glyphs(count: int) -> Tensor:
    """The second text: the same for every row."""
    draw = torch.Generator().manual_seed(5)
    return torch.randn(1, 3, 1472, generator=draw).expand(count, -1, -1)


def tokens_of(family: str, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """FLUX.2 numbers the words in a fourth place and takes a pixel as a token; Chroma 2 x 2."""
    patch, axes = (1, 4) if family == "flux2" else (2, 3)
    size = x.shape[-1] // patch
    tokens = nn.functional.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)
    ids, words = torch.zeros(size, size, axes), torch.zeros(text.shape[1], axes)
    ids[..., 1], ids[..., 2] = torch.arange(size)[:, None], torch.arange(size)[None]
    more = {}
    if family == "flux2":
        words[:, 3] = torch.arange(len(words))
    else:
        more["attention_mask"] = torch.ones(len(x), len(words) + size**2)
    out = denoiser(
        tokens, encoder_hidden_states=text, timestep=t, img_ids=ids.flatten(0, 1),
        txt_ids=words, **more,
    ).sample  # fmt: skip
    return nn.functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (size, size)), patch)


def packed(denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """FLUX of diffusers takes tokens of 2 x 2 pixels and their places."""
    size = x.shape[-1] // 2
    tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    ids = torch.zeros(size, size, 3)
    ids[..., 1], ids[..., 2] = torch.arange(size)[:, None], torch.arange(size)[None]
    out = denoiser(
        tokens, encoder_hidden_states=text, pooled_projections=pooled, timestep=t,
        img_ids=ids.flatten(0, 1), txt_ids=torch.zeros(text.shape[1], 3),
    ).sample  # fmt: skip
    return nn.functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (size, size)), 2)


@pytest.fixture(scope="session")
def call_as() -> Callable[..., Tensor]:
    """call_as(family, denoiser, x, t, text)."""
    return call


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
