"""Which denoiser reads what of which text encoder: one row a consumer.

A row says how the prompt becomes tokens, which of them the others see and which states are read, so
that an encoder is calibrated and measured as it will be used, by a host that takes it from a file
of its own. Templates are the models' own, as diffusers has them; where diffusers and ComfyUI fill
up a text differently, a row is as ComfyUI does, whose files these are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TenutoError
from .encoder_calls import BATCH, MASK, Row, calls_of, without_cache
from .reads import state_count
from .trajectory import Call

LIMIT = 512  # tokens of a prompt and its template that are looked at
ALL = "all"  # hidden states
PROMPT = "{}"


@dataclass(frozen=True)
class Consumer:
    """What one denoiser reads.

    kinds: `model_type`s of transformers' configs that its encoder may have. source: where this is
    to be read, in diffusers unless it says ComfyUI. read: hidden states, from the end where they
    are negative, or `ALL`; (): the one after the last norm. template: of the text, "{}" is the
    prompt. drop: whether the tokens before the prompt are not read. filled: to how many tokens a
    text is filled up with ones that all others see and the denoiser reads too; 0: what fills a text
    up is hidden, and changes nothing.
    """

    kinds: tuple[str, ...]
    source: str
    read: tuple[int, ...] | str = ()
    template: str = PROMPT
    drop: bool = False
    filled: int = 0


T5, UMT5, LLAMA, QWEN3, GEMMA2 = ("t5",), ("umt5",), ("llama",), ("qwen3",), ("gemma2",)
QWEN2_VL, MISTRAL, GEMMA3 = ("qwen2_5_vl",), ("mistral3", "mistral"), ("gemma3", "gemma3_text")

_USER = "<|im_start|>user\n{}<|im_end|>\n"
_ANSWER = "<|im_start|>assistant\n"
_DETAILS = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
)
_REASONS = (
    "[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured "
    "responses focusing on object relationships, object\nattribution and actions without "
    "speculation.[/SYSTEM_PROMPT][INST]{}[/INST]"
)
_VIDEO = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following "
    "aspects: 1. The main content and theme of the video.2. The color, shape, size, texture, "
    "quantity, text, and spatial relationships of the objects.3. Actions, events, behaviors "
    "temporal relationships, physical movement changes of the objects.4. background environment, "
    "light, style and atmosphere.5. camera angles, movements, and transitions used in the video:"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
_SUPERIOR = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> {}"
)
_KREA = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)

CONSUMERS: dict[str, Consumer] = {  # by what `--for` calls them
    "flux": Consumer(T5, "ComfyUI text_encoders/flux.py; FluxPipeline (512)", filled=256),
    "sd3": Consumer(T5, "ComfyUI text_encoders/sd3_clip.py; pipeline (256)", filled=77),
    "chroma": Consumer(T5, "ComfyUI text_encoders/pixart_t5.py; ChromaPipeline"),
    "pixart": Consumer(T5, "PixArtSigmaPipeline"),
    "cogvideox": Consumer(T5, "CogVideoXPipeline", filled=226),
    "mochi": Consumer(T5, "MochiPipeline"),
    "ltx": Consumer(T5, "LTXPipeline"),
    "cosmos": Consumer(T5, "CosmosTextToWorldPipeline"),
    "hidream-t5": Consumer(T5, "HiDreamImagePipeline, text_encoder_3"),
    "hidream-llama": Consumer(LLAMA, "HiDreamImagePipeline, text_encoder_4", ALL),
    "wan": Consumer(UMT5, "WanPipeline"),
    "qwen-image": Consumer(
        QWEN2_VL, "QwenImagePipeline", (-1,), _DETAILS + _USER + _ANSWER, drop=True
    ),
    "hunyuan-image": Consumer(
        QWEN2_VL, "HunyuanImagePipeline", (-3,), _DETAILS + _USER.rstrip("\n"), drop=True
    ),
    "hunyuan-video": Consumer(LLAMA, "HunyuanVideoPipeline", (-3,), _VIDEO, drop=True),
    "z-image": Consumer(QWEN3, "ZImagePipeline", (-2,), _USER + _ANSWER),
    "flux2": Consumer(MISTRAL, "Flux2Pipeline", (10, 20, 30), _REASONS),
    "flux2-klein": Consumer(
        QWEN3, "Flux2KleinPipeline", (9, 18, 27), _USER + _ANSWER + "<think>\n\n</think>\n\n"
    ),
    "krea2": Consumer(("qwen3_vl",), "Krea2Pipeline", _KREA, _DETAILS + _USER + _ANSWER, drop=True),
    "lumina2": Consumer(GEMMA2, "Lumina2Pipeline", (-2,), _SUPERIOR),
    "sana": Consumer(GEMMA2, "SanaPipeline, without its instruction"),
    "ltx2": Consumer(GEMMA3, "LTX2Pipeline", ALL),
}


def consumer_of(name: str) -> Consumer:
    """The row called `name`; TenutoError names the choices."""
    if name not in CONSUMERS:
        raise TenutoError(f"Unknown consumer {name!r}: choose one of {', '.join(CONSUMERS)}.")
    return CONSUMERS[name]


def states_of(consumer: Consumer, blocks: int) -> tuple[int, ...]:
    """The numbers of the hidden states that are read of an encoder of so many blocks.

    From 0, which is the embedding; (): the state after the last norm alone. TenutoError where it
    has too few.
    """
    if consumer.read == ALL:
        return tuple(range(blocks + 1))
    wanted = [k for k in consumer.read if isinstance(k, int)]
    found = tuple(k if k >= 0 else blocks + 1 + k for k in wanted)
    if any(not 0 <= k <= blocks for k in found):
        raise TenutoError(
            f"The denoiser reads hidden state {max(wanted, key=abs)}, and this encoder has "
            f"{blocks} blocks: it is another one."
        )
    return found


def calls_for(
    consumer: Consumer,
    encoder: nn.Module,
    tokenizer: Any,
    blocks: int,
    prompts: Sequence[str],
    held_out: Sequence[str] = (),
    batch: int = BATCH,
    *,
    read_alone: bool = False,
    by_length: bool = False,
) -> list[Call]:
    """What `encoder` is called with for each prompt, as `encoder_calls` gives it of a pipeline.

    blocks: how many it has. read_alone: what counts are the tokens that the denoiser reads, not all
    that others see. by_length: as in `calls_of`.
    """
    states = states_of(consumer, blocks)
    more = without_cache(encoder) | ({"output_hidden_states": True} if states else {})

    def rows(lines: Sequence[str]) -> list[Row]:
        return [_tokens(consumer, tokenizer, line) | more for line in lines]

    how = {"read": states, "by_length": by_length}
    calls = calls_of(rows(prompts), batch, held_out=rows(held_out), **how)
    if states and state_count(encoder, calls[0]) != blocks + 1:
        raise TenutoError(f"{type(encoder).__name__} does not give out all of its hidden states.")
    return [_without_template(call, consumer, tokenizer) for call in calls] if read_alone else calls


def _tokens(consumer: Consumer, tokenizer: Any, prompt: str) -> Row:
    """One text as the encoder gets it, (1, L) each; filled up where the others see that."""
    text = consumer.template.replace(PROMPT, prompt)
    limit = consumer.filled or LIMIT
    ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    pad = tokenizer.pad_token_id or 0
    if consumer.filled:
        return {"input_ids": torch.tensor([[*ids, *[pad] * (consumer.filled - len(ids))]])}
    found = torch.tensor([ids or [pad]])
    return {"input_ids": found, MASK: torch.ones_like(found)}


def _without_template(call: Call, consumer: Consumer, tokenizer: Any) -> Call:
    """`call`, of which tokens before the prompt do not count where the denoiser drops them."""
    if not consumer.drop:
        return call
    start = len(tokenizer(consumer.template.partition(PROMPT)[0])["input_ids"])
    counted: Tensor = torch.ones(call.inputs["input_ids"].shape)
    counted = counted if call.counted is None else call.counted.clone()
    counted[:, :start] = 0
    return replace(call, counted=counted)
