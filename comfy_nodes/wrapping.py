"""What every patch of a MODEL shares: where it lies, when it acts, how it leaves.

The patches are forwards of single modules, put in by an injection while the MODEL is loaded. They
act during a denoiser call of a MODEL that carries them, and are nothing but the original at any
other time: clones share their modules, and core ejects in no order that one could count on.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import Tensor, nn

from tenuto.model import Override, patches_on
from tenuto.sampling import Clock

# A sampling run, an evaluation of its sampler, a denoiser call: one within the other.
WRAPPED = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL)
# In the options of a call that shows other frames to the same prompt: a window of a longer video,
# or the next frames of one that is made in order, whose calls write what later ones attend to.
OTHER_FRAMES = ("context_window", "ar_state")


class Wrapped:
    """Overrides round a MODEL. A subclass says which ones, and what a sampling run opens.

    `clock` follows every denoiser call; `on` is True inside of one. `passes`: how often each
    prompt was computed in the evaluation of the sampler in progress; None outside of one.
    """

    key = "tenuto"

    def __init__(self) -> None:
        self.clock = Clock(())
        self.on = False
        self.passes: Counter[Hashable] | None = None
        self.placed: weakref.WeakKeyDictionary[nn.Module, list[Override]]
        self.placed = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return self  # model_options are copied deeply with every clone

    # --- what a subclass fills in -----------------------------------------------------------------

    def overrides(self, patcher: Any, denoiser: nn.Module) -> list[Override]:
        """Put the patches in."""
        raise NotImplementedError

    def opened(self, times: Sequence[float], sampler: Any, guider: Any) -> Callable[[], None]:
        """A run at these timesteps begins, by a SAMPLER and a GUIDER; returns what ends it."""
        return lambda: None

    # --- round a MODEL ----------------------------------------------------------------------------

    def apply(self, model: Any) -> Any:
        """A clone of `model` with the patches; another of the same kind before it is replaced."""
        made = model.clone()
        calls = self.sampling, self.evaluating, self.calling
        for kind, call in zip(WRAPPED, calls, strict=True):
            made.remove_wrappers_with_key(kind, self.key)
            made.add_wrapper_with_key(kind, self.key, call)
        made.remove_callbacks_with_key(CallbacksMP.ON_DETACH, self.key)
        made.add_callback_with_key(CallbacksMP.ON_DETACH, self.key, self.detached)
        made.set_injections(self.key, [PatcherInjection(self.inject, self.eject)])
        made.set_attachments(self.key, self)
        return made

    def inject(self, patcher: Any) -> None:
        """Core loads the MODEL."""
        self.eject(patcher)
        denoiser = patcher.model.diffusion_model
        self.placed[denoiser] = []
        self.placed[denoiser] = self.overrides(patcher, denoiser)

    def eject(self, patcher: Any) -> None:
        """Core unloads it, or wants to look at its weights."""
        for patch in reversed(self.placed.pop(patcher.model.diffusion_model, [])):
            patch.retire()

    def detached(self, patcher: Any, unpatch_all: bool) -> None:
        """Core unloads the MODEL, or (unpatch_all False) only makes room for a clone of it."""

    def sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One sampling run: its state is opened here, and dropped whatever happens.

        args: noise, latent, sampler, sigmas (T + 1,), ...
        """
        sampler = args[2] if len(args) > 2 else kwargs["sampler"]
        sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]
        sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        close = self.opened(timesteps(sampling, sigmas[:-1]).tolist(), sampler, executor.class_obj)
        try:
            return executor(*args, **kwargs)
        finally:
            close()

    def evaluating(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the sampler: guidance calls the denoiser as often as it likes."""
        before, self.passes = self.passes, Counter()
        try:
            return executor(*args, **kwargs)
        finally:
            self.passes = before

    def calling(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One denoiser call: `x` (B, ...) at `t` (B,) sigmas, several prompts in one or apart."""
        options = kwargs.get("transformer_options") or (args[3] if len(args) > 3 else {})
        self.observe(timesteps(executor.class_obj.model_sampling, t), len(x), options, x.device)
        before, self.on = self.on, True
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            self.on = before

    def observe(self, times: Tensor, batch: int, options: dict[str, Any], device: Any) -> None:
        """Move the clock. A stream is an image of a prompt in one pass of the evaluation.

        That is: the prompt's id, which patches are on, how many such passes came before, and the
        image's place in its share of the rows.
        """
        ids, on = options.get("uuids") or (), patches_on(options)
        same = all(options.get(name) is None for name in OTHER_FRAMES)
        fits = ids and batch % len(ids) == 0 and same
        if not fits or self.passes is None:
            self.clock.begin()  # what is stored is of other frames: nothing is reused
        self.clock.observe(times, batch, (), device)
        if not fits or self.passes is None:
            return
        streams: list[Hashable] = []
        for prompt in ids:
            count = self.passes[prompt, on]
            self.passes[prompt, on] += 1
            streams += [(prompt, on, count, row) for row in range(batch // len(ids))]
        self.clock.streams = tuple(streams)


def timesteps(sampling: Any, sigmas: Tensor) -> Tensor:
    """The timesteps that the denoiser gets at `sigmas`: float (n,), no view of anything."""
    return torch.as_tensor(sampling.timestep(sigmas)).float().reshape(-1).clone()
