"""What an exported file brings is applied to the model that it holds, and to no other one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tenuto as tn
from tenuto.artifact.export import (
    applicable,
    companion,
    export,
    exported_facts,
    read_companion,
    read_exported,
)
from tenuto.artifact.in_float import MARKS
from tenuto.errors import ArtifactError
from tenuto.model import host_map_of
from tenuto.runtime import attach
from tenuto.sampling import OutputKernel


def with_schedule(artifact: tn.Artifact, model: Any) -> tn.Artifact:
    """`artifact` with a route of random cells and a forecast, too."""
    found = copy.deepcopy(artifact)
    times = [float(t) for t in found.header["schedule"]["timesteps"]]
    branches = [b.name for b in tn.describe(model).branches]
    draw = torch.Generator().manual_seed(0)
    table = torch.rand(len(times), len(branches), generator=draw) < 0.5
    table[0] = True
    found.header["route"] = {"policy": "x", "timesteps": times, "branches": branches}
    found.tensors["route/table"] = table
    count = len(times)
    root = torch.randn(count, count + 2, generator=draw, dtype=torch.float64)
    noise = tuple(torch.linspace(0.9, 0.1, count).tolist())
    signal = tuple(1 - x for x in noise)
    return found.add_forecast(OutputKernel(root @ root.T, tuple(times), signal, noise, "flow"))


@pytest.fixture(scope="module")
def made(tiny: Any, rounded: Any) -> tn.Artifact:
    return with_schedule(rounded("flux"), tiny("flux"))


def holding(model: Any, file: Path) -> Any:
    """`model` with the weights of an exported file in float: its layers are rounded."""
    missing, _ = model.load_state_dict(
        {k: v.float() for k, v in load_file(file).items()}, strict=False
    )
    assert not [name for name in missing if name in dict(model.named_parameters())]
    return model


@pytest.mark.parametrize("form", ["comfy", "gguf", "float"])
def test_a_file_says_what_it_is(form: str, tiny: Any, made: Any, tmp_path: Path) -> None:
    out = tmp_path / ("m.gguf" if form == "gguf" else "m.safetensors")
    export(tiny("flux"), form, out, artifact=made)
    facts = exported_facts(out)
    assert facts is not None and facts["format"] == form and facts["family"] == "flux"
    assert applicable(facts) == ["cache schedule", "forecast"]
    said, found = read_exported(out)
    assert said["layers"] == facts["layers"]
    for key in ("route/table", "forecast/kernel"):
        assert torch.equal(found.tensors[key], made.tensors[key])
    assert found.header["route"] == made.header["route"]
    assert not found.header.get("layers") and found.header[MARKS]
    if form != "gguf":
        with pytest.raises(ArtifactError, match="is a model that Tenuto exported"):
            tn.Artifact.load(out)


def test_the_marks_are_of_what_is_in_float(tiny: Any, made: Any, tmp_path: Path) -> None:
    """Names of the model itself, none of a layer that is rounded, and equal to its weights."""
    model = tiny("flux")
    report = export(model, "comfy", tmp_path / "m.safetensors", artifact=made)
    _, found = read_exported(tmp_path / "m.safetensors")
    marks, places = found.header[MARKS], host_map_of(model).places
    assert len(marks) > 16
    for name, values in marks.items():
        assert places[name].name.removesuffix(".weight") not in report.layers
        flat = model.get_parameter(name).detach().reshape(-1)
        assert values == pytest.approx([float(flat[i]) for i in (0, len(flat) // 2, -1)], rel=1e-5)


def test_it_is_applied_to_the_rounded_model(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    """In bf16 and with codes in place of weights, which the whole artifact is refused for."""
    made = with_schedule(rounded("flux", "COMFY_W4A8"), tiny("flux"))
    out = tmp_path / "m.safetensors"
    export(tiny("flux"), "float", out, artifact=made)
    _, found = read_exported(out)
    model = holding(copy.deepcopy(tiny("flux")), out)
    with pytest.raises(ArtifactError, match="the weights differ"):
        attach(model, made, route=True)
    for given in (model, model.bfloat16()):
        with attach(given, found) as attached:
            assert attached.counts() or attached.patches
        with attach(given, found, speedup=2.0) as attached:
            assert attached.forecast() is not None
    with attach(tiny("flux"), found):
        pass  # it is the model that it was made of, too


def test_another_model_is_refused(tiny: Any, made: Any, tmp_path: Path) -> None:
    """Of other weights by what is in float, of another class by its name."""
    out = tmp_path / "m.safetensors"
    export(tiny("flux"), "comfy", out, artifact=made)
    _, found = read_exported(out)
    other = copy.deepcopy(tiny("flux"))
    with torch.no_grad():
        for name, value in other.named_parameters():
            if name.endswith("bias"):
                value += 0.1
    with pytest.raises(ArtifactError, match="of another model: what is in float differs at"):
        attach(other, found)
    with pytest.raises(ArtifactError, match="is of a FluxTransformer2DModel"):
        attach(tiny("sd3"), found)
    assert MARKS not in (found | made).header, "merged it is of the weights themselves"


def test_two_files_of_one_stem_have_two_companions(tiny: Any, made: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "m.safetensors", tmp_path / "m.gguf"
    export(tiny("flux"), "comfy", one, artifact=made)
    export(tiny("flux"), "gguf", two, artifact=made)
    assert {p.name for p in tmp_path.iterdir()} == {
        "m.safetensors", "m.gguf", "m.safetensors.tenuto.json", "m.gguf.tenuto.json",
    }  # fmt: skip
    for out, form in ((one, "comfy"), (two, "gguf")):
        facts, _ = read_companion(companion(out))
        assert (facts["format"], facts["weights"]) == (form, out.name)


def test_what_brings_nothing_is_said(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    export(tiny("flux"), "comfy", out, scheme="w8a8")
    facts = exported_facts(out)
    assert facts is not None and not applicable(facts)
    with pytest.raises(ArtifactError, match="without a cache schedule or a forecast"):
        read_exported(out)
    rounded("flux").save(tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    for name in ("a.safetensors", "x.safetensors", "junk.safetensors", "b.gguf", "none.gguf"):
        assert exported_facts(tmp_path / name) is None, name
    with pytest.raises(ArtifactError, match="no file that Tenuto has exported"):
        read_exported(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_exported(tmp_path / "junk.safetensors")


BROKEN: dict[str, Any] = {
    "no marks": lambda facts: facts.pop(MARKS), "marks of nothing": lambda f: f | {MARKS: {}},
    "odd marks": lambda f: f | {MARKS: {"x": ["nan"]}}, "no table": lambda f: f["route"].clear(),
    "no schedule": lambda f: f.pop("schedule"), "odd route": lambda f: f | {"route": 7},
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_header_is_one_sentence(
    case: str, tiny: Any, made: Any, contents: Any, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    export(tiny("flux"), "comfy", out, artifact=made)
    tensors, metadata = contents(out)
    facts = json.loads(metadata["tenuto"])
    changed = BROKEN[case](facts)
    metadata["tenuto"] = json.dumps(changed if case.startswith(("odd", "marks")) else facts)
    save_file(tensors, out, metadata)
    with pytest.raises(ArtifactError) as error:
        read_exported(out)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_a_gguf_with_other_bytes_is_refused(tiny: Any, made: Any, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    export(tiny("flux"), "gguf", out, artifact=made)
    out.write_bytes(out.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"belongs to another m\.gguf"):
        read_exported(out)


def test_codes_of_other_libraries_are_refused(tiny: Any, tmp_path: Path) -> None:
    """A parameter of a class of its own is quantized already, whatever type it says it has."""

    class Coded(torch.Tensor):
        pass

    model = copy.deepcopy(tiny("flux"))
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Coded), False)
    with pytest.raises(tn.ModelError, match="already quantized"):
        export(model, "comfy", tmp_path / "m.safetensors", scheme="w8a8")
    assert not list(tmp_path.iterdir())
