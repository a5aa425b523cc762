"""A denoiser in a single file by the key map of its family, read a tensor at a time.

diffusers reads single files of many models, some of them at the sizes of one release alone. Hosts'
names of every family are known here anyway; and what is read by them can stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..model import Place, host_map_of, swapped
from .single_file import header

PREFIXES = ("model.diffusion_model.", "")  # of a denoiser among other parts, and alone


class MappedFile(Mapping[str, Tensor]):
    """The parameters of `denoiser` in a file by their own names, each read anew, in `dtype`.

    denoiser: of diffusers, of the right sizes; it may be on the meta device. wide: parts of names
    whose tensors are in fp32. ModelError where the file has not all of them, in their shapes.
    """

    def __init__(
        self, file: Path, denoiser: nn.Module, dtype: torch.dtype, wide: tuple[str, ...] = ()
    ) -> None:
        self.file, self.dtype, self.wide = file, dtype, wide
        known, wanted = header(file), dict(denoiser.state_dict())
        places = host_map_of(denoiser).places
        self.prefix = next(p for p in PREFIXES if not p or any(n.startswith(p) for n in known))
        self.places = {name: place for name, place in places.items() if name in wanted}
        for name, place in self.places.items():
            shape = known.get(self.prefix + place.name, ("", ()))[1]
            rows = () if not shape else (place.rows[1] - place.rows[0], *shape[1:])
            if rows != tuple(wanted[name].shape) or place.rows[1] > shape[0]:
                raise ModelError(f"{file.name} has no {place.name} of a {type(denoiser).__name__}.")
        self._check_whole(known)

    def _check_whole(self, known: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """ModelError where a tensor of the file is not taken as a whole."""
        ends: dict[str, int] = {}
        for place in self.places.values():
            ends[place.name] = max(ends.get(place.name, 0), place.rows[1])
        for name, end in ends.items():
            if known[self.prefix + name][1][0] != end:
                raise ModelError(f"{self.file.name} has another {name}.")

    def type_of(self, name: str) -> torch.dtype:
        """The type of a floating tensor."""
        return torch.float32 if set(self.wide) & set(name.split(".")) else self.dtype

    @property
    def renamed(self) -> bool:
        """Whether the file has other names than the model, but for what they begin with."""
        return any(name != place.name for name, place in self.places.items())

    def whole(self) -> dict[str, Tensor]:
        """All of them, of a file that is opened once."""
        with safe_open(self.file, "pt") as opened:
            return {name: self._read(opened, name) for name in self.places}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            return self._read(opened, name)

    def _read(self, opened: Any, name: str) -> Tensor:
        place: Place = self.places[name]
        found = opened.get_slice(self.prefix + place.name)[slice(*place.rows)]
        found = swapped(found) if place.swapped else found
        return found.to(self.type_of(name), copy=True) if found.is_floating_point() else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
