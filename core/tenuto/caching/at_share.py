"""A schedule at another share of reuse than it was made for, and one where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence

from .interval import late_interval_for
from .policy import Facts, policies
from .schedule import CacheSchedule

NEAR = 0.03  # a share this near to the schedule's own is the schedule's own


def at_share(schedule: CacheSchedule, share: float, facts: Facts, best: str) -> CacheSchedule:
    """`schedule` at about `share` of reuse, by what calibration measured.

    best: the label of the policy that made the schedule. It decides where its own measurements are
    known, else the policy that knows the costs of the steps; with neither the schedule stays.
    """
    if abs(schedule.reuse_ratio - share) <= NEAR:
        return schedule
    steps = len(facts.timesteps)
    share = min(round(share * steps), steps - 1) / steps if facts.logits is None else share
    known = sorted(policies().items(), key=lambda item: not best.startswith(item[0]))
    for _, cls in known:
        if getattr(cls, "measured", False):
            found = list(getattr(cls, "for_share")(share, facts))  # noqa: B009
            found.sort(key=lambda policy: getattr(policy, "label", "") != best)  # it first
            if found:
                return found[0](facts.timesteps, facts.branches)
    return schedule


def unmeasured(
    share: float, first: int, timesteps: Sequence[float], branches: Sequence[str]
) -> CacheSchedule:
    """A late interval of about `share` that computes the first steps where there is a choice."""
    found = late_interval_for(share, timesteps, branches)
    late = [policy for policy in found if policy.first >= first] or found
    return min(late, key=lambda policy: policy.period)(timesteps, branches)
