"""Pipelines of diffusers' own classes, as small as they get: random weights, no file, no network.

Their tokenizers know letters; text encoders are tiny models of the real classes, but for Wan and
Qwen-Image, which get `prompt_embeds` in the call (see `embeds`).
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tenuto.sampling import Clock, Follow

WIDTH = 24  # of the states of every text encoder
SAMPLE = 8  # latent rows and columns where a call names no size
LETTERS = string.ascii_lowercase + string.digits + ".,:;'-|<>!_/"


@contextmanager
def follow(handle: Any, clock: Clock) -> Iterator[Clock]:
    """`clock` at the step of every call of the denoiser of `handle`."""
    hook = Follow(handle, clock)
    try:
        yield clock
    finally:
        hook.remove()


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, of the same seed each time: no gate is closed, as new models have them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.copy_(noise * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1))
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return module.eval()


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16
    )


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0)]
    words += [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=16)


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    words = ["<|endoftext|>", "Ġ", "Ċ", *LETTERS, *string.ascii_uppercase]
    found = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    found.chat_template = "{% for m in messages %}user:{{ m['content'] }}{% endfor %}"
    return found


def clip(projected: bool = False, positions: int = 16) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=positions, projection_dim=WIDTH,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return randomized((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=WIDTH, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return randomized(T5EncoderModel(config))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12,
    )  # fmt: skip
    return randomized(Qwen3Model(config))


def vae(channels: int = 4) -> nn.Module:
    """32 x 32 images are 8 x 8 latents."""
    from diffusers import AutoencoderKL

    return randomized(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
            sample_size=32,
            scaling_factor=1.0,
            shift_factor=0.0,
            mid_block_add_attention=False,
        )
    )


def video_vae(kind: str, **options: Any) -> nn.Module:
    import diffusers

    size = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "temperal_downsample": [True]}
    return randomized(getattr(diffusers, kind)(**size, **scale, **options))


def unet(channels: int = 4) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return randomized(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
        )
    )


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def stable_diffusion(kind: str, channels: int = 4, scheduler: Any = None) -> Any:
    """kind: "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", ..."""
    import diffusers

    usual = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return getattr(diffusers, kind)(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet(channels),
        scheduler=scheduler or usual, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def flux(kind: str = "FluxPipeline") -> Any:
    """Guidance-distilled, with a shift that depends on the size (`use_dynamic_shifting`)."""
    import diffusers

    denoiser = diffusers.FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, num_layers=1,
        num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(), text_encoder=clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=randomized(denoiser),
    )  # fmt: skip
    pipe.default_sample_size = SAMPLE  # where a call names no size
    return pipe


def flux2() -> Any:
    """FLUX.2 klein. Its call takes text_encoder_out_layers=(0, 1, 2)."""
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    denoiser = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip
    config = Qwen3Config(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, tie_word_embeddings=True,
    )  # fmt: skip
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=randomized(decoder),
        text_encoder=randomized(Qwen3ForCausalLM(config)), tokenizer=qwen_tokenizer(),
        transformer=randomized(denoiser), is_distilled=True,
    )  # fmt: skip
    pipe.default_sample_size = SAMPLE
    return pipe


def sd3(kind: str = "StableDiffusion3Pipeline") -> Any:
    import diffusers

    denoiser = diffusers.SD3Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=32, sample_size=8, patch_size=2,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    return getattr(diffusers, kind)(
        transformer=randomized(denoiser), scheduler=flow(shift=3.0), vae=vae(),
        text_encoder=clip(True), tokenizer=clip_tokenizer(), text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def qwen_image(kind: str = "QwenImagePipeline") -> Any:
    import diffusers

    denoiser = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return getattr(diffusers, kind)(
        scheduler=flow(use_dynamic_shifting=True), vae=video_vae("AutoencoderKLQwenImage"),
        text_encoder=None, tokenizer=None, transformer=randomized(denoiser),
    )  # fmt: skip


def z_image(kind: str = "ZImagePipeline") -> Any:
    import diffusers

    denoiser = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2,
        n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )  # fmt: skip
    return getattr(diffusers, kind)(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(), text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(), transformer=randomized(denoiser),
    )  # fmt: skip


def wan_denoiser(seed: int = 0, channels: int = 4) -> nn.Module:
    """channels: that go in; an image-to-video model has those of the image and of its mask too."""
    import diffusers

    denoiser = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels,
        out_channels=4, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return randomized(denoiser, seed)


def wan(kind: str = "WanPipeline", **options: Any) -> Any:
    import diffusers

    parts = {"tokenizer": None, "text_encoder": None, "vae": video_vae("AutoencoderKLWan")}
    parts |= {"transformer": wan_denoiser()}
    return getattr(diffusers, kind)(scheduler=flow(shift=3.0), **parts | options)


def wan_22(kind: str = "WanPipeline", channels: int = 4, **options: Any) -> Any:
    """Wan 2.2 A14B: one denoiser for much noise and one for little, with the boundary between.

    Of 8 steps with this shift, the first has 4, of 6 it has 3.
    """
    return wan(
        kind, transformer=wan_denoiser(0, channels), transformer_2=wan_denoiser(1, channels),
        boundary_ratio=0.75, **options,
    )  # fmt: skip


def umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=64, d_model=WIDTH, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return randomized(UMT5EncoderModel(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, attn_implementation="eager",
    )  # fmt: skip
    return randomized(LlamaForCausalLM(config))


def hidream() -> Any:
    """Four text encoders: two of CLIP, T5 and Llama, of which every layer's states are read."""
    import diffusers

    denoiser = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(4, 6, 6), max_resolution=(16, 16), llama_layers=[0, 1, 1, 0],
    )  # fmt: skip
    return diffusers.HiDreamImagePipeline(
        scheduler=flow(), vae=vae(), text_encoder=clip(True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True), tokenizer_2=clip_tokenizer(), text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(), text_encoder_4=llama(), tokenizer_4=qwen_tokenizer(),
        transformer=randomized(denoiser),
    )  # fmt: skip


