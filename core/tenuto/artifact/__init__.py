"""The artifact: one safetensors file, its checks and its translations."""

from .artifact import SECTIONS, Artifact, tabled
from .compact import compact
from .contents import StepMap, measured, policy_of, schedule_of, step_map
from .fingerprint import fingerprint, same, versions
from .forecast import at_one, default_speedup, kernel_of, scores_of, set_default
from .header import read_header
from .host_names import canonicalized, localized

__all__ = [
    "SECTIONS",
    "Artifact",
    "StepMap",
    "at_one",
    "canonicalized",
    "compact",
    "default_speedup",
    "fingerprint",
    "kernel_of",
    "localized",
    "measured",
    "policy_of",
    "read_header",
    "same",
    "schedule_of",
    "scores_of",
    "set_default",
    "step_map",
    "tabled",
    "versions",
]
