"""A checkpoint in one file is used as a model: by what a folder of its kind lends it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenuto.errors import ModelError
from tenuto.model import Weights, denoisers_of
from tenuto.sampling import skeleton
from tenuto.sampling.loading import load, load_denoisers
from tenuto.sampling.single_file import NOTE, is_checkpoint, pointed
from tenuto.sampling.single_file_folder import opened_folder
from tests.core import single_files, tiny_pipelines


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.stable_diffusion("StableDiffusionPipeline")


@pytest.fixture(scope="module")
def whole(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder, with its weights."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare(whole: Path) -> Path:
    """Its configurations and tokenizer alone."""
    folder = whole.parent / "bare"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def file(pipe: Any, whole: Path) -> Path:
    return single_files.stable_diffusion_file(pipe, whole.parent / "files" / "my model.safetensors")


def same(found: Any, wanted: Any) -> bool:
    """Whether all weights are equal."""
    a, b = found.state_dict(), wanted.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def both(found: Any, wanted: Any) -> tuple[Any, Any]:
    """Parameters of two models, in one order."""
    return found.parameters(), wanted.parameters()


def test_a_whole_checkpoint_needs_configurations_alone(
    pipe: Any, file: Path, bare: Path, tmp_path: Path
) -> None:
    assert is_checkpoint(file)
    folder = opened_folder(file, tmp_path / "opened", [bare])
    found = load(str(folder))
    assert found.name_or_path == str(folder)
    assert type(found) is type(pipe) and type(found.scheduler) is type(pipe.scheduler)
    for name in ("unet", "vae", "text_encoder"):
        assert same(getattr(found, name), getattr(pipe, name)), name
    assert not list(folder.rglob("*.safetensors")), "weights are not copied"
    alone = denoisers_of(load_denoisers(str(folder)))["unet"]
    assert any(p.is_meta for p in alone.parameters()), "it stays on disk"
    read = Weights(alone)
    assert all(torch.equal(read(x), y) for x, y in zip(*both(alone, pipe.unet), strict=True))
    assert load(str(folder), dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_the_check_has_its_sizes(pipe: Any, file: Path, bare: Path, tmp_path: Path) -> None:
    found = skeleton(str(opened_folder(file, tmp_path, [bare])))
    assert found is not None and not found.complaints
    for name in ("unet", "vae", "text_encoder"):
        values = getattr(pipe, name).state_dict().values()
        assert found.stored[name] == sum(x.numel() * x.element_size() for x in values), name


def test_a_denoiser_alone_takes_the_rest_from_a_whole_model(
    pipe: Any, whole: Path, bare: Path, tmp_path: Path
) -> None:
    other = tiny_pipelines.randomized(tiny_pipelines.unet(), seed=5)
    file = tmp_path / "unet.safetensors"
    save_file({k: x.clone() for k, x in single_files.denoiser(other).items()}, file)
    with pytest.raises(ModelError, match=r"has no (vae|text encoder), and bare, a model"):
        opened_folder(file, tmp_path / "opened", [bare])
    found = load(str(opened_folder(file, tmp_path / "opened", [bare, whole])))
    assert same(found.unet, other) and same(found.vae, pipe.vae)
    assert same(found.text_encoder, pipe.text_encoder)


def test_a_folder_is_made_once_and_anew_for_another_file(
    file: Path, bare: Path, tmp_path: Path
) -> None:
    copy = shutil.copy2(file, tmp_path / "copy.safetensors")
    first = opened_folder(Path(copy), tmp_path / "opened", [bare])
    assert opened_folder(Path(copy), tmp_path / "opened", []) == first, "no donor is needed again"
    single = pointed(first)
    assert single is not None and single.file == Path(copy)
    shutil.move(copy, tmp_path / "moved.safetensors")
    with pytest.raises(ModelError, match=r"There is no checkpoint .*copy\.safetensors any more"):
        load(str(first))
    (first / NOTE).write_text("{")
    with pytest.raises(ModelError, match="is not readable"):
        load(str(first))


def test_what_cannot_be_opened_is_told(
    file: Path, bare: Path, tmp_path: Path, tiny_pixart_folder: Path
) -> None:
    """No model of its kind, quantized, no model at all, half of one."""
    with pytest.raises(ModelError, match="hf download stable-diffusion-v1-5/stable-diffusion-v1-5"):
        opened_folder(file, tmp_path / "opened", [tiny_pixart_folder])
    known = load_file(file)

    def written(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    fp8 = {k: x.to(torch.float8_e4m3fn) if x.ndim > 1 else x for k, x in known.items()}
    with pytest.raises(ModelError, match=r"already quantized \(F8_E4M3\)"):
        opened_folder(written("fp8", fp8), tmp_path / "opened", [bare])
    lora = {"lora_unet_x.lora_down.weight": torch.ones(1)}
    with pytest.raises(ModelError, match="has no denoiser"):
        opened_folder(written("lora", lora), tmp_path / "opened", [bare])
    (tmp_path / "text.safetensors").write_text("no such file")
    with pytest.raises(ModelError, match="has no denoiser"):
        opened_folder(tmp_path / "text.safetensors", tmp_path / "opened", [bare])
    half = {k: x for k, x in known.items() if ".output_blocks.0." not in k}
    with pytest.raises(ModelError, match=r"Cannot load|has no "):
        load(str(opened_folder(written("half", half), tmp_path / "opened", [bare])))
    assert not list((tmp_path / "opened").glob(".opening-*"))


def test_a_file_says_that_its_weights_predict_the_velocity(
    pipe: Any, file: Path, bare: Path, tmp_path: Path
) -> None:
    """By the empty tensors that ComfyUI and the WebUIs look for; the lender is as it was."""
    before = (bare / "scheduler" / "scheduler_config.json").read_text()
    for marks, wanted in {
        (): (pipe.scheduler.config.prediction_type, False),
        ("v_pred",): ("v_prediction", False),
        ("v_pred", "ztsnr"): ("v_prediction", True),
    }.items():
        name = "-".join(("own", *marks))
        marked = tmp_path / f"{name}.safetensors"
        save_file(load_file(file) | {mark: torch.zeros(0) for mark in marks}, marked)
        found = load(str(opened_folder(marked, tmp_path / "opened", [bare])))
        config = found.scheduler.config
        assert (config.prediction_type, config.rescale_betas_zero_snr) == wanted
        assert (config.timestep_spacing == "trailing") == wanted[1]
        assert same(found.unet, pipe.unet) and same(found.text_encoder, pipe.text_encoder)
        first = found.scheduler.alphas_cumprod[-1]
        assert (float(first) < 1e-6) == wanted[1], "the first step is noise alone"
    assert (bare / "scheduler" / "scheduler_config.json").read_text() == before
