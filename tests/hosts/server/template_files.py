"""Tiny files under the names that a template asks for: template_files.py ROOT FOLDER NAME...

FOLDER has the folders of models/, and ROOT the ComfyUI whose classes give names and shapes. Widths
that its detection fixes are the real ones; there are as few layers as run, and all is random.
small_encoders.py makes that ComfyUI expect text encoders of these sizes.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from small_encoders import SIZES, WAN22_VAE  # noqa: E402

Tensors = dict[str, Tensor]
FLOAT8 = torch.float8_e4m3fn
POOL = 1 << 22  # random values; larger tensors repeat them


class RandomTensors:
    """Random tensors of the shapes of a module that has no memory."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """One: what is added to noise or multiplied with it stays of the size of one."""
        count = shape.numel()
        if len(shape) < 2:
            values = 0.05 * self.pool[:count] + float(name.endswith(("weight", "scale", "gamma")))
        else:
            table = "embed" in name and "patch" not in name and "_embedder" not in name
            values = self.pool * 0.7 * (0.1 if table else shape[1:].numel() ** -0.5)
        values = values.to(self.dtype)
        return values.repeat(-(-count // max(len(values), 1)))[:count].reshape(shape).clone()

    def all(self, module: nn.Module, prefix: str = "") -> Tensors:
        """Under `prefix`; whole numbers are left out, the host makes them."""
        state = module.state_dict()
        return {
            prefix + name: self(name, old.shape)
            for name, old in state.items() if old.is_floating_point()
        }  # fmt: skip


def host(name: str) -> Any:
    """A module of ComfyUI."""
    return importlib.import_module(f"comfy.{name}")


def built(kind: Any, **facts: Any) -> nn.Module:
    """A model of the host without memory."""
    ops = host("ops").disable_weight_init
    return kind(device="meta", dtype=torch.float32, operations=ops, **facts)


def encoder(kind: Any, file: str, name: str, **more: Any) -> nn.Module:
    """A text encoder of the size that small_encoders.py says."""
    config = json.loads((Path(host("sd").__file__).parent / file).read_text()) if file else {}
    return kind(config | SIZES[name] | more, torch.float32, "meta", host("ops").disable_weight_init)


def sdxl() -> Tensors:
    """All of SDXL's depth, at 320 channels on each level; both encoders, a tiny autoencoder."""
    unet = host("ldm.modules.diffusionmodules.openaimodel").UNetModel
    made = RandomTensors(torch.float16).all(
        built(
            unet, image_size=32, in_channels=4, out_channels=4, model_channels=320,
            channel_mult=[1, 1, 1], num_res_blocks=[2, 2, 2], use_spatial_transformer=True,
            transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048,
            adm_in_channels=2816, num_classes="sequential", num_heads=-1, num_head_channels=64,
            use_linear_in_transformer=True, use_checkpoint=False, legacy=False,
        ), "model.diffusion_model.",
    )  # fmt: skip
    text = host("clip_model").CLIPTextModel
    clips = RandomTensors(torch.float16).all(
        encoder(text, "clip_config_bigg.json", "clip_g"), "clip_g.transformer."
    )
    clips |= {f"clip_l.transformer.{key}": value for key, value in clip_l().items()}
    saved = host("supported_models").SDXL({}).process_clip_state_dict_for_saving(clips)
    made |= {key: value.contiguous() for key, value in saved.items()}
    return made | {f"first_stage_model.{key}": value for key, value in taesd(4).items()}


def clip_l() -> Tensors:
    """A whole one."""
    model = host("sd1_clip").SDClipModel(device="meta", dtype=torch.float32)
    return RandomTensors(torch.float16).all(model.transformer)


def taesd(channels: int) -> Tensors:
    """A tiny autoencoder of images."""
    with torch.device("meta"):
        model = host("taesd.taesd").TAESD(latent_channels=channels)
    found = RandomTensors(torch.float16).all(model)
    return found | {
        name: torch.tensor(float(name.endswith("scale"))) for name in found if "vae_s" in name
    }


def wan_vae() -> Tensors:
    """The autoencoder of Wan and Qwen-Image, eight channels wide."""
    with torch.device("meta"):
        model = host("ldm.wan.vae").WanVAE(
            dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0,
        )  # fmt: skip
    return RandomTensors().all(model)


def wan22_vae() -> Tensors:
    """That of Wan 2.2 5B, eight channels wide: small_encoders.py makes the host's so."""
    kind = host("ldm.wan.vae2_2").WanVAE
    with torch.device("meta"):
        model = kind(
            z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0, **WAN22_VAE,
        )  # fmt: skip
    return RandomTensors().all(model)


def flux() -> Tensors:
    """A block of each sort."""
    return RandomTensors().all(
        built(
            host("ldm.flux.model").Flux, in_channels=16, out_channels=16, patch_size=2,
            vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24,
            depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
            guidance_embed=True, **later("flux", {"txt_ids_dims": []}),
        )
    )  # fmt: skip


