"""Models larger than memory: a block at a time has its weights, and the artifact is the same."""

from __future__ import annotations

import copy
from collections import namedtuple
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import tenuto as tn
from tenuto.calibration import spared
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.by_block import by_block, filled, held
from tenuto.calibration.presets import recipe_for
from tenuto.cli import commands
from tenuto.errors import Cancelled, ModelError
from tenuto.model import Leave, denoiser_of, describe, tensors_in, watched
from tenuto.numerics import QTensor
from tenuto.sampling import low_memory
from tenuto.sampling.loading import load, on_disk
from tests.core import tiny_pipelines as small

KINDS = ("flux2", "sd")
CALL = {
    "flux2": small.SMALL | {"text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 32},
    "sd": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines in diffusers' format, their denoisers in several files, in bf16."""
    made = {"flux2": small.flux2(), "sd": small.stable_diffusion("StableDiffusionPipeline")}
    found = {}
    for kind, pipe in made.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        nn.Module.to(denoiser_of(pipe), torch.bfloat16)
        pipe.save_pretrained(found[kind], max_shard_size="100KB")
    return found


def there(module: nn.Module) -> int:
    """How many weights have values."""
    return sum(p.numel() for p in module.parameters() if not p.is_meta)


def most_at_once(model: nn.Module, inputs: dict[str, Any]) -> int:
    """The largest number of weights with values while `model` computes."""
    most = 0

    def count(name: str, args: Any, kwargs: Any) -> None:
        nonlocal most
        most = max(most, there(model))

    with torch.no_grad(), watched(model, [n for n, _ in model.named_modules()], before=count):
        model(**inputs)
    return most


def quantized(kind: str, folder: Path, low: bool, out: Path, **options: Any) -> bytes:
    """The artifact's bytes of a brief calibration."""
    pipe = load(str(folder), low_memory=low)
    assert on_disk(pipe) == low
    trajectory = tn.record(pipe, ["a dog", "two cats"], steps=2, call=CALL[kind])
    backbone = describe(denoiser_of(pipe))
    recipe = recipe_for(tn.schemes.W4A8_STATIC, backbone, GPTQ(rows=8, sweeps=1))
    made = tn.quantize(pipe, recipe, trajectory, **options)
    found = made.header.pop("check")  # of a model on disk it is of the weights alone
    assert (found.get("inputs") == "float") == low
    made.save(out)
    return out.read_bytes()


# --- the copy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixart", "dit", "unet", "home", "sd3", "flux"])
def test_the_copy_computes_the_same_with_few_weights(tiny: Any, recorded: Any, kind: str) -> None:
    """DiT's model calls a part of its first block itself."""
    denoiser, call = tiny(kind), recorded(kind).calls[0]
    blocks = describe(denoiser).blocks
    model = by_block(denoiser, blocks, "cpu")
    outside = there(model)
    sizes = [there(denoiser.get_submodule(block)) for block in blocks]
    assert outside == there(denoiser) - sum(sizes)
    most = most_at_once(model, call.inputs)
    assert outside < most <= outside + max(sizes)
    assert there(model) == outside, "all are given up"
    with torch.no_grad():
        found, wanted = (next(tensors_in(m(**call.inputs))) for m in (model, denoiser))
    assert torch.equal(found, wanted)


def test_a_block_that_is_held(tiny: Any) -> None:
    denoiser = tiny("pixart")
    model = by_block(denoiser, describe(denoiser).blocks, "cpu")
    name, outside = "transformer_blocks.1", there(model)
    block, own = model.get_submodule(name), denoiser.get_submodule(name)
    with held(block), held(block):
        twin = copy.deepcopy(block)
        for mine, theirs in zip(block.parameters(), own.parameters(), strict=True):
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
            mine.data.zero_()
        assert there(model) == outside + there(own)
    assert there(model) == outside and there(twin) == there(own), "a copy keeps what it has"
    with held(block):
        assert all(map(torch.equal, block.parameters(), own.parameters())), "changes are forgotten"
    part = filled(model, f"{name}.ff")
    assert there(part) == there(own.ff) and part is not model.get_submodule(f"{name}.ff")
    assert filled(model, "proj_out") is model.proj_out


def test_a_call_that_is_left_gives_up_its_weights(tiny: Any, recorded: Any) -> None:
    denoiser, call = tiny("pixart"), recorded("pixart").calls[0]
    model = by_block(denoiser, describe(denoiser).blocks, "cpu")
    outside = there(model)

    def leave(name: str, args: Any, kwargs: Any) -> None:
        assert there(model) > outside
        raise Leave

    with watched(model, ["transformer_blocks.1.ff.net.2"], before=leave), suppress(Leave):
        model(**call.inputs)
    assert there(model) == outside


def test_codes_that_come_later_are_used(tiny: Any, recorded: Any) -> None:
    """Inputs of a block come from what is quantized before it."""
    denoiser, call = tiny("pixart"), recorded("pixart").calls[0]
    codes: dict[str, QTensor] = {}
    model = by_block(denoiser, describe(denoiser).blocks, "cpu", codes)
    name = "transformer_blocks.0.attn1.to_v"
    layer = denoiser.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    codes[name] = QTensor.nearest(layer.weight, tn.schemes.W4A8.weight)
    layer.weight.data = codes[name].dequantize()
    with torch.no_grad():
        found, wanted = (next(tensors_in(m(**call.inputs))) for m in (model, denoiser))
    assert torch.equal(found, wanted)


# --- from disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_artifact_is_the_same(folders: Any, kind: str, tmp_path: Path) -> None:
    """Cancelled in between and resumed, too; and no more than a block is in memory."""
    out, work = tmp_path / "a.safetensors", tmp_path / "work"
    wanted = quantized(kind, folders[kind], False, out)

    def stop(done: int, total: int, note: str) -> None:
        if done > total / 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        quantized(kind, folders[kind], True, out, work=work, on_progress=stop)
    assert len(list(work.glob("*.safetensors"))) > 1
    assert quantized(kind, folders[kind], True, out, work=work) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_on_disk(folders: Any, kind: str) -> None:
    pipes = [load(str(folders[kind]), low_memory=low) for low in (True, False)]
    low, whole = map(denoiser_of, pipes)
    calls = tn.record(pipes[1], ["a dog"], steps=1, call=CALL[kind]).calls
    sizes = [there(whole.get_submodule(block)) for block in describe(whole).blocks]
    assert there(low) == there(whole) - sum(sizes)
    assert most_at_once(low, calls[0].inputs) <= there(low) + max(sizes)
    with torch.no_grad():
        found, wanted = (next(tensors_in(m(**calls[0].inputs))) for m in (low, whole))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ModelError, match="offloaded until they are called"):
        tn.attach(pipes[0], tn.schemes.W8A8)


def test_large_text_encoders_too(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory, "LARGE", 0)
    folder = str(folders["flux2"])
    found = [load(folder, low_memory=True, encoders=e).text_encoder for e in (True, False)]
    assert [any(p.is_meta for p in encoder.parameters()) for encoder in found] == [True, False]
    with torch.no_grad():
        states = [encoder(torch.tensor([[5, 6, 7]])).logits for encoder in found]
    torch.testing.assert_close(*states)


def test_other_names_than_the_class_has(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipe = load(str(folders["sd"]))
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    known = load_file(file)
    known["old"] = known.pop("conv_in.weight")
    save_file(known, file)
    with pytest.raises(ModelError, match="only read as a whole"):
        load(str(tmp_path), low_memory=True)


@pytest.mark.parametrize(("free", "low"), [(1000, True), (2**40, False)])
def test_a_model_that_is_large_for_this_machine(
    folders: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, free: int, low: bool
) -> None:
    memory = namedtuple("memory", "available")(free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert on_disk(load(str(folders["sd"]), low_memory=None)) == low
    assert ("block by block" in caplog.text) == low


def test_the_command(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, compact too, and no model is put into memory to say how it runs."""
    monkeypatch.setattr(spared, "WORTH", 2.0)  # nothing stays in float: on disk it is not measured
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog\ntwo cats\n")
    for compact in (False, True):
        files = []
        for low in (True, False):
            out = tmp_path / f"{low}.safetensors"
            answer = commands.quantize(
                str(folders["sd"]), out=out, scheme="w8a8", steps=2, prompts=prompts,
                device="cpu", low_memory=low, compact=compact,
            )  # fmt: skip
            assert ("would be" in answer.text) == low == ("Here they run" not in answer.text)
            assert not out.with_suffix(".work").exists()
            made = tn.Artifact.load(out)
            del made.header["check"]  # of a model on disk it is of the weights alone
            made.save(out)
            files.append(out.read_bytes())
        assert files[0] == files[1]
