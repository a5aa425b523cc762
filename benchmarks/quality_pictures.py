"""Pictures by the thousand for `quality.py`, and how far they are from the real ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assets.recipe_data import caption, class_names, read_split
from assets.recipe_inception import load_inception
from assets.recipe_measure import features, psnr, reconstruct
from tenuto.measure import frechet_distance, kernel_distance
from tenuto.model import device_and_dtype
from tenuto.sampling import sampler

FIRST = 100_000  # seed of the first picture: far from all others, and of the first class


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """CUDA's fp32 products in TF32 or not; as before afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Real:
    """The validation pictures, their class names as captions, and their features."""

    def __init__(self, data: Path, weights: Path, device: Any, count: int, fast: bool) -> None:
        self.device, self.count, self.fast = torch.device(device or "cpu"), count, fast
        self.captions = tuple(caption(n[0], "a photo of {a}{x}") for n in class_names(data))
        self.pictures, _ = read_split(data, "val")
        self.network = load_inception(weights, self.device)
        with tf32(fast):
            self.target = features(self.network, self.pictures, self.device)

    def distance(self, pictures: Tensor) -> dict[str, float]:
        """FID and KID x 1000 of pictures (N, 3, H, W) uint8 from all real ones."""
        with tf32(self.fast):
            return self.scores(features(self.network, pictures, self.device))

    def scores(self, rows: Tensor, other: Tensor | None = None) -> dict[str, float]:
        """FID and KID x 1000 of features (N, 2048) from the real ones, or from `other`."""
        target = self.target if other is None else other
        fid, kid = frechet_distance(rows, target), kernel_distance(rows, target)
        return {"fid": round(fid, 3), "kid_x1000": round(1000 * kid, 3)}

    def generated(
        self, pipe: Any, denoiser: nn.Module, steps: int, guidance: float | None, batch: int = 500
    ) -> dict[str, float]:
        """Generate `count` images, one class after the other at seeds of their own, and compare."""
        rows, seconds = self.generated_features(pipe, denoiser, steps, guidance, batch)
        facts = {"fid_seconds_per_picture": round(seconds, 5), "fid_batch": batch}
        return self.scores(rows) | facts

    @torch.no_grad()
    def generated_features(
        self, pipe: Any, denoiser: nn.Module, steps: int, guidance: float | None, batch: int = 500
    ) -> tuple[Tensor, float]:
        """The features of `count` images at the seeds of `generated`, and the seconds for each."""
        sample, found = sampler(pipe, self.captions, steps, guidance), []
        begin = time.perf_counter()
        with tf32(self.fast):
            for start in range(0, self.count, batch):
                x = sample(denoiser, FIRST + start, min(batch, self.count - start))
                found.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
            seconds = (time.perf_counter() - begin) / self.count
            return features(self.network, torch.cat(found), self.device), seconds

    def rebuilt(self, vae: Any) -> dict[str, float]:
        """The real pictures through the autoencoder and back: what it costs by itself."""
        with tf32(self.fast):
            found = reconstruct(vae, self.pictures, device_and_dtype(vae)[0])
        return self.distance(found) | {"psnr_mean_db": round(psnr(self.pictures, found), 2)}
