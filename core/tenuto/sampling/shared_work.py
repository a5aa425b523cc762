"""The work folder of a job that several processes do: the first writes, all read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..resume import Work
from .processes import processes


def work_in(path: Path | str | None, inputs: dict[str, Any]) -> Work:
    """A job's work, see `Work`: in `path`, or in memory, of all the processes that do it."""
    return Work(path, inputs) if processes().size == 1 else SharedWork(path, inputs)


class SharedWork(Work):
    """`Work` whose every method all processes call alike, `part` apart."""

    def __init__(self, path: Path | str | None, inputs: dict[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self._memory = {}
        self._once(lambda: Work.__init__(self, path, inputs))

    def _once(self, compute: Any) -> Any:
        return processes().once(compute)

    def load(self, unit: str) -> dict[str, Tensor] | None:
        """The tensors of a finished unit, where the first process finds it finished."""
        found: dict[str, Tensor] | None = None

        def loaded() -> bool:
            nonlocal found
            found = Work.load(self, unit)
            return found is not None

        if not self._once(loaded):
            return None
        return self.part(unit, "") if found is None else found

    def save(self, unit: str, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of a finished unit as the first process has them."""
        if self.path is None:
            Work.save(self, unit, self._once(lambda: tensors))
        else:
            self._once(lambda: Work.save(self, unit, tensors))

    def discard(self) -> None:
        """Remove what was kept, when none needs it any more."""
        self._memory.clear()
        processes().meet()
        self._once(lambda: Work.discard(self))
