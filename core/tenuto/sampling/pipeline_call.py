"""A pipeline's own call: the keywords it takes, under its own names, for the images of a batch.

Whatever a user gives is checked against the pipeline's signature before anything is computed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TenutoError
from ..model import denoisers_of, map_tensors, parts_of, uncompiled, watched
from .described import described, is_plain
from .prompt_call import encodes

OURS = {
    "prompt": "`prompts`", "num_inference_steps": "`steps=`", "generator": "`seed=`",
    "output_type": "what is measured", "return_dict": "what is measured",
    "num_images_per_prompt": "`prompts` and `batch=`",
    "num_videos_per_prompt": "`prompts` and `batch=`",
}  # fmt: skip
PLAIN = {"use_resolution_binning": False, "clean_caption": False}  # small images, prompts as given
GUIDANCE = ("guidance_scale", "distilled_guidance_scale", "decoder_guidance_scale")
TRUE_CFG = "true_cfg_scale"  # guidance in two calls, of models that are distilled or may be
IMAGE_NAMES = ("image", "mask_image", "control_image", "mask", "control_mask", "video")
ONE_TEXT = ("system_prompt", "chi_prompt")  # what stands before every prompt
LABELS = "class_labels"  # of DiT, one an image
WRONG_CALL = (TypeError, ValueError, AttributeError, LookupError, AssertionError)


def guidance_name(names: Mapping[str, Any]) -> str | None:
    """What a pipeline with these parameters (name: default) calls its guidance; None: nothing.

    `true_cfg_scale` where that is what guides by default (Qwen-Image), else `guidance_scale`.
    """
    true = names.get(TRUE_CFG)
    found = [name for name in GUIDANCE if name in names]
    if TRUE_CFG in names and (not found or (isinstance(true, int | float) and true > 1)):
        return TRUE_CFG
    return found[0] if found else None


def check_names(kind: type, given: Mapping[str, Any]) -> None:
    """TenutoError on keywords that such a pipeline does not take or that are not for `call`."""
    ours = next((name for name in given if name in OURS), None)
    if ours is not None:
        raise TenutoError(f"{ours} follows from {OURS[ours]}: leave it out of the call.")
    parameters = inspect.signature(kind.__call__).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if any_name and not kind.__module__.startswith("diffusers."):
        return  # a user's pipeline knows its own
    known = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n != "self"]
    strange = [name for name in given if name not in known]
    if strange:
        near = get_close_matches(strange[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise TenutoError(f"{kind.__name__} takes no {', '.join(strange)}{hint}.")


def check_needed(kind: type, given: Iterable[str]) -> None:
    """TenutoError names what a call of such a pipeline must have and is not given.

    Prompts, steps and guidance are taken for given.
    """
    parameters = inspect.signature(kind.__call__).parameters
    known = {name: p for name, p in parameters.items() if name != "self"}
    _check_given(kind.__name__, known, {*given, *OURS, *GUIDANCE, TRUE_CFG})


def _check_given(
    title: str, parameters: Mapping[str, inspect.Parameter], given: Container[str]
) -> None:
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in given
    ]
    if missing:
        raise TenutoError(f"{title} needs {', '.join(missing)}: pass it in the call.")


def check_steps(pipe: Any, steps: int) -> None:
    """TenutoError unless the pipeline can be sampled in so many steps."""
    config = getattr(getattr(pipe, "scheduler", None), "config", None)
    most = getattr(config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise TenutoError(f"This model samples in at most {most} steps, not {steps}.")


def is_of_prompts(name: str, value: Any) -> bool:
    """Whether `value` has a row for each image: texts, embeddings and masks of prompts, labels."""
    if name == LABELS:
        return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > 0)
    if "prompt" not in name or name in ONE_TEXT:
        return False
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, str | Tensor) for item in value)
    return isinstance(value, Tensor) and value.ndim > 0


def unprompted(call: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keywords of a call without embeddings of prompts, in whose place prompts are given."""
    return {k: v for k, v in (call or {}).items() if not (is_of_prompts(k, v) and "_embeds" in k)}


