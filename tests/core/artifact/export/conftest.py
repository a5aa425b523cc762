"""What the tests of exported files share: files as plain tensors, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Content = tuple[dict[str, Tensor], dict[str, str]]


def read(path: Path) -> Content:
    """Tensors and header of a file."""
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], Content]:
    """contents(path): (tensors, header)."""
    return read


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """damaged(path, change): the file after `change(tensors, metadata)`."""

    def build(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
        tensors, metadata = read(path)
        change(tensors, metadata)
        out = tmp_path / "damaged.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, out, metadata)
        return out

    return build


@pytest.fixture(scope="session")
def mark() -> Callable[[Tensor], dict[str, Any]]:
    """mark(tensor): the JSON in a `comfy_quant`."""
    return lambda tensor: json.loads(bytes(tensor.tolist()))
