"""`record`: the denoiser's calls of sampling runs, as a `Trajectory`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, TenutoError
from ..model import Signature, all_frozen, denoiser_of, map_held, parts_of, watched
from ..progress import Progress, Shown, shown
from .described import described
from .own_outputs import Noise, outputs_of
from .pipeline_call import PipelineCall
from .processes import processes
from .results import images_of, latents_of
from .step_outputs import StepOutputs
from .trajectory import Call, Sample, Trajectory, nearest


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
    return Sampler(PipelineCall(pipe, prompts, steps, guidance, call), output)


@dataclass(frozen=True)
class Sampler:
    """`sampler`: takes the denoiser called `name`; `others`, by name, are in the pipeline too."""

    asked: PipelineCall
    output: str
    name: str = ""
    others: Mapping[str, nn.Module] = field(default_factory=dict)

    def __call__(
        self, denoiser: nn.Module | Mapping[str, nn.Module], seed: int, batch: int
    ) -> Tensor:
        """Images or latents; see `sampler`. denoiser: several by name, too (`parts_of`)."""
        taken = latents_of if self.output == "latent" else images_of
        given = denoiser if isinstance(denoiser, Mapping) else {self.name: denoiser}
        return taken(self.asked({**self.others, **given}, seed, batch, self.output))

    def of(self, name: str, others: Mapping[str, nn.Module]) -> Sampler:
        """The same for another denoiser of the pipeline."""
        return replace(self, name=name, others=others)


@contextmanager
def recording(
    denoiser: nn.Module,
    calls: list[Call],
    run: int = 0,
    part: str = "",
    outputs: StepOutputs | None = None,
) -> Iterator[list[Call]]:
    """Append every call of `denoiser`, the pipeline's `part`, to `calls`, as before the call.

    outputs: gets what is made of the calls' outputs, step by step.
    """
    facts, start = Signature(denoiser), len(calls)
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of a model's own caches

    def copied(x: Tensor) -> Tensor:
        return x.detach().to("cpu", copy=True)

    def shared(x: Tensor) -> Tensor:
        """One copy for all calls that get the same."""
        key = id(x), x._version
        if key not in copies:
            copies[key] = x, copied(x)
        return copies[key][1]

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = facts.inputs(args, kwargs)
        step = facts.step(inputs)
        kept = map_held(copied, inputs, shared)
        calls.append(Call(run, 0, step, kept, denoiser=part))

    def last() -> float | None:
        return calls[-1].timestep if len(calls) > start else None

    def answered(name: str, args: Any, kwargs: Any, out: Any) -> None:
        assert outputs is not None
        outputs.saw(out)

    seen = nullcontext() if outputs is None else outputs.run(last)
    with watched(denoiser, before=keep, after=answered if outputs else None), seen:
        yield calls


def to_device(value: Any, device: Any, half: torch.dtype | None = None) -> Any:
    """Tensors in nested containers, and in objects, on `device`; half precision becomes `half`."""

    def moved(x: Tensor) -> Tensor:
        low = x.dtype in (torch.float16, torch.bfloat16)
        return x.to(device, half if low and half else x.dtype)

    return map_held(moved, value)


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
    prediction: str | None = None,
    noise: Noise | None = None,
    on_progress: Shown = True,
) -> Trajectory:
    """Run the model as its user does and keep every denoiser call, of all its denoisers.

    A pipeline takes `prompts` (each once unless `runs` says otherwise), and in `call` any keyword
    of its own: image, mask_image, control_image, height, num_frames, negative_prompt, strength,
    prompt_embeds in place of `prompts`, ... `guidance` is given under the name that the pipeline
    has for it. What it returns does not matter: images, a video, sound. A bare denoiser takes
    `sample(denoiser, seed, batch)`, which runs one trajectory and returns its images,
    float (batch, C, H, W) in [-1, 1]; `steps` then follows from what it does. So that calls of it
    can be forecast, say what it answers, `prediction` "eps", "v", "x0" or "flow", and how much
    `noise` a sample alpha * x0 + sigma * noise has: a function of the timestep that gives (alpha,
    sigma), or one such pair a step. A run is then repeated at most eleven times, to see how much
    of an error in a step is left at the end. A pipeline's scheduler knows all that. on_progress: as
    in `quantize`; True is a bar of a pipeline alone, for what runs in `sample` may show its own.
    """
    denoiser, found = denoiser_of(model), parts_of(model)
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
    starts = {seed + i * batch: min(batch, left - i * batch) for i in range(runs)}
    repeat = None if sample is None else partial(sample, denoiser, seed, starts[seed])
    made = partial(outputs_of, model, repeat, prediction, noise)
    with shown(on_progress, "Recording", able=sample is None) as told:
        calls, outputs = _seen(made, found, partial(run, denoiser), starts, told)
    if not calls:
        raise ModelError("`sample` did not call the denoiser that it was given.")
    times = tuple(dict.fromkeys(c.timestep for c in calls if c.run == 0))
    calls = [replace(c, row=nearest(times, c.timestep)) for c in calls]
    known = Trajectory(
        times, calls, seed, batch, runs, len(times), guidance, prompts, sample,
        kernel=outputs.kernel(),
    )  # fmt: skip
    return known if asked is None else again(known, asked, steps, call)


def _seen(
    made: Callable[[], StepOutputs],
    parts: Mapping[str, nn.Module],
    run: Callable[[int, int], Any],
    starts: Mapping[int, int],
    on_progress: Progress | None,
) -> tuple[list[Call], StepOutputs]:
    """The calls of the denoisers `parts` in all runs, and what a `made()` saw of their steps.

    run: takes a seed and how many images; starts: those of every run.
    """
    note = processes().told(on_progress) or (lambda done, total, words: None)

    def one(place: int, seed: int) -> tuple[Any, ...]:
        note(place, len(starts), "recording")
        kept, outputs = list[Call](), made()
        with ExitStack() as watching, all_frozen(parts.values()), torch.no_grad():
            for name, part in parts.items():
                beside = outputs if len(parts) == 1 else None
                watching.enter_context(recording(part, kept, part=name, outputs=beside))
            run(seed, starts[seed])
        return [(c.timestep, c.inputs, c.denoiser) for c in kept], outputs.seen()

    calls, whole = list[Call](), made()
    shares = processes().each(enumerate(starts), lambda start: one(*start))
    for i, (known, own) in enumerate(shares):
        calls += [Call(i, 0, timestep, inputs, denoiser=of) for timestep, inputs, of in known]
        whole.add(*own)
    note(len(starts), len(starts), "recording")
    return calls, whole


def again(
    trajectory: Trajectory, asked: PipelineCall, steps: int, call: Mapping[str, Any] | None
) -> Trajectory:
    """`trajectory`, which the pipeline can run again as it was asked."""
    return replace(
        trajectory,
        steps=steps,
        sample=Sampler(asked, "pt"),
        latent=Sampler(asked, "latent"),
        call=described(call),
    )