def flux2() -> Tensors:
    """A block of each sort, two heads; it reads what the 4B encoder gives."""
    return RandomTensors().all(
        built(
            host("ldm.flux.model").Flux, in_channels=128, out_channels=128, patch_size=1,
            vec_in_dim=None, context_in_dim=7680, hidden_size=256, mlp_ratio=3.0, num_heads=2,
            depth=1, depth_single_blocks=1, axes_dim=[32, 32, 32, 32], theta=2000, qkv_bias=False,
            guidance_embed=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
            **later("flux", {"txt_ids_dims": [3]}),
        )
    )  # fmt: skip


def flux2_vae() -> Tensors:
    """The decoder of FLUX.2, 32 channels wide; nothing is encoded here."""
    kind = host("ldm.modules.diffusionmodules.model").Decoder
    with torch.device("meta"):
        model = kind(
            ch=32, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[],
            in_channels=3, resolution=256, z_channels=32, double_z=True, dropout=0.0,
        )  # fmt: skip
    random = RandomTensors()
    found = random.all(model, "decoder.")
    found["post_quant_conv.weight"] = torch.eye(32)[:, :, None, None].contiguous()
    found["post_quant_conv.bias"] = torch.zeros(32)
    return found | {"bn.running_mean": torch.zeros(128), "bn.running_var": torch.ones(128)}


def later(package: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Those that this version knows."""
    known = host(f"ldm.{package}.model").FluxParams.__dataclass_fields__
    return {key: value for key, value in facts.items() if key in known}


def qwen_image() -> Tensors:
    """One block, in 8-bit floats as the file that it stands for."""
    return RandomTensors(FLOAT8).all(built(host("ldm.qwen_image.model").QwenImageTransformer2DModel,
                                  num_layers=1))  # fmt: skip


def z_image() -> Tensors:
    """One layer and the four that refine."""
    return RandomTensors().all(
        built(
            host("ldm.lumina.model").NextDiT, in_channels=16, dim=3840, n_layers=1, n_heads=30,
            n_kv_heads=30, qk_norm=True, cap_feat_dim=2560, axes_dims=[32, 48, 48],
            axes_lens=[1536, 512, 512], ffn_dim_multiplier=8 / 3, z_image_modulation=True,
            time_scale=1000.0, pad_tokens_multiple=32,
        )
    )  # fmt: skip


def wan(channels: int = 16) -> Tensors:
    """Two blocks, two heads."""
    facts = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
    facts |= {"in_dim": channels, "out_dim": channels}
    return RandomTensors().all(built(host("ldm.wan.model").WanModel, **facts))


def t5(file: str, name: str) -> Tensors:
    """One layer, and of the last of 24 what the host tells the size by."""
    random, seen = RandomTensors(FLOAT8), "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    made = random.all(encoder(host("text_encoders.t5").T5, file, name))
    return made | {seen: random(seen, torch.Size((10240, 4096)))}


def umt5() -> Tensors:
    """With a tokenizer inside, of 300 pieces, learnt from a few words."""
    import io

    import sentencepiece

    model, letters = io.BytesIO(), "abcdefghijklmnopqrstuvwxyz"
    words = [f"{a}{b} {b}{a}{a}, {a}.{b}" for a in letters for b in letters]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=300, minloglevel=2,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    pieces = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
    return t5("text_encoders/umt5_config_xxl.json", "umt5xxl") | {"spiece_model": pieces}


def llama(kind: str, name: str) -> Tensors:
    """Without what sees images; 8-bit floats, since the table of words is most of it."""
    made = encoder(getattr(host("text_encoders.llama"), kind), "", name)
    found = RandomTensors(FLOAT8).all(made)
    return {key: value for key, value in found.items() if not key.startswith("visual.")}


MAKERS: dict[str, Callable[[], Tensors]] = {
    "sd_xl_base_1.0": sdxl, "clip_l": clip_l, "ae": lambda: taesd(16),
    "t5xxl_fp16": lambda: t5("text_encoders/t5_config_xxl.json", "t5xxl"),
    "flux1-dev": flux, "qwen_image_2512_fp8_e4m3fn": qwen_image, "z_image_bf16": z_image,
    "wan2.1_t2v_1.3B_fp16": wan, "umt5_xxl_fp8_e4m3fn_scaled": umt5,
    "qwen_2.5_vl_7b_fp8_scaled": lambda: llama("Qwen25_7BVLI", "qwen25_7b"),
    "qwen_3_4b": lambda: llama("Qwen3_4B", "qwen3_4b"),
    "flux-2-klein-base-4b": flux2, "flux2-vae": flux2_vae,
    "wan2.2_ti2v_5B_fp16": lambda: wan(48), "wan2.2_vae": wan22_vae,
    "qwen_image_vae": wan_vae, "wan_2.1_vae": wan_vae,
}  # fmt: skip


@torch.no_grad()
def main(root: str, folder: Path, names: list[str]) -> None:
    """Write each file; a name is that of its folder and its own, with a slash between."""
    sys.path.insert(0, root)
    sys.argv = [sys.argv[0], "--cpu"]
    host("options").enable_args_parsing()
    for name in names:
        path = folder / name
        save_file(MAKERS[path.stem](), path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
