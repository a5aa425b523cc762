"""The artifact: one safetensors file, its checks and its translations."""

from .artifact import SECTIONS, Artifact, kernel_of, tabled
from .compact import compact
from .contents import StepMap, measured, policy_of, schedule_of, step_map
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
    "kernel_of",
    "localized",
    "measured",
    "policy_of",
    "read_header",
    "same",
    "schedule_of",
    "step_map",
    "tabled",
    "versions",
]
