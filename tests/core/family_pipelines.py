"""One tiny pipeline of diffusers' own classes a model family, with text encoders of its own kind.

Random weights of a fixed seed, no file, no network. What has no pipeline in diffusers (FLUX.3,
MiniMax H3, Anima: modular ones alone) is a bare denoiser with a sampling loop.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.core import tiny_pipelines as tiny
from tests.core.model.conftest import FAMILIES, UNKNOWN, Draw, built

WIDTH, PROMPTS = tiny.WIDTH, ("a dog", "two cats")
SMALL = {"height": 32, "width": 32}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Ready:
    """A model as its user holds it, and how he calls it.

    call: keywords of the pipeline's own. sample: of a bare denoiser, in place of prompts.
    """

    model: Any
    prompts: tuple[str, ...] = PROMPTS
    call: dict[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    sample: Callable[[nn.Module, int, int], Tensor] | None = None


# --- language models as text encoders -------------------------------------------------------------

LLM: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def tokenizer(kind: str = "Qwen2Tokenizer", specials: tuple[str, ...] = ()) -> Any:
    """One token a letter; a chat is its texts, one after another."""
    import transformers

    marks = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"]
    words = [*marks, "Ġ", "Ċ", "▁", *tiny.LETTERS, *string.ascii_uppercase]
    found = getattr(transformers, kind)(
        vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, merges=[],
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64,
    )  # fmt: skip
    if specials:
        found.add_tokens(list(specials), special_tokens=True)
    found.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    return found


def language_model(kind: str, model: str, **more: Any) -> nn.Module:
    """kind: of the configuration, without "Config"; model: the class."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(LLM | more))
    return tiny.randomized(getattr(transformers, model)(config))


def vision_model(kind: str, model: str, vision: dict[str, Any], **more: Any) -> nn.Module:
    """A language model with a vision tower. kind: as above."""
    import transformers

    text = LLM | more
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    return tiny.randomized(getattr(transformers, model)(config))


