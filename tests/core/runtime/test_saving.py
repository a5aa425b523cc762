"""What leaves an attached model is whole or refused: files of its weights, pickles of it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tenuto as tn
from tenuto.calibration.quantize_encoder import quantize_encoder
from tenuto.errors import ModelError

STEPS = 2


@pytest.fixture(scope="module")
def made(tiny_pixart_folder: Path) -> tn.Artifact:
    """Codes, a table of the time path, a cache schedule and a quantized text encoder."""
    pipe = load(tiny_pixart_folder)
    trajectory = tn.record(pipe, prompts=["a red dog"], steps=STEPS, guidance=2.0)
    artifact = tn.quantize(pipe, tn.schemes.W8A8, trajectory, temporal="table")
    artifact |= quantize_encoder(pipe, "w8", ["a red dog"], method="rtn", steps=STEPS)
    return artifact | tn.train_router(pipe, trajectory, reuse=0.3, iterations=1)


def load(folder: Path) -> Any:
    from tenuto.sampling.loading import load as load_pipeline

    return load_pipeline(str(folder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the files under `folder`, by file and name."""
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def test_save_pretrained_writes_the_float_model(
    tiny_pixart_folder: Path, made: tn.Artifact, tmp_path: Path
) -> None:
    """Over a user's only copy too: the same names and numbers as without the artifact."""
    pipe = load(tiny_pixart_folder)
    pipe.save_pretrained(tmp_path / "before")
    state = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    with tn.attach(pipe, made):
        pipe.save_pretrained(tmp_path / "attached")
        pipe.transformer.save_pretrained(tmp_path / "alone")
        assert same(pipe.transformer.state_dict(), state)
        twin = copy.deepcopy(pipe.transformer)
        assert same(twin.state_dict(), state)
    before = weights(tmp_path / "before")
    assert len(before) > 100 and same(weights(tmp_path / "attached"), before)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "before" / "transformer"))


def test_what_was_released_is_not_saved(
    tiny_pixart_folder: Path, made: tn.Artifact, tmp_path: Path
) -> None:
    pipe = load(tiny_pixart_folder)
    tn.attach(pipe, made).release()
    for part in (pipe, pipe.transformer, pipe.text_encoder):
        with pytest.raises(ModelError, match="load the model again"):
            part.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cast_model_is_saved_as_cast(tiny_pixart_folder: Path, made: tn.Artifact) -> None:
    pipe = load(tiny_pixart_folder)
    with tn.attach(pipe, made):
        pipe.transformer.to(torch.bfloat16)
        assert {t.dtype for t in pipe.transformer.state_dict().values()} == {torch.bfloat16}


def test_an_attached_model_is_not_pickled(tiny_pixart_folder: Path, made: tn.Artifact) -> None:
    pipe = load(tiny_pixart_folder)
    with tn.attach(pipe, made), pytest.raises(ModelError, match="detach"):
        torch.save(pipe.transformer, io.BytesIO())
    torch.save(pipe.transformer, io.BytesIO())
