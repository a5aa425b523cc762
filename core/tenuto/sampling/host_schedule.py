"""What ComfyUI and the WebUIs say of a model's sampling: what it predicts, and how much noise.

Their objects are recognised by the names of their classes and attributes, which forks keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grid import places_of

CLASSES = (  # the first that an object is of: several are EPS too, and two of images are CONST
    ("IMG_TO_IMG_FLOW", "x0"), ("IMG_TO_IMG_VELOCITY", ""), ("V_PREDICTION_DDPM", "v"),
    ("COSMOS_RFLOW", "flow"), ("CONST", "flow"), ("ModelSamplingDiscreteFlow", "flow"),
    ("LCM", ""), ("X0", "x0"), ("V_PREDICTION", "v"), ("EPS", "eps"),
)  # fmt: skip
SAID = {"epsilon": "eps", "eps": "eps", "v_prediction": "v", "edm": "v", "v": "v", "const": "flow"}


@dataclass(frozen=True, eq=False)
class TableNoise:
    """`Noise` from a table: timesteps, rising, and the `share` of noise or of the image at each.

    flow: share is sigma, and alpha + sigma = 1; else it is alpha squared, and squares add up to 1.
    Beyond the table it is as at its end.
    """

    times: Sequence[float]
    share: Tensor  # float64 (n,)
    flow: bool

    def __call__(self, timesteps: Sequence[float]) -> list[tuple[float, float]]:
        """(alpha, sigma) at each."""
        places = places_of(timesteps, self.times)
        low = places.floor().long().clamp(0, len(self.share) - 2)
        found = self.share[low].lerp(self.share[low + 1], places - low).clamp(0, 1).tolist()
        if self.flow:
            return [(1 - share, share) for share in found]
        return [(share**0.5, (1 - share) ** 0.5) for share in found]


def host_prediction(sampling: Any) -> str | None:
    """What a denoiser answers, "eps", "v", "x0" or "flow"; None where its host does not say.

    sampling: ComfyUI's and reForge's `model_sampling`, Forge's `predictor`, A1111's `sd_model`.
    """
    names = {cls.__name__ for cls in type(sampling).__mro__}
    found = next((kind for name, kind in CLASSES if name in names), None)
    said = getattr(sampling, "prediction_type", getattr(sampling, "parameterization", None))
    return found or SAID.get(str(said))


def host_noise(sampling: Any) -> TableNoise | None:
    """(alpha, sigma) at timesteps as the denoiser gets them; None where the host does not say.

    sampling: as in `host_prediction`.
    """
    sigmas, flow = getattr(sampling, "sigmas", None), host_prediction(sampling) == "flow"
    if isinstance(sigmas, Tensor) and callable(getattr(sampling, "timestep", None)):
        times = torch.as_tensor(sampling.timestep(sigmas)).detach().cpu().double().flatten()
        share = sigmas.detach().cpu().double().flatten()
        if "COSMOS_RFLOW" in {cls.__name__ for cls in type(sampling).__mro__}:
            share = share / (share + 1)
        if not flow:
            unit = float(getattr(sampling, "sigma_data", None) or 1.0)  # deviation of a latent
            share = 1 / (1 + (share / unit).square())
        rises = torch.cat([times[:1] == times[:1], times[1:] > times.cummax(0).values[:-1]])
        if int(rises.sum()) < 2:
            return None
        return TableNoise(times[rises].tolist(), share[rises], flow)
    kept = getattr(sampling, "alphas_cumprod", None)
    if not isinstance(kept, Tensor) or flow or len(kept) < 2:
        return None
    return TableNoise(range(len(kept)), kept.detach().cpu().double(), False)
