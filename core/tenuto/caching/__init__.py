"""What to compute and what to reuse at which step: `CacheSchedule` and what makes one."""

from .at_share import at_share, unmeasured
from .budget import reuse_for, saved, whole_steps
from .cells import CachedBranch, CallShape, Slot, apply_schedule_, for_branch, shape_of
from .default_kernel import NAME as DEFAULT_FORECAST
from .default_kernel import about_defaults, default_kernel
from .forecast import ForecastCalls
from .forecast_budget import AT_ONE, AUTO, SAFE, Speedup, about_db, calls_for, check_speedup
from .forecast_plan import MOST, Forecast, ForecastPlan, Programme, speedup_of
from .interval import Interval, LateInterval, interval_for, late_interval_for
from .policy import Facts, candidates, made, policies, rules
from .random_table import RandomTable
from .router_scores import RouterScores
from .schedule import SHORTEST, CacheSchedule
from .step_programme import POWERS, StepProgramme

__all__ = [
    "AT_ONE",
    "AUTO",
    "DEFAULT_FORECAST",
    "MOST",
    "POWERS",
    "SAFE",
    "SHORTEST",
    "CacheSchedule",
    "CachedBranch",
    "CallShape",
    "Facts",
    "Forecast",
    "ForecastCalls",
    "ForecastPlan",
    "Interval",
    "LateInterval",
    "Programme",
    "RandomTable",
    "RouterScores",
    "Slot",
    "Speedup",
    "StepProgramme",
    "about_db",
    "about_defaults",
    "apply_schedule_",
    "at_share",
    "calls_for",
    "candidates",
    "check_speedup",
    "default_kernel",
    "for_branch",
    "interval_for",
    "late_interval_for",
    "made",
    "policies",
    "reuse_for",
    "rules",
    "saved",
    "shape_of",
    "speedup_of",
    "unmeasured",
    "whole_steps",
]
