"""Compact weights: every code comes back, from the same model alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto import Artifact, attach, quantize, schemes
from tenuto.artifact.compact import _digits, _pack, _unpack, compact, expanded
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.presets import recipe_for
from tenuto.errors import ArtifactError
from tenuto.model.families import describe
from tenuto.numerics.scheme import Scheme


@pytest.fixture(scope="module")
def quantized(tiny: Any, recorded: Any) -> Callable[[str], tuple[Any, Artifact]]:
    """quantized(scheme): a tiny U-Net and an artifact of it, made once."""
    table = {s.name: s for s in vars(schemes).values() if isinstance(s, Scheme)}
    known: dict[str, Artifact] = {}

    def build(scheme: str) -> tuple[Any, Artifact]:
        model = tiny("unet")
        if scheme not in known:
            recipe = recipe_for(table[scheme], describe(model), GPTQ(rows=8))
            known[scheme] = quantize(model, recipe, recorded("unet"))
        return model, copy.deepcopy(known[scheme])

    return build


@pytest.fixture(params=["w8a8", "w4a8", "w4a8-static", "w4a16"])
def made(request: pytest.FixtureRequest, quantized: Any) -> tuple[Any, Artifact]:
    """A tiny U-Net and an artifact of it, in each scheme."""
    return quantized(request.param)


def test_nothing_is_lost(made: tuple[Any, Artifact], tmp_path: Path) -> None:
    model, artifact = made
    small = compact(artifact, model)
    assert not any(key.endswith(".qdata") for key in small.tensors)
    small.save(tmp_path / "small.safetensors")
    again = expanded(Artifact.load(tmp_path / "small.safetensors"), model)
    assert again.header == artifact.header and again.tensors.keys() == artifact.tensors.keys()
    for key, value in artifact.tensors.items():
        assert again.tensors[key].dtype is value.dtype and torch.equal(again.tensors[key], value)


@pytest.mark.parametrize("key", ["most", "crc32"])
@pytest.mark.parametrize("value", [-math.inf, math.nan, -1, 10**17, "1", None])
def test_forged_facts_are_refused_before_anything_is_expanded(
    quantized: Any, tmp_path: Path, key: str, value: Any
) -> None:
    model, artifact = quantized("w4a16")
    small = compact(artifact, model)
    next(iter(small.header["compact"].values()))[key] = value
    small.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="does not fit its tensors"):
        Artifact.load(tmp_path / "a")
    with pytest.raises(ArtifactError):
        expanded(small, model)


def test_it_is_smaller(made: tuple[Any, Artifact]) -> None:
    model, artifact = made

    def size(tensors: dict[str, Tensor], end: str) -> int:
        return sum(t.nbytes for key, t in tensors.items() if key.endswith(end))

    small = size(compact(artifact, model).tensors, ".delta")
    whole = size(artifact.tensors, ".qdata")
    eight = all(row["weight"]["bits"] == 8 for row in artifact.header["schemes"].values())
    assert small == 0 if eight else small < whole / 3


def test_it_attaches_as_it_is(made: tuple[Any, Artifact], recorded: Any) -> None:
    model, artifact = made
    call = recorded("unet").calls[0].inputs
    with torch.no_grad():
        with attach(model, artifact):
            wanted = model(**call)[0]
        with attach(model, compact(artifact, model)) as attached:
            assert torch.equal(model(**call)[0], wanted)
            assert "compact" in attached.artifact.header


def test_twice_is_once(made: tuple[Any, Artifact]) -> None:
    model, artifact = made
    small = compact(artifact, model)
    assert compact(small, model) is small and expanded(artifact, model) is artifact


def test_other_weights_are_told(made: tuple[Any, Artifact]) -> None:
    """So near that the fingerprint cannot tell: half precision of another kind."""
    model, artifact = made
    small = compact(artifact, model)
    rounded = copy.deepcopy(model).bfloat16().float()
    with pytest.raises(ArtifactError, match="in which it is stored"):
        attach(rounded, small)


@pytest.mark.parametrize("hurt", ["cut", "long", "noise", "gone", "most"])
def test_damage_is_told(made: tuple[Any, Artifact], hurt: str) -> None:
    model, artifact = made
    small = copy.deepcopy(compact(artifact, model))
    name = max(small.header["compact"], key=lambda n: small.tensors[f"weights/{n}.delta"].numel())
    key, facts = f"weights/{name}.delta", small.header["compact"][name]
    if not small.tensors[key].numel():
        facts["most"] = 1  # 8-bit layers have no stream: pretend one
    if hurt == "cut":
        small.tensors[key] = small.tensors[key][:-5].clone()
    elif hurt == "long":
        small.tensors[key] = torch.cat((small.tensors[key], torch.zeros(3, dtype=torch.uint8)))
    elif hurt == "noise":
        small.tensors[key] = torch.full_like(small.tensors[key], 7)
    elif hurt == "gone":
        del small.tensors[key]
    else:
        facts["most"] = -3
    with pytest.raises(ArtifactError, match=r"damaged|in which it is stored"):
        attach(model, small)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 90, 127])
def test_packing(most: int) -> None:
    draw = torch.Generator().manual_seed(most)
    delta = torch.randint(-most, most + 1, (1001,), generator=draw).to(torch.int16)
    assert torch.equal(_unpack(_pack(delta, most), most, 1001), delta)
    assert (2 * most + 1) ** _digits(most) <= 256


def test_a_stream_never_inflates_beyond_its_layer() -> None:
    """A bomb is refused after as many bytes as the layer needs."""
    bomb = _pack(torch.zeros(50_000_000, dtype=torch.int16), 1)
    with pytest.raises(ValueError, match="another length"):
        _unpack(bomb, 1, 1000)


def test_a_merge_keeps_what_belongs_together(made: tuple[Any, Artifact]) -> None:
    model, artifact = made
    small = compact(artifact, model)
    route = Artifact({k: v for k, v in artifact.header.items() if k not in ("layers", "schemes")})
    route.header.pop("temporal", None)
    route.tensors["route/table"] = torch.zeros(1, 1, dtype=torch.uint8)
    assert "compact" in (small | route).header
    assert "compact" not in (small | artifact).header
    (small | artifact).validate()
    (artifact | small).validate()
