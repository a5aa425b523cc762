"""`Tenuto`: an attached artifact, and what it does while it is on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..artifact import Artifact
from ..caching import CachedBranch, Forecast, ForecastCalls, RunTimeCalls, about_db
from ..model import (
    Attached,
    KeyMap,
    Override,
    denoiser_of,
    encoders_of,
    layers,
)
from ..sampling import Clock
from .execution import DENSE, word
from .layers import QLayer
from .replacements import Replacements


@dataclass(eq=False)
class Part:
    """One patched denoiser. new: what takes the place of its modules. total: its weights."""

    denoiser: nn.Module
    plan: Replacements
    new: dict[str, nn.Module]
    keys: KeyMap | None
    total: int

    @property
    def clock(self) -> Clock:
        """Where the run stands at the denoiser's last call."""
        return self.plan.clock


class Tenuto(Attached):
    """An attached artifact (None: a scheme), and what it does while it is on.

    parts: the patched denoisers of the handle, by the names of `parts_of`. What is said of layers
    and branches has "NAME/" before those of a further one.
    """

    def __init__(self, handle: Any, artifact: Artifact | None, parts: dict[str, Part]) -> None:
        super().__init__(handle, [])
        self.artifact, self.parts = artifact, parts

    @property
    def denoiser(self) -> nn.Module:
        """The patched denoiser, the main one of several."""
        return denoiser_of(self.handle)

    @property
    def clock(self) -> Clock:
        """That of the main denoiser."""
        return self.parts[""].clock

    @property
    def keys(self) -> KeyMap | None:
        """Where canonical names are in the main denoiser; None where they are its own."""
        return self.parts[""].keys

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for part, about in self.parts.items():
            for name, module in about.denoiser.named_modules():
                yield _full(part, name), module

    def encoders(self) -> dict[str, int]:
        """How many layers of each text encoder are quantized: weights alone, inputs in float."""
        found = {
            name: sum(isinstance(m, QLayer) for m in encoder.modules())
            for name, encoder in encoders_of(self.handle).items()
        }
        return {name: count for name, count in found.items() if count}

    def execution(self) -> dict[str, Any]:
        """How the Linear and Conv2d layers compute: {"mode", "layers": {how: count}}.

        Under "auto" also {"choices": {layer: {rows: how}}}, what was decided so far and for how
        many rows at most: `int8` or `dequantized`, which is the float layer with that weight.
        """
        count: Counter[str] = Counter()
        choices: dict[str, dict[str, str]] = {}
        for name, module in self._modules():
            if isinstance(module, QLayer):
                count[module.execution] += 1
                if module.choices:
                    made = sorted(module.choices.items(), key=lambda row: row[0][0])
                    choices[name] = {str(2**bits - 1): word(kernel) for (bits, _), kernel in made}
        count["float"] = sum(1 for part in self.parts.values() for _ in layers(part.denoiser))
        found = {k: v for k, v in count.items() if v}
        quantized = [k for k in found if k != "float"]
        mode = "float" if not quantized else quantized[0] if len(quantized) == 1 else "mixed"
        return {"mode": mode, "layers": found} | ({"choices": choices} if choices else {})

    def int8_weight_share(self) -> float:
        """Share of Linear and Conv2d weights with codes of 8 bits or fewer and 8-bit inputs.

        Of those that the patched model computes with: a module that a temporal table took out is
        counted neither here nor there. A layer that computes in float at some number of rows does
        not count.
        """
        low = (
            math.prod(module.shape)
            for _, module in self._modules()
            if isinstance(module, QLayer)
            and module.scheme.activation is not None
            and DENSE not in module.execution
        )
        return sum(low) / max(1, sum(part.total for part in self.parts.values()))

    def forecast(self) -> dict[str, Any] | None:
        """What the plan of the last run says; None where no calls are forecast.

        {"steps", "skipped": calls, "predicted_db": about which PSNR to the full run, "kernel":
        "forecast-default" where that is not of this model, else ""}. Of two denoisers that share
        a run, both together.
        """
        calls = (p.call for p in self.patches if isinstance(p, Override))
        found = [
            (call.plan, call.forecast)
            for call in calls
            if isinstance(call, ForecastCalls) and isinstance(call.forecast, Forecast)
        ]
        if not found:
            return None
        steps, made = sum(len(plan.computed) for plan, _ in found), found[0][1]
        return {
            "steps": steps, "skipped": steps - sum(plan.calls for plan, _ in found),
            "kernel": made.origin,
            "predicted_db": about_db(sum(plan.error for plan, _ in found), made.at_one),
        }  # fmt: skip

    def counts(self) -> dict[str, list[int]]:
        """[computed, reused] calls of every branch, by canonical name, since it was attached.

        Under a forecast, or a policy that decides at run time: [computed, skipped] calls of the
        denoiser, "".
        """
        named = {
            module: _full(name, part.keys.canonical(inner) if part.keys else inner)
            for name, part in self.parts.items()
            for inner, module in part.denoiser.named_modules()
        }
        patches = [p for p in self.patches if isinstance(p, Override)]
        calls = [(named[p.module], p.call) for p in patches]
        counted = (CachedBranch, ForecastCalls, RunTimeCalls)
        return {name: list(call.counts) for name, call in calls if isinstance(call, counted)}


def _full(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name
