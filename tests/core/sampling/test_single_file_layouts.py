"""Real layouts of single files: SD 1.5, SDXL, Stable Diffusion 3 and 3.5, FLUX, tiny and random."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tenuto.model import Weights, denoiser_of
from tenuto.sampling.loading import load
from tenuto.sampling.single_file import pointed
from tenuto.sampling.single_file_folder import opened_folder
from tests.core import family_pipelines, single_files, tiny_pipelines


class Kind(NamedTuple):
    """mapped: whether diffusers cannot read one, or one so small, so that the key map does."""

    made: Callable[[], Any]
    file: Callable[[Any, Path], Path]
    mapped: bool = False


ALONE = {  # families that hosts have as denoisers alone, and whether diffusers cannot read them
    "flux2": True, "chroma": True, "qwen_image": True, "lumina2": True, "z_image": False,
    "wan": False, "hunyuan_image": True, "hunyuan_video": True, "pixart": True,
}  # fmt: skip
KINDS = {
    "sd15": Kind(
        lambda: tiny_pipelines.stable_diffusion("StableDiffusionPipeline"),
        single_files.stable_diffusion_file,
    ),
    "sdxl": Kind(single_files.sdxl, single_files.sdxl_file),
    "sd3": Kind(single_files.sd3, single_files.sd3_file),
    "sd35": Kind(lambda: single_files.sd3(with_t5=True), single_files.sd3_file),
    "flux": Kind(lambda: family_pipelines.flux().model, single_files.flux_file, mapped=True),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def here(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(its kind, a pipeline, a folder with `whole` and `bare`, a model and its configurations)."""
    kind, root = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    pipe = kind.made()
    pipe.save_pretrained(root / "whole")
    shutil.copytree(root / "whole", root / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return kind, pipe, root


def equal(found: nn.Module, wanted: nn.Module) -> bool:
    """Whether all weights are equal, those that stay on disk too."""
    read, known = Weights(found), dict(wanted.named_parameters())
    own = dict(found.named_parameters())
    return own.keys() == known.keys() and all(
        torch.equal(read(x), known[name]) for name, x in own.items()
    )


def test_every_part_is_read_as_it_was_written(here: Any, tmp_path: Path) -> None:
    kind, pipe, root = here
    file = kind.file(pipe, tmp_path / "model.safetensors")
    folder = opened_folder(file, tmp_path / "opened", [root / "bare"])
    single = pointed(folder)
    assert single is not None and single.mapped == kind.mapped
    found = load(str(folder))
    parts = {n: x for n, x in pipe.components.items() if isinstance(x, nn.Module)}
    assert len(parts) >= 3
    for name, part in parts.items():
        assert equal(getattr(found, name), part), name
    low = load(str(folder), low_memory=True)
    assert any(p.is_meta for p in denoiser_of(low).parameters())
    assert equal(denoiser_of(low), denoiser_of(pipe))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_denoiser_alone_under_both_names(here: Any, tmp_path: Path, prefix: str) -> None:
    _, pipe, root = here
    tensors = single_files.denoiser(denoiser_of(pipe), prefix)
    file = single_files.written(tensors, tmp_path / "alone.safetensors")
    found = load(str(opened_folder(file, tmp_path / "opened", [root / "whole"])))
    assert equal(denoiser_of(found), denoiser_of(pipe)) and equal(found.vae, pipe.vae)


def test_stable_diffusion_3_needs_no_t5(tmp_path: Path) -> None:
    pipe = single_files.sd3(with_t5=True)
    pipe.save_pretrained(tmp_path / "kind")
    for file in (tmp_path / "kind").rglob("*.safetensors"):
        file.unlink()
    pipe.text_encoder_3 = None
    file = single_files.sd3_file(pipe, tmp_path / "model.safetensors")
    found = load(str(opened_folder(file, tmp_path / "opened", [tmp_path / "kind"])))
    assert found.text_encoder_3 is None and equal(found.transformer, pipe.transformer)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALONE))
def test_denoisers_of_other_families_in_files_of_comfyui(name: str, tmp_path: Path) -> None:
    pipe = getattr(family_pipelines, name)().model
    pipe.save_pretrained(tmp_path / "whole")
    tensors = single_files.denoiser(denoiser_of(pipe))
    file = single_files.written(tensors, tmp_path / "model.safetensors")
    folder = opened_folder(file, tmp_path / "opened", [tmp_path / "whole"])
    single = pointed(folder)
    assert single is not None and single.mapped == ALONE[name]
    assert equal(denoiser_of(load(str(folder))), denoiser_of(pipe))
