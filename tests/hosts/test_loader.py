"""Tenuto Loader: which files it lists, what it puts in, what it says. The host's reading of a file
is replaced where widths of real models would be needed; tests/hosts/server has it whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto import Artifact
from tenuto.errors import TenutoError


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        f"tenuto_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export_node = _beside("test_export_node")
SAID, artifact_of, exported = export_node.SAID, export_node.artifact_of, export_node.exported
folders = export_node.folders


@pytest.fixture
def load(folders: Path, in_comfy: Any, monkeypatch: Any) -> Any:
    """load(family, model=..., artifact=..., ...): what the node returns."""
    from comfy_nodes import loader

    def call(family: str, **given: Any) -> Any:
        settings = {"model": "diffusion_models/m.safetensors", "artifact": loader.OF_FILE,
                    "skip": loader.AS_SAID, "speedup": 2.0}  # fmt: skip
        monkeypatch.setattr(loader.comfy.sd, "load_diffusion_model", lambda path: in_comfy(family))
        return loader.Loader.execute(**(settings | given)).args

    (folders / "models" / "diffusion_models" / "m.safetensors").write_bytes(b"a model")
    return call


def parts(model: Any) -> tuple[Any, Any]:
    """(its quantized layers, its cache) or None."""
    from comfy_nodes.cache import Cache
    from comfy_nodes.weights import Weights

    return tuple(model.get_attachment(part.key) for part in (Weights, Cache))


def test_a_model_without_an_artifact(load: Any) -> None:
    """Is as the host loads it; the slider works on any."""
    from comfy_nodes.loader import BY_SLIDER, NOTHING

    model, clip, vae, text = load("sd3")
    assert clip is None and vae is None and parts(model) == (None, None)
    assert text.splitlines()[1:] == ["Skips nothing.", text.splitlines()[2]]
    assert (
        text.startswith("diffusion_models/m.safetensors: SD3")
        and "Its weights take 0.00" in text
        and "in float" not in text
    )
    model, _, _, text = load("sd3", skip=BY_SLIDER)
    assert parts(model)[1].plan.speedup == 2 and "the forecast that ships, not measured" in text
    assert parts(load("sd3", skip=NOTHING)[0]) == (None, None)


def test_an_artifact_with_codes(
    load: Any, folders: Path, in_comfy: Any, coded_artifact: Any
) -> None:
    """Codes alone, or beside the float weights; the report says the memory of each."""
    from comfy_nodes.coded_weights import coded
    from comfy_nodes.loader import FLOATS, artifacts
    from comfy_nodes.report import Report

    made = coded_artifact(in_comfy("flux").model.diffusion_model)
    made.save(folders / "models" / "tenuto" / "a.safetensors")
    assert artifacts() == ["none or file's own", "a.safetensors"]
    model, _, _, text = load("flux", artifact="a.safetensors")
    assert parts(model)[0] is not None and len(list(coded(model.model.diffusion_model))) > 3
    assert "layers w8a16" in text and "GiB, in float 0.00" in text
    said = Report.execute(model, {}).args[0]
    assert "Loaded: diffusion_models/m.safetensors with a.safetensors. Its weights take" in said
    model, _, _, text = load("flux", artifact="a.safetensors", weights=FLOATS)
    assert not list(coded(model.model.diffusion_model)) and "in float" not in text
    assert parts(model)[0] is not None


def test_its_schedule_and_its_forecast(load: Any, folders: Path, original: Any) -> None:
    """The schedule goes first; a forecast without one at the speedup of the file."""
    from comfy_nodes.loader import BY_SLIDER, NOTHING
    from tenuto.artifact import set_default

    place = folders / "models" / "tenuto"
    made = artifact_of(original("sd3"), "sd3")
    made.save(place / "both.safetensors")
    tensors = {k: v for k, v in made.tensors.items() if not k.startswith("route/")}
    header = {k: v for k, v in made.header.items() if k != "route"}
    Artifact(header, tensors).save(place / "undecided.safetensors")
    set_default(Artifact(header, tensors), 1.5).save(place / "forecast.safetensors")
    model, _, _, text = load("sd3", artifact="both.safetensors")
    assert "Skips: 40% of the branches' evaluations, by its cache schedule." in text
    assert all(parts(model)) and parts(model)[1].branches
    model, _, _, text = load("sd3", artifact="forecast.safetensors")
    assert "1.5 times fewer, by its forecast" in text and parts(model)[1].plan.speedup == 1.5
    model, _, _, text = load("sd3", artifact="both.safetensors", skip=BY_SLIDER, speedup=3.0)
    assert "3 times fewer, by its forecast" in text and parts(model)[1].plan.speedup == 3
    for more in ({"artifact": "undecided.safetensors"}, {"skip": NOTHING}):
        model, _, _, text = load("sd3", **({"artifact": "both.safetensors"} | more))
        assert "Skips nothing." in text and parts(model)[0] and parts(model)[1] is None


def test_an_exported_model_brings_its_own(
    folders: Path, in_comfy: Any, from_file: Any, original: Any, monkeypatch: Any
) -> None:
    """Read by the host; named here, or as the artifact of the same model."""
    from comfy.model_patcher import ModelPatcher

    from comfy_nodes import loader

    exported(in_comfy("sd3"), artifact=artifact_of(original("sd3"), "sd3"))
    codes = artifact_of(original("sd3"), "sd3")
    codes.save(folders / "models" / "tenuto" / "a.safetensors")
    cpu = torch.device("cpu")
    monkeypatch.setattr(loader.comfy.sd, "load_diffusion_model", lambda path: ModelPatcher(
        from_file("sd3", path), load_device=cpu, offload_device=cpu))  # fmt: skip
    (name,) = loader.models()
    assert name == "diffusion_models/one.safetensors"
    for artifact in (loader.OF_FILE, f"{name}{SAID}"):
        assert loader.Loader.validate_inputs(name, artifact) is True
        found = loader.Loader.execute(name, artifact, loader.AS_SAID, 2.0).args
        assert parts(found[0])[0] is None and parts(found[0])[1].branches
        assert "exported as comfy" in found[3] and "Skips: 40%" in found[3]
        assert "layers in float8_e4m3fn" in found[3] and "GiB, in float" in found[3]
    with pytest.raises(TenutoError, match="already quantized, by ComfyUI itself"):
        loader.Loader.execute(name, "a.safetensors", loader.AS_SAID, 2.0)


def test_what_is_wrong_is_one_sentence(load: Any, folders: Path, original: Any) -> None:
    from comfy_nodes.loader import OF_FILE, Loader

    artifact_of(original("sd3"), "sd3").save(folders / "models" / "tenuto" / "a.safetensors")
    there = "diffusion_models/m.safetensors"
    assert Loader.validate_inputs(there, "a.safetensors") is True
    said = Loader.validate_inputs("diffusion_models/../tenuto/a.safetensors", OF_FILE)
    assert str(said).startswith("There is no model called") and str(said).count(". ") == 0
    assert "There is no artifact called" in str(Loader.validate_inputs(there, "b.safetensors"))
    assert "There is no file in" in str(Loader.validate_inputs("no file yet", OF_FILE))
    with pytest.raises(TenutoError, match=r"The artifact is for a SD3\w+, and the model is a"):
        load("flux", artifact="a.safetensors")
    with pytest.raises(TenutoError, match="There is no model called"):
        load("flux", model="checkpoints/x.safetensors")


@pytest.mark.parametrize("folder", ["diffusion_models", "checkpoints"])
def test_a_file_that_the_host_does_not_know(folders: Path, folder: str) -> None:
    """Its own message has several lines."""
    from safetensors.torch import save_file

    from comfy_nodes.loader import read

    place = folders / "models" / folder
    save_file({"x": torch.zeros(2)}, place / "x.safetensors")
    (place / "junk.safetensors").write_bytes(b"\0" * 20)
    for name in ("x", "junk"):
        with pytest.raises(TenutoError) as found:
            read(f"{folder}/{name}.safetensors")
        said = str(found.value)
        assert said.startswith(f"ComfyUI cannot load {folder}/{name}") and "\n" not in said
        assert str(folders) not in said


def test_another_file_is_another_input(folders: Path) -> None:
    from comfy_nodes.loader import OF_FILE, Loader

    place = folders / "models" / "checkpoints" / "a.safetensors"
    place.write_bytes(b"one")
    given = {"model": "checkpoints/a.safetensors", "artifact": OF_FILE}
    before = Loader.fingerprint_inputs(**given, speedup=2.0)
    assert before == Loader.fingerprint_inputs(**given)
    place.write_bytes(b"another")
    assert before != Loader.fingerprint_inputs(**given)
