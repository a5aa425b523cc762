"""The sample, the timestep and the conditions among a denoiser's arguments."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .tree import tensors_in

STEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_labels")


class Signature:
    """Finds the sample, the timestep and the conditions among a denoiser's arguments."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.signature = inspect.signature(type(denoiser).forward)
        self.names = list(self.signature.parameters)[1:]

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults left out."""
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
        found = next((n for n in STEP_NAMES if inputs.get(n) is not None), None)
        if found is None and len(self.names) > 1:
            found = self.names[1]
        if found is None or inputs.get(found) is None:
            raise ModelError(f"No timestep among the denoiser's arguments {self.names}.")
        return inputs[found]

    def sample(self, inputs: dict[str, Any]) -> Tensor:
        """The noisy sample: the first argument."""
        return inputs[self.names[0]]

    def conditions(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Every other tensor: prompt embeddings, labels, masks, pooled vectors."""
        step = self.timestep(inputs)
        rest = (v for n, v in inputs.items() if n != self.names[0] and v is not step)
        return [t for value in rest for t in tensors_in(value)]
