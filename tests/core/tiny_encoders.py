"""Folders of transformers with a tiny random text encoder and its tokenizer, as a hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.core.tiny_language import EYES, PLACES, TEXT
from tests.core.tiny_pipelines import qwen_tokenizer, randomized, t5_tokenizer

SIZES: dict[str, Any] = TEXT | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 32,
}  # fmt: skip
PIECES = bytes(range(200))  # stands for a model of sentencepiece, which nothing here opens


def t5(kind: str = "T5") -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return randomized(getattr(transformers, f"{kind}EncoderModel")(config))


def language(kind: str, **more: Any) -> nn.Module:
    """Such as "Qwen3ForCausalLM"."""
    import transformers

    family = kind.removesuffix("ForCausalLM").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**SIZES | more)
    return randomized(getattr(transformers, kind)(config))


def qwen_vl() -> nn.Module:
    """Qwen2.5-VL with its tower for images and its head."""
    import transformers

    text = SIZES | {"rope_parameters": PLACES | {"mrope_section": [4, 6, 6]}}
    eyes = EYES | {"out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2}
    tokens = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **tokens)
    return randomized(transformers.Qwen2_5_VLForConditionalGeneration(config))


KINDS: dict[str, tuple[Any, Any, str]] = {  # model, tokenizer, the tokenizer's own file
    "flux": (t5, t5_tokenizer, ""),
    "wan": (lambda: t5("UMT5"), t5_tokenizer, "spiece.model"),
    "z-image": (lambda: language("Qwen3ForCausalLM"), qwen_tokenizer, ""),
    "qwen-image": (qwen_vl, qwen_tokenizer, ""),
    "lumina2": (lambda: language("Gemma2Model", query_pre_attn_scalar=32), qwen_tokenizer,
                "tokenizer.model"),
    "ltx2": (lambda: language("Gemma3TextModel", query_pre_attn_scalar=32, sliding_window=16),
             qwen_tokenizer, "tokenizer.model"),
}  # fmt: skip


def encoder_folder(path: Path, consumer: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with the encoder that a consumer reads."""
    model, tokenizer, file = KINDS[consumer]
    model().to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    if file:
        (path / file).write_bytes(PIECES)
    return path
