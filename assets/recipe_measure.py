"""Pictures drawn by a saved pipeline, and how far they are from real ones (FID, KID, PSNR)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))  # not installed here

from tenuto.measure import frechet_distance as frechet
from tenuto.measure import kernel_distance

__all__ = [
    "GRID", "batches", "draw", "features", "frechet", "kernel_distance", "psnr", "reconstruct",
    "save_grid",
]  # fmt: skip

GRID = (
    "goldfish", "school bus", "lemon", "golden retriever", "pizza", "lighthouse",
    "monarch butterfly", "sports car", "king penguin", "ladybug", "tabby cat", "mushroom",
    "jellyfish", "suspension bridge", "african elephant", "seashore",
)  # fmt: skip


def draw(
    pipeline: object, prompts: list[str], guidance: float, steps: int, seed: int, batch: int = 500,
    **call: object,
) -> Tensor:  # fmt: skip
    """One picture for each prompt through the stock pipeline, as (N, 3, 64, 64) uint8."""
    generator, out = torch.Generator("cpu").manual_seed(seed), []
    for start in range(0, len(prompts), batch):
        pictures = pipeline(
            prompt=prompts[start : start + batch], guidance_scale=guidance,
            num_inference_steps=steps, generator=generator, output_type="pt", **call,
        ).images  # fmt: skip
        out.append((pictures.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(out)


def batches(pictures: Tensor, device: torch.device, size: int = 250) -> Iterator[Tensor]:
    """Pictures (N, 3, H, W) uint8 as batches in [-1, 1] on `device`."""
    for rows in pictures.split(size):
        yield rows.to(device).float() / 127.5 - 1


@torch.no_grad()
def features(network: nn.Module, pictures: Tensor, device: torch.device) -> Tensor:
    """Inception features (N, 2048) in float64, pictures scaled to 299 x 299."""
    size = {"size": (299, 299), "mode": "bilinear", "align_corners": False}
    rows = [network(F.interpolate(x, **size)) for x in batches(pictures, device)]
    return torch.cat(rows).double()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor, device: torch.device) -> Tensor:
    """Pictures through the autoencoder (the latents' mean) and back, uint8."""
    out = []
    for x in batches(pictures, device):
        latent = vae.encode(x.to(vae.dtype)).latent_dist.mode()
        y = vae.decode(latent).sample.float()
        out.append(((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(out)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures (N, 3, H, W) uint8."""
    error = ((a.float() - b.float()) ** 2).mean((1, 2, 3)).clamp(min=1e-6)
    return float((10 * torch.log10(255**2 / error)).mean())


def save_grid(pictures: Tensor, file: Path, columns: int, zoom: int = 2) -> None:
    """Save pictures (N, 3, H, W) uint8 as one JPEG, row by row."""
    n, c, h, w = pictures.shape
    grid = pictures.reshape(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)
    image = Image.fromarray(grid.reshape(n // columns * h, columns * w, c).numpy())
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    image.save(file, quality=92, subsampling=0, optimize=True)
