"""The sample, the timestep and the conditions among a denoiser's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .passes import which_pass
from .tree import tensors_in

STEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_labels")
# Arguments that are other ones at every step, of one image too: what a ControlNet adds, the noisy
# sound beside a noisy video, times in another unit.
STEPWISE = re.compile(
    r"additional_residuals?$|^(block_)?controlnet_\w*(samples|states)$|^control$"
    r"|^audio_hidden_states$|timestep|sigma"
)

Rows = Tensor | Sequence[Tensor]  # (B, ...), or B tensors of a row each, not all of one shape


class Signature:
    """Finds the sample, the timestep and the conditions among a denoiser's arguments."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.signature = inspect.signature(type(denoiser).forward)
        self.names = list(self.signature.parameters)[1:]
        self.first, self.time = _of_pictures(self.names) or ("".join(self.names[:1]), None)
        known = list(self.signature.parameters.values())[1:]
        self.places = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.needed = {p.name for p in known if p.default is p.empty}
        self.plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in known)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults left out, in the order of the signature."""
        if self.plain and len(args) <= len(self.places):  # at every step: a tenth of `bind`'s time
            given = dict(zip(self.places, args, strict=False)) | kwargs
            found = {name: given[name] for name in self.names if name in given}
            if len(found) == len(args) + len(kwargs) and self.needed <= found.keys():
                return found
        bound = self.signature.bind(None, *args, **kwargs).arguments
        found: dict[str, Any] = {}
        for name, value in list(bound.items())[1:]:
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            elif kind is not inspect.Parameter.VAR_POSITIONAL:
                found[name] = value
        return found

    def timestep(self, inputs: dict[str, Any]) -> Any:
        """The timestep among `inputs`: by its usual names, else the second argument."""
        found = next((n for n in STEP_NAMES if inputs.get(n) is not None), self.time)
        if found is None and len(self.names) > 1:
            found = self.names[1]
        if found is None or inputs.get(found) is None:
            raise ModelError(f"No timestep among the denoiser's arguments {self.names}.")
        return inputs[found]

    def step(self, inputs: dict[str, Any]) -> float:
        """The timestep of the first row of a call, as a number."""
        return float(times_of(self.timestep(inputs), self.batch(inputs))[0])

    def sample(self, inputs: dict[str, Any]) -> Rows:
        """The noisy sample, the first argument: (B, ...), or a list of B images (Z-Image).

        Of a model of several media, each with tokens and timesteps (Cosmos 3): the pictures.
        """
        return inputs[self.first]

    def batch(self, inputs: dict[str, Any]) -> int:
        """How many rows a call has."""
        return len(self.sample(inputs))

    def which(self, inputs: dict[str, Any]) -> str:
        """Which pass of a step a call is, where it leaves something out; "": all others."""
        return which_pass(inputs)

    def fills(self, inputs: dict[str, Any]) -> bool:
        """Whether a call fills a cache of the model's own, which the calls after it read."""
        return inputs.get("kv_cache_mode") == "extract"

    def moves(self, name: str) -> bool:
        """Whether an argument is the sample, the timestep or something else that a step changes."""
        times = [n for n in STEP_NAMES if n in self.names] or self.names[1:2]
        return name in (self.first, *times) or STEPWISE.search(name) is not None

    def conditions(self, inputs: dict[str, Any]) -> list[Rows]:
        """Every other tensor that stays the same: prompt embeddings, labels, masks, sizes.

        It says which image and which half of guidance a row is of, at every step of a run.
        Where the sample is a list, so are other arguments with a tensor a row; they stay lists.
        """
        step, batch = self.timestep(inputs), self.batch(inputs)
        rest = [
            value
            for name, value in inputs.items()
            if name != self.first and value is not step and not STEPWISE.search(name)
        ]
        listed = not isinstance(self.sample(inputs), Tensor)
        found: list[Rows] = []
        for value in rest:
            if listed and is_listed(value, batch):
                found.append(value)
            else:
                found += tensors_in(value)
        return found


def _of_pictures(names: Sequence[str]) -> tuple[str, str] | None:
    """The names of tokens and timesteps where every medium has its own; the first one's."""
    found = [n.removesuffix("_timesteps") for n in names if n.endswith("_timesteps")]
    pairs = [(f"{n}_tokens", f"{n}_timesteps") for n in found if f"{n}_tokens" in names]
    return pairs[0] if pairs and not any(n in STEP_NAMES for n in names) else None


def is_listed(value: Any, batch: int) -> bool:
    """Whether `value` is a list of `batch` tensors, one a row."""
    return (
        isinstance(value, list | tuple)
        and len(value) == batch
        and all(isinstance(item, Tensor) for item in value)
    )


def times_of(timestep: Any, batch: int) -> Tensor:
    """A timestep in any form, a number a row: (batch,), or (1,) where all rows have the same.

    Of one a token, a frame or an image (image-to-video keeps what is given at 0) a row has the
    largest, and so has a call whose timesteps are not those of its rows.
    """
    steps = torch.as_tensor(timestep).detach()
    if steps.ndim > 1:
        steps = steps.flatten(1).amax(1)
    steps = steps.reshape(-1)
    return steps if len(steps) in (1, batch) else steps.amax()[None]
