"""The artifact: one safetensors file, its checks and its translations."""

from .artifact import SECTIONS, Artifact, tabled
from .compact import compact
from .contents import StepMap, schedule_of, step_map
from .fingerprint import fingerprint, same, versions
from .header import read_header
from .host_names import canonicalized, localized

__all__ = [
    "SECTIONS",
    "Artifact",
    "StepMap",
    "canonicalized",
    "compact",
    "fingerprint",
    "localized",
    "read_header",
    "same",
    "schedule_of",
    "step_map",
    "tabled",
    "versions",
]
