"""On what numbers were measured: it stands beside every one of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from ..model import device_and_dtype
from ..resources import __version__


def surroundings(denoiser: nn.Module) -> dict[str, Any]:
    """Device, dtype, threads and versions, as plain data."""
    device, dtype = device_and_dtype(denoiser)
    cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    versions = {
        "tenuto": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": f"{device.type} ({chip})",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
