"""How much effort a search for a route takes, by name."""

from __future__ import annotations

from dataclasses import dataclass

from .harmonica import HarmoniCa


@dataclass(frozen=True)
class RoutePreset:
    """Effort. router: settings of the training; batches: that each candidate is measured on."""

    router: HarmoniCa
    batches: int

    @property
    def batch(self) -> int:
        """Images a batch, everywhere."""
        return self.router.batch


PRESETS = {
    "quick": RoutePreset(HarmoniCa(iterations=24, batch=1), 4),
    "standard": RoutePreset(HarmoniCa(iterations=48, batch=2), 4),
    "thorough": RoutePreset(HarmoniCa(iterations=100, batch=8, lr=0.1, joint=0.4), 8),
}
