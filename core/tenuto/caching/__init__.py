"""What to compute and what to reuse at which step: `CacheSchedule` and what makes one."""

from .budget import reuse_for, saved, whole_steps
from .cells import CachedBranch, Slot, apply_schedule_, shape_of
from .interval import Interval, LateInterval, interval_for, late_interval_for
from .policy import Facts, candidates, made, policies, rules
from .random_table import RandomTable
from .schedule import CacheSchedule
from .step_programme import POWERS, StepProgramme

__all__ = [
    "POWERS",
    "CacheSchedule",
    "CachedBranch",
    "Facts",
    "Interval",
    "LateInterval",
    "RandomTable",
    "Slot",
    "StepProgramme",
    "apply_schedule_",
    "candidates",
    "interval_for",
    "late_interval_for",
    "made",
    "policies",
    "reuse_for",
    "rules",
    "saved",
    "shape_of",
    "whole_steps",
]
