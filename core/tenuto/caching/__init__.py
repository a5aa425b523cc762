"""What to compute and what to reuse at which step: `CacheSchedule` and what makes one."""

from .at_run_time import RunTimeCalls
from .at_share import at_share, unmeasured
from .budget import reuse_for, saved, whole_steps
from .cells import CachedBranch, CallShape, apply_policy_, apply_schedule_, for_branch, shape_of
from .deep_cache import DeepCache
from .default_kernel import NAME as DEFAULT_FORECAST
from .default_kernel import about_defaults, default_kernel
from .easy_cache import EasyCache
from .first_block import FirstBlock
from .forecast import ForecastCalls
from .forecast_budget import (
    AT_ONE,
    AUTO,
    FOREIGN,
    SAFE,
    Speedup,
    about_db,
    calls_for,
    check_speedup,
    predicted,
    untold,
)
from .forecast_plan import MOST, Forecast, ForecastPlan, Programme
from .forecast_run import forecast_run, said_of, why_none
from .growing_window import GrowingWindow
from .interval import Interval, LateInterval, interval_for, late_interval_for
from .l2p import L2P
from .learning_to_cache import LearningToCache
from .mag_cache import MagCache, Magnitudes
from .policy import Facts, candidates, made, policies, rules, table_policy
from .random_table import RandomTable
from .router_scores import RouterScores
from .schedule import SHORTEST, CacheSchedule
from .slots import Slot
from .step_programme import POWERS, StepProgramme
from .taylor_seer import TaylorSeer

__all__ = [
    "AT_ONE",
    "AUTO",
    "DEFAULT_FORECAST",
    "FOREIGN",
    "L2P",
    "MOST",
    "POWERS",
    "SAFE",
    "SHORTEST",
    "CacheSchedule",
    "CachedBranch",
    "CallShape",
    "DeepCache",
    "EasyCache",
    "Facts",
    "FirstBlock",
    "Forecast",
    "ForecastCalls",
    "ForecastPlan",
    "GrowingWindow",
    "Interval",
    "LateInterval",
    "LearningToCache",
    "MagCache",
    "Magnitudes",
    "Programme",
    "RandomTable",
    "RouterScores",
    "RunTimeCalls",
    "Slot",
    "Speedup",
    "StepProgramme",
    "TaylorSeer",
    "about_db",
    "about_defaults",
    "apply_policy_",
    "apply_schedule_",
    "at_share",
    "calls_for",
    "candidates",
    "check_speedup",
    "default_kernel",
    "for_branch",
    "forecast_run",
    "interval_for",
    "late_interval_for",
    "made",
    "policies",
    "predicted",
    "reuse_for",
    "rules",
    "said_of",
    "saved",
    "shape_of",
    "table_policy",
    "unmeasured",
    "untold",
    "whole_steps",
    "why_none",
]
