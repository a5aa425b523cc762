"""What a router has come to while it trains, read from the work folder by whoever looks on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...artifact import StepMap
from ...resume import MANIFEST


@dataclass(frozen=True)
class SoFar:
    """map: computed where r > 1/2. loss: the weighted error of each trajectory until now."""

    map: StepMap
    loss: tuple[float, ...]


def so_far(work: Path) -> SoFar | None:
    """The router in the work folder of `train_router`, or None where no trajectory is finished.

    Of several denoisers, that of the last one that is begun, in a folder inside.
    It only reads: a folder that another process is writing, or has begun anew, does no harm.
    """
    further = sorted(work.glob("*/router%2F*.safetensors"))
    found = further or sorted(work.glob("router%2F*.safetensors"))
    work = further[-1].parent if further else work
    try:
        facts = json.loads((work / MANIFEST).read_text(encoding="utf-8"))["about"]["about"]
        state = load_file(found[-1])
        times, branches = facts["trajectory"]["timesteps"], facts["branches"]
        table = state["logits"] > 0
        if tuple(table.shape) != (len(times), len(branches)):
            return None
        loss = tuple(float(row[0]) for row in state["history"].tolist())
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return None
    shown = StepMap(table, tuple(map(float, times)), tuple(map(str, branches)), "router so far")
    return SoFar(shown, loss)
