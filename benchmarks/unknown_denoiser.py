"""A pretrained denoiser that no family knows: W8A8 and half of its blocks' calls against the truth.

    pip install einops
    pip download 21cmPSDenoiser==1.0.2 --no-deps --no-binary :all:
    tar xzf 21cmpsdenoiser-1.0.2.tar.gz
    python benchmarks/unknown_denoiser.py 21cmpsdenoiser-1.0.2          # 12 spectra, 8 draws each
    python benchmarks/unknown_denoiser.py 21cmpsdenoiser-1.0.2 48 32

The model (MIT, Breitman et al. 2025) takes the noise of few samples out of power spectra of the
21 cm line; its test set has the true ones. Its weights are a zip of torch's, read with
`weights_only`. Ten DDIM steps; the answer is the median of the draws, its error the mean of
|answer - truth| / truth. A draw is wide, so that the error falls with their number in every row
alike; rows have the same noise. One JSON line a row.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.quantization import cpu_name
from tenuto.artifact import Artifact
from tenuto.caching import CacheSchedule
from tenuto.model import describe, layers

STEPS = 10
SHAPE = (1, 32, 16)
ENDS = ("init_conv", "time_mlp.*", "ups.3.3")  # most of the error of 8 bits is theirs


def main(folder: str, spectra: int = 12, draws: int = 8) -> None:
    """Measure and print. folder: of the unpacked source distribution."""
    source = Path(folder) / "src" / "psdenoiser"
    model = loaded(source)
    known, own = dict(layers(model)), set[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in known:
            own.add(type(module).__name__)
    constants = np.load(source / "constants.npz")
    tests = np.load(Path(folder) / "docs" / "tutorials" / "test_ps.npz")
    order = torch.randperm(7000, generator=torch.Generator().manual_seed(0))
    noisy = scaled(torch.from_numpy(tests["deltasq_realisations"])[order], constants)
    truth = torch.from_numpy(tests["true_deltasq_means"])[order][:spectra]
    conditions = noisy[:spectra, None].repeat_interleave(draws, 0)

    def error(denoiser: nn.Module) -> float:
        found = spectrum(run(denoiser, conditions, 0), constants)
        found = found.view(spectra, draws, *SHAPE[1:]).median(1).values
        return float(((found - truth).abs() / truth).mean())

    sample = sampler(noisy[spectra:, None])  # other spectra than those that are measured
    trajectory = tn.record(model, sample=sample, batch=4, runs=1)
    plain = error(model)
    say("float32", plain, plain, cpu=cpu_name(), left_in_float=sorted(own), count=len(known))
    kept = (tn.Rule(name, None) for name in ENDS)
    spared = tn.Recipe((*kept, tn.Rule("*", tn.schemes.W8A8)))
    for label, scheme in (("w8a8", tn.schemes.W8A8), ("w8a8, ends in float", spared)):
        artifact = tn.quantize(model, scheme, trajectory)
        with tn.attach(model, artifact, execution="int8"):
            say(label, error(model), plain, check=artifact.header["check"])
    for label, table in halves().items():
        with tn.attach(model, scheduled(model, trajectory, table)) as attached:
            off = error(model)
            computed, reused = map(sum, zip(*attached.counts().values(), strict=True))
        say(label, off, plain, reused=reused / (computed + reused))


def halves() -> dict[str, list[bool]]:
    """Half of the steps reuse every block: every second one, and in pairs after the first ones."""
    late = [True, True, True, False, True, False, False, True, False, False]
    return {"every second step": [i % 2 == 0 for i in range(STEPS)], "late steps": late}


def scheduled(model: nn.Module, trajectory: tn.Trajectory, table: list[bool]) -> Artifact:
    """An artifact with that schedule alone."""
    names = [branch.name for branch in describe(model).branches]
    schedule = CacheSchedule.steps(table, trajectory.timesteps, names)
    artifact = Artifact.new(model, trajectory.schedule())
    times = list(schedule.timesteps)
    artifact.header["route"] = {"policy": "steps", "timesteps": times, "branches": names}
    artifact.header["route"] |= {"reuse_ratio": schedule.reuse_ratio}
    artifact.tensors["route/table"] = schedule.table
    return artifact


def loaded(source: Path) -> nn.Module:
    """The pretrained U-Net; of the package only its model's file is run."""
    spec = importlib.util.spec_from_file_location("psdenoiser_model", source / "model.py")
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    model = code.UNet(dim=SHAPE[1:], channels=2, dim_mults=(1, 2, 4, 8), cdn_len=None)
    weights = torch.load(source / "denoiser_model.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def sampler(conditions: Tensor) -> Callable[[nn.Module, int, int], Tensor]:
    """`sample` of `record`: image i is of the condition number seed + i."""
    return lambda denoiser, seed, batch: run(denoiser, conditions[seed : seed + batch], seed)


@torch.no_grad()
def run(denoiser: nn.Module, conditions: Tensor, seed: int) -> Tensor:
    """Final samples (B, 1, 32, 16) by DDIM in the package's own variance-preserving SDE."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(len(conditions), *SHAPE, generator=draw)
    times = torch.linspace(1, 1e-3, STEPS + 1, dtype=torch.float64)
    signal = torch.exp(-0.25 * times**2 * (20 - 0.1) - 0.5 * times * 0.1)
    noise = (1 - signal**2).sqrt()
    for i in range(STEPS):
        step = torch.full((len(x),), float(times[i]) * 999)
        guess = denoiser(x, step, x_cdn=conditions)
        clean = (x - float(noise[i]) * guess) / float(signal[i])
        x = float(signal[i + 1]) * clean + float(noise[i + 1]) * guess
    return x


def scaled(spectra: Tensor, constants: Any) -> Tensor:
    """Noisy spectra (B, 32, 16) in mK^2 as the model takes them."""
    unit = (spectra.log10() - float(constants["noisy_mean"][0])) / float(constants["noisy_std"][0])
    return unit * 2 - 1


def spectrum(samples: Tensor, constants: Any) -> Tensor:
    """What the model gives, in mK^2."""
    unit = (samples + 1) / 2
    return 10 ** (unit * float(constants["mean_std"][0]) + float(constants["mean_mean"][0]))


def say(row: str, error: float, plain: float, **more: Any) -> None:
    """One line: the error against the truth, and by how much it is larger than float's."""
    found = {"row": row, "error": round(error, 5), "above_float32": round(error / plain - 1, 5)}
    sys.stdout.write(json.dumps(found | more) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:4]))
