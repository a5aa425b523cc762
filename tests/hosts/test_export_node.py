"""Tenuto Export in the real ComfyUI: its file is loaded, listed and applied there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto import Artifact, describe, schemes
from tenuto.artifact.export import export, exported_facts, read_exported
from tenuto.errors import TenutoError
from tenuto.runtime import Patches
from tenuto.sampling import OutputKernel

SAID = " [exported: cache schedule, forecast]"


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's folders, all of them below one: models/tenuto, models and output."""
    import folder_paths

    before = dict(folder_paths.folder_names_and_paths)
    known = ("tenuto", "diffusion_models", "checkpoints")
    output, models = folder_paths.get_output_directory(), tmp_path / "models"
    folder_paths.set_output_directory(str(tmp_path / "output"))
    for name in known:
        (models / name).mkdir(parents=True)
        places = [str(models / name)]
        if name == "diffusion_models":  # as ComfyUI's main.py has it
            places.append(str(tmp_path / "output" / name))
            (tmp_path / "output" / name).mkdir(parents=True)
        folder_paths.folder_names_and_paths[name] = (places, {".safetensors"})
        folder_paths.filename_list_cache.pop(name, None)
    yield tmp_path
    folder_paths.set_output_directory(output)
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(before)
    for name in known:
        folder_paths.filename_list_cache.pop(name, None)


def artifact_of(model: Any, family: str) -> Artifact:
    """fp8 codes of a diffusers model, a cache schedule and a forecast; not calibrated."""
    from tenuto.artifact.host_names import canonicalized
    from tenuto.model import layers
    from tenuto.numerics import QTensor

    ranged = (0.9, 0.7, 0.5, 0.3, 0.1) if family == "flux" else (900, 700, 500, 300, 100)
    times = [float(t) for t in ranged]
    made = Artifact.new(model, {"timesteps": times, "steps": 5, "guidance": 1.0})
    scheme = schemes.FP8
    blocks = tuple(f"{name}." for name in describe(model).blocks)
    made.header["schemes"], made.header["layers"] = {"fp8": scheme.to_json()}, {}
    for name, layer in layers(model):
        if name.startswith(blocks):
            codes = QTensor.nearest(layer.weight.detach(), scheme.weight)
            made.tensors |= {f"weights/{k}": v for k, v in codes.tensors(name).items()}
            shape = list(layer.weight.shape)
            made.header["layers"][name] = {"scheme": "fp8", "shape": shape}
    branches = [b.name for b in describe(model).branches]
    table = torch.ones(5, len(branches), dtype=torch.bool)
    table[1::2] = False
    made.header["route"] = {"policy": "x", "timesteps": times, "branches": branches}
    made.tensors["route/table"] = table
    root = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = (0.9, 0.7, 0.5, 0.3, 0.1)
    kernel = OutputKernel(root @ root.T, tuple(times), tuple(1 - r for r in rest), rest, "flow")
    return canonicalized(made.add_forecast(kernel), model)


def exported(
    model: Any, name: str = "one", scheme: str = "comfy: from artifact", **more: Any
) -> str:
    from comfy_nodes.export import Export

    return Export.execute(model, name, scheme, **more).args[0]


