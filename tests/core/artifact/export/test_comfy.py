"""Files of ComfyUI's `comfy_quant`: exact, under the host's names, and never silently wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.artifact.export import export, read_companion
from tenuto.artifact.export.comfy_layouts import FP8, INT8
from tenuto.artifact.export.comfy_reader import comfy_file
from tenuto.errors import ArtifactError, Cancelled, TenutoError
from tenuto.model import host_map_of, swapped
from tenuto.numerics import QTensor, float8

QKV = "double_blocks.0.img_attn.qkv"
PARTS = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def codes(artifact: Any, name: str) -> QTensor:
    """The codes of a layer of an artifact."""
    from tenuto.numerics import Scheme

    facts = artifact.header["layers"][name]
    form = Scheme.from_json(artifact.header["schemes"][facts["scheme"]]).weight
    return QTensor.from_tensors(artifact.section("weights"), name, facts["shape"], form)


@pytest.fixture(scope="module")
def int8(tiny: Any, rounded: Any, tmp_path_factory: Any) -> tuple[Path, Any, Any]:
    """(file, artifact, report) of W8A8 codes in a tiny FLUX."""
    artifact, out = rounded("flux"), tmp_path_factory.mktemp("int8") / "flux.safetensors"
    return out, artifact, export(tiny("flux"), "comfy", out, artifact=artifact)


def test_codes_of_8_bits_stay(int8: Any, tiny: Any, contents: Any, mark: Any) -> None:
    """Fused row by row: each code and scale is the artifact's, and so is the weight."""
    out, artifact, report = int8
    tensors, _ = contents(out)
    wanted = [codes(artifact, name) for name in PARTS]
    assert torch.equal(tensors[f"{QKV}.weight"], torch.cat([q.qdata for q in wanted]))
    assert torch.equal(tensors[f"{QKV}.weight_scale"][:, 0], torch.cat([q.scale for q in wanted]))
    assert mark(tensors[f"{QKV}.comfy_quant"]) == {"format": INT8}
    with comfy_file(out) as file:
        file.check()
        for layer in report.layers:
            parts = host_map_of(tiny("flux")).layers()[layer]
            dense = torch.cat([codes(artifact, part).dequantize() for part in parts])
            assert torch.equal(file.decode(layer), dense), layer
    assert report.kept == len(report.layers) == len(file.layers) > 8
    assert report.host == "ComfyUI >= 0.27" and set(report.layers.values()) == {INT8}


def test_all_else_is_bf16_under_the_hosts_names(int8: Any, tiny: Any, contents: Any) -> None:
    out, _, report = int8
    tensors, _ = contents(out)
    model = tiny("flux")
    values, places = model.state_dict(), host_map_of(model).places
    assert {p.name for p in places.values()} <= set(tensors)
    for name, place in places.items():
        if place.name.removesuffix(".weight") in report.layers:
            continue
        found = tensors[place.name]
        assert found.dtype is torch.bfloat16, name
        found = found[slice(*place.rows)] if found.ndim else found
        found = swapped(found) if place.swapped else found
        assert torch.equal(found, values[name].bfloat16()), name
    assert places["norm_out.linear.weight"].swapped, "else nothing was swapped"


def test_first_and_last_layers_stay_in_16_bits(int8: Any, contents: Any) -> None:
    """Hosts read sizes from them; the artifact has codes of them all the same."""
    out, artifact, report = int8
    tensors, _ = contents(out)
    assert "x_embedder" in artifact.header["layers"]
    for name in ("img_in", "txt_in", "final_layer.linear", "double_blocks.0.img_mod.lin"):
        assert tensors[f"{name}.weight"].dtype is torch.bfloat16
    assert any("first, last and embedding" in line for line in report.dropped)


def test_both_places_say_the_same(int8: Any, contents: Any, mark: Any) -> None:
    out, _, report = int8
    tensors, metadata = contents(out)
    said = json.loads(metadata["_quantization_metadata"])
    assert said["format_version"] == "1.0" and set(said["layers"]) == set(report.layers)
    for layer, facts in said["layers"].items():
        assert mark(tensors[f"{layer}.comfy_quant"]) == facts
    about = json.loads(metadata["tenuto"])
    assert about["host"] == report.host and about["family"] == "flux"


