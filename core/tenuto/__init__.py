"""Tenuto: diffusion models made faster and smaller, with a picture one cannot tell apart."""

from .artifact import Artifact
from .attachment import attach
from .caching.schedule import CacheSchedule
from .calibrate import quantize
from .demo import demo, prompts
from .encoders import quantize_encoder
from .errors import ArtifactError, Cancelled, ModelError, SchemeError, TenutoError
from .families import describe
from .measure import compare
from .route import train_router
from .scheme import Format, Recipe, Rule, Scheme, schemes
from .trajectory import Trajectory, record
from .version import __version__

__all__ = [
    "Artifact",
    "ArtifactError",
    "CacheSchedule",
    "Cancelled",
    "Format",
    "ModelError",
    "Recipe",
    "Rule",
    "Scheme",
    "SchemeError",
    "TenutoError",
    "Trajectory",
    "__version__",
    "attach",
    "compare",
    "demo",
    "describe",
    "prompts",
    "quantize",
    "quantize_encoder",
    "record",
    "schemes",
    "train_router",
]
