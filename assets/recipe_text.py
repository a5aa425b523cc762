"""The text encoders of the demo models and their tokenizers, both trained on the captions alone."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

from recipe_data import captions
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

VOCABULARY = 1024
CLIP_LENGTH = 24  # tokens of a prompt, start and end included; the longest caption has 16


def build_t5_tokenizer(names: list[list[str]]) -> T5Tokenizer:
    """A T5 tokenizer (unigram) trained on all captions, with every printable ASCII character."""
    trained = Tokenizer(models.Unigram())
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps)
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = [chr(c) for c in range(33, 127)] + ["▁"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>",
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(chain.from_iterable(captions(names)), trainer)
    vocab = [(t, float(s)) for t, s in json.loads(trained.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)


def build_clip_tokenizer(names: list[list[str]]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE) trained on all captions, with every byte.

    Pairs of equal counts are merged in another order every time: keep what was built.
    """
    trained = CLIPTokenizer().backend_tokenizer  # the stock normalizer and splitting
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(chain.from_iterable(captions(names)), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def build_t5(size: str, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 v1.1 encoder (1.9 M parameters) for `tokenizer`."""
    width, inner, layers, heads = {"demo": (256, 384, 3, 4), "tiny": (32, 48, 1, 2)}[size]
    config = T5Config(
        vocab_size=rounded(len(tokenizer)),
        d_model=width, d_kv=width // heads, d_ff=inner, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1, dtype="float32",
    )  # fmt: skip
    return T5EncoderModel(config)


def build_clip(size: str, tokenizer: Any) -> CLIPTextModel:
    """A CLIP text encoder (1.1 M parameters) for `tokenizer`."""
    width, inner, layers, heads = {"demo": (192, 384, 3, 3), "tiny": (32, 48, 1, 2)}[size]
    config = CLIPTextConfig(
        vocab_size=rounded(len(tokenizer)),
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=CLIP_LENGTH, projection_dim=width,
        hidden_act="gelu", bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, dtype="float32",
    )  # fmt: skip
    return CLIPTextModel(config)


def rounded(size: int) -> int:
    """`size` up to a multiple of 64."""
    return -(-size // 64) * 64