def test_names_with_a_prefix(tiny: Any, contents: Any, tmp_path: Path) -> None:
    out, prefix = tmp_path / "flux.safetensors", "model.diffusion_model."
    export(tiny("flux"), "comfy", out, scheme="w8a8", prefix=prefix)
    tensors, metadata = contents(out)
    assert all(name.startswith(prefix) for name in tensors)
    assert all(
        n.startswith(prefix) for n in json.loads(metadata["_quantization_metadata"])["layers"]
    )
    for wrong in ("model", "a b.", "../."):
        with pytest.raises(TenutoError, match="prefix"):
            export(tiny("flux"), "comfy", out, scheme="w8a8", prefix=wrong)


def test_fp8_with_the_range_of_its_inputs(
    tiny: Any, rounded: Any, contents: Any, tmp_path: Path
) -> None:
    """One scale of the weight, found anew; one of the inputs: the largest of all steps / 448."""
    artifact, out = rounded("flux", "FP8_STATIC"), tmp_path / "flux.safetensors"
    report = export(tiny("flux"), "comfy", out, artifact=artifact)
    tensors, _ = contents(out)
    scale = tensors[f"{QKV}.weight_scale"]
    assert scale.shape == () and tensors[f"{QKV}.weight"].dtype is torch.float8_e4m3fn
    values = tiny("flux").state_dict()
    whole = torch.cat([values[f"{name}.weight"] for name in PARTS])
    assert float(scale) == pytest.approx(float(whole.abs().max()) / 448)
    read = tensors[f"{QKV}.weight"].float() * scale
    assert (read - whole).abs().max() <= whole.abs().max() / 16
    assert torch.equal(read, float8.values(float8.levels(whole / scale)) * scale)
    wanted = artifact.tensors[f"ranges/{PARTS[0]}.scale"].max()
    assert torch.equal(tensors[f"{QKV}.input_scale"], wanted)
    assert report.kinds == {FP8: len(report.layers)} and report.host == "ComfyUI >= 0.3.68"
    assert any("rounded anew" in note for note in report.notes)


def test_fp8_without_a_range_multiplies_in_16_bits(
    tiny: Any, contents: Any, mark: Any, tmp_path: Path
) -> None:
    """A host takes a missing range for 1, which is noise: the file forbids it, or has recorded."""
    model, out = tiny("flux"), tmp_path / "flux.safetensors"
    report = export(model, "comfy", out, scheme="fp8")
    tensors, _ = contents(out)
    assert not [name for name in tensors if name.endswith("input_scale")]
    assert mark(tensors[f"{QKV}.comfy_quant"])["full_precision_matrix_mult"] is True
    assert any("no range of their inputs" in note for note in report.notes)
    report = export(model, "comfy", out, scheme="fp8", inputs={PARTS[0]: 3.0, PARTS[1]: 7.0})
    tensors, _ = contents(out)
    assert float(tensors[f"{QKV}.input_scale"]) == pytest.approx(7 / 448)
    assert "full_precision_matrix_mult" not in mark(tensors[f"{QKV}.comfy_quant"])


def test_inputs_that_grow_from_step_to_step_are_said(
    tiny: Any, rounded: Any, tmp_path: Path
) -> None:
    artifact = rounded("flux", "FP8_STATIC")
    for name in PARTS:
        artifact.tensors[f"ranges/{name}.scale"][0] *= 100
    report = export(tiny("flux"), "comfy", tmp_path / "f.safetensors", artifact=artifact)
    assert any(QKV in note and "times as large" in note for note in report.notes)


