"""`record`: the denoiser's calls of sampling runs, as a `Trajectory`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, TenutoError
from ..model import Signature, denoiser_of, frozen, map_tensors, watched
from ..progress import Progress
from .described import described
from .pipeline_call import PipelineCall
from .results import images_of, latents_of
from .step_outputs import StepOutputs
from .trajectory import Call, Sample, Trajectory


def sampler(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
    output: str = "pt",
    call: Mapping[str, Any] | None = None,
) -> Sample:
    """`sample(denoiser, seed, batch)` for a diffusers pipeline.

    Image i has prompt `prompts[(seed + i) % len(prompts)]` and noise of CPU seed `seed + i`.
    output "pt" returns images in [-1, 1], those of a video one after another; "latent" the final
    latents. call: as in `record`.
    """
    return _sample(PipelineCall(pipe, prompts, steps, guidance, call), output)


def _sample(asked: PipelineCall, output: str) -> Sample:
    taken = latents_of if output == "latent" else images_of

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        return taken(asked(denoiser, seed, batch, output))

    return sample


@contextmanager
def recording(
    denoiser: nn.Module, calls: list[Call], run: int = 0, outputs: StepOutputs | None = None
) -> Iterator[list[Call]]:
    """Append every call of `denoiser` to `calls`, as it was before the call.

    outputs: gets what is made of the calls' outputs, step by step.
    """
    facts, start = Signature(denoiser), len(calls)

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = facts.inputs(args, kwargs)
        step = facts.step(inputs)
        kept = map_tensors(lambda x: x.detach().to("cpu", copy=True), inputs)
        calls.append(Call(run, 0, step, kept))

    def last() -> float | None:
        return calls[-1].timestep if len(calls) > start else None

    seen = nullcontext() if outputs is None else outputs.run(last)
    with watched(denoiser, before=keep), seen:
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
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 4,
    runs: int | None = None,
    sample: Sample | None = None,
    on_progress: Progress | None = None,
) -> Trajectory:
    """Run the model as its user does and keep every denoiser call.

    A pipeline takes `prompts` (each once unless `runs` says otherwise), and in `call` any keyword
    of its own: image, mask_image, control_image, height, num_frames, negative_prompt, strength,
    prompt_embeds in place of `prompts`, ... `guidance` is given under the name that the pipeline
    has for it. What it returns does not matter: images, a video, sound. A bare denoiser takes
    `sample(denoiser, seed, batch)`, which runs one trajectory and returns its images,
    float (batch, C, H, W) in [-1, 1]; `steps` then follows from what it does.
    """
    denoiser = denoiser_of(model)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
    if batch < 1 or (runs is not None and runs < 1):
        raise TenutoError(f"There is nothing to record in {runs} runs of a batch of {batch}.")
    asked, run, count = None, sample, len(prompts)
    if sample is None:
        if isinstance(model, nn.Module):
            raise TenutoError("A bare denoiser needs `sample=fn`, fn(denoiser, seed, batch).")
        asked = PipelineCall(model, prompts, steps, guidance, call)
        count, batch = asked.count, batch if asked.together else 1
        run = partial(asked, output="latent")
    elif call:
        raise TenutoError("`sample` makes the call itself: give `sample` or `call`, not both.")
    assert run is not None
    batch = min(batch, count) if count else batch
    left = count if count and runs is None else (runs or 2) * batch
    runs = -(-left // batch)
    calls: list[Call] = []
    outputs = StepOutputs(None if sample is not None else model)
    for i in range(runs):
        if on_progress:
            on_progress(i, runs, "recording")
        with frozen(denoiser), torch.no_grad(), recording(denoiser, calls, i, outputs):
            run(denoiser, seed + i * batch, min(batch, left - i * batch))
    if on_progress:
        on_progress(runs, runs, "recording")
    if not calls:
        raise ModelError("`sample` did not call the denoiser that it was given.")
    times = tuple(dict.fromkeys(c.timestep for c in calls if c.run == 0))
    calls = [Call(c.run, _row(times, c.timestep), c.timestep, c.inputs) for c in calls]
    known = Trajectory(
        times, calls, seed, batch, runs, len(times), guidance, prompts, sample,
        kernel=outputs.kernel(),
    )  # fmt: skip
    return known if asked is None else again(known, asked, steps, call)


def again(
    trajectory: Trajectory, asked: PipelineCall, steps: int, call: Mapping[str, Any] | None
) -> Trajectory:
    """`trajectory`, which the pipeline can run again as it was asked."""
    return replace(
        trajectory,
        steps=steps,
        sample=_sample(asked, "pt"),
        latent=_sample(asked, "latent"),
        call=described(call),
    )


def _row(times: tuple[float, ...], timestep: float) -> int:
    return min(range(len(times)), key=lambda i: abs(times[i] - timestep))
