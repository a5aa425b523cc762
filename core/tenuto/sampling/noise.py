"""What a scheduler of diffusers says of noise: how much there is at a timestep, and what is asked.

Nothing here calls a denoiser.
"""

from __future__ import annotations

from typing import Any

import torch

STOCHASTIC = (  # in names of classes
    "ancestral", "sde", "ddpm", "lcm", "tcd", "consistency", "stochastic", "unclip", "repaint",
    "sasolver", "scm", "karrasve", "cogvideoxdpm", "cosinedpm", "proteina",
)  # fmt: skip
NOISY = ("eta", "s_churn")  # what a step is asked to add noise by
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def is_stochastic(scheduler: Any) -> bool:
    """Whether a scheduler adds noise of its own at every step."""
    config = getattr(scheduler, "config", None)
    name = type(scheduler).__name__.lower()
    if any(word in name for word in STOCHASTIC):
        return True
    kind = str(getattr(config, "algorithm_type", ""))
    return kind.startswith("sde") or bool(getattr(config, "stochastic_sampling", False))


def prediction_of(scheduler: Any) -> str | None:
    """What a scheduler takes a denoiser's output for: "eps", "v", "x0" or "flow"; None: unknown."""
    config = getattr(scheduler, "config", None)
    if "FlowMatch" in type(scheduler).__name__ or getattr(config, "use_flow_sigmas", False):
        return "flow"
    return PREDICTIONS.get(str(getattr(config, "prediction_type", "")))


def noise_at(scheduler: Any, timestep: float) -> tuple[float, float] | None:
    """(alpha, sigma) of the sample at a timestep of the scheduler's; None where it is not known."""
    if prediction_of(scheduler) == "flow":
        count = float(getattr(scheduler.config, "num_train_timesteps", 1000))
        sigma = min(1.0, max(0.0, timestep / count))
        return 1 - sigma, sigma
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        return None
    table = torch.as_tensor(kept).detach().cpu().double()
    place = min(max(timestep, 0.0), len(table) - 1.0)
    low = int(place)
    high = min(low + 1, len(table) - 1)
    found = float(table[low] + (table[high] - table[low]) * (place - low))
    found = min(1.0, max(0.0, found))
    return found**0.5, (1 - found) ** 0.5
