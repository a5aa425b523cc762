"""How much a search for a cache schedule does, by preset, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .harmonica import HarmoniCa

PASSES = 3.5  # what a training step costs, in denoiser calls: teacher, student, gradient


@dataclass(frozen=True)
class RoutePreset:
    """Effort. router: settings of the training; batches: that each candidate is measured on."""

    router: HarmoniCa
    batches: int

    @property
    def batch(self) -> int:
        """Images a batch, everywhere."""
        return self.router.batch


# From the step programme on, which a high rate would forget; errors as the schedule makes them.
MENDED = HarmoniCa(lr=0.05, joint=0.05, estimator="straight-through", error="coherent")
PRESETS = {
    "quick": RoutePreset(replace(MENDED, iterations=24, batch=1), 4),
    "standard": RoutePreset(replace(MENDED, iterations=48, batch=2), 4),
    "thorough": RoutePreset(replace(MENDED, iterations=100, batch=8, lr=0.02, joint=0.02), 8),
}


def calls_of_search(
    plan: RoutePreset, steps: int, reuse: float, tables: int, whole: bool = False
) -> dict[str, float]:
    """Denoiser calls of one batch that each part of a search takes, over so many tables.

    whole: of whole calls, for which no router is trained.
    """
    return {
        "costs": steps * (steps + 3) / 2,
        "router": 0 if whole else plan.router.iterations * steps * PASSES,
        "reference": plan.batches * steps,
        "candidates": tables * plan.batches * steps * (1 - reuse),
    }
