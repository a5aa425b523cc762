"""LoRA files on a pipeline: they change images, and a file that is no LoRA gets one sentence."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tenuto as tn
from tenuto.errors import ModelError
from tenuto.sampling.loras import Lora, add_loras, with_loras
from tests.core import lora_files, single_files
from tests.core import tiny_pipelines as tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One LoRA in both layouts, and some that are none of this model."""
    root, pipe = tmp_path_factory.mktemp("loras"), tiny.stable_diffusion("StableDiffusionPipeline")
    lora_files.lora_file(pipe.unet, root / "style.safetensors")
    lora_files.lora_file(pipe.unet, root / "kohya.safetensors", kohya=True)
    lora_files.lora_file(single_files.sdxl().unet, root / "xl.safetensors")
    lora_files.lora_file(tiny.flux().transformer, root / "flux.safetensors", "transformer")
    single_files.stable_diffusion_file(pipe, root / "whole.safetensors")
    save_file({"a": torch.ones(1)}, root / "other.safetensors")
    (root / "old.pt").write_bytes(b"x")
    return root


def image(*loras: Lora, artifact: Any = None) -> torch.Tensor:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    add_loras(pipe, loras)
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    with nullcontext() if artifact is None else tn.attach(pipe, artifact, execution="float"):
        noise = torch.Generator().manual_seed(1)
        return pipe("a dog", generator=noise, output_type="pt", **call).images


def test_a_weight_is_told_from_a_name(files: Path, tmp_path: Path) -> None:
    file = files / "style.safetensors"
    assert Lora.read(str(file)) == (file, 1.0)
    assert Lora.read(f"{file}:0.5") == (file, 0.5)
    assert Lora.read(f"{file}:-2") == (file, -2.0)


def test_loras_do_what_they_say_and_add_up(files: Path) -> None:
    """Both layouts, twice the half, none at 0; beside an artifact too."""
    style, kohya = files / "style.safetensors", files / "kohya.safetensors"
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    trajectory = tn.record(pipe, prompts=["a dog"], steps=2)
    artifact = tn.quantize(pipe, "w8a8", trajectory, measure=False)
    for made in (None, artifact):
        plain, full = image(artifact=made), image(Lora(style), artifact=made)
        assert (plain - full).abs().max() > 0.05
        for same in ((Lora(kohya),), (Lora(style, 0.5), Lora(kohya, 0.5))):
            torch.testing.assert_close(image(*same, artifact=made), full, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(image(Lora(style, 0.0), artifact=made), plain)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.safetensors", "There is no LoRA file"), ("old.pt", "is no .safetensors file"),
        ("whole.safetensors", "whole.safetensors is no LoRA"),
        ("other.safetensors", "other.safetensors is no LoRA"),
        ("style.safetensors:nan", "weight of a LoRA is a number"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_told_before_a_model_is_loaded(
    files: Path, name: str, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        Lora.read(str(files / name))


@pytest.mark.parametrize(
    ("name", "said"), [("xl", "the layers have other sizes"), ("flux", "it has no such layers")]
)
def test_a_lora_of_another_model_is_told(
    files: Path, name: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    match = f"{name}.safetensors is no LoRA of this StableDiffusionPipeline, .*: {said}"
    with pytest.raises(ModelError, match=match):
        add_loras(pipe, [Lora(files / f"{name}.safetensors")])
    assert not caplog.records, "one sentence, and no chatter of the libraries"


def test_a_pipeline_that_takes_none(files: Path) -> None:
    with warnings.catch_warnings(), pytest.raises(ModelError, match="takes no LoRA"):
        add_loras(tn.demo("transformer"), [Lora(files / "style.safetensors")])


def test_they_come_off_again_or_it_is_said(files: Path, tmp_path: Path) -> None:
    """A Control LoRA widens FLUX's first layer for good: the pipeline is another one then."""
    changed = list[int]()

    def used(pipe: Any, file: Path) -> None:
        with with_loras(pipe, [Lora(file)], lambda: changed.append(1)):
            pass

    pipe = tiny.flux()
    before = {n: x.clone() for n, x in pipe.transformer.state_dict().items()}
    used(pipe, files / "flux.safetensors")
    after = pipe.transformer.state_dict()
    assert not changed and all(torch.equal(before[n], after[n]) for n in before | after)
    with pytest.raises(ModelError, match=r"control\.safetensors is a Control LoRA"):
        used(pipe, wide_file(pipe, tmp_path / "control.safetensors"))
    assert changed


def wide_file(pipe: Any, file: Path, layer: str = "x_embedder") -> Path:
    """A LoRA of one layer of FLUX, with twice as many inputs as it has, written to `file`."""
    linear = pipe.transformer.get_submodule(layer)
    save_file({
        f"transformer.{layer}.lora_A.weight": torch.ones(2, 2 * linear.in_features),
        f"transformer.{layer}.lora_B.weight": torch.ones(linear.out_features, 2),
    }, file)  # fmt: skip
    return file


def test_what_widens_a_layer_is_refused_unless_the_pipeline_feeds_it(tmp_path: Path) -> None:
    """Diffusers widens any layer of FLUX without a word, and the run fails."""
    from diffusers import FluxControlPipeline

    pipe = tiny.flux()
    file = wide_file(pipe, tmp_path / "depth.safetensors")
    channels = pipe.transformer.x_embedder.in_features
    said = rf"\({2 * channels} channels in place of {channels}\), and a FluxPipeline takes none"
    with pytest.raises(ModelError, match=said):
        add_loras(pipe, [Lora(file)])
    pipe = tiny.flux()
    with pytest.raises(
        ModelError, match=r"no LoRA of this FluxPipeline, .*: the layers have other"
    ):
        add_loras(pipe, [Lora(wide_file(pipe, tmp_path / "other.safetensors", "context_embedder"))])
    parts = tiny.flux().components
    for other in ("image_encoder", "feature_extractor"):
        parts.pop(other, None)
    control = FluxControlPipeline(**parts)
    add_loras(control, [Lora(file)])
    assert control.transformer.config.in_channels == 2 * channels
