"""`record`: the denoiser's calls of sampling runs, as a `Trajectory`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, TenutoError
from ..model import Signature, denoiser_of, frozen, map_tensors, watched
from ..progress import Progress
from .trajectory import Call, Sample, Trajectory


def sampler(
    pipe: Any, prompts: Sequence[str], steps: int, guidance: float | None, output: str = "pt"
) -> Sample:
    """`sample(denoiser, seed, batch)` for a diffusers pipeline.

    Image i has prompt `prompts[(seed + i) % len(prompts)]` and noise of CPU seed `seed + i`.
    output "pt" returns images in [-1, 1], "latent" the final latents.
    """
    if not prompts:
        raise TenutoError("A pipeline needs at least one prompt.")
    if steps < 1:
        raise TenutoError(f"Sampling takes at least one step, not {steps}.")
    known = inspect.signature(type(pipe).__call__).parameters
    extra: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
    extra = {k: v for k, v in extra.items() if k in known}
    if guidance is not None:
        extra["guidance_scale"] = guidance
    name = "transformer" if denoiser_of(pipe) is getattr(pipe, "transformer", None) else "unet"

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        chosen = [prompts[(seed + i) % len(prompts)] for i in range(batch)]
        noise = [torch.Generator("cpu").manual_seed(seed + i) for i in range(batch)]
        with _using(pipe, name, denoiser):
            images = pipe(
                prompt=chosen,
                num_inference_steps=steps,
                generator=noise,
                output_type=output,
                **extra,
            ).images
        return images.float() * 2 - 1 if output == "pt" else images

    return sample


@contextmanager
def _using(pipe: Any, name: str, denoiser: nn.Module) -> Iterator[None]:
    """`pipe` with another denoiser and without its own progress bar; both are restored."""
    before, bar = getattr(pipe, name), pipe.__dict__.get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)
    if denoiser is not before:
        setattr(pipe, name, denoiser)
    try:
        yield
    finally:
        if denoiser is not before:
            setattr(pipe, name, before)
        if bar is None:
            pipe.__dict__.pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = bar


@contextmanager
def recording(denoiser: nn.Module, calls: list[Call], run: int = 0) -> Iterator[list[Call]]:
    """Append every call of `denoiser` to `calls`, as it was before the call."""
    facts = Signature(denoiser)

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = facts.inputs(args, kwargs)
        step = float(torch.as_tensor(facts.timestep(inputs)).reshape(-1)[0])
        kept = map_tensors(lambda x: x.detach().to("cpu", copy=True), inputs)
        calls.append(Call(run, 0, step, kept))

    with watched(denoiser, before=keep):
        yield calls


def to_device(value: Any, device: Any, half: torch.dtype | None = None) -> Any:
    """Tensors in nested containers on `device`; half precision becomes `half`."""

    def moved(x: Tensor) -> Tensor:
        low = x.dtype in (torch.float16, torch.bfloat16)
        return x.to(device, half if low and half else x.dtype)

    return map_tensors(moved, value)


def record(
    model: Any,
    prompts: Sequence[str] | None = None,
    *,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 4,
    runs: int | None = None,
    sample: Sample | None = None,
    on_progress: Progress | None = None,
) -> Trajectory:
    """Run the model as its user does and keep every denoiser call.

    A pipeline takes `prompts` (each once unless `runs` says otherwise). A bare denoiser takes
    `sample(denoiser, seed, batch)`, which runs one trajectory and returns its images,
    float (batch, C, H, W) in [-1, 1]; `steps` then follows from what it does.
    """
    denoiser = denoiser_of(model)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
    if batch < 1 or (runs is not None and runs < 1):
        raise TenutoError(f"There is nothing to record in {runs} runs of a batch of {batch}.")
    latent = None
    if sample is None:
        if denoiser is model:
            raise TenutoError("A bare denoiser needs `sample=fn`, fn(denoiser, seed, batch).")
        sample = sampler(model, prompts, steps, guidance)
        latent = sampler(model, prompts, steps, guidance, output="latent")
    batch = min(batch, len(prompts)) if prompts else batch
    left = len(prompts) if prompts and runs is None else (runs or 2) * batch
    runs = -(-left // batch)
    calls: list[Call] = []
    for run in range(runs):
        if on_progress:
            on_progress(run, runs, "recording")
        with frozen(denoiser), torch.no_grad(), recording(denoiser, calls, run):
            (latent or sample)(denoiser, seed + run * batch, min(batch, left - run * batch))
    if on_progress:
        on_progress(runs, runs, "recording")
    if not calls:
        raise ModelError("`sample` did not call the denoiser that it was given.")
    times = tuple(dict.fromkeys(c.timestep for c in calls if c.run == 0))
    calls = [Call(c.run, _row(times, c.timestep), c.timestep, c.inputs) for c in calls]
    return Trajectory(
        times, calls, seed, batch, runs, len(times), guidance, prompts, sample, latent
    )


def _row(times: tuple[float, ...], timestep: float) -> int:
    return min(range(len(times)), key=lambda i: abs(times[i] - timestep))
