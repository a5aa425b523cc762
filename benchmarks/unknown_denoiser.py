"""A pretrained denoiser that no family knows: W8A8 and half of its calls against the truth.

    pip install einops
    pip download 21cmPSDenoiser==1.0.2 --no-deps --no-binary :all:
    tar xzf 21cmpsdenoiser-1.0.2.tar.gz
    python benchmarks/unknown_denoiser.py 21cmpsdenoiser-1.0.2          # 32 spectra, 15 draws each
    python benchmarks/unknown_denoiser.py 21cmpsdenoiser-1.0.2 128 200 cuda

The model (MIT, Breitman et al. 2025) takes the noise of few samples out of power spectra of the
21 cm line; its test set has the true ones. Its weights are a zip of torch's, read with
`weights_only`. Ten DDIM steps; the answer is the median of the draws, its error |answer - truth| /
truth in each of the 32 x 16 bins. Rows have the same noise. Of some spectra the model has two
opinions, and the median of few draws falls between them: these alone make up most of the mean
error, and other noise moves it by a third. So there is the median over the spectra in each bin too,
which is what the authors state; each with the interval of 95 % over spectra. One JSON line a row.
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

STEPS = 10
SHAPE = (1, 32, 16)
CHUNK = 96  # images of one seed, and at once on a CPU
TIMES = torch.linspace(1, 1e-3, STEPS + 1, dtype=torch.float64)  # of the package's SDE


def main(folder: str, spectra: int = 32, draws: int = 15, device: str = "cpu") -> None:
    """Measure and print. folder: of the unpacked source distribution."""
    source = Path(folder) / "src" / "psdenoiser"
    model = loaded(source).to(device)
    constants = np.load(source / "constants.npz")
    tests = np.load(Path(folder) / "docs" / "tutorials" / "test_ps.npz")
    order = torch.randperm(7000, generator=torch.Generator().manual_seed(0))
    noisy = scaled(torch.from_numpy(tests["deltasq_realisations"])[order], constants)
    truth = torch.from_numpy(tests["true_deltasq_means"])[order][:spectra]
    conditions = noisy[:spectra, None].repeat_interleave(draws, 0)
    torch.backends.cudnn.allow_tf32 = False
    at_once = CHUNK if device == "cpu" else 16 * CHUNK

    def errors(first: int) -> Tensor:
        """Of each spectrum in each bin: (spectra, 512). first: seed of the noise."""
        seeds = enumerate(conditions.split(CHUNK), first)
        start = torch.cat([gaussian(len(part), seed) for seed, part in seeds])
        parts = zip(conditions.split(at_once), start.split(at_once), strict=True)
        found = spectrum(torch.cat([run(model, *part) for part in parts]), constants)
        found = found.view(spectra, draws, *SHAPE[1:]).quantile(0.5, 1)
        return ((found - truth).abs() / truth).flatten(1)

    sample = sampler(noisy[spectra:, None])  # other spectra than those that are measured
    noise = [(float(alpha), float(sigma)) for alpha, sigma in zip(*levels(), strict=True)]
    trajectory = tn.record(
        model, sample=sample, batch=4, runs=1, prediction="eps", noise=noise[:STEPS]
    )
    made = tn.quantize(model, tn.schemes.W8A8, trajectory)
    plain = errors(0)
    computer = cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    say("float32", plain, plain, computer=computer, draws=draws)
    facts = {key: made.header[key] for key in ("check", "left_in_float", "kept_in_float")}
    with tn.attach(model, made, execution="int8"):
        say("w8a8", errors(0), plain, **facts)
    kernel = Artifact.new(model, trajectory.schedule()).add_forecast(trajectory.kernel)
    for label, artifact in (("half skipped", kernel), ("w8a8, half skipped", made)):
        with tn.attach(model, artifact, execution="int8", speedup=2) as attached:
            off = errors(0)
            say(label, off, plain, calls=attached.counts())
    say("float32, other noise", errors(1000), plain)


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
    return lambda denoiser, seed, batch: run(
        denoiser, conditions[seed : seed + batch], gaussian(batch, seed)
    )


def gaussian(batch: int, seed: int) -> Tensor:
    """The noise that `batch` samples start from, made on the CPU: the same for every device."""
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(denoiser: nn.Module, conditions: Tensor, start: Tensor) -> Tensor:
    """Final samples (B, 1, 32, 16) by DDIM in the package's own variance-preserving SDE.

    start: the noise that they are made of, of the same shape.
    """
    device = next(denoiser.parameters()).device
    x, conditions = start.to(device), conditions.to(device)
    signal, noise = levels()
    for i in range(STEPS):
        step = torch.full((len(x),), float(TIMES[i]) * 999, device=device)
        guess = denoiser(x, step, x_cdn=conditions)
        clean = (x - float(noise[i]) * guess) / float(signal[i])
        x = float(signal[i + 1]) * clean + float(noise[i + 1]) * guess
    return x.cpu()


def levels() -> tuple[Tensor, Tensor]:
    """How much of the image and of noise a sample has at each step, and after the last."""
    signal = torch.exp(-0.25 * TIMES**2 * (20 - 0.1) - 0.5 * TIMES * 0.1)
    return signal, (1 - signal**2).sqrt()


def scaled(spectra: Tensor, constants: Any) -> Tensor:
    """Noisy spectra (B, 32, 16) in mK^2 as the model takes them."""
    unit = (spectra.log10() - float(constants["noisy_mean"][0])) / float(constants["noisy_std"][0])
    return unit * 2 - 1


def spectrum(samples: Tensor, constants: Any) -> Tensor:
    """What the model gives, in mK^2."""
    unit = (samples + 1) / 2
    return 10 ** (unit * float(constants["mean_std"][0]) + float(constants["mean_mean"][0]))


def say(row: str, errors: Tensor, plain: Tensor, **more: Any) -> None:
    """One line: the error against the truth, and by how much it is larger than float's."""
    draw = torch.Generator().manual_seed(0)
    count = len(errors)
    taken = [torch.randint(0, count, (count,), generator=draw) for _ in range(1000)]
    found: dict[str, Any] = {"row": row, "spectra": count}
    for name, score in (("median", of_authors), ("mean", torch.mean)):
        above = sorted(float(score(errors[i]) / score(plain[i])) - 1 for i in taken)
        value = float(score(errors))
        found[name] = {
            "error": round(value, 5),
            "above_float32": round(value / float(score(plain)) - 1, 4),
            "interval": [round(above[24], 4), round(above[974], 4)],
        }
    sys.stdout.write(json.dumps(found | more) + "\n")
    sys.stdout.flush()


def of_authors(errors: Tensor) -> Tensor:
    """The median over the spectra in each bin, its mean over the bins."""
    return errors.quantile(0.5, 0).mean()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    counts = dict(zip(("spectra", "draws"), map(int, sys.argv[2:4]), strict=False))
    main(sys.argv[1], **counts, device="".join(sys.argv[4:5]) or "cpu")
