"""Under which names hosts' single files have a text encoder of transformers.

ComfyUI finds out from names and rows which encoder a file is, and takes the names of the models'
own repositories: transformers' `AutoModel` has the same parts under other prefixes, without head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError

EYES = ("vision_tower.", "multi_modal_projector.")
TOKENS = ("spiece_model", "tokenizer_json", "tekken_model")  # tensors with a tokenizer's file


@dataclass(frozen=True)
class EncoderNames:
    """How files have encoders of one `model_type`.

    prefixes: (of the model, of the file); the first that fits counts. dropped: what begins like
    that is in no file: no host needs it to read a text. tokens: the tensor that has the tokenizer,
    and the file of a folder that it is byte for byte; None: hosts bring the tokenizer themselves.
    """

    prefixes: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...] = ()
    tokens: tuple[str, str] | None = None

    def in_file(self, name: str) -> str | None:
        """The file's name of a parameter; None where it has none."""
        if name.startswith(self.dropped):
            return None
        return next(file + name[len(own) :] for own, file in self.prefixes if name.startswith(own))

    def in_model(self, name: str) -> str:
        """The model's name of a file's tensor: the inverse of `in_file`."""
        given = [(len(f), own + name[len(f) :]) for own, f in self.prefixes if name.startswith(f)]
        return max(given, default=(0, name))[1]


_SPIECE = ("spiece_model", "tokenizer.model")
_TEKKEN = ("tekken_model", "tekken.json")
_TEXT = (("language_model.", "model."), ("", ""))
_WHOLE = (("", "model."),)
_T5 = ("encoder.embed_tokens.", "decoder.", "lm_head.")
NAMES: Mapping[str, EncoderNames] = {
    "t5": EncoderNames((("", ""),), _T5),
    "umt5": EncoderNames((("", ""),), _T5, ("spiece_model", "spiece.model")),
    "qwen2": EncoderNames(_WHOLE),
    "qwen2_5_vl": EncoderNames(_TEXT),
    "qwen3": EncoderNames(_WHOLE),
    "qwen3_vl": EncoderNames(_WHOLE),
    "llama": EncoderNames(_WHOLE),
    "gemma2": EncoderNames(_WHOLE, (), _SPIECE),
    "gemma3_text": EncoderNames(_WHOLE, (), _SPIECE),
    "gemma3": EncoderNames(_TEXT, EYES, _SPIECE),
    "mistral": EncoderNames(_WHOLE, (), _TEKKEN),
    "mistral3": EncoderNames(_TEXT, EYES, _TEKKEN),
}
CLIP = "CLIP text encoders cannot be quantized for hosts: these compute noise with one, silently."
UNREAD = {  # blocks and width of T5s that hosts know, and read without quantized layers
    (24, 2048): "the T5-XL of AuraFlow", (12, 768): "a T5-base, as Stable Audio has",
}  # fmt: skip


def names_of(kind: str) -> EncoderNames:
    """The names of a `model_type`; ModelError where it is no encoder that files have."""
    if kind.startswith("clip"):
        raise ModelError(CLIP)
    if kind not in NAMES:
        raise ModelError(
            f"A model of the type {kind or 'unknown'} is no text encoder whose files Tenuto knows: "
            f"{', '.join(NAMES)}."
        )
    return NAMES[kind]


def check_read(kind: str, config: Any) -> None:
    """ModelError where ComfyUI knows such an encoder, but reads no quantized layers of it."""
    size = getattr(config, "num_layers", 0), getattr(config, "d_model", 0)
    if kind in ("t5", "umt5") and size in UNREAD:
        raise ModelError(f"ComfyUI reads no quantized layers of {UNREAD[size]}: keep it in float.")


def known_to_hosts(rows: Mapping[str, int]) -> str | None:
    """Which encoder ComfyUI takes a file for, by the first dimension of its tensors, or None."""
    llama = "model.layers.0."
    norm = rows.get(f"{llama}post_attention_layernorm.weight")
    if "encoder.block.23.layer.1.DenseReluDense.wi_1.weight" in rows:
        wide = rows["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"] == 10240
        return "T5-XXL or UMT5-XXL" if wide else None
    if "encoder.block.23.layer.1.DenseReluDense.wi.weight" in rows:
        return "T5-XXL of Cosmos"
    if "model.visual.deepstack_merger_list.0.norm.weight" in rows:
        return "Qwen3-VL"
    if f"{llama}post_feedforward_layernorm.weight" in rows:
        third = f"{llama}self_attn.q_norm.weight" in rows
        sizes = {2560: "Gemma 3 4B", 3840: "Gemma 3 12B"} if third else {2304: "Gemma 2 2B"}
        return sizes.get(norm or 0)
    if f"{llama}self_attn.k_proj.bias" in rows:
        sizes = {256: "Qwen2.5-VL-3B", 512: "Qwen2.5-VL-7B"}
        return sizes.get(rows[f"{llama}self_attn.k_proj.bias"])
    if f"{llama}self_attn.q_norm.weight" in rows:
        sizes = {1024: "0.6B", 2048: "2B", 2560: "4B", 4096: "8B"}
        return f"Qwen3-{sizes[norm]}" if norm in sizes else None
    return {5120: "Mistral 3 24B", 4096: "Llama 3 8B"}.get(norm or 0)
