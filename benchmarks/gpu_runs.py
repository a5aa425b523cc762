"""A whole sampling run of the models of `gpu_models.py`, as a pipeline of diffusers makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20


class Loop:
    """A denoiser with its scheduler: what `attach` takes for a pipeline. Called, it makes a run.

    inputs: of one call; all but the sample and the timestep stay as they are. The first half of a
    sample's rows is guided by the second, where there are two or more.
    """

    def __init__(self, name: str, denoiser: nn.Module, inputs: dict[str, Any]) -> None:
        import diffusers

        if name == "sdxl":
            self.unet = denoiser
            self.scheduler: Any = diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
            )
        else:
            self.transformer = denoiser
            flow = name == "klein"
            self.scheduler = (
                diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDIMScheduler()
            )
        self.denoiser, self.inputs, self.flow = denoiser, inputs, name == "klein"
        self.sample = next(iter(inputs))
        self.device = inputs[self.sample].device

    @property
    def components(self) -> dict[str, Any]:
        """As a pipeline has them."""
        name = "unet" if hasattr(self, "unet") else "transformer"
        return {name: self.denoiser, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """A run of `STEPS` from noise that no run had before: the last sample."""
        self.scheduler.set_timesteps(STEPS, device=self.device)
        rows = len(self.inputs[self.sample])
        guided = rows // 2 or 1
        x = torch.randn_like(self.inputs[self.sample][:guided])
        given = dict(self.inputs)
        for t in self.scheduler.timesteps:
            both = self.scheduler_input(x, t)
            given[self.sample] = torch.cat([both, both]) if rows > 1 else both
            given["timestep"] = t.expand(rows) / 1000 if self.flow else t.expand(rows)
            out = self.denoiser(**given, return_dict=False)[0][:, : x.shape[1]]
            if rows > 1:
                first, second = out.chunk(2)
                out = second + 4.0 * (first - second)
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x

    def scheduler_input(self, x: Tensor, t: Tensor) -> Tensor:
        """The sample as the denoiser takes it."""
        if self.flow:
            return x
        return self.scheduler.scale_model_input(x, t).to(x.dtype)
