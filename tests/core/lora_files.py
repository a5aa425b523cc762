"""LoRA files as trainers write them, of random values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 2


def lora_file(
    module: Any,
    file: Path,
    part: str = "unet",
    kohya: bool = False,
    targets: tuple[str, ...] = TARGETS,
) -> Path:
    """One for layers of a part of a pipeline, its attention: in names of diffusers', or kohya's."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for name, layer in module.named_modules():
        if name.endswith(targets) and hasattr(layer, "in_features"):
            place = f"lora_{part}_{name.replace('.', '_')}" if kohya else f"{part}.{name}"
            down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
            found[f"{place}.{down}.weight"] = torch.randn(RANK, layer.in_features, generator=draw)
            found[f"{place}.{up}.weight"] = torch.randn(layer.out_features, RANK, generator=draw)
            if kohya:
                found[f"{place}.alpha"] = torch.tensor(float(RANK))
    assert found
    save_file(found, file)
    return file
