"""A forecast without calibration: the shipped kernel, read by the noise of a model's runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..artifact import kernel_of
from ..caching import default_kernel
from ..errors import ModelError
from ..model import parts_of
from ..sampling import (
    NoiseKernel,
    PipelineNoise,
    boundary,
    host_noise,
    host_prediction,
    prediction_of,
)
from .replacements import Patches

WITHOUT = "A forecast without calibration needs "


def default_kernel_of(model: Any) -> NoiseKernel:
    """The shipped kernel for a pipeline of diffusers; ModelError where it can have none."""
    scheduler = getattr(model, "scheduler", None)
    if isinstance(model, nn.Module) or scheduler is None:
        raise ModelError(f"{WITHOUT}a pipeline with its scheduler, which says what noise there is.")
    if not _one_a_step(model):
        raise ModelError(f"{WITHOUT}a pipeline of one denoiser.")
    found = default_kernel(prediction_of(scheduler), PipelineNoise(weakref.ref(model)))
    if found.noise((999.0, 0.0)) is None:
        raise ModelError(f"{WITHOUT}the noise at every step, which this scheduler does not say.")
    return found


def host_kernel(sampling: Any) -> NoiseKernel:
    """The shipped kernel in ComfyUI or a WebUI; TenutoError where the model can have none.

    sampling: what the host says of its model's sampling, as in `host_prediction`.
    """
    noise = host_noise(sampling)
    if noise is None:
        raise ModelError(f"{WITHOUT}the noise at every step, which this model does not say.")
    return default_kernel(host_prediction(sampling), noise)


def with_default(model: Any, patches: Patches) -> Patches:
    """`patches` with the shipped kernel where calls are to be skipped and none was recorded.

    For pipelines with several denoisers a step and for bare ones they stay as they are.
    """
    able = not isinstance(model, nn.Module) and _one_a_step(model)
    return with_kernel(patches, lambda: default_kernel_of(model)) if able else patches


def _one_a_step(model: Any) -> bool:
    """Whether a pipeline calls one denoiser at a step: its only one, or of Wan 2.2's two."""
    return len(parts_of(model)) == 1 or boundary(model) is not None


def with_kernel(patches: Patches, shipped: Callable[[], NoiseKernel]) -> Patches:
    """`patches` with a `shipped()` kernel where calls are to be skipped and none was recorded."""
    own = None if patches.artifact is None else kernel_of(patches.artifact)
    if patches.speedup in (None, 1) or patches.kernel or own:
        return patches
    return replace(patches, kernel=shipped())
