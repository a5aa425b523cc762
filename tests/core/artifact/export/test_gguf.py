"""GGUF: calibrated 4-bit codes stay, all else is rounded to the blocks' own grid, exactly."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto.artifact.export import export, lines_of
from tenuto.artifact.export.gguf_blocks import KINDS, Blocks, kept, nearest, unpacked
from tenuto.artifact.export.gguf_file import read_gguf
from tenuto.artifact.export.size import size_note
from tenuto.errors import ArtifactError, TenutoError
from tenuto.model import host_map_of
from tenuto.numerics import Format, QTensor, Scheme

BEST = {"q8_0": 0.006, "q4_0": 0.10, "q4_1": 0.09, "q5_0": 0.05, "q5_1": 0.045}


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight_of(path: Path, name: str) -> torch.Tensor:
    """A quantized tensor of a file, by the reader's code."""
    _, entries = read_gguf(path)
    entry = entries[name]
    kind = next(k for k in KINDS.values() if k.number == entry.type)
    size = torch.Size(entry.shape).numel() // 32 * kind.bytes
    raw = path.read_bytes()[entry.offset : entry.offset + size]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return unpacked(data.view(-1, kind.bytes), kind).view(entry.shape)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_packed_is_read(name: str) -> None:
    """Every code, with ranges of any size, zeros and one that fp16 makes nothing of."""
    kind, weight = KINDS[name], noise(8, 96)
    weight[0] *= 1e-3
    weight[1] = 0
    weight[2] *= 1e-8
    weight[3] = weight[3].abs() + 1
    blocks = nearest(weight, kind)
    packed = blocks.packed()
    assert packed.shape == (24, kind.bytes) and packed.dtype is torch.uint8
    assert torch.equal(unpacked(packed, kind).view(8, 96), blocks.weight((8, 96)))
    assert torch.equal(blocks.weight((8, 96))[1], torch.zeros(96))
    every = torch.arange(-127, 128) if kind.bits == 8 else torch.arange(2**kind.bits)
    q = every.repeat(32).view(-1, 32)
    ones = torch.full((len(q), 1), 0.5).half()
    blocks = Blocks(kind, q.float(), ones, ones * kind.minimum)
    wanted = (q - kind.zero) * 0.5 + 0.5 * kind.minimum
    assert torch.equal(unpacked(blocks.packed(), kind), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_rounding_is_as_good_as_it_gets(name: str) -> None:
    """On noise; and moving any code by one makes it worse."""
    kind, weight = KINDS[name], noise(16, 256, 1)
    blocks = nearest(weight, kind)
    gap = (blocks.weight((16, 256)) - weight).norm() / weight.norm()
    assert gap < BEST[name]
    low, high = (-127, 127) if kind.bits == 8 else (0, 2**kind.bits - 1)
    error = (blocks.weight((16, 256)) - weight).abs().view(-1, 32)
    for step in (-1, 1):
        moved = Blocks(kind, (blocks.q + step).clamp(low, high), blocks.d, blocks.m)
        assert ((moved.weight((16, 256)) - weight).abs().view(-1, 32) >= error - 1e-6).all()


def test_codes_of_four_bits_are_those_of_q4_1() -> None:
    """Groups of 32 or 64 columns, or a row: the codes stay, d and m are rounded to fp16."""
    weight = noise(6, 128, 2) * 0.05
    for group in (32, 64, 0):
        form = Format(4, symmetric=False, ranges="mse", group=group)
        q = QTensor.nearest(weight, form)
        blocks = kept(q)
        assert blocks is not None
        wide = group or 128
        raw = q.levels().float().view(6, -1, wide)
        zero = q.zero_point.float().view(6, -1, 1)  # type: ignore[union-attr]
        assert torch.equal(blocks.q.view(6, -1, wide), raw + zero)
        dense = q.dequantize()
        gap = (blocks.weight((6, 128)) - dense).abs().max()
        assert 0 < gap < 2e-3 * dense.abs().max()
    for other in (Format(8), Format(6), Format(4, symmetric=False, ranges="mse", group=16)):
        assert kept(QTensor.nearest(weight, other)) is None
    assert kept(QTensor.nearest(weight * 1e-5, Format(4, symmetric=False, group=32))) is None


def test_a_calibrated_model(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    """Its own codes, fused as the host has them; the header names the model."""
    artifact, out = rounded("flux", "W4A8"), tmp_path / "flux.gguf"
    model = tiny("flux")
    report = export(model, "gguf", out, artifact=artifact)
    values, entries = read_gguf(out)
    assert values["general.architecture"] == "flux"
    assert values["general.file_type"] == 3 and values["general.quantization_version"] == 2
    assert report.kept == len(report.layers) and report.kinds == {"q4_1": len(report.layers)}
    keys = host_map_of(model)
    for layer in report.layers:
        dense = []
        for name in keys.layers()[layer]:
            facts = artifact.header["layers"][name]
            form = Scheme.from_json(artifact.header["schemes"][facts["scheme"]]).weight
            known = artifact.section("weights")
            dense.append(QTensor.from_tensors(known, name, facts["shape"], form).dequantize())
        wanted = torch.cat(dense)
        gap = (weight_of(out, f"{layer}.weight") - wanted).abs().max()
        assert gap < 2e-3 * wanted.abs().max(), layer
    assert {place.name for place in keys.places.values()} == set(entries)
    assert entries["double_blocks.0.img_attn.norm.key_norm.scale"].type == 0
    assert entries["img_in.weight"].type in (0, 1)


def test_codes_of_eight_bits_are_rounded_anew(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    """Q8_0 has a range per 32 weights: nearer to the model than codes of a range a row."""
    model, artifact, out = tiny("flux"), rounded("flux", "W8A8"), tmp_path / "flux.gguf"
    report = export(model, "gguf", out, artifact=artifact)
    assert report.kinds == {"q8_0": len(report.layers)} and report.kept == 0
    name = "transformer_blocks.0.ff.net.2"
    weight = model.state_dict()[f"{name}.weight"]
    found = weight_of(out, "double_blocks.0.img_mlp.2.weight")
    per_row = QTensor.nearest(weight, Format(8)).dequantize()
    assert (found - weight).norm() < (per_row - weight).norm()


def test_a_file_that_is_no_smaller_says_why(tiny: Any, rounded: Any, tmp_path: Path) -> None:
    """A tiny model has little in low bits; what its bytes are is said, and adds up."""
    model, artifact, out = tiny("flux"), rounded("flux", "W8A8"), tmp_path / "flux.gguf"
    report = export(model, "gguf", out, artifact=artifact)
    assert report.after < report.before and not any("no smaller" in n for n in report.notes)
    said = size_note(replace(report, before=report.after))
    units = {"KiB": 2**10, "MiB": 2**20}
    parts = [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) ([KM]iB)", said)]
    assert len(parts) == 4 and sum(parts) == pytest.approx(report.after, rel=0.05)
    one = export(tiny("flux"), "comfy", tmp_path / "x.safetensors", artifact=artifact)
    two = export(tiny("unet"), "gguf", tmp_path / "x.gguf", artifact=rounded("unet", "W8A8"))
    for found in (one, two):
        assert any("no smaller" in line for line in lines_of(found)) == (
            found.after >= found.before
        )
    assert two.after >= two.before
    copy = export(model, "float", tmp_path / "y.safetensors", artifact=artifact)
    assert not any("no smaller" in note for note in copy.notes)  # it is meant to be as large


def test_five_dimensions_are_told_beside(tmp_path: Path) -> None:
    """ggml's tensors have four: the patches of a video model keep their shape in the header."""
    from tests.core import tiny_pipelines

    model, out = tiny_pipelines.wan_denoiser(), tmp_path / "wan.gguf"
    shape = model.state_dict()["patch_embedding.weight"].shape
    report = export(model, "gguf", out, scheme="q8_0")
    values, entries = read_gguf(out)
    assert values["comfy.gguf.orig_shape.patch_embedding.weight"] == list(shape)
    assert entries["patch_embedding.weight"].shape == (shape[0], shape[1:].numel())
    assert any("no multiple of 32" in line for line in report.dropped), "a width of 24"


def test_what_no_program_reads_is_refused(tiny: Any, tmp_path: Path) -> None:
    for kind, sentence in (("pixart", "reads pixart from GGUF"), ("dit", "under which names")):
        with pytest.raises(TenutoError, match=sentence):
            export(tiny(kind), "gguf", tmp_path / "x.gguf", scheme="q8_0")
    model = tiny("flux")
    model.transformer_blocks[0].norm1.linear.weight.data[0, 0] = 1e5
    with pytest.raises(TenutoError, match="values that fp16 has not"):
        export(model, "gguf", tmp_path / "x.gguf", scheme="q8_0")
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_no_gguf(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "flux.gguf"
    export(tiny("flux"), "gguf", out, scheme="q5_1")
    raw = out.read_bytes()
    for piece in (raw[:-40], raw[:300], b"GGML" + raw[4:], raw[:8] + b"\xff" * 8 + raw[16:], b""):
        out.write_bytes(piece)
        with pytest.raises(ArtifactError, match="not a GGUF file"):
            read_gguf(out)
