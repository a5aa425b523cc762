"""One sampling run: load a pipeline, call it, record its calls, follow its clock."""

from .clock import Clock
from .encoder_calls import BATCH, calls_of, encoder_calls
from .follow import Follow
from .record import record, sampler, to_device
from .storage import keep, kept
from .trajectory import Call, Sample, Trajectory

__all__ = [
    "BATCH",
    "Call",
    "Clock",
    "Follow",
    "Sample",
    "Trajectory",
    "calls_of",
    "encoder_calls",
    "keep",
    "kept",
    "record",
    "sampler",
    "to_device",
]
