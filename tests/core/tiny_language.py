"""Pipelines of diffusers' own classes with a language model as text encoder, tiny and random.

The encoders are of transformers' own classes, three blocks deep, with their towers for images.
Tokenizers know letters, as in `tiny_pipelines.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.core.tiny_pipelines import (
    SMALL,
    WIDTH,
    clip_tokenizer,
    flow,
    qwen_tokenizer,
    randomized,
    t5_tokenizer,
    vae,
    video_vae,
)

TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
}  # fmt: skip
PLACES = {"mrope_section": [2, 2, 2], "rope_type": "default", "rope_theta": 10000.0}
EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %} "
    "{% endfor %}"
)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
HUNYUAN = HEADS | {
    "num_layers": 1, "num_refiner_layers": 1, "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH,
}  # fmt: skip


def language(kind: str, **more: Any) -> nn.Module:
    """A text model of transformers, such as "Qwen3ForCausalLM"."""
    import transformers

    family = kind.removesuffix("ForCausalLM").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**TEXT | more)
    return randomized(getattr(transformers, kind)(config))


def sighted(kind: str) -> nn.Module:
    """A model of text and images, such as "Qwen2_5_VLForConditionalGeneration"."""
    import transformers

    family = kind.removesuffix("ForConditionalGeneration").removesuffix("Model")
    text, eyes, more = dict(TEXT), dict(EYES), {}
    if family.startswith("Qwen"):
        text["rope_parameters"] = PLACES
        eyes |= {"out_hidden_size": WIDTH, "patch_size": 4, "spatial_merge_size": 2}
        more = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122}
        if family == "Qwen3VL":
            eyes |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            text["rope_parameters"] = PLACES | {"mrope_interleaved": True}
    else:
        eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
        eyes |= {"head_dim": 8} if family == "Mistral3" else {}
        more = {"image_token_index": 120}
        text |= {"model_type": "mistral" if family == "Mistral3" else "gemma3_text"}
        eyes |= {"model_type": "pixtral" if family == "Mistral3" else "siglip_vision_model"}
        if family == "Gemma3":
            text |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                     "query_pre_attn_scalar": 12, "sliding_window": 16}  # fmt: skip
            more |= {"mm_tokens_per_image": 4}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=eyes, **more)
    return randomized(getattr(transformers, kind)(config))


def clip(places: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return randomized(CLIPTextModel(CLIPTextConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=places, eos_token_id=1, pad_token_id=1,
    )))  # fmt: skip


def byt5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return randomized(T5EncoderModel(T5Config(
        vocab_size=400, d_model=WIDTH, d_kv=12, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )))  # fmt: skip


def tokenizer() -> Any:
    found = qwen_tokenizer()
    found.chat_template = TEMPLATE
    return found


def flux2(klein: bool) -> Any:
    import diffusers

    denoiser = diffusers.Flux2Transformer2DModel(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, patch_size=1,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip
    encoder = (
        language("Qwen3ForCausalLM", num_hidden_layers=4)
        if klein
        else sighted("Mistral3ForConditionalGeneration")
    )
    pipe = (diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline)(
        scheduler=flow(use_dynamic_shifting=True), vae=randomized(decoder), text_encoder=encoder,
        tokenizer=tokenizer(), transformer=randomized(denoiser),
    )  # fmt: skip
    pipe.system_message = "see"
    return pipe


def qwen_image() -> Any:
    import diffusers

    denoiser = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=video_vae("AutoencoderKLQwenImage"),
        text_encoder=sighted("Qwen2_5_VLForConditionalGeneration"), tokenizer=tokenizer(),
        transformer=randomized(denoiser),
    )  # fmt: skip


def hunyuan_image() -> Any:
    import diffusers
    from transformers import ByT5Tokenizer

    denoiser = diffusers.HunyuanImageTransformer2DModel(
        **HUNYUAN, in_channels=4, out_channels=4, num_single_layers=1, patch_size=(1, 1),
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
        layers_per_block=1, spatial_compression_ratio=2, sample_size=32,
    )  # fmt: skip
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=flow(), vae=randomized(decoder), tokenizer=tokenizer(),
        text_encoder=sighted("Qwen2_5_VLForConditionalGeneration"), text_encoder_2=byt5(),
        tokenizer_2=ByT5Tokenizer(), transformer=randomized(denoiser),
    )  # fmt: skip
    pipe.tokenizer_max_length = 220
    return pipe


def krea2() -> Any:
    import diffusers

    denoiser = diffusers.Krea2Transformer2DModel(
        **HEADS, in_channels=16, num_layers=1, num_key_value_heads=1, intermediate_size=48,
        timestep_embed_dim=32, text_hidden_dim=WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = diffusers.Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=video_vae("AutoencoderKLQwenImage"),
        text_encoder=sighted("Qwen3VLModel"), tokenizer=tokenizer(),
        transformer=randomized(denoiser), text_encoder_select_layers=(1, 2),
    )  # fmt: skip
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "see ", 2
    return pipe


def lumina2() -> Any:
    import diffusers

    denoiser = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
        axes_dim_rope=(4, 4, 4), axes_lens=(300, 16, 16), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=randomized(denoiser), scheduler=flow(), vae=vae(), tokenizer=tokenizer(),
        text_encoder=language("Gemma2Model", query_pre_attn_scalar=12),
    )  # fmt: skip


def hunyuan_video() -> Any:
    import diffusers

    denoiser = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH, rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, mid_block_add_attention=False,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=language("LlamaModel", num_hidden_layers=4), tokenizer=tokenizer(),
        text_encoder_2=clip(77), tokenizer_2=clip_tokenizer(), transformer=randomized(denoiser),
        vae=randomized(decoder), scheduler=flow(),
    )  # fmt: skip


def wan() -> Any:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=64, d_model=WIDTH, d_kv=12, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    denoiser = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=randomized(UMT5EncoderModel(config)),
        vae=video_vae("AutoencoderKLWan"), scheduler=flow(shift=3.0),
        transformer=randomized(denoiser),
    )  # fmt: skip


def asked(kind: str) -> tuple[Any, dict[str, Any]]:
    """(pipeline, call) of one of KINDS, as its user would call it."""
    if kind == "flux2 klein":
        return flux2(True), SMALL | {
            "max_sequence_length": 24,
            "text_encoder_out_layers": (1, 2, 3),
        }
    if kind == "flux2":
        return flux2(False), SMALL | {
            "max_sequence_length": 24,
            "text_encoder_out_layers": (0, 1, 2),
        }
    if kind == "qwen-image":
        return qwen_image(), {"height": 16, "width": 16}
    if kind == "hunyuan-image":
        return hunyuan_image(), {"height": 16, "width": 16}
    if kind == "krea2":
        return krea2(), {"height": 16, "width": 16, "max_sequence_length": 24}
    if kind == "lumina2":
        return lumina2(), SMALL | {"max_sequence_length": 48, "system_prompt": "see"}
    if kind == "hunyuan-video":
        template = {"template": "say {}", "crop_start": 2}
        call = {"num_frames": 5, "max_sequence_length": 24, "prompt_template": template}
        return hunyuan_video(), SMALL | call
    assert kind == "wan"
    return wan(), SMALL | {"num_frames": 5, "max_sequence_length": 16}


KINDS = (
    "flux2 klein", "flux2", "qwen-image", "hunyuan-image", "krea2", "lumina2", "hunyuan-video",
    "wan",
)  # fmt: skip
