"""A new kernel is one file: put beside the others, layers use it, and nothing else names it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto import attach, quantize, schemes
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.numerics.scheme import Recipe, Rule, Scheme
from tenuto.runtime import kernels
from tenuto.runtime.execution import Chooser
from tenuto.runtime.layers import QLayer, QLinear

TOY = '''
"""y = x_scale * (x - x_zero) @ (scale * codes).T + bias, in float64: a toy, for weights (64, K)."""

import torch

from tenuto.runtime.kernels import Formats, Kernel

calls = []


class Packed:
    def __init__(self, weight, geometry):
        self.weight, self.scale = weight.codes().clone(), weight.scale

    def codes(self):
        return self.weight

    def tensors(self):
        return [self.weight, self.scale]


def reference(x, x_scale, x_zero, weight, bias, geometry):
    near = (x.double() - x_zero) * x_scale.double()
    y = near @ (weight.codes().double() * weight.scale.double()[:, None]).T
    return y if bias is None else y + bias.double()


def call(x, x_scale, x_zero, packed, bias, dtype):
    calls.append(tuple(x.shape))
    return reference(x, x_scale, x_zero, type("W", (), {
        "codes": packed.codes, "scale": packed.scale})(), bias, None).to(dtype)


KERNEL = Kernel(
    "toy", "linear", Formats(bits=(8,)), Formats(bits=(8,), granularities=("token",)),
    lambda case: case.shape[0] == 64 and case.device.type == "cpu",
    Packed, reference, call, word="toy", priority=PRIORITY,
)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """toy(priority): the file is written, and its list of calls returned by a function."""
    name = f"{kernels.__name__}.toy_kernel"

    def write(priority: int) -> Any:
        text = TOY.replace("PRIORITY", str(priority))
        (tmp_path / "toy_kernel.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
        return lambda: sys.modules[name].calls  # type: ignore[attr-defined]

    yield write
    sys.modules.pop(name, None)
    vars(kernels).pop("toy_kernel", None)


@pytest.fixture(scope="module")
def artifact(tiny: Any, recorded: Any) -> Any:
    recipe = Recipe((Rule("*", schemes.W8A8, RoundToNearest()),))
    return quantize(tiny("dit"), recipe, recorded("dit"))


def fitting(model: Any) -> set[str]:
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, QLinear))
    return {n for n, m in found if m.shape[0] == 64}


@pytest.mark.parametrize("priority", [1, -1])
def test_a_file_beside_the_others_is_enough(
    tiny: Any, artifact: Any, loop: Any, toy: Any, priority: int
) -> None:
    """The one of the highest priority executes; what it does not take goes on as before."""
    model, sample = tiny("dit"), loop("dit")
    with torch.no_grad():
        with attach(model, artifact, execution="int8") as attached:
            expected, plain = sample(model, 3, 2), attached.execution()
            layers = fitting(model)
        calls = toy(priority)
        with attach(model, artifact, execution="int8") as attached:
            found, report = sample(model, 3, 2), attached.execution()
            words = {n: m.execution for n, m in model.named_modules() if isinstance(m, QLayer)}
            state = model.state_dict()
    count = len(layers)
    assert count and plain["layers"]["int8"] > count
    gap = float((found - expected).norm() / expected.norm())
    if priority < 0:
        assert not calls() and report == plain and torch.equal(found, expected)
        return
    assert len(calls()) % count == 0 and len(calls()) >= count
    assert report["layers"] == {"int8": plain["layers"]["int8"] - count, "toy": count}
    assert {n for n, how in words.items() if how == "toy"} == layers and report["mode"] == "mixed"
    assert 0 <= gap < 1e-2
    with torch.no_grad(), attach(model, artifact, execution="int8"):
        fresh = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in fresh.items()), "packing is no state"


@pytest.mark.parametrize("name", ["toy", "int8_linear", "dequantized"])
def test_under_auto_it_is_timed_beside_the_others(
    tiny: Any, artifact: Any, loop: Any, toy: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float among them; the chooser takes one, and the others leave nothing behind."""
    asked: list[tuple[str, ...]] = []

    def chosen(self: Chooser, kind: Any, runs: Any) -> str:
        asked.append(tuple(runs))
        results = [run() for run in runs.values()]
        close = [float((r - results[-1]).norm() / results[-1].norm()) for r in results]
        assert max(close) < 0.1
        return name if name in runs else "int8"

    monkeypatch.setattr(Chooser, "__call__", chosen)
    calls, model = toy(-1), tiny("dit")
    with torch.no_grad(), attach(model, artifact, chooser=Chooser()) as attached:
        loop("dit")(model, 3, 2)
        layers, report = fitting(model), attached.execution()
        one = model.get_submodule(min(layers))
        assert set(report["choices"][min(layers)].values()) == {one.execution}
        word = {"int8_linear": "int8"}.get(name, name)
        assert one.execution == word and report["layers"][word] >= len(layers)
        assert set(one._packed) == ({name} - {"dequantized"})
    assert ("int8_linear", "toy", "dequantized") in asked and calls()
    assert all(names[-1] == "dequantized" for names in asked)


def test_a_file_that_cannot_be_imported_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its package is missing here: one line says so."""
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    before = [k.name for k in kernels.kernels()]
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "odd_kernel.py").write_text("import no_such_package", encoding="utf-8")
    (folder / "odd_triton.py").write_text("raise RuntimeError", encoding="utf-8")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(folder)])
    assert [k.name for k in kernels.kernels()] == before
    assert [r.name for r in caplog.records] == ["tenuto"] and "odd_kernel" in caplog.text


def test_formats_say_what_they_take() -> None:
    only = kernels.Formats(bits=(4,), groups=False)
    assert only.take(Scheme("x", schemes.W4A8.weight).weight) is False, "in groups"
    assert not only.take(None) and not only.take(schemes.W8A8.weight)
