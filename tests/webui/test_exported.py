"""Exported models in the list of artifacts: what they bring is applied to the model they hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto.artifact import Artifact
from tenuto.artifact.export import export
from tenuto.artifact.host_names import canonicalized
from tenuto.model import describe, key_map_of
from tenuto.numerics import QTensor, schemes
from tenuto.sampling import OutputKernel

NAME = "Stable-diffusion/sub/mine.safetensors [exported: cache schedule + forecast]"


@pytest.fixture
def file(host: Any, tmp_path: Path) -> Path:
    """The host's own U-Net with 8-bit attention, a schedule of whole blocks and a forecast."""
    model, times = host.unet, [float(t) for t in range(975, 0, -50)]
    made = Artifact.new(model, {"timesteps": times, "steps": 20, "guidance": 2.0})
    made.header["schemes"] = {"w8a16": schemes.W8A16.to_json()}
    made.header["layers"] = {}
    for name, layer in extension("hosts").layers(model):  # Forge's are of classes of its own
        if ".attn" in name and layer.weight.ndim == 2:
            codes = QTensor.nearest(layer.weight.detach(), schemes.W8A16.weight)
            made.tensors |= {f"weights/{k}": v for k, v in codes.tensors(name).items()}
            shape = list(layer.weight.shape)
            made.header["layers"][name] = {"scheme": "w8a16", "shape": shape}
    keys = key_map_of(model)
    branches = [keys.canonical(b.name) if keys else b.name for b in describe(model).branches]
    table = torch.ones(20, len(branches), dtype=torch.bool)
    table[1::2] = False
    made.header["route"] = {"policy": "x", "timesteps": times, "branches": branches}
    made.tensors["route/table"] = table
    root = torch.randn(20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = tuple(torch.linspace(0.95, 0.05, 20).tolist())
    signal = tuple((1 - s**2) ** 0.5 for s in noise)
    kernel = OutputKernel(root @ root.T, tuple(times), signal, noise, "eps", 2)
    route = {k: made.header.pop(k) for k in ("route",)}
    whole = canonicalized(made.add_forecast(kernel), model)
    whole.header |= route
    path = tmp_path / "Stable-diffusion" / "sub" / "mine.safetensors"
    path.parent.mkdir(parents=True)
    export(model, "float", path, artifact=whole)
    return path


def extension(name: str) -> Any:
    """A module of the extension as the host has it."""
    return sys.modules[f"tenuto_webui.{name}"]


def test_it_is_listed_with_what_it_brings(host: Any, file: Path, tmp_path: Path) -> None:
    """In the folder of artifacts too; other checkpoints are not."""
    artifacts = extension("artifacts")
    (file.parent / "other.safetensors").write_bytes(b"no")
    found = [n for n in artifacts.names(host.unet) if not n.startswith("Built-in")]
    assert found == [NAME]
    one = artifacts.find(NAME)
    assert one.path == file and one.scheme == "Off" and len(artifacts.mark(one)) == 8
    assert artifacts.find(NAME.partition(" [")[0]).path == file
    made = artifacts.load(one)
    assert not made.header.get("layers") and "route/table" in made.tensors
    assert not artifacts.names(torch.nn.Linear(2, 2))[3:]
    (tmp_path / "tenuto").mkdir(exist_ok=True)
    moved = file.rename(tmp_path / "tenuto" / "mine.safetensors")
    found = [n for n in artifacts.names(host.unet) if not n.startswith("Built-in")]
    assert found == ["mine.safetensors [exported: cache schedule + forecast]"]
    assert artifacts.find(found[0]).path == moved


@pytest.mark.parametrize(("cache", "said"), [
    ("Auto", "calls of the model skipped"), ("Router (from artifact)", "blocks computed"),
])  # fmt: skip
def test_it_is_applied(host: Any, file: Path, cache: str, said: str) -> None:
    """By its forecast and by its schedule; off again, every bit is back."""
    plain = host.pictures(host.p(False, steps=12))
    p = host.p(True, NAME, "From artifact", cache, steps=12)
    found = host.pictures(p)
    assert said in p.processed.comments and not torch.equal(found, plain)
    assert "W8" not in p.processed.comments, "its layers are rounded already"
    assert torch.equal(host.pictures(host.p(False, steps=12)), plain)


def test_another_checkpoint_is_refused_in_a_sentence(host: Any, file: Path) -> None:
    """The image goes on in full precision."""
    with torch.no_grad():
        for name, value in host.unet.named_parameters():
            if name.endswith("bias"):
                value += 0.1
    plain = host.pictures(host.p(False, steps=12))
    p = host.p(True, NAME, "From artifact", "Router (from artifact)", steps=12)
    assert torch.equal(host.pictures(p), plain)
    assert "of another model: what is in float differs" in p.processed.comments
