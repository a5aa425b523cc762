"""One sampling run: load a pipeline, call it, record its calls, follow its clock."""

from .clock import Clock
from .described import MARK, described, repeated
from .encoder_calls import BATCH, calls_of, encoder_calls
from .follow import Follow
from .pipeline_call import PipelineCall, check_names, one_by_one, unprompted, wanted_prompts
from .record import record, sampler, to_device
from .storage import keep, kept
from .trajectory import Call, Sample, Trajectory
from .visited import answered_once, schedule_of_run

__all__ = [
    "BATCH",
    "MARK",
    "Call",
    "Clock",
    "Follow",
    "PipelineCall",
    "Sample",
    "Trajectory",
    "answered_once",
    "calls_of",
    "check_names",
    "described",
    "encoder_calls",
    "keep",
    "kept",
    "one_by_one",
    "record",
    "repeated",
    "sampler",
    "schedule_of_run",
    "to_device",
    "unprompted",
    "wanted_prompts",
]
