"""All that is learnt: quantization, text encoders, the cache router."""

from . import algorithms
from .check import ENCODERS, QUANTIZE, ROUTER, USES, Check, check
from .given import prompts_needed
from .presets import Preset, effort, recipe_for
from .quantize import quantize
from .quantize_encoder import WIDTHS, encoder_job, encoder_scheme, fill, quantize_encoder
from .replay import outputs
from .text_encoder import (
    ENCODER_METHODS,
    ENCODER_SCHEMES,
    EncoderCodes,
    check_text_encoder,
    quantize_text_encoder,
)
from .train_router import PRESETS, train_router
from .under_cache import check_under, under_cache

__all__ = [
    "ENCODERS",
    "ENCODER_METHODS",
    "ENCODER_SCHEMES",
    "PRESETS",
    "QUANTIZE",
    "ROUTER",
    "USES",
    "WIDTHS",
    "Check",
    "EncoderCodes",
    "Preset",
    "algorithms",
    "check",
    "check_text_encoder",
    "check_under",
    "effort",
    "encoder_job",
    "encoder_scheme",
    "fill",
    "outputs",
    "prompts_needed",
    "quantize",
    "quantize_encoder",
    "quantize_text_encoder",
    "recipe_for",
    "train_router",
    "under_cache",
]