def qwen25() -> nn.Module:
    vision = VISION | {"out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
    return vision_model(
        "Qwen2_5_VL", "Qwen2_5_VLForConditionalGeneration", vision, rope_parameters=SECTIONS
    )


def qwen3_vl(model: str) -> nn.Module:
    vision = VISION | {
        "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return vision_model("Qwen3VL", model, vision, rope_parameters=SECTIONS)


def umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=64, d_model=WIDTH, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        dropout_rate=0.0, use_cache=False, is_encoder_decoder=False, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return tiny.randomized(UMT5EncoderModel(config))


def byt5(width: int) -> tuple[nn.Module, Any]:
    """(encoder, tokenizer) of bytes."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=384, d_model=width, d_kv=10, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return tiny.randomized(T5EncoderModel(config)), ByT5Tokenizer(model_max_length=16)


def gemma2() -> nn.Module:
    return language_model("Gemma2", "Gemma2Model", query_pre_attn_scalar=12)


# --- pieces ---------------------------------------------------------------------------------------


def denoiser(name: str, **changes: Any) -> nn.Module:
    """The tiny denoiser of this name, with another configuration where one is given."""
    import diffusers

    known = {**FAMILIES, **UNKNOWN}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers
        return tiny.randomized(getattr(diffusers, known.kind)(**(known.config | changes)))


def autoencoder(kind: str, **config: Any) -> nn.Module:
    import diffusers

    return tiny.randomized(getattr(diffusers, kind)(**config))


def pipeline(kind: str, **parts: Any) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers
        return getattr(diffusers, kind)(**parts)


def given(pipe: Any, **parts: Any) -> Any:
    """`pipe` with other parts."""
    pipe.register_modules(**parts)
    return pipe


def stable_diffusion() -> Ready:
    return Ready(tiny.stable_diffusion("StableDiffusionPipeline"), guidance=2.0)


def sdxl() -> Ready:
    unet = tiny.randomized(
        _class("UNet2DConditionModel")(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2 * WIDTH,
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH, use_linear_projection=True,
        )
    )  # fmt: skip
    usual = _class("EulerDiscreteScheduler")(beta_schedule="scaled_linear", steps_offset=1)
    pipe = pipeline(
        "StableDiffusionXLPipeline", vae=tiny.vae(), text_encoder=tiny.clip(),
        text_encoder_2=tiny.clip(True), tokenizer=tiny.clip_tokenizer(),
        tokenizer_2=tiny.clip_tokenizer(), unet=unet, scheduler=usual, add_watermarker=False,
    )  # fmt: skip
    return Ready(pipe, call=SMALL, guidance=2.0)


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def sd3() -> Ready:
    return Ready(tiny.sd3(), guidance=2.0)


def sd35() -> Ready:
    """Of medium: with attention twice in some blocks, and a third encoder."""
    model = denoiser("sd3 medium", joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH)
    parts = {"text_encoder_3": _t5(2 * WIDTH), "tokenizer_3": tiny.t5_tokenizer()}
    return Ready(given(tiny.sd3(), transformer=model, **parts), guidance=2.0)


def _t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=width, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return tiny.randomized(T5EncoderModel(config))


def flux() -> Ready:
    return Ready(tiny.flux(), call=SMALL | {"max_sequence_length": 16}, guidance=3.5)


def flux2(distilled: bool = True) -> Ready:
    """dev: guidance embedded; klein: guided in two calls."""
    name = "flux2" if distilled else "flux2 klein"
    vae = autoencoder(
        "AutoencoderKLFlux2", sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=2, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "transformer": denoiser(name, joint_attention_dim=3 * WIDTH), "vae": vae,
        "scheduler": tiny.flow(use_dynamic_shifting=True), "tokenizer": tokenizer(),
    }  # fmt: skip
    call = {
        "height": 16, "width": 16, "max_sequence_length": 16,
        "text_encoder_out_layers": (1, 2, 3),
    }  # fmt: skip
    if not distilled:
        text = language_model("Qwen3", "Qwen3ForCausalLM")
        return Ready(pipeline("Flux2KleinPipeline", text_encoder=text, **parts), PROMPTS, call, 2.0)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    text = vision_model(
        "Mistral3", "Mistral3ForConditionalGeneration", vision | {"model_type": "pixtral"},
        model_type="mistral",
    )  # fmt: skip
    return Ready(pipeline("Flux2Pipeline", text_encoder=text, **parts), PROMPTS, call, 4.0)


def qwen_image() -> Ready:
    pipe = given(tiny.qwen_image(), text_encoder=qwen25(), tokenizer=tokenizer())
    call = {"height": 16, "width": 16, "negative_prompt": "blur"}
    return Ready(pipe, call=call, guidance=2.0)


def qwen_edit() -> Ready:
    """Made of an image; as in 2511 with half of the rows at t = 0. Prompts are embedded before."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit

    edit.VAE_IMAGE_SIZE = 32 * 32  # to which it resizes what is to be edited: a megapixel
    pipe = pipeline(
        "QwenImageEditPlusPipeline", scheduler=tiny.flow(use_dynamic_shifting=True),
        vae=tiny.video_vae("AutoencoderKLQwenImage"), text_encoder=None, tokenizer=None,
        processor=None, transformer=denoiser("qwen_image edit", in_channels=16, out_channels=4),
    )  # fmt: skip
    call = embedded(masks=True) | {"image": tiny.picture(16, 16), "height": 16, "width": 16}
    return Ready(pipe, (), call, 2.0)


def embedded(masks: bool = False, negative: bool = True) -> dict[str, Any]:
    """Embeddings in place of two prompts."""
    names = ("prompt_embeds", "negative_prompt_embeds")[: 1 + negative]
    found = {name: tiny.embeds(2, seed=i) for i, name in enumerate(names)}
    more = {f"{name}_mask": torch.ones(2, 5).long() for name in names if masks}
    return found | more


def qwen_image21() -> Ready:
    vae = autoencoder(
        "AutoencoderKLQwenImage21", base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1, 1],
        num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8, scale_factor_temporal=1, scale_factor_spatial=2,
    )  # fmt: skip
    pipe = pipeline(
        "QwenImage21Pipeline", scheduler=tiny.flow(use_dynamic_shifting=True), vae=vae,
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration"), processor=TextProcessor(),
        transformer=denoiser("qwen_image 2.1"),
    )  # fmt: skip
    return Ready(pipe, call={"height": 64, "width": 64}, guidance=2.0)


class TextProcessor:
    """The part of a processor that is for texts: the real one wants torchvision for videos."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer(specials=("<|image_pad|>",))

    def apply_chat_template(self, chat: list[Any], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template([chat], **options)

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, **options)


def z_image() -> Ready:
    return Ready(tiny.z_image(), call=SMALL | {"max_sequence_length": 32}, guidance=2.0)


def wan(second: bool = False) -> Ready:
    """second: 2.2, where another denoiser takes over at half of the noise."""
    more = {"transformer_2": denoiser("wan"), "boundary_ratio": 0.5} if second else {}
    pipe = given(tiny.wan(**more), text_encoder=umt5(), tokenizer=tiny.t5_tokenizer())
    call = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    return Ready(pipe, call=call, guidance=2.0)


def krea2() -> Ready:
    model = denoiser("krea2", in_channels=16)
    pipe = pipeline(
        "Krea2Pipeline", scheduler=tiny.flow(use_dynamic_shifting=True), transformer=model,
        vae=tiny.video_vae("AutoencoderKLQwenImage"), text_encoder=qwen3_vl("Qwen3VLModel"),
        tokenizer=tokenizer(), text_encoder_select_layers=[1, 2, 3],
    )  # fmt: skip
    call = {"height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "blur"}
    return Ready(pipe, call=call, guidance=2.0)


def ltx2(gated: bool = False) -> Ready:
    """gated: 2.3."""
    text = vision_model(
        "Gemma3", "Gemma3ForConditionalGeneration",
        {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
    )  # fmt: skip
    vae = autoencoder(
        "AutoencoderKLLTX2Video", latent_channels=4, block_out_channels=(8,),
        decoder_block_out_channels=(8,), layers_per_block=(1,), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), patch_size=1, patch_size_t=1,
        decoder_causal=False,
    )  # fmt: skip
    audio = autoencoder(
        "AutoencoderKLLTX2Audio", base_channels=4, output_channels=2, ch_mult=(1,),
        num_res_blocks=1, attn_resolutions=None, in_channels=2, resolution=32, latent_channels=2,
        mid_block_add_attention=False, mel_bins=8,
    )  # fmt: skip
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=16, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=LLM["num_hidden_layers"] + 1,
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=12,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=12,
        audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    sizes = {"in_channels": 4, "out_channels": 4, "audio_in_channels": 4, "audio_out_channels": 4}
    pipe = pipeline(
        "LTX2Pipeline", scheduler=tiny.flow(), vae=vae, audio_vae=audio, text_encoder=text,
        tokenizer=tokenizer("GemmaTokenizer"), connectors=tiny.randomized(connectors),
        transformer=denoiser("ltx2", **sizes, rope_type="split"),
        vocoder=tiny.randomized(vocoder),
    )  # fmt: skip
    call = SMALL | {"num_frames": 5, "frame_rate": 25.0, "max_sequence_length": 16}
    return Ready(pipe, call=call, guidance=2.0)


def chroma() -> Ready:
    pipe = pipeline(
        "ChromaPipeline", scheduler=tiny.flow(), vae=tiny.vae(), text_encoder=tiny.t5(),
        tokenizer=tiny.t5_tokenizer(), transformer=denoiser("chroma", in_channels=16),
    )  # fmt: skip
    return Ready(pipe, call=SMALL | {"max_sequence_length": 16}, guidance=2.0)


def hunyuan_video() -> Ready:
    vae = autoencoder(
        "AutoencoderKLHunyuanVideo", latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        mid_block_add_attention=False,
    )  # fmt: skip
    pipe = pipeline(
        "HunyuanVideoPipeline", text_encoder=language_model("Llama", "LlamaModel"),
        tokenizer=tokenizer("LlamaTokenizer"), vae=vae, scheduler=tiny.flow(shift=7.0),
        transformer=denoiser("hunyuan_video", pooled_projection_dim=WIDTH),
        text_encoder_2=tiny.clip(positions=77), tokenizer_2=tiny.clip_tokenizer(),
    )  # fmt: skip
    template = {"template": "describe: {}", "crop_start": 3}
    call = SMALL | {"num_frames": 5, "max_sequence_length": 16, "prompt_template": template}
    return Ready(pipe, call=call, guidance=6.0)


def hunyuan_video15() -> Ready:
    from diffusers.guiders import ClassifierFreeGuidance

    vae = autoencoder(
        "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(8, 8, 8),
        layers_per_block=1, spatial_compression_ratio=4, temporal_compression_ratio=2,
    )  # fmt: skip
    text, words = byt5(20)
    pipe = pipeline(
        "HunyuanVideo15Pipeline", tokenizer=tokenizer(), vae=vae, scheduler=tiny.flow(shift=7.0),
        text_encoder=language_model("Qwen2_5_VLText", "Qwen2_5_VLTextModel",
                                    rope_parameters=SECTIONS),
        text_encoder_2=text, tokenizer_2=words, transformer=denoiser("hunyuan_video 1.5"),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 16
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 3, 12
    return Ready(pipe, ('a "dog"', "two cats"), {"height": 16, "width": 16, "num_frames": 5})


def hunyuan_image() -> Ready:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    vae = autoencoder(
        "AutoencoderKLHunyuanImage", in_channels=3, out_channels=3, latent_channels=4,
        block_out_channels=(32, 32, 32), layers_per_block=1, spatial_compression_ratio=4,
        sample_size=16, scaling_factor=1.0,
    )  # fmt: skip
    text, words = byt5(20)
    pipe = pipeline(
        "HunyuanImagePipeline", scheduler=tiny.flow(shift=5.0), vae=vae, text_encoder=qwen25(),
        tokenizer=tokenizer(), text_encoder_2=text, tokenizer_2=words,
        transformer=denoiser("hunyuan_image"),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    )  # fmt: skip
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 16
    return Ready(pipe, ('a "dog"', "two cats"), {"height": 16, "width": 16})


def lumina2() -> Ready:
    pipe = pipeline(
        "Lumina2Pipeline", transformer=denoiser("lumina2"), scheduler=tiny.flow(),
        vae=tiny.vae(), text_encoder=gemma2(), tokenizer=tokenizer("GemmaTokenizer"),
    )  # fmt: skip
    call = SMALL | {"max_sequence_length": 16, "system_prompt": "you"}
    return Ready(pipe, call=call, guidance=2.0)


def sana() -> Ready:
    vae = autoencoder(
        "AutoencoderDC", latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    pipe = pipeline(
        "SanaPipeline", tokenizer=tokenizer("GemmaTokenizer"), text_encoder=gemma2(), vae=vae,
        transformer=denoiser("sana"), scheduler=tiny.flow(shift=3.0),
    )  # fmt: skip
    call = {
        **SMALL, "max_sequence_length": 16, "complex_human_instruction": None,
        "use_resolution_binning": False, "clean_caption": False,
    }  # fmt: skip
    return Ready(pipe, call=call, guidance=2.0)


def hidream() -> Ready:
    text = language_model("Llama", "LlamaForCausalLM")
    model = denoiser(
        "hidream", caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH,
        llama_layers=[0, 1, 1, 0],
    )  # fmt: skip
    pipe = pipeline(
        "HiDreamImagePipeline", scheduler=tiny.flow(shift=3.0), vae=tiny.vae(),
        text_encoder=tiny.clip(True), tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=tiny.clip(True), tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=tiny.t5(), tokenizer_3=tiny.t5_tokenizer(), text_encoder_4=text,
        tokenizer_4=tokenizer("LlamaTokenizer"), transformer=model,
    )  # fmt: skip
    pipe.default_sample_size = 8  # to the area of which it takes every image
    return Ready(pipe, call=SMALL | {"max_sequence_length": 16}, guidance=2.0)


def pixart() -> Ready:
    model = _class("PixArtTransformer2DModel")(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=8,
        sample_size=8, patch_size=2, cross_attention_dim=32, caption_channels=WIDTH,
        use_additional_conditions=False,
    )  # fmt: skip
    pipe = pipeline(
        "PixArtAlphaPipeline", tokenizer=tiny.t5_tokenizer(), text_encoder=tiny.t5(),
        vae=tiny.vae(), transformer=tiny.randomized(model),
        scheduler=_class("DPMSolverMultistepScheduler")(),
    )  # fmt: skip
    call = SMALL | {"use_resolution_binning": False, "clean_caption": False}
    return Ready(pipe, call=call | {"max_sequence_length": 16}, guidance=2.0)


def dit() -> Ready:
    model = _class("DiTTransformer2DModel")(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=8,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = pipeline(
        "DiTPipeline", transformer=tiny.randomized(model), vae=tiny.vae(),
        scheduler=_class("DDIMScheduler")(),
    )  # fmt: skip
    return Ready(pipe, (), {"class_labels": [1, 7]}, 2.0)


def animatediff() -> Ready:
    model = denoiser("unet motion", layers_per_block=1)
    pipe = pipeline(
        "AnimateDiffPipeline", vae=tiny.vae(), text_encoder=tiny.clip(),
        tokenizer=tiny.clip_tokenizer(), unet=model, motion_adapter=None,
        scheduler=_class("DDIMScheduler")(beta_schedule="linear", steps_offset=1),
    )  # fmt: skip
    return Ready(pipe, call=SMALL | {"num_frames": 3}, guidance=2.0)


def video_diffusion() -> Ready:
    call = {"image": tiny.picture(), "height": 32, "width": 32, "num_frames": 2}
    return Ready(tiny.video_diffusion(), (), call | {"decode_chunk_size": 2})


def kandinsky3() -> Ready:
    movq = autoencoder(
        "VQModel", block_out_channels=(32, 32), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), num_vq_embeddings=12,
        norm_num_groups=4, vq_embed_dim=4, norm_type="spatial",
    )  # fmt: skip
    model = denoiser("unet kandinsky 3", block_out_channels=(8,) * 4)
    pipe = pipeline(
        "Kandinsky3Pipeline", tokenizer=tiny.t5_tokenizer(), text_encoder=tiny.t5(),
        unet=model, movq=movq,
        scheduler=_class("DDPMScheduler")(),
    )  # fmt: skip
    return Ready(pipe, call={"height": 64, "width": 64}, guidance=2.0)


def unet2d() -> Ready:
    """Without a prompt: as many images as are asked for."""
    pipe = pipeline(
        "DDIMPipeline", unet=denoiser("unet 2d"), scheduler=_class("DDIMScheduler")()
    )  # fmt: skip
    return Ready(pipe, ())


# --- bare denoisers -------------------------------------------------------------------------------


def bare(name: str, key: str = "hidden_states", flips: bool = False) -> Ready:
    """A denoiser with a loop of Euler steps over its own inputs, image i of seed i."""
    known = FAMILIES[name]

    def sample(model: nn.Module, seed: int, batch: int) -> Tensor:
        found = [_loop(model, known, key, seed + i) for i in range(batch)]
        return torch.cat(found)

    return Ready(built(known), (), sample=sample)


def _loop(model: nn.Module, known: Any, key: str, seed: int, steps: int = 4) -> Tensor:
    times = [1 - i / steps for i in range(steps)]
    inputs = known.inputs(Draw(seed), times[0])
    text = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and "encoder" in k}
    x = inputs[key]
    for t in times:
        inputs = known.inputs(Draw(seed), t) | text | {key: x}
        out = model(**inputs, return_dict=False)[0]
        x = x - out[..., : x.shape[-1]] / steps
    return x.flatten(1)[:, : 3 * 16].reshape(-1, 3, 4, 4).tanh()


MODELS: dict[str, Callable[[], Ready]] = {
    "Stable Diffusion 1.5": stable_diffusion,
    "SDXL": sdxl,
    "Stable Diffusion 3": sd3,
    "Stable Diffusion 3.5": sd35,
    "FLUX.1": flux,
    "FLUX.2 dev": flux2,
    "FLUX.2 klein": partial(flux2, distilled=False),
    "FLUX.3": partial(bare, "flux3"),
    "Qwen-Image": qwen_image,
    "Qwen-Image-Edit": qwen_edit,
    "Qwen-Image-2.1": qwen_image21,
    "Z-Image": z_image,
    "Wan 2.1": wan,
    "Wan 2.2": partial(wan, second=True),
    "Krea 2": krea2,
    "LTX-2": ltx2,
    "MiniMax H3": partial(bare, "minimax_h3"),
    "Chroma": chroma,
    "HunyuanVideo": hunyuan_video,
    "HunyuanVideo 1.5": hunyuan_video15,
    "HunyuanImage 2.1": hunyuan_image,
    "Lumina 2": lumina2,
    "Sana": sana,
    "HiDream": hidream,
    "PixArt": pixart,
    "DiT": dit,
    "Anima / Cosmos": partial(bare, "anima"),
    "AnimateDiff": animatediff,
    "Stable Video Diffusion": video_diffusion,
    "Kandinsky 3": kandinsky3,
    "UNet2D": unet2d,
}
