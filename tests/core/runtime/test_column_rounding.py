"""The fused column loops against their reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenuto.runtime.kernels import column_rounding

SHAPES = [(1, 1), (3, 7), (4, 32), (9, 33), (17, 128)]
HERE = "cuda" if torch.cuda.is_available() else "cpu"


def case(shape: tuple[int, int], device: str = HERE) -> dict[str, Tensor]:
    """A tile with its grid, and second moments with their factor."""
    n, w = shape
    gen = torch.Generator().manual_seed(n * w)
    x = torch.randn(3 * w, w, generator=gen).double()
    gram = x.T @ x + torch.eye(w).double()
    size = torch.rand(n, w, generator=gen) * 0.2 + 0.2
    zero = torch.randint(0, 16, (n, w), generator=gen).float()
    found = {
        "weight": torch.randn(n, w, generator=gen),
        "gram": gram.float(),
        "inverse": torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).float(),
        "size": size,
        "low": -zero,
        "high": 15 - zero,
    }
    return {name: t.to(device) for name, t in found.items()}


def check(shape: tuple[int, int], device: str = HERE) -> None:
    """Both kernels on one case: levels as the reference has them, all but ties."""
    from tenuto.runtime.kernels import column_rounding_triton as fused

    c = case(shape, device)
    grid = c["size"], c["low"], c["high"]
    levels, errors = fused.compensate(c["weight"], c["inverse"], *grid)
    wanted = column_rounding.compensate_reference(c["weight"], c["inverse"], *grid)
    assert torch.equal(levels, levels.round())
    assert (levels >= c["low"]).all() and (levels <= c["high"]).all()
    assert (levels == wanted[0]).float().mean() > 0.98
    same = (levels == wanted[0]).all(1)
    assert torch.allclose(errors[same], wanted[1][same], atol=1e-3, rtol=1e-3)
    values = wanted[0] * c["size"]
    slope = (values - c["weight"]) @ c["gram"]
    found = fused.descend(slope, c["gram"], values, *grid)
    best = column_rounding.descend_reference(slope, c["gram"], values, *grid)
    assert torch.isclose(found, best, atol=1e-4).float().mean() > 0.98


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this platform"
)
def test_fused_column_loops_equal_the_reference() -> None:
    """Without a GPU in a process of its own: the interpreter is chosen when triton is imported."""
    if HERE == "cuda":
        for shape in SHAPES:
            check(shape)
        return
    code = "import test_column_rounding as t\nfor shape in t.SHAPES: t.check(shape)"
    folder = str(Path(__file__).parent)
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gpu_the_reference_runs(shape: tuple[int, int]) -> None:
    c = case(shape, "cpu")
    assert not column_rounding.supported(c["weight"])
    grid = c["size"], c["low"], c["high"]
    levels, errors = column_rounding.compensate(c["weight"], c["inverse"], *grid)
    kept = c["weight"].clone()
    assert torch.equal(levels, column_rounding.compensate_reference(kept, c["inverse"], *grid)[0])
    assert torch.equal(kept, c["weight"]), "a tile is not written to"
    first = (c["weight"][:, :1] / c["size"][:, :1]).round()
    assert torch.equal(levels[:, :1], first.clamp(c["low"][:, :1], c["high"][:, :1]))
    assert errors.shape == levels.shape
