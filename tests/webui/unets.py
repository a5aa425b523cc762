"""A tiny U-Net of our own with the names of ldm's, in the two ways that hosts call its blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CONTEXT = 32, 16


class Linear(nn.Module):
    """What Forge has in the place of nn.Linear: no subclass of it."""

    def __init__(self, columns: int, rows: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(torch.randn(rows, columns) / columns**0.5)
        self.bias = nn.Parameter(torch.randn(rows) * 0.1) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CastingLinear(nn.Linear):
    """What Forge Neo has there: a subclass with a forward of its own, in a module of the host's."""

    weight_function: tuple[Any, ...] = ()  # a list where there is one

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
        return F.linear(x, self.weight, self.bias)


CastingLinear.forward.__module__ = "backend.operations"


class Sequence(nn.Sequential):
    """A block: its layers take what they need."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # pyright: ignore
        for layer in self:
            x = step(layer, x, emb, context)
        return x


def step(layer: nn.Module, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    """One layer of a block."""
    if isinstance(layer, ResBlock):
        return layer(x, emb)
    return layer(x, context) if isinstance(layer, SpatialTransformer) else layer(x)


class ResBlock(nn.Module):
    """norm, conv, embedding, norm, conv."""

    def __init__(self, linear: Any, columns: int, rows: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(columns, rows, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(8, columns), nn.SiLU(), convolution)
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(4 * WIDTH, rows))
        again = nn.Conv2d(rows, rows, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(8, rows), nn.SiLU(), nn.Dropout(0.0), again)
        same = columns == rows
        self.skip_connection = nn.Identity() if same else nn.Conv2d(columns, rows, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """One head."""

    def __init__(self, linear: Any, context: int) -> None:
        super().__init__()
        self.to_q = linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (linear(context, WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        weights = (q @ k.transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1)
        return self.to_out(weights @ v)


class Gated(nn.Module):
    """GEGLU."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.proj = linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a way back."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(linear), nn.Dropout(0.0), linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Inner(nn.Module):
    """Self-attention, cross-attention, feed-forward; it adds in place, as Forge does."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn1, self.attn2 = Attention(linear, WIDTH), Attention(linear, CONTEXT)
        self.ff = FeedForward(linear)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.attn1(self.norm1(x))
        n += x
        m = self.attn2(self.norm2(n), context)
        m += n
        return self.ff(self.norm3(m)) + m


class SpatialTransformer(nn.Module):
    """Pixels as tokens."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, WIDTH)
        self.proj_in, self.proj_out = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([Inner(linear)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class UNetModel(nn.Module):
    """walks: calls the layers of a block and never the block, as reForge does."""

    walks = False

    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(
            linear(WIDTH, 4 * WIDTH), nn.SiLU(), linear(4 * WIDTH, 4 * WIDTH)
        )
        self.input_blocks = nn.ModuleList([
            Sequence(nn.Conv2d(4, WIDTH, 3, padding=1)),
            Sequence(ResBlock(linear, WIDTH, WIDTH), SpatialTransformer(linear)),
        ])  # fmt: skip
        self.middle_block = Sequence(
            ResBlock(linear, WIDTH, WIDTH), SpatialTransformer(linear),
            ResBlock(linear, WIDTH, WIDTH),
        )  # fmt: skip
        self.output_blocks = nn.ModuleList([
            Sequence(ResBlock(linear, 2 * WIDTH, WIDTH), SpatialTransformer(linear))
            for _ in range(2)
        ])  # fmt: skip
        last = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(8, WIDTH), nn.SiLU(), last)

    def block(self, block: Any, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """As the host does."""
        if not self.walks:
            return block(h, emb, context)
        for layer in block:
            h = step(layer, h, emb, context)
        return h

    def forward(
        self, x: Tensor, timesteps: Any = None, context: Any = None, **kwargs: Any
    ) -> Tensor:
        """(B, 4, H, W), (B,), (B, L, CONTEXT)."""
        rates = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
        angles = timesteps[:, None].float() * rates
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        h, skips = x, []
        for block in self.input_blocks:
            h = self.block(block, h, emb, context)
            skips.append(h)
        h = self.block(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = self.block(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class WalkingUNetModel(UNetModel):
    """reForge's way; a subclass counts as its class."""

    walks = True


class IntegratedUNet2DConditionModel(UNetModel):
    """Forge's name, which is no subclass of ldm's there."""


def unet(kind: str) -> nn.Module:
    """The U-Net of one host, the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            "a1111": lambda: UNetModel(), "reforge": lambda: WalkingUNetModel(),
            "forge": lambda: IntegratedUNet2DConditionModel(Linear),
            "neo": lambda: IntegratedUNet2DConditionModel(CastingLinear),
        }[kind]()  # fmt: skip
        draw = torch.Generator().manual_seed(1)
        for _, p in sorted(made.named_parameters()):
            width = 1.2 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1
            p.data = torch.randn(p.shape, generator=draw) * width + (p.ndim == 1) * 0.5
    return made.eval().requires_grad_(False)
