"""`Codes`: the quantized weights of a job by layer, read from its work when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..numerics import Format, QTensor
from ..resume import Work


class Codes(Mapping[str, QTensor]):
    """Layer -> its quantized weight. Nothing is kept here: each is read anew."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Work, str, tuple[int, ...], Format]] = {}

    def add(self, name: str, work: Work, unit: str, shape: tuple[int, ...], form: Format) -> None:
        """The layer `name` is in `unit` of `work`, which is finished."""
        self._places[name] = work, unit, shape, form

    def drop(self, name: str) -> None:
        """Forget a layer: it stays in float."""
        del self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight."""
        return self._places[name][2]

    def __getitem__(self, name: str) -> QTensor:
        work, unit, shape, form = self._places[name]
        return QTensor.from_tensors(work.part(unit, f"{name}."), name, shape, form)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places
