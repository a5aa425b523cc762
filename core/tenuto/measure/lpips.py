"""LPIPS v0.1 with the AlexNet backbone: a learned distance between images.

Zhang, Isola, Efros, Shechtman, Wang: The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric, CVPR 2018, equation 1. The weights ship in half precision (benchmarks/
convert_lpips.py made them) and compute in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TenutoError
from ..resources import asset
from .metrics import same_shape

SMALLEST = 31  # pixels: below that the last feature map is empty
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The network: five AlexNet convolutions and one non-negative weight per channel of each."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        convs = (
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.Conv2d(256, 256, 3, padding=1),
        )
        self.convs = nn.ModuleList(convs)
        self.heads = nn.ParameterList(torch.zeros(conv.out_channels) for conv in convs)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """The five feature maps of x (N, 3, H, W), each of unit length along its channels."""
        x = (x - self.shift) / self.scale
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(F.max_pool2d(x, 3, stride=2) if i in (1, 2) else x))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance (N,) of two batches (N, 3, H, W) with values in [-1, 1]."""
        total = a.new_zeros(a.shape[0])
        for head, x, y in zip(self.heads, self.features(a), self.features(b), strict=True):
            weighted = (x - y).square() * head.view(1, -1, 1, 1)
            total = total + weighted.sum(1).mean((1, 2))
        return total


@cache
def network(device: str = "cpu") -> Lpips:
    """The shipped network in fp32, loaded once per device; it takes no gradients."""
    net = Lpips()
    weights = load_file(asset("lpips-alex.safetensors"))
    net.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return net.requires_grad_(False).eval().to(device)


def lpips(a: Tensor, b: Tensor, batch: int = 32) -> Tensor:
    """LPIPS v0.1 (AlexNet) of two batches (N, C, H, W) in [-1, 1], C 1 or 3: fp32 (N,), 0 if equal.

    Its weights were fitted on 64 x 64 patches. Images under 31 x 31 raise TenutoError.
    """
    same_shape(a, b)
    if a.shape[1] not in (1, 3) or min(a.shape[-2:]) < SMALLEST:
        shape = " x ".join(str(n) for n in a.shape[1:])
        raise TenutoError(
            f"LPIPS takes grey or RGB images, {SMALLEST} x {SMALLEST} or more, not {shape}."
        )
    net = network(str(a.device))
    a, b = (x.float().expand(-1, 3, -1, -1) for x in (a, b))
    with torch.inference_mode():
        return torch.cat([net(x, y) for x, y in zip(a.split(batch), b.split(batch), strict=True)])
