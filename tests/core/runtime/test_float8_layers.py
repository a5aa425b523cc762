"""Schemes that name e4m3: quantized, saved, loaded, attached, simulated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto import Artifact, attach, quantize
from tenuto.artifact.compact import compact, expanded
from tenuto.artifact.contents import band
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import layers as layers_of
from tenuto.numerics import float8
from tenuto.numerics.scheme import Format, Recipe, Rule, Scheme, schemes
from tenuto.runtime.execution import DENSE
from tenuto.runtime.layers import QConv2d, QLayer, QLinear
from tenuto.sampling.clock import Clock

WEIGHT = Format(dtype="e4m3")
TOKEN, STEP = schemes.FP8, schemes.FP8_STATIC
ALONE = Scheme("fp8-weights", WEIGHT)
ALL = {scheme.name: scheme for scheme in (TOKEN, STEP, ALONE)}


def values(x: Tensor, scale: Tensor) -> Tensor:
    """x on the grid of `scale`, float64 from fp32 quotients, as `test_float8.py` has shown it."""
    return float8.values(float8.reference_levels(x.float() / scale)).double() * scale.double()


def layer(kind: str, scheme: Scheme, **options: Any) -> tuple[Any, Any]:
    """A float layer and its quantized one; a stored range is that of ±4, then of ±8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: Any = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1)
    weight = RoundToNearest().weight(base.weight, scheme.weight)
    scale = torch.tensor([4.0, 8.0]) / 448
    static = scheme.activation is not None and not scheme.activation.dynamic
    pair = (scale, torch.zeros(2)) if static else None
    made = QLinear if kind == "linear" else QConv2d
    return base, made(base, weight, scheme, Clock((999, 0)), pair, **options)


@pytest.mark.parametrize("scheme", ALL.values(), ids=list(ALL))
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_is_the_operation_on_its_grids(kind: str, scheme: Scheme) -> None:
    """In float64 from its values; the stored range is that of the step."""
    base, q = layer(kind, scheme)
    x = torch.randn((2, 5, 32) if kind == "linear" else (2, 8, 7, 7)) * 3
    rows = base.weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / 448
    weight = values(rows, scale).view(base.weight.shape)
    dims = (-1,) if kind == "linear" else (1, 2, 3)
    for step, timestep in enumerate((999, 0)):
        q.clock.tick(timestep, (0,), torch.device("cpu"))
        if scheme is ALONE:
            near = x.double()
        else:
            stored = torch.tensor([4.0, 8.0])[step] / 448
            found = x.abs().amax(dims, keepdim=True) / 448
            near = values(x, found if scheme is TOKEN else stored)
        bias = base.bias.double()
        expected = (
            F.linear(near, weight, bias)
            if kind == "linear"
            else F.conv2d(near, weight, bias, padding=1)
        )
        with torch.no_grad():
            assert float((q(x) - expected).norm() / expected.norm()) < 1e-6
    assert q.execution == ("weight-only" if scheme is ALONE else "simulated")


def test_a_cast_of_the_model_changes_no_code() -> None:
    base, q = layer("linear", TOKEN)
    before, x = q.qdata.clone(), torch.randn(3, 32)
    with torch.no_grad():
        expected = q(x)
        twin = copy.deepcopy(q).to(torch.bfloat16)
        assert torch.equal(twin.qdata, before) and twin(x.bfloat16()).dtype is torch.bfloat16
        assert float((twin(x.bfloat16()) - expected).norm() / expected.norm()) < 0.05
        back = twin.to(torch.float32)
        back.bias = base.bias
        assert torch.equal(back(x), expected)
        fresh = layer("linear", TOKEN, wanted="auto")[1]
        assert torch.equal(fresh(x), F.linear(x, q.qtensor().dequantize(), base.bias))
        assert fresh.execution == DENSE, "no kernel takes it yet"


def outputs(model: nn.Module, trajectory: Any) -> Tensor:
    """What the recorded calls give."""
    found = [model(**call.inputs) for call in trajectory.calls]
    return torch.cat([f if isinstance(f, Tensor) else f[0] for f in found])


@pytest.mark.parametrize("scheme", ALL.values(), ids=list(ALL))
def test_from_a_model_to_a_file_and_back(
    tiny: Any, kind: str, recorded: Any, bits: Any, tmp_path: Path, scheme: Scheme
) -> None:
    model, path = tiny(kind), tmp_path / "x.safetensors"
    before = bits(model)
    recipe = Recipe((Rule("*", scheme, RoundToNearest()),))
    artifact = quantize(model, recipe, recorded(kind))
    artifact.save(path)
    with safe_open(path, "pt") as file:
        names = [key for key in file.keys() if key.endswith(".qdata")]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in names} == {"F8_E4M3"}
    loaded = Artifact.load(path)
    forms = loaded.header["schemes"].values()
    assert {form["weight"]["dtype"] for form in forms} == {"e4m3"}
    assert {f["activation"] and f["activation"]["dtype"] for f in forms} == {
        None if scheme is ALONE else "e4m3"
    }
    small = compact(loaded, model)
    whole = expanded(small, model)
    assert whole.tensors.keys() == loaded.tensors.keys()
    assert all(torch.equal(whole.tensors[k], v) for k, v in loaded.tensors.items())
    with torch.no_grad():
        plain = outputs(model, recorded(kind))
        with attach(model, loaded, execution="int8") as attached:
            found, report = outputs(model, recorded(kind)), attached.execution()
            layers = [m for m in model.modules() if isinstance(m, QLayer)]
        assert bits(model) == before
        wanted = "weight-only" if scheme is ALONE else "simulated"
        left = sum(isinstance(m, nn.Conv2d) for _, m in layers_of(model))
        left = 0 if scheme is ALONE else left  # convolutions
        own = {wanted: len(layers)} | ({"float": left} if left else {})
        assert report == {"mode": wanted, "layers": own}
        assert 0 < float((found - plain).norm() / plain.norm()) < 0.3  # three bits of mantissa
        with attach(model, loaded) as attached:
            near = outputs(model, recorded(kind))
            assert float((near - plain).norm() / plain.norm()) < 0.3  # three bits of mantissa
            assert attached.execution()["mode"] == ("weight-only" if scheme is ALONE else DENSE)


def test_the_stored_range_of_a_step_is_shown_as_it_is(tiny: Any, recorded: Any) -> None:
    """±448 scales; a scheme of whole codes has 255 from its zero point."""
    found = {}
    for scheme in (STEP, schemes.W8A8_STATIC):
        recipe = Recipe((Rule("*", scheme, RoundToNearest()),))
        artifact = quantize(tiny("dit"), recipe, recorded("dit"))
        name = next(n for n, f in artifact.header["layers"].items() if "block" in n)
        found[scheme.name] = band(artifact.header, artifact.tensors, name)
    real, whole = found["fp8-static"], found["w8a8-static"]
    assert real is not None and whole is not None
    assert torch.equal(real.low, -real.high)
    most = torch.maximum(-whole.low, whole.high)
    assert torch.allclose(real.high, most, rtol=0.02)


def test_a_header_with_an_unknown_dtype_is_refused(tiny: Any, recorded: Any) -> None:
    from tenuto import TenutoError

    recipe = Recipe((Rule("*", TOKEN, RoundToNearest()),))
    artifact = quantize(tiny("dit"), recipe, recorded("dit"))
    text = json.dumps(artifact.header).replace('"e4m3"', '"e5m2"')
    with pytest.raises(TenutoError):
        Artifact(json.loads(text), artifact.tensors).validate()