def test_what_shares_a_layer_there_must_be_alike(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    artifact, out = rounded("flux"), tmp_path / "flux.safetensors"
    del artifact.header["layers"][PARTS[1]]
    with pytest.raises(ArtifactError, match="quantize what shares an input alike"):
        export(tiny("flux"), "comfy", out, artifact=artifact)
    assert not list(tmp_path.iterdir())


def test_the_schedule_travels(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    """In the header and beside the file, which it knows by its content."""
    from tenuto import Artifact, describe

    model, artifact = tiny("flux"), rounded("flux")
    branches = [branch.name for branch in describe(model).branches]
    times = artifact.header["schedule"]["timesteps"]
    table = torch.rand(len(times), len(branches)) < 0.5
    route = Artifact({**artifact.header, "route": {"timesteps": times, "branches": branches}})
    route.header.pop("layers")
    route.tensors["route/table"] = table
    out = tmp_path / "flux.safetensors"
    report = export(model, "comfy", out, artifact=artifact | route)
    facts, found = read_companion(report.files[1])
    assert facts["weights"] == out.name and found is not None
    assert torch.equal(found.tensors["route/table"], table)
    assert found.header["route"]["branches"] == branches
    out.write_bytes(out.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="belongs to another"):
        read_companion(report.files[1])


def without(end: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(f".{end}")]:
            del tensors[name]
        if end == "comfy_quant":
            metadata.pop("_quantization_metadata")

    return change


def said(facts: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        raw = json.dumps(facts).encode()
        tensors[f"{QKV}.comfy_quant"] = torch.tensor(list(raw), dtype=torch.uint8)
        metadata.pop("_quantization_metadata")

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors[f"{QKV}.{name}"] = make(tensors[f"{QKV}.{name}"])

    return change


def renamed(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Bare names in the header over names with a prefix: one loader makes noise of it."""
    for name in list(tensors):
        tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("comfy_quant"), "nothing says of which format"),
        (without("weight_scale"), "has no weight_scale"),
        (put("weight_scale", lambda t: t[:, 0]), "wrong type or shape"),
        (put("weight_scale", lambda t: t.half()), "wrong type or shape"),
        (put("weight_scale", lambda t: t * float("nan")), "not finite"),
        (put("weight", lambda t: t.view(torch.uint8)), "are torch.uint8"),
        (put("weight", lambda t: t[:, :, None, None].clone()), "is a convolution"),
        (said({"format": "int9"}), "no format that ComfyUI knows"),
        (said({"format": None}), "no format that ComfyUI knows"),
        (said(["int8_tensorwise"]), "no object"),
        (said({"format": INT8, "convrot": True, "convrot_groupsize": 128}), "groups of 128"),
        (said({"format": INT8, "convrot": True}), "groups of 256"),
        (said({"format": FP8, "full_precision_matrix_mult": True}), "are torch.int8"),
        (said({"format": FP8}), "no input_scale, which hosts take for 1"),
        (renamed, "not what its tensors say"),
    ],
)
def test_what_a_host_would_read_wrongly_is_refused(
    int8: Any, damaged: Any, change: Any, complaint: str
) -> None:
    path = damaged(int8[0], change)
    with pytest.raises(ArtifactError, match=complaint), comfy_file(path) as file:
        file.check()
        for layer in (f"{p}{QKV}" for p in ("", "model.diffusion_model.")):
            if f"{layer}.weight" in file.names:
                file.decode(layer)


def test_a_wrong_layout_leaves_no_file(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The reader, not the writer, has the last word."""
    from dataclasses import replace

    from tenuto.artifact.export import comfy, comfy_layouts

    def off(weight: Tensor, found: QTensor | None) -> comfy_layouts.Coded:
        coded = comfy_layouts._int8(weight, found)
        coded.tensors["weight"][0, 0] += 1 - 2 * (coded.tensors["weight"][0, 0] > 0)
        return coded

    wrong = replace(comfy_layouts.LAYOUTS["w8a8"], coded=off)
    monkeypatch.setitem(comfy.LAYOUTS, "w8a8", wrong)
    with pytest.raises(TenutoError, match="reads differently"):
        export(tiny("flux"), "comfy", tmp_path / "flux.safetensors", scheme="w8a8")
    assert not list(tmp_path.iterdir())


def test_stopped_it_leaves_no_file(tiny: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int, note: str) -> None:
        seen.append((done, total))
        if done > 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        export(tiny("flux"), "comfy", tmp_path / "f.safetensors", scheme="w8a8", on_progress=stop)
    assert not list(tmp_path.iterdir()) and seen[0][1] > 5
