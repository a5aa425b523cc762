"""The losses that train the autoencoder: L1, LPIPS and, if asked, a critic."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

VGG16 = ((0, 1), (2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))  # convolutions between two poolings


class Perceptual(nn.Module):
    """LPIPS v0.1 over VGG-16 (Zhang et al. 2018), at `size` pixels a side."""

    def __init__(self, file: Path, size: int) -> None:
        super().__init__()
        self.size = size
        rows = {k.replace(".", "_"): v.float() for k, v in load_file(file).items()}
        self.weights = nn.ParameterDict({k: nn.Parameter(v, False) for k, v in rows.items()})
        self.shift = nn.Parameter(torch.tensor([-0.030, -0.088, -0.188])[:, None, None], False)
        self.scale = nn.Parameter(torch.tensor([0.458, 0.448, 0.450])[:, None, None], False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length features of pictures in [-1, 1] after each of the five stages."""
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear")
        x, out = (x - self.shift) / self.scale, []
        for stage in VGG16:
            x = F.max_pool2d(x, 2) if out else x
            for i in stage:
                weight, bias = self.weights[f"conv_{i}_weight"], self.weights[f"conv_{i}_bias"]
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            out.append(F.normalize(x.float(), dim=1, eps=1e-8))
        return out

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The mean distance of two batches of pictures, and the features of both."""
        with torch.no_grad():
            target = self.features(y)
        found = self.features(x)
        return self.distance(found, target), found, target

    def distance(self, found: list[Tensor], target: list[Tensor]) -> Tensor:
        """The mean distance of two sets of features."""
        total = found[0].new_zeros(())
        for i, (a, b) in enumerate(zip(found, target, strict=True)):
            total = total + ((a - b) ** 2 * self.weights[f"head_{i}"][:, None, None]).sum(1).mean()
        return total


class Critic(nn.Module):
    """Tells real from drawn by the features of `Perceptual` (as Sauer et al. 2021 project)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for channels in (64, 128, 256, 512, 512)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """One map of logits a stage."""
        rows = zip(self.heads, features, strict=True)
        return [head(x * x.shape[1] ** 0.5).float() for head, x in rows]

    def judged(self, features: list[Tensor]) -> Tensor:
        """The drawn pictures' part of the loss; the critic itself learns nothing from it."""
        still = {name: p.detach() for name, p in self.named_parameters()}
        return -_mean(functional_call(self, still, (features,)))

    def loss(self, drawn: list[Tensor], real: list[Tensor]) -> Tensor:
        """The hinge loss of the critic."""
        fake = self([x.detach() for x in drawn])
        return _mean([F.relu(1 + x) for x in fake]) + _mean([F.relu(1 - x) for x in self(real)])


def _mean(maps: list[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in maps]).mean()


class AutoencoderLoss(nn.Module):
    """L1 + LPIPS + a small Kullback-Leibler term of one autoencoder, and a critic's if any.

    share: the length of the critic's gradient at the picture beside that of L1 + LPIPS.
    """

    def __init__(
        self, vae: AutoencoderKL, perceptual: Perceptual | None, critic: Critic | None, kl: float,
        share: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vae, self.perceptual, self.critic = vae, perceptual, critic
        self.kl, self.share, self.weight = kl, share, 0.0

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures through the autoencoder, float, and the Kullback-Leibler term."""
        moments = self.vae.quant_conv(self.vae.encoder(x)).float()
        mean, log_var = moments.chunk(2, dim=1)
        log_var = log_var.clamp(-30, 20)
        latent = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        y = self.vae.decoder(self.vae.post_quant_conv(latent)).float()
        return y, 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum((1, 2, 3)).mean()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The total loss, L1, LPIPS and the critic's loss on pictures (B, 3, 64, 64)."""
        y, kl = self.draw(x)
        l1, zero = (y - x).abs().mean(), y.new_zeros(())
        if self.perceptual is None:
            return l1 + self.kl * kl, l1, zero, zero
        lpips, drawn, real = self.perceptual(y, x)
        total, hinge = l1 + lpips + self.kl * kl, zero
        if self.critic is not None:
            hinge = self.critic.loss(drawn, real)
            total = total + hinge + self.weight * self.critic.judged(drawn)
        return total, l1, lpips, hinge

    def balance(self, x: Tensor) -> None:
        """Set the critic's weight so that its gradient has its share, measured on `x`."""
        if self.critic is None or self.perceptual is None:
            return
        with torch.no_grad():
            y = self.draw(x)[0]
        y.requires_grad_(True)
        real, drawn = self.perceptual.features(x), self.perceptual.features(y)
        near = (y - x).abs().mean() + self.perceptual.distance(drawn, real)
        [pull] = torch.autograd.grad(near, y, retain_graph=True)
        [push] = torch.autograd.grad(self.critic.judged(drawn), y)
        now = self.share * float(pull.norm() / push.norm().clamp(min=1e-8))
        self.weight = now if not self.weight else 0.9 * self.weight + 0.1 * now
