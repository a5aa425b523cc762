"""What to compute and what to reuse at which step: `CacheSchedule` and what makes one."""

from .at_share import at_share, unmeasured
from .budget import reuse_for, saved, whole_steps
from .cells import CachedBranch, CallShape, Slot, apply_schedule_, for_branch, shape_of
from .forecast import ForecastCalls
from .forecast_plan import MOST, Forecast, ForecastPlan, Programme
from .forecast_run import forecast_run, why_none
from .interval import Interval, LateInterval, interval_for, late_interval_for
from .policy import Facts, candidates, made, policies, rules
from .random_table import RandomTable
from .router_scores import RouterScores
from .schedule import SHORTEST, CacheSchedule
from .step_programme import POWERS, StepProgramme

__all__ = [
    "MOST",
    "POWERS",
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
    "StepProgramme",
    "apply_schedule_",
    "at_share",
    "candidates",
    "for_branch",
    "forecast_run",
    "interval_for",
    "late_interval_for",
    "made",
    "policies",
    "reuse_for",
    "rules",
    "saved",
    "shape_of",
    "unmeasured",
    "whole_steps",
    "why_none",
]
