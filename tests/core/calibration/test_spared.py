"""Layers that hold far more of the error than of the weights stay in float; no other model's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact.summary import about
from tenuto.calibration import spared
from tenuto.calibration.result_check import chosen

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Conv2d(WIDTH, 4 * WIDTH, 3, padding=1),
            nn.Conv2d(4 * WIDTH, WIDTH, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * self.down(torch.relu(self.up(x)))


class Denoiser(nn.Module):
    """As many a U-Net: nearly all of the answer is the sample, which two thin layers pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.init_conv = nn.Conv2d(3, WIDTH, 1)
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.out = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.init_conv(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x) * (1 + t[:, None, None, None] / 1000)


def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in (900.0, 500.0, 100.0):
        x = x - 0.1 * denoiser(x, torch.full((batch,), t))
    return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trajectory(model: nn.Module) -> Any:
    return tn.record(model, sample=sample, batch=2, runs=1)


@pytest.fixture(scope="module")
def artifact(model: nn.Module, trajectory: Any) -> Any:
    return tn.quantize(model, "w8a8", trajectory)


def plain(model: nn.Module, trajectory: Any) -> Any:
    """With every layer quantized: a recipe says itself what stays in float."""
    return tn.quantize(model, tn.Recipe((tn.Rule("*", tn.schemes.W8A8),)), trajectory)


def test_the_thin_ends_stay_in_float(model: Any, trajectory: Any, artifact: Any) -> None:
    whole = plain(model, trajectory)
    assert "kept_in_float" not in whole.header and len(whole.header["layers"]) == 14
    kept, layers = artifact.header["kept_in_float"], artifact.header["layers"]
    assert set(kept) == {"init_conv", "out"} and len(layers) == 12
    assert 0.8 < sum(kept.values()) < 1.2
    before, after = (a.header["check"]["relative_error"] for a in (whole, artifact))
    assert after < before / 3
    assert not [k for k in artifact.tensors if "init_conv" in k or "/out." in k]
    rules = artifact.header["recipe"]
    assert [r["pattern"] for r in rules if r["scheme"] is None] == list(kept)
    assert "2 layers kept in float, with" in about("a file", artifact, 1)


def test_it_is_attached_as_it_was_checked(
    model: Any, trajectory: Any, artifact: Any, tmp_path: Path
) -> None:
    artifact.save(tmp_path / "a.safetensors")
    call = next(c for c in trajectory.calls if c.timestep == artifact.header["check"]["timestep"])
    with torch.no_grad():
        y = model(**call.inputs)
        with tn.attach(model, tmp_path / "a.safetensors", execution="int8") as attached:
            off = model(**call.inputs) - y
            assert type(model.init_conv) is nn.Conv2d
            assert attached.artifact.header["kept_in_float"] == artifact.header["kept_in_float"]
    found = float(off.norm() / y.norm())
    assert found == pytest.approx(artifact.header["check"]["relative_error"], rel=0.05)


@pytest.mark.parametrize("scheme", ["w4a8", "w8a16", "w8a8-static"])
def test_at_other_schemes(model: Any, trajectory: Any, scheme: str) -> None:
    made = tn.quantize(model, scheme, trajectory)
    sizes = {n: m.weight.numel() for n, m in tn.model.layers(model)}
    kept = made.header.get("kept_in_float", {})
    assert sum(sizes[n] for n in kept) <= spared.MOST * sum(sizes.values())
    assert set(made.header["layers"]) == set(sizes) - set(kept)
    used = {facts["scheme"] for facts in made.header["layers"].values()}
    assert set(made.header["schemes"]) == used


def test_as_many_trials_as_said(model: Any, trajectory: Any, monkeypatch: Any) -> None:
    """The worst groups come first, so that few trials find the worst layers."""
    seen: list[list[str]] = []
    usual = spared.Trial.__call__

    def counted(self: spared.Trial, names: list[str]) -> float:
        seen.append(names)
        return usual(self, names)

    monkeypatch.setattr(spared.Trial, "__call__", counted)
    monkeypatch.setattr(spared, "TRIALS", 9)
    made = tn.quantize(model, "w8a8", trajectory)
    assert len(seen) <= 9 and made.header["kept_in_float"]


def test_layers_that_share_an_input_stay_together(
    tiny: Any, recorded: Any, monkeypatch: Any
) -> None:
    """Hosts make one layer of them, which cannot be half in float; nor what depends on time."""
    seen: list[list[str]] = []

    def nothing(_: Any, __: Any, all: list[str], single: list[str], *rest: Any) -> dict[str, float]:
        assert set(single) < set(all)
        seen.append(single)
        return {}

    monkeypatch.setattr(spared, "heavy", nothing)
    model = tiny("unet")
    assert "kept_in_float" not in tn.quantize(model, "w8a8", recorded("unet")).header
    (names,) = seen
    backbone = tn.describe(model)
    together = {name for subset in backbone.subsets for name in subset.linears}
    assert together and not together & set(names) and "conv_in" in names
    assert not [name for name in names if name.startswith(backbone.temporal)]


def test_nothing_is_kept_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the blocks make nearly all of the answer, the two thin layers have little of it."""
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.down.weight.mul_(100)
    trajectory = tn.record(model, sample=sample, batch=2, runs=1)
    assert "kept_in_float" not in tn.quantize(model, "w8a8", trajectory).header
    monkeypatch.setattr(spared, "WORTH", 0)
    kept = tn.quantize(model, "w8a8", trajectory).header["kept_in_float"]
    assert set(kept) == {"init_conv", "out"}, "however little"
    assert 0.1 < sum(kept.values()) < 0.25


def test_a_share_is_of_the_error_of_all_layers(model: Any, trajectory: Any, artifact: Any) -> None:
    """Of those too that may not stay in float themselves; and one small layer needs its share."""
    whole, calls = plain(model, trajectory), list(chosen(trajectory))
    names = list(whole.header["layers"])
    thin = ["init_conv", "out"]
    found = spared.heavy(model, whole, names, thin, calls, "cpu")
    assert found == {
        n: pytest.approx(v, rel=0.01) for n, v in artifact.header["kept_in_float"].items()
    }
    trial = spared.Trial(model, whole, calls, "cpu")
    assert found["out"] == pytest.approx(trial(["out"]) / trial(names), rel=1e-3)
    least = {"layers.0.down": 2.0}  # more than there is
    assert not spared._single(trial, names, ["layers.0.down"], least)


def test_it_is_seen_while_it_looks(model: Any, trajectory: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    tn.quantize(model, "w8a8", trajectory, on_progress=lambda *facts: seen.append(facts))
    done = [now for now, _, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1] and len({t for _, t, _ in seen}) == 1
    search = [now for now, _, note in seen if "layers with most of the error" in note]
    assert len(set(search)) > 3
    total = seen[-1][1]
    assert search[0] < total / 10, "rounding to nearest takes little beside the search"
    assert all(now < total for now in done[:-1]), "nothing is left to do only at the end"
