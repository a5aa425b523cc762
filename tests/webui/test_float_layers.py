"""Layers that "auto" leaves in float are the host's own, LoRAs and all."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.runtime import DENSE, Chooser

W8A8 = (True, "Built-in: Balanced", "W8A8", "Off")
NAME = "middle_block.1.transformer_blocks.0.attn1.to_q"


def same(found: Tensor, wanted: Tensor) -> bool:
    """Computed by the same operations on the same numbers: codes are a thousand times as far."""
    return float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_all_in_float_is_the_plain_model(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a change of a weight as functions of it, and without; no codes are kept."""
    monkeypatch.setattr(Chooser, "__call__", lambda self, kind, runs: DENSE)
    layer = host.unet.get_submodule(NAME)
    plain = host.pictures(host.p(False))
    assert same(host.pictures(host.p(*W8A8)), plain)
    weights = sys.modules["tenuto_webui.session"].session.host._known[1]
    assert not weights.kept and weights.how() == {DENSE: len(weights.plan.schemes)}
    own = layer.weight.data
    patcher = getattr(host.sd_model, "forge_objects", None)
    change = 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    if patcher is None:  # as A1111 merges
        monkeypatch.setattr(layer, "network_weights_backup", own.clone(), raising=False)
        monkeypatch.setattr(layer, "network_current_names", ("lora",), raising=False)
    else:
        key = f"diffusion_model.{NAME}.weight"
        holder = getattr(patcher.unet, "lora_loader", None) or patcher.unet
        monkeypatch.setitem(holder.backup, key, own.clone())
    layer.weight.data = own + change
    full = host.pictures(host.p(False))
    assert not same(full, plain)
    for fresh in (False, True):  # decided before, or with the LoRA in place
        if fresh:
            sys.modules["tenuto_webui.session"].session.host.forget()
        p = host.p(*W8A8)
        assert same(host.pictures(p), full)
        assert "LoRA" not in p.processed.comments
    layer.weight.data = own