def wanted_prompts(
    pipe: Any, prompts: Sequence[str], call: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """`prompts`, or none where the pipeline takes none or its call has their embeddings."""
    known = inspect.signature(type(pipe).__call__).parameters
    given = any(name.startswith("prompt_embeds") for name in call or {})
    return () if given or "prompt" not in known else tuple(prompts)


def one_by_one(pipe: Any, call: Mapping[str, Any] | None) -> bool:
    """Whether a pipeline is better called for one image at a time: a video, or made of an image.

    A start image is given for one image, and not every pipeline takes it for several.
    """
    video = "num_frames" in inspect.signature(type(pipe).__call__).parameters
    return video or not all(map(is_plain, described(call).values()))


class PipelineCall:
    """A pipeline called for images by number: image i has prompt i modulo their `count`.

    call: any keywords of the pipeline's own. Those of prompts (`prompt_embeds`, `negative_prompt`)
    have a row for each prompt, or are one text for all; everything else is passed on as it is.
    With a PIL image among them, images are made one at a time: it is for one. TenutoError names
    what the pipeline does not take, and what it needs.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        steps: int,
        guidance: float | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.prompts, self.given = pipe, tuple(prompts), dict(call or {})
        self.denoiser = parts_of(pipe)[""]
        self.title, self.reached = type(pipe).__name__, False
        found = inspect.signature(type(pipe).__call__).parameters
        self.parameters = {name: p for name, p in found.items() if name != "self"}
        if steps < 1:
            raise TenutoError(f"Sampling takes at least one step, not {steps}.")
        check_names(type(pipe), self.given)
        self.count = self._counted()
        one = any(hasattr(value, "getbands") for value in self.given.values())  # a PIL image
        self.together = "prompt" in self.parameters and not one  # else one image a call
        self.fixed: dict[str, Any] = {k: v for k, v in PLAIN.items() if k in self.parameters}
        self.fixed |= self._guided(guidance) | self.given
        if "num_inference_steps" in self.parameters:
            self.fixed["num_inference_steps"] = steps
        self._check_required()

    def _counted(self) -> int:
        """The number of prompts; 0 where the pipeline takes none."""
        embeds = [
            len(value)
            for name, value in self.given.items()
            if name.endswith(("prompt_embeds", LABELS)) and is_of_prompts(name, value)
        ]
        if self.prompts and not wanted_prompts(self.pipe, self.prompts, self.given):
            if "prompt" not in self.parameters:
                raise TenutoError(f"{self.title} takes no prompts: leave them out.")
            raise TenutoError("Give prompts or prompt_embeds, not both.")
        count = len(self.prompts) or max(embeds, default=0)
        if not count and "prompt" in self.parameters:
            raise TenutoError("A pipeline needs at least one prompt.")
        return count

    def _guided(self, guidance: float | None) -> dict[str, Any]:
        """Guidance under the pipeline's own name, with what it takes for it to be on."""
        if guidance is None:
            return {}
        name = guidance_name({n: p.default for n, p in self.parameters.items()})
        if name is None:
            raise TenutoError(f"{self.title} takes no guidance: leave it out.")
        found: dict[str, Any] = {name: guidance}
        negative = any(key.startswith("negative_prompt") for key in self.given)
        wanted = name == TRUE_CFG and guidance > 1 and "negative_prompt" in self.parameters
        if wanted and encodes(self.pipe) and not negative:
            found["negative_prompt"] = " "  # without one it would not guide
        return found

    def _check_required(self) -> None:
        """TenutoError names what has no default and is not given."""
        ours = OURS if self.prompts else OURS.keys() - {"prompt"}
        _check_given(self.title, self.parameters, {*self.fixed, *ours})

    def __call__(
        self,
        denoiser: nn.Module | Mapping[str, nn.Module],
        seed: int,
        batch: int,
        output: str,
        quiet: bool = True,
    ) -> list[Any]:
        """What the pipeline returns for images `seed` to `seed` + `batch` - 1, call by call.

        denoiser: in place of the pipeline's main one, or of several by name (`parts_of`). output:
        its output type. quiet: without the pipeline's own progress bar.
        """
        given = {"": denoiser} if isinstance(denoiser, nn.Module) else denoiser
        if self.together:
            return [self._run(given, range(seed, seed + batch), output, quiet)]
        each = (range(i, i + 1) for i in range(seed, seed + batch))
        return [self._run(given, one, output, quiet) for one in each]

    def _run(
        self, denoisers: Mapping[str, nn.Module], images: range, output: str, quiet: bool
    ) -> Any:
        """One call. TenutoError, in the pipeline's words, if it does not reach its denoiser."""
        given = {name: self._rows(name, value, images) for name, value in self.fixed.items()}
        if self.prompts:
            given["prompt"] = [self.prompts[i % self.count] for i in images]
        if "generator" in self.parameters:
            given["generator"] = [torch.Generator("cpu").manual_seed(i) for i in images]
        if "output_type" in self.parameters:
            given["output_type"] = output
        with self._using(denoisers, quiet):
            return self.pipe(**given) if self.reached else self._first_run(given)

    def _first_run(self, given: dict[str, Any]) -> Any:
        """`_run`, watched until the pipeline first gets to a denoiser."""

        def note(name: str, args: Any, kwargs: Any) -> None:
            self.reached = True

        with ExitStack() as watching:
            for denoiser in denoisers_of(self.pipe).values():
                watching.enter_context(watched(denoiser, before=note, first=True))
            try:
                return self.pipe(**given)
            except WRONG_CALL as error:
                if self.reached:
                    raise
                raise TenutoError(self._refusal(error)) from error

    def _refusal(self, error: Exception) -> str:
        """One sentence on a call that the pipeline itself refused."""
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        said = (said or type(error).__name__).rstrip(".")[:200]
        empty = [
            name
            for name, p in self.parameters.items()
            if name in IMAGE_NAMES and p.default is None and name not in self.given
            if "None" not in str(p.annotation)
        ]
        hint = f" It was given no {' and no '.join(empty)}." if empty else ""
        return f"{self.title} cannot be called like this: {said}.{hint}"

    def _rows(self, name: str, value: Any, images: range) -> Any:
        """`value` for these images."""
        if isinstance(value, str) and "prompt" in name and name not in ONE_TEXT and self.count:
            return [value] * len(images)
        if not is_of_prompts(name, value):
            return copy.copy(value) if isinstance(value, list | dict) else value  # some write to it
        place = getattr(self.pipe, "_execution_device", None)  # pipelines move what they made only
        if isinstance(value, Tensor):
            return value[[i % len(value) for i in images]].to(place or value.device)
        return map_tensors(
            lambda t: t.to(place or t.device), [value[i % len(value)] for i in images]
        )

    @contextmanager
    def _using(self, denoisers: Mapping[str, nn.Module], quiet: bool) -> Iterator[None]:
        """The pipeline with these denoisers, without its own bar if `quiet`; all comes back."""
        pipe, bar = self.pipe, self.pipe.__dict__.get("_progress_bar_config")
        names = dict(zip(parts_of(pipe), denoisers_of(pipe), strict=True))
        before = {names[part]: getattr(pipe, names[part]) for part in denoisers}
        other = {  # else it stays compiled, where it is
            names[part]: given
            for part, given in denoisers.items()
            if uncompiled(before[names[part]]) is not given
        }
        if quiet:
            pipe.set_progress_bar_config(disable=True)
        for name, given in other.items():
            setattr(pipe, name, given)
        try:
            yield
        finally:
            for name in other:
                setattr(pipe, name, before[name])
            if bar is None:
                pipe.__dict__.pop("_progress_bar_config", None)
            else:
                pipe._progress_bar_config = bar
