"""Multiply-adds are counted in what runs; a model that the counter cannot follow is not harmed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.model.operations import multiply_adds


class Attending(nn.Module):
    def __init__(self, flexible: bool) -> None:
        super().__init__()
        self.flexible = flexible
        self.parts = nn.ModuleDict({"into": nn.Linear(32, 32), "out": nn.Linear(32, 8)})

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q = self.parts["into"](x)[:, None]
        kernel: Any = flex_attention if self.flexible else F.scaled_dot_product_attention
        return self.parts["out"](kernel(q, q, q)[:, 0])


def test_products_are_counted() -> None:
    x, layers = torch.randn(2, 64, 32), 2 * 64 * 32 * (32 + 8)
    found = multiply_adds(Attending(flexible=False), (x,), {}, ["parts", "parts.out"])
    attention = 2 * 2 * 64 * 64 * 32
    assert found == {"": layers + attention, "parts": 0, "parts.out": 2 * 64 * 32 * 8}


def test_layers_are_counted_where_attention_cannot_be() -> None:
    """torch's counter raises around flex_attention, and leaves it raising in plain calls."""
    model, x = Attending(flexible=True), torch.randn(2, 64, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of calls that are not compiled
        before = model(x)
        found = multiply_adds(model, (x,), {}, ["parts", "parts.out"])
        after = model(x)
    layers = 2 * 64 * 32 * (32 + 8)
    assert found == {"": layers, "parts": layers, "parts.out": 2 * 64 * 32 * 8}
    torch.testing.assert_close(after, before)
