"""The kernels that ship: a forecast for models that were not recorded, `forecast-default`.

Nothing in them is of the user's model. They are means over the demo models, which learned v on a
cosine schedule; for eps and flow matching these were rewritten, which is exact, and run under the
schedules that are usual there. The file's own header says it all: benchmarks/default_kernels.py.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import TenutoError
from ..resources import asset
from ..sampling import Noise, NoiseKernel, OutputKernel

NAME = "forecast-default"
FILE, KEY = f"{NAME}.safetensors", "tenuto-kernels"


@cache
def _shipped() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says, and its kernels by what a denoiser predicts."""
    with safe_open(str(asset(FILE)), framework="pt") as file:
        about = json.loads((file.metadata() or {})[KEY])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def default_kernel(prediction: str | None, noise: Noise) -> NoiseKernel:
    """The shipped kernel for a model that predicts "v", "eps" or "flow".

    noise: (alpha, sigma) of the sample at each timestep of a run, in the unit that the denoiser
    gets: alpha is the share of the image, sigma that of the noise; their squares add up to 1, in
    flow matching they themselves. TenutoError where no kernel ships for what it predicts.
    """
    about, kernels = _shipped()
    if prediction not in kernels:
        known = ", ".join(sorted(kernels))
        said = (
            f"it predicts {prediction}" if prediction else "its host does not say what it predicts"
        )
        raise TenutoError(
            f"There is no default forecast for this model: {said}, and kernels ship for {known}."
        )
    plain = OutputKernel.of(kernels[prediction], about["kernels"][prediction])
    return NoiseKernel(
        plain.values, plain.timesteps, plain.alpha, plain.sigma, plain.prediction, plain.images,
        noise, NAME,
    )  # fmt: skip


def about_defaults() -> dict[str, Any]:
    """What the shipped file says of itself: {"kernels": {prediction: facts}, "origin": facts}."""
    return _shipped()[0]
