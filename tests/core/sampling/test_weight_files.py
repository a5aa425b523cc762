"""Folders as people have them: a variant alone, a pipeline saved without a part, parts missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto.errors import ModelError
from tenuto.sampling.loading import load
from tenuto.sampling.skeleton import skeleton
from tenuto.sampling.weight_files import variant_of, weight_files
from tests.core import tiny_pipelines as tiny


def saved(pipe: Any, folder: Path, **how: Any) -> Path:
    pipe.save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion("StableDiffusionPipeline")


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of its numbers, in files of the variant alone, as downloads have them."""
    half = tiny.stable_diffusion("StableDiffusionPipeline").to(torch.float16)
    return saved(half, tmp_path_factory.mktemp("models") / "half", variant="fp16")


def image(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    return pipe("a dog", generator=noise, **call).images


def alike(one: Any, other: Any) -> None:
    """Their images: products may be added up in another order where a block is read from disk."""
    torch.testing.assert_close(image(one), image(other), rtol=1e-4, atol=1e-4)


def test_a_folder_of_a_variant_is_checked_and_loaded_as_it_lies(pipe: Any, folder: Path) -> None:
    assert not list(folder.glob("*/*model.safetensors"))
    found, bones = load(str(folder)), skeleton(str(folder))
    assert bones is not None and not bones.complaints and bones.stored["unet"] > 0
    for name in ("unet", "text_encoder", "vae"):
        for key, value in getattr(pipe, name).state_dict().items():
            assert torch.equal(getattr(found, name).state_dict()[key], value.half().float()), key
    alike(load(str(folder), low_memory=True), found)


def shards(place: Path) -> None:
    """A part in two files and their index, in place of its one file of the variant."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(place, variant="fp16", dtype=torch.float16)
    (place / "diffusion_pytorch_model.fp16.safetensors").unlink()
    model.save_pretrained(place, variant="fp16", max_shard_size="100KB")


def test_a_variant_in_shards(folder: Path, tmp_path: Path) -> None:
    copied = copy(folder, tmp_path)
    shards(copied / "unet")
    assert len(weight_files(copied / "unet", "fp16")) > 1
    for low in (False, True):
        alike(load(str(copied), low_memory=low), load(str(folder)))


def copy(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to / folder.name))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"unet": ["plain"], "vae": ["plain"]}, None),
        ({"unet": ["plain", "fp16"], "vae": ["plain", "fp16"]}, None),
        ({"unet": ["fp16"], "vae": ["plain"]}, "fp16"),
        ({"unet": ["bf16", "fp16"], "vae": ["plain", "bf16"]}, "fp16"),
        ({"unet": ["bf16", "fp16"], "vae": ["bf16"]}, "bf16"),
        ({"unet": ["non_ema", "bf16"], "vae": ["plain"]}, "bf16"),
        ({"unet": ["fp16"], "vae": ["bf16"]}, None),
        ({"unet": [], "vae": []}, None),
    ],
)
def test_the_variant_is_what_all_need(
    tmp_path: Path, files: dict[str, list[str]], wanted: str | None
) -> None:
    index = {name: ["diffusers", "Any"] for name in files}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name, kinds in files.items():
        (tmp_path / name).mkdir()
        for kind in kinds:
            middle = "" if kind == "plain" else f".{kind}"
            (tmp_path / name / f"diffusion_pytorch_model{middle}.safetensors").touch()
    assert variant_of(tmp_path) == wanted


def test_stable_diffusion_3_without_its_t5(tmp_path: Path) -> None:
    """As diffusers saves it, and does not load it: its own text encoder is no optional part."""
    folder = saved(tiny.sd3(), tmp_path / "sd3")
    found = load(str(folder))
    assert found.text_encoder_3 is None and found.tokenizer_3 is None
    alike(found, tiny.sd3())


def without(name: str) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            path.unlink()

    return take


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("text_encoder/*"), "text_encoder has no config.json"),
        (without("vae/*"), "vae has no config.json"),
        (without("vae/*.safetensors"), "vae has no weights in safetensors"),
        (without("unet/*.safetensors"), "unet has no weights in safetensors"),
    ],
)
def test_what_is_missing_is_said_alike_by_check_and_by_loading(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    copied = copy(folder, tmp_path)
    change(copied)
    with pytest.raises(ModelError, match=said) as raised:
        load(str(copied))
    bones = skeleton(str(copied))
    assert bones is not None and bones.complaints[0] == str(raised.value)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    copied = copy(folder, tmp_path)
    shards(copied / "unet")
    gone = weight_files(copied / "unet", "fp16")[-1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name} is missing"):
        load(str(copied))


def test_what_is_no_pipeline_says_what_would_be(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"it is a part of .*half: name that"):
        load(str(folder / "unet"))
    with pytest.raises(ModelError, match=r"is a file; a model is a diffusers folder"):
        load(str(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"))