def older(name: str) -> str:
    """FLUX's norms were called so before ComfyUI 0.14, which later ones read too."""
    return f"{name[: -len('weight')]}scale" if name.endswith("_norm.weight") else name


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_what_is_exported_here_is_as_from_diffusers(
    folders: Path, in_comfy: Any, original: Any, family: str
) -> None:
    """The same tensors, bit for bit, and the schedule under canonical names."""
    from safetensors.torch import load_file

    made = artifact_of(original(family), family)
    text = exported(in_comfy(family), artifact=made)
    out = folders / "output" / "diffusion_models" / "one.safetensors"
    assert text.startswith("one.safetensors: ") and "float8_e4m3fn" in text
    assert str(folders) not in text
    export(original(family), "comfy", folders / "two.safetensors", artifact=made)
    here, there = load_file(out), load_file(folders / "two.safetensors")
    here = {name if name in there else older(name): tensor for name, tensor in here.items()}
    assert here.keys() >= there.keys()
    for name, tensor in there.items():
        assert here[name].dtype is tensor.dtype
        assert torch.equal(here[name].float(), tensor.float()), name
    (facts, found), (other, wanted) = map(read_exported, (out, folders / "two.safetensors"))
    assert facts["model_class"] == other["model_class"] == type(original(family)).__name__
    for key in ("route", "forecast", "in_float", "schedule"):
        assert found.header[key] == wanted.header[key], key
    assert torch.equal(found.tensors["route/table"], wanted.tensors["route/table"])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_file_is_loaded_listed_and_applied(
    folders: Path, in_comfy: Any, from_file: Any, original: Any, prompts: Any, family: str
) -> None:
    """By the host's own loader; its schedule reuses, its forecast skips, on the rounded model."""
    import comfy.sample
    from comfy.model_patcher import ModelPatcher

    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.artifacts import names
    from comfy_nodes.nodes import LoadArtifact

    exported(in_comfy(family), artifact=artifact_of(original(family), family))
    (name,) = names()
    assert name == f"diffusion_models/one.safetensors{SAID}"
    assert LoadArtifact.validate_inputs(name) is True
    found, text = LoadArtifact.execute(name).args
    assert "cache schedule: 40%" in text and "exported as comfy, for ComfyUI >= 0.3.68" in text
    host = from_file(family, folders / "output" / "diffusion_models" / "one.safetensors")
    cpu = torch.device("cpu")
    model = ModelPatcher(host, load_device=cpu, offload_device=cpu)
    for patches in (
        Patches(found, weights=False),
        Patches(found, weights=False, route=False, speedup=2.0),
    ):
        made = ComfyUI().install(model, patches)
        text, empty = prompts([1]), torch.zeros(1, 16, 8, 8)
        given = [[text, {"pooled_output": text[:, 0].clone()}]]
        noise = comfy.sample.prepare_noise(empty, 3, None)
        latent = comfy.sample.sample(
            made.handle, noise, 10, 1.0, "euler", "simple", given, given, empty, disable_pbar=True,
            seed=3,
        )  # fmt: skip
        (part,) = made.parts
        last = part.last
        assert int(last.reused.sum()) > 0 and latent.isfinite().all()
        assert last.forecast == (patches.speedup is not None)
        made.detach()
    other = copy.deepcopy(found)
    other.header["in_float"] = {k: [v + 1 for v in x] for k, x in other.header["in_float"].items()}
    with pytest.raises(TenutoError, match="of another model"):
        ComfyUI().install(model, Patches(other, weights=False))


def test_a_file_in_either_folder_and_its_name(folders: Path, original: Any, in_comfy: Any) -> None:
    """Exported models bring what they say; others are not listed, artifacts as ever."""
    from comfy_nodes.artifacts import loaded, names, path_of

    made = artifact_of(original("sd3"), "sd3")
    made.save(folders / "models" / "tenuto" / "a.safetensors")
    exported(in_comfy("sd3"), artifact=made)
    exported(in_comfy("sd3"), "two", "gguf: q8_0", artifact=made)
    exported(in_comfy("sd3"), "bare", "comfy: w8a8")
    (folders / "models" / "diffusion_models" / "junk.safetensors").write_bytes(b"junk")
    place = folders / "output" / "diffusion_models"
    (place / "one.safetensors").rename(folders / "models" / "tenuto" / "e.safetensors")
    prefix, whole = "model.diffusion_model.", folders / "models" / "checkpoints" / "c.safetensors"
    export(original("sd3"), "comfy", whole, artifact=made, prefix=prefix)
    found = names()
    assert found == [
        "a.safetensors", f"e.safetensors{SAID}", f"diffusion_models/two.gguf{SAID}",
        f"checkpoints/c.safetensors{SAID}",
    ]  # fmt: skip
    assert loaded(found[3])[0].header == loaded(found[1])[0].header
    assert not loaded("a.safetensors")[1] and loaded(found[1])[1] and loaded(found[2])[1]
    assert path_of("e.safetensors [exported: something else]") == path_of("e.safetensors")
    assert path_of("diffusion_models/../tenuto/../../x") is None
    with pytest.raises(TenutoError, match="without a cache schedule or a forecast"):
        loaded("diffusion_models/bare.safetensors")
    with pytest.raises(TenutoError, match="There is no artifact called"):
        loaded(f"diffusion_models/none.safetensors{SAID}")


