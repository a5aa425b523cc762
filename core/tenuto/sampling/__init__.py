"""One sampling run: load a pipeline, call it, record its calls, follow its clock."""

from .by_function import adds_noise, goes_as, visited_once
from .call_in_progress import CallInProgress, call_in_progress
from .clock import Clock
from .described import MARK, described, repeated
from .encoder_calls import BATCH, HELD_OUT, calls_of, encoder_calls
from .follow import Follow
from .grid import boundary, places_of
from .host_schedule import host_noise, host_prediction
from .noise import prediction_of
from .noise_kernel import Noise, NoiseKernel, PipelineNoise, noises_at
from .output_kernel import OutputKernel
from .pipeline_call import (
    PipelineCall,
    check_names,
    check_needed,
    check_steps,
    guidance_name,
    one_by_one,
    unprompted,
    wanted_prompts,
)
from .processes import launched, launched_size, processes, started_alone
from .prompt_cache import PromptCache
from .prompt_file import PromptFile
from .reads import cosines, state_count, states_read
from .record import record, sampler, to_device
from .shared_work import work_in
from .skeleton import Skeleton, skeleton
from .storage import keep, kept
from .trajectory import Call, Sample, Trajectory
from .visited import answered_once, schedule_of_run

__all__ = [
    "BATCH",
    "HELD_OUT",
    "MARK",
    "Call",
    "CallInProgress",
    "Clock",
    "Follow",
    "Noise",
    "NoiseKernel",
    "OutputKernel",
    "PipelineCall",
    "PipelineNoise",
    "PromptCache",
    "PromptFile",
    "Sample",
    "Skeleton",
    "Trajectory",
    "adds_noise",
    "answered_once",
    "boundary",
    "call_in_progress",
    "calls_of",
    "check_names",
    "check_needed",
    "check_steps",
    "cosines",
    "described",
    "encoder_calls",
    "goes_as",
    "guidance_name",
    "host_noise",
    "host_prediction",
    "keep",
    "kept",
    "launched",
    "launched_size",
    "noises_at",
    "one_by_one",
    "places_of",
    "prediction_of",
    "processes",
    "record",
    "repeated",
    "sampler",
    "schedule_of_run",
    "skeleton",
    "started_alone",
    "state_count",
    "states_read",
    "to_device",
    "unprompted",
    "visited_once",
    "wanted_prompts",
    "work_in",
]
