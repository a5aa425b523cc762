"""Tenuto: diffusion models made faster and smaller, with a picture one cannot tell apart."""

from .artifact import Artifact
from .attachment import attach
from .caching.schedule import CacheSchedule
from .calibrate import quantize
from .errors import ArtifactError, Cancelled, ModelError, SchemeError, TenutoError
from .families import describe
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
    "describe",
    "quantize",
    "record",
    "schemes",
]