def test_what_cannot_be_exported_is_one_sentence(
    folders: Path, in_comfy: Any, original: Any
) -> None:
    """Before anything is written."""
    from comfy_nodes.export import Export

    model, made = in_comfy("sd3"), artifact_of(original("sd3"), "sd3")
    place = folders / "output" / "diffusion_models"
    assert Export.validate_inputs("../x") is not True and Export.validate_inputs("x") is True
    with pytest.raises(TenutoError, match="Connect an artifact"):
        exported(model)
    with pytest.raises(TenutoError, match="The artifact is for a SD3"):
        exported(in_comfy("flux"), artifact=made)
    changed = model.clone()
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    changed.add_patches({key: ("diff", (torch.zeros(1),))})
    with pytest.raises(TenutoError, match="with the LoRA merged"):
        exported(changed, artifact=made)
    from comfy_nodes.adapter import ComfyUI

    quantized = ComfyUI().install(model, Patches(scheme=schemes.W8A8)).handle
    with pytest.raises(TenutoError, match="without Tenuto Quantize Model"):
        exported(quantized, artifact=made)
    with pytest.raises(TenutoError, match="quantized convolutions wrongly"):
        exported(in_comfy("unet"), scheme="comfy: w8a8")
    narrow = in_comfy("sd3")
    narrow.model.diffusion_model.to(torch.float8_e4m3fn)
    with pytest.raises(TenutoError, match="already quantized"):
        exported(narrow, scheme="comfy: w8a8")
    assert not list(place.iterdir())
    (place / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(TenutoError, match="that Tenuto did not export"):
        exported(model, "mine", artifact=made)
    assert (place / "mine.safetensors").read_bytes() == b"mine"


def test_an_exported_model_is_not_exported_again(
    folders: Path, in_comfy: Any, from_file: Any
) -> None:
    from comfy.model_patcher import ModelPatcher

    exported(in_comfy("sd3"), scheme="comfy: fp8")
    place = folders / "output" / "diffusion_models" / "one.safetensors"
    cpu = torch.device("cpu")
    again = ModelPatcher(from_file("sd3", place), load_device=cpu, offload_device=cpu)
    before = place.read_bytes()
    with pytest.raises(TenutoError, match="already quantized"):
        exported(again, scheme="comfy: w8a8")
    assert place.read_bytes() == before and exported_facts(place) is not None


def test_cancel_leaves_no_file(folders: Path, in_comfy: Any, monkeypatch: Any) -> None:
    """ComfyUI's own interrupt, in the midst of it; the same name works after it."""
    import comfy.model_management as management
    import comfy.utils

    seen = list[int]()

    def update(self: Any, done: int, total: Any = None, preview: Any = None) -> None:
        seen.append(done)
        if len(seen) == 5:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    with pytest.raises(management.InterruptProcessingException):
        exported(in_comfy("sd3"), scheme="comfy: w8a8")
    place = folders / "output" / "diffusion_models"
    assert len(seen) == 5 and not list(place.iterdir())
    exported(in_comfy("sd3"), scheme="comfy: w8a8")
    assert {p.name for p in place.iterdir()} == {
        "one.safetensors", "one.safetensors.tenuto.json",
    }  # fmt: skip