def video_diffusion() -> Any:
    """Stable Video Diffusion: an image in, no prompt."""
    import diffusers
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    denoiser = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, num_frames=2, num_attention_heads=2, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=48, addition_time_embed_dim=16,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32, 32, 32),
        layers_per_block=1, latent_channels=4, sample_size=32,
    )  # fmt: skip
    encoder = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=WIDTH, image_size=224, patch_size=56,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        vae=randomized(decoder), unet=randomized(denoiser),
        image_encoder=randomized(CLIPVisionModelWithProjection(encoder)),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002,
            sigma_max=700.0, use_karras_sigmas=True, timestep_spacing="leading",
        ),
        feature_extractor=CLIPImageProcessor(),
    )  # fmt: skip


def sound() -> Any:
    """Stable Audio."""
    import diffusers

    denoiser = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=WIDTH,
        time_proj_dim=16, global_states_input_dim=2 * WIDTH, cross_attention_input_dim=WIDTH,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on what diffusers does
        decoder = diffusers.AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
            decoder_input_channels=4, audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
        )  # fmt: skip
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )
    return diffusers.StableAudioPipeline(
        vae=randomized(decoder), text_encoder=t5(), projection_model=randomized(projection),
        tokenizer=t5_tokenizer(), transformer=randomized(denoiser),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    )  # fmt: skip


def embeds(rows: int, length: int = 5, seed: int = 0) -> Tensor:
    """Embeddings of prompts, (rows, length, WIDTH)."""
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def picture(width: int = 32, height: int = 32, mode: str = "RGB") -> Any:
    """A PIL image of noise."""
    from PIL import Image

    draw = torch.Generator().manual_seed(width)
    values = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(values.numpy()).convert(mode)


PROMPTS = ("a dog", "two cats", "a red bus")
SMALL = {"height": 32, "width": 32}


def asked(kind: str) -> tuple[Any, tuple[str, ...] | None, dict[str, Any]]:
    """(pipeline, prompts, call) of one of KINDS, as its user would call it."""
    pictures = {"image": picture(), "mask_image": picture(mode="L")}
    given = {"prompt_embeds": embeds(3), "negative_prompt_embeds": embeds(3, seed=1)}
    masks = dict.fromkeys(
        ("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(3, 5).long()
    )
    if kind == "sd":
        return stable_diffusion("StableDiffusionPipeline"), PROMPTS, {}
    if kind == "img2img":
        call = {"image": pictures["image"], "strength": 0.5}
        return stable_diffusion("StableDiffusionImg2ImgPipeline"), PROMPTS, call
    if kind == "inpaint":
        return stable_diffusion("StableDiffusionInpaintPipeline", 9), PROMPTS, pictures | SMALL
    if kind == "flux":
        return flux(), PROMPTS, SMALL | {"max_sequence_length": 16}
    if kind == "sd3":
        return sd3(), PROMPTS, {"negative_prompt": "blur"}
    if kind == "sd3 img2img":
        return sd3("StableDiffusion3Img2ImgPipeline"), PROMPTS, {"image": pictures["image"]}
    if kind == "qwen-image":
        return qwen_image(), None, given | masks | {"height": 16, "width": 16}
    if kind == "z-image":
        return z_image(), PROMPTS, SMALL | {"max_sequence_length": 32}
    assert kind == "wan"
    return wan(), None, given | SMALL | {"num_frames": 5}


KINDS = (
    "sd", "img2img", "inpaint", "flux", "sd3", "sd3 img2img", "qwen-image", "z-image", "wan",
)  # fmt: skip
