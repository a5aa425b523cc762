"""The network whose features FID and KID compare: Inception-v3 of 2015-12-05 up to its last pool.

Szegedy et al., Rethinking the Inception Architecture for Computer Vision (2016), as the FID metric
uses it (Heusel et al. 2017). It differs from the later Inception-v3 in two places: an average pool
does not count the padding, and the last block pools by maximum. Batch normalisation is folded into
the convolutions. `benchmarks/convert_inception.py` makes the weights, which do not ship.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = int | tuple[int, int]
WIDE, TALL = (1, 7), (7, 1)


class Unit(nn.Conv2d):
    """A convolution and its ReLU, zero padding to the same size unless `same` is false."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Kernel = 1, stride: int = 1, same: bool = True
    ) -> None:
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if same else 0
        super().__init__(inputs, outputs, size, stride, padding)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs, H', W'), at least 0."""
        return F.relu(super().forward(input))


class Split(nn.ModuleList):
    """Branches that see the same input; their outputs lie side by side along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, sum of the branches' channels, H', W')."""
        return torch.cat([branch(x) for branch in self], 1)


def chain(inputs: int, *units: tuple[int, Kernel]) -> nn.Sequential:
    """Units of (outputs, kernel), one after the other."""
    rows = []
    for outputs, kernel in units:
        rows.append(Unit(inputs, outputs, kernel))
        inputs = outputs
    return nn.Sequential(*rows)


def average(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 mean over what lies inside the picture, and a unit."""
    return nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), Unit(inputs, outputs))


def fine(inputs: int, pooled: int) -> Split:
    """A block of the 35 x 35 grid."""
    return Split([
        Unit(inputs, 64), chain(inputs, (48, 1), (64, 5)),
        chain(inputs, (64, 1), (96, 3), (96, 3)), average(inputs, pooled),
    ])  # fmt: skip


def middle(width: int) -> Split:
    """A block of the 17 x 17 grid."""
    one = chain(768, (width, 1), (width, WIDE), (192, TALL))
    two = chain(768, (width, 1), (width, TALL), (width, WIDE), (width, TALL), (192, WIDE))
    return Split([Unit(768, 192), one, two, average(768, 192)])


def coarse(inputs: int, pool: nn.Module) -> Split:
    """A block of the 8 x 8 grid; its unit after the pool keeps 192 channels."""

    def cross() -> Split:
        return Split([Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))])

    return Split([
        Unit(inputs, 320), nn.Sequential(Unit(inputs, 384), cross()),
        nn.Sequential(Unit(inputs, 448), Unit(448, 384, 3), cross()),
        nn.Sequential(pool, Unit(inputs, 192)),
    ])  # fmt: skip


def halved(inputs: int, outputs: int) -> Unit:
    """A 3 x 3 unit that halves the grid."""
    return Unit(inputs, outputs, 3, stride=2, same=False)


class Inception(nn.Sequential):
    """Features (N, 2048) of pictures (N, 3, 299, 299) in [-1, 1]."""

    def __init__(self) -> None:
        down = Split([
            halved(288, 384), nn.Sequential(*chain(288, (64, 1), (96, 3)), halved(96, 96)),
            nn.MaxPool2d(3, 2),
        ])  # fmt: skip
        last = Split([
            nn.Sequential(Unit(768, 192), halved(192, 320)),
            nn.Sequential(*chain(768, (192, 1), (192, WIDE), (192, TALL)), halved(192, 192)),
            nn.MaxPool2d(3, 2),
        ])  # fmt: skip
        super().__init__(
            halved(3, 32), Unit(32, 32, 3, same=False), Unit(32, 64, 3), nn.MaxPool2d(3, 2),
            Unit(64, 80), Unit(80, 192, 3, same=False), nn.MaxPool2d(3, 2),
            fine(192, 32), fine(256, 64), fine(288, 64), down,
            middle(128), middle(160), middle(160), middle(192), last,
            coarse(1280, nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
            coarse(2048, nn.MaxPool2d(3, 1, 1)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


def load_inception(file: Path, device: torch.device | str = "cpu") -> Inception:
    """The network in fp32, without grads, from a file of `convert_inception.py`.

    There a weight (out, in, kh, kw) is 16-bit codes and one scale for each output channel.
    """
    found = load_file(file)
    for name in [n for n in found if n.endswith(".weight")]:
        scale = found.pop(name.removesuffix("weight") + "scale")
        found[name] = found[name].float() * scale.view(-1, 1, 1, 1)
    with torch.device("meta"):
        network = Inception()
    network.load_state_dict(found, assign=True)
    return network.requires_grad_(False).eval().to(device)
