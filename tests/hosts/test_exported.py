"""An exported file in the real ComfyUI, which loads it by itself: what was meant is computed.

This version knows 8-bit floats alone; all other formats are read by comfy-kitchen's own code, see
`tests/core/artifact/export/`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto.artifact.export import export
from tenuto.artifact.export.comfy_reader import comfy_file
from tenuto.model import host_map_of, swapped

FAMILIES = (
    "pixart", "sd3", "flux", "flux2", "wan", "wan_vace", "lumina2", "hunyuan_video",
    "hunyuan_video15", "hunyuan_image", "z_image",
)  # fmt: skip
UNUSED = ("y_embedding", "norm_final", "pos_embed", "comfy_quant")


def intended(model: nn.Module, path: Path) -> nn.Module:
    """`model` with what a file stands for, by our reader and under its own names."""
    with comfy_file(path) as file, torch.no_grad():
        file.check()
        for name, place in host_map_of(model).places.items():
            if name not in dict(model.named_parameters()):
                continue
            layer = place.name.removesuffix(".weight")
            quantized = layer in file.layers and layer != place.name
            whole = file.decode(layer) if quantized else file.file.get_tensor(place.name).float()
            own = whole[slice(*place.rows)]
            model.get_parameter(name).copy_(swapped(own) if place.swapped else own)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_computes_what_was_meant(
    original: Any, from_file: Any, call_as: Any, prompts: Any, tmp_path: Path, caplog: Any,
    family: str,
) -> None:  # fmt: skip
    """fp8 weights and all else in bf16, without a node of ours: one call, relative error."""
    out, model = tmp_path / "model.safetensors", original(family)
    report = export(model, "comfy", out, scheme="fp8")
    with caplog.at_level(logging.WARNING):
        host = from_file(family, out)
    complaints = [r.getMessage() for r in caplog.records if "unet" in r.getMessage()]
    for line in complaints:
        names = line.partition("[")[2].rstrip("]").split(", ")
        assert all(any(word in name for word in UNUSED) for name in names), line
    weights = dict(host.diffusion_model.named_parameters())
    kinds = {type(weights[f"{layer}.weight"].data).__name__ for layer in report.layers}
    assert "QuantizedTensor" in kinds or any(
        type(weights[f"{layer}.weight"]).__name__ == "QuantizedTensor" for layer in report.layers
    )
    draw = torch.Generator().manual_seed(0)
    channels, side = (4, 36) if family == "pixart" else (16, 8)
    x = torch.randn(2, channels, side, side, generator=draw)
    given = x, torch.tensor([900.0, 900.0]), prompts([0, 1])
    with torch.no_grad():
        plain: Tensor = call_as(family, model, *given)
        wanted = call_as(family, intended(original(family), out), *given)
        found = call_as(family, host.diffusion_model, *given)
    gap = float((found - wanted).norm() / wanted.norm())
    far = float((plain - wanted).norm() / wanted.norm())
    assert gap < 1e-2 and gap < far / 3, (gap, far)
