"""Tenuto: diffusion models made faster and smaller, with an image one cannot tell apart."""

from .artifact import Artifact
from .artifact.export import export
from .caching import CacheSchedule
from .calibration import (
    Check,
    check,
    quantize,
    quantize_encoder,
    quantize_text_encoder,
    train_router,
)
from .errors import ArtifactError, Cancelled, ModelError, SchemeError, TenutoError
from .measure import compare
from .model import describe
from .numerics import Format, Recipe, Rule, Scheme, schemes
from .resources import __version__
from .runtime import attach
from .sampling import PromptCache, Trajectory, record
from .sampling.loading import demo, prompts
from .sampling.opened import open_model

__all__ = [
    "Artifact",
    "ArtifactError",
    "CacheSchedule",
    "Cancelled",
    "Check",
    "Format",
    "ModelError",
    "PromptCache",
    "Recipe",
    "Rule",
    "Scheme",
    "SchemeError",
    "TenutoError",
    "Trajectory",
    "__version__",
    "attach",
    "check",
    "compare",
    "demo",
    "describe",
    "export",
    "open_model",
    "prompts",
    "quantize",
    "quantize_encoder",
    "quantize_text_encoder",
    "record",
    "schemes",
    "train_router",
]
