"""Several algorithms one after the other, in LLMC's order: transform, clip, reconstruct.

Gong et al. 2024 (arXiv 2405.06001): scales of columns are searched first, then the ends of ranges
with these scales, then how weights round within these ranges. Each stage gets what the ones before
it found as `before` and keeps what it does not search itself: the scale of each column, the ranges.
`algorithms.by_name` makes one of names with a plus between them, such as "awq+clip+gptq".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import SchemeError
from ...numerics import QTensor, Scheme
from ...progress import parts
from . import PARTS, STAGES, algorithm
from .clip import Clip
from .gptq import GPTQ

WORTH = 1000  # of a stage, in the progress


@dataclass(frozen=True)
class Stages:
    """`stages`: algorithms that say which `stage` they are, in the order of `STAGES`.

    Several of one stage may follow each other, but for transforms. SchemeError: fewer than two,
    another order, one that comes twice or is no stage.
    """

    stages: tuple[Any, ...] = (Clip(), GPTQ())

    def __post_init__(self) -> None:
        found = tuple(algorithm(s) if isinstance(s, dict) else s for s in self.stages)
        object.__setattr__(self, "stages", found)
        kinds = [getattr(stage, "stage", None) for stage in found]
        places = [STAGES.index(kind) for kind in kinds if kind in STAGES]
        nested = any(isinstance(stage, Stages) for stage in found)
        once = len({type(s) for s in found}) == len(found) and places.count(0) < 2 and not nested
        if len(found) < 2 or len(places) < len(found) or places != sorted(places) or not once:
            names = "+".join(getattr(s, "name", type(s).__name__) for s in found)
            raise SchemeError(
                f"{names} is no chain of algorithms: two or more that {', '.join(STAGES)}, in this "
                "order, such as awq+clip+gptq."
            )

    @property
    def name(self) -> str:
        """The names of the stages with a plus between them."""
        return "+".join(stage.name for stage in self.stages)

    @property
    def stage(self) -> str:
        """What the first one does: it goes on from what that goes on from."""
        return self.stages[0].stage

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that all stages are for."""
        every = [getattr(stage, "parts", PARTS) for stage in self.stages]
        return tuple(part for part in PARTS if all(part in some for some in every))

    @property
    def smooth(self) -> bool:
        """Whether a stage scales columns."""
        return any(getattr(stage, "smooth", False) for stage in self.stages)

    @property
    def even(self) -> bool:
        """Whether a stage needs values of equal distances."""
        return any(getattr(stage, "even", False) for stage in self.stages)

    @property
    def needs_inputs(self) -> bool:
        """Whether a stage uses recorded inputs."""
        return any(stage.needs_inputs for stage in self.stages)

    @property
    def needs_target(self) -> bool:
        """Whether a stage uses the outputs in full precision."""
        return any(s.needs_inputs and getattr(s, "needs_target", True) for s in self.stages)

    def __call__(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Any = None,
        target: Tensor | None = None,
        *,
        before: Mapping[str, QTensor] | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, QTensor]:
        """The weights of `layers` after the last stage. before: what they are so far, by name."""
        places = {str(place): WORTH for place in range(len(self.stages))}
        found = before
        for stage, note in zip(self.stages, parts(on_progress, places).values(), strict=True):
            more = {} if found is None else {"before": found}
            found = stage(block, layers, bank, target, seed=seed, on_progress=note, **more)
        assert found is not None
        return dict(found)
