"""One cache policy a file: a frozen dataclass with a `name`, called on steps and branches.

    policy(timesteps, branches) -> CacheSchedule

The file is all that there is to write. What else a class may say:
`for_share(share, facts)`, a class method: itself, any number of times, for a wanted share of reuse;
`label`: what tells one of them from the others (else the name, or the settings where there are
several);
`branches_of(denoiser)`: what it holds, where that is not the model's branches;
`candidate`: False keeps it, as a control, out of the search of `train_router`;
`measured`: True where it goes by what calibration measured: it serves other shares (`at_share`);
`title`: how a host's menu lists it, in words that its settings complete; `aliases`: other names.

One that decides at run time is not called: it has `apply_(denoiser, clock)` (see `at_run_time`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import TenutoError
from ..resources import classes
from .schedule import CacheSchedule

PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Facts:
    """What is known of the runs that a schedule is for.

    costs: T numbers, the squared error of the result where that step alone is reused
    (`rollout.step_costs`); None where nothing was measured. logits: (T, N), of a trained router
    that was the best; else None.
    """

    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    costs: tuple[float, ...] | None = None
    logits: Tensor | None = None


def policies() -> dict[str, type]:
    """Every policy by name."""
    return classes(PACKAGE)


def candidates(share: float, facts: Facts, only: str | None = None) -> dict[str, CacheSchedule]:
    """What every policy makes of a wanted share of reuse, by label; controls are left out.

    only: the policy of that name alone, a control or not.
    """
    found: dict[str, CacheSchedule] = {}
    for name, cls in policies().items():
        wanted = getattr(cls, "candidate", True) if only is None else name == only
        if not wanted or not hasattr(cls, "for_share"):
            continue
        made = list(getattr(cls, "for_share")(share, facts))  # noqa: B009
        for policy in made:
            label = getattr(policy, "label", name if len(made) == 1 else str(policy))
            found[label] = policy(facts.timesteps, facts.branches)
    return found


def table_policy(name: str) -> type:
    """The policy of that name; TenutoError where there is none or it makes no table."""
    known = policies()
    tables = [key for key, cls in known.items() if hasattr(cls, "for_share")]
    if name in known and name not in tables:
        raise TenutoError(
            f"{name} decides at run time and has no table: give `tenuto.attach` the policy itself."
        )
    if name not in known:
        raise TenutoError(f"Unknown policy {name!r}: choose one of {', '.join(tables)}.")
    return known[name]


def rules(settings: Collection[str]) -> dict[str, type]:
    """The policies that need no settings but some of these, by title: for the menu of a host."""

    def fits(cls: type) -> bool:
        if "__call__" not in vars(cls) or hasattr(cls, "branches_of"):
            return False
        given = inspect.signature(cls).parameters.values()
        return all(p.name in settings for p in given if p.default is p.empty)

    return {getattr(cls, "title", name): cls for name, cls in policies().items() if fits(cls)}


def made(cls: type, settings: Mapping[str, Any]) -> Callable[..., CacheSchedule]:
    """A policy with those of `settings` that it takes."""
    return cls(**{k: v for k, v in settings.items() if k in inspect.signature(cls).parameters})
