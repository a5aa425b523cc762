"""Two flow models: the demo U-Net rewritten as one, and a small transformer trained as one.

The U-Net gives the same images by u = eps - x0 on x = (1 - s) x0 + s eps.

It learned v. A sample of a flow is, but for its length, the sample of the model with the same noise
in relation to the image, at the timestep where the model has that noise; from the model's answer
    x0 = alpha x - sigma v,    eps = sigma x + alpha v,    u = eps - x0
are exact. So what a flow model knows of a forecast can be measured without training one. To know
that a trained one does the same, `assets/train.py denoiser --flow` trains one, in ten minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from tenuto.sampling.loading import load


class FlowUNet(UNet2DConditionModel):
    """A U-Net that predicts v, answering as a flow model does. angles: of its noise, (1000,)."""

    angles: Tensor

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """u at `timestep` = 1000 s."""
        share = torch.as_tensor(timestep, device=sample.device).double().reshape(-1) / 1000
        wanted = torch.atan2(share, 1 - share)
        known = self.angles.to(sample.device)
        right = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        gap = (wanted - known[right - 1]) / (known[right] - known[right - 1])
        place = (right - 1 + gap).clamp(0, len(known) - 1)
        own = (known[right - 1] + gap.clamp(0, 1) * (known[right] - known[right - 1]))[
            :, None, None
        ]
        length = (share.square() + (1 - share).square()).sqrt()[:, None, None, None]
        alpha, sigma = own.cos()[..., None], own.sin()[..., None]
        x = sample.double() / length
        kwargs["return_dict"] = False
        v = super().forward(x.to(sample.dtype), place.to(sample.dtype), *args, **kwargs)[0].double()
        eps, x0 = sigma * x + alpha * v, alpha * x - sigma * v
        return ((eps - x0).to(sample.dtype),)


class _ForStableDiffusion:
    """What Stable Diffusion's pipelines ask of a scheduler and those of flows lack."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The sample as it is."""
        return sample

    def add_noise(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The samples of an image at the run's first step."""
        share = timesteps.to(samples).reshape(-1, *[1] * (samples.ndim - 1)) / 1000
        return share * noise + (1 - share) * samples


class FlowMatchEuler(_ForStableDiffusion, FlowMatchEulerDiscreteScheduler):
    """Of diffusers, for Stable Diffusion's pipelines."""


class FlowMatchHeun(_ForStableDiffusion, FlowMatchHeunDiscreteScheduler):
    """Of diffusers, for Stable Diffusion's pipelines."""


def flow_pipeline(device: Any = None, shift: float = 1.0) -> Any:
    """The demo U-Net's pipeline as one of flow matching."""
    pipe = load("demo:unet", device)
    known = DDIMScheduler.from_config(pipe.scheduler.config)
    kept = known.alphas_cumprod.double()  # pyright: ignore[reportAttributeAccessIssue]
    pipe.unet.__class__ = FlowUNet
    pipe.unet.angles = torch.atan2((1 - kept).sqrt(), kept.sqrt())
    pipe.scheduler = FlowMatchEuler(shift=shift)
    return pipe


def trained_flow(folder: Path, device: Any = None) -> Any:
    """The pipeline of `assets/train.py denoiser --flow`, with a scheduler that it can call."""
    pipe = load(str(folder), device)
    pipe.scheduler = FlowMatchEuler.from_config(pipe.scheduler.config)
    return pipe
