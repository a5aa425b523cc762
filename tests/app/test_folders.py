"""Models that the app finds: in folders that are added on the page, and in the hub's own cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gradio_app.bench import Bench
from gradio_app.folders import added, kept
from gradio_app.places import Places
from gradio_app.restore import _folder
from gradio_app.settings import Settings
from tenuto.errors import TenutoError
from tenuto.sampling.model_folders import bare

INDEX = json.dumps({"_class_name": "StableDiffusionPipeline"})


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(INDEX)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "out").mkdir()
    return Settings(tmp_path / "out", device="cpu")


def test_a_folder_is_added_and_kept(settings: Settings, tmp_path: Path) -> None:
    """Until the app ends, and the next time; not where other machines may come."""
    model(tmp_path / "more" / "mine")
    bench = Bench(settings)
    assert "mine" not in bench.places.models()
    before = len(bench.places.models())
    assert added(bench, str(tmp_path / "more")) == before + 1 == added(bench, f"{tmp_path}/more")
    assert bench.places.model("mine") == str(tmp_path / "more" / "mine")
    again = Bench(settings)
    assert again.places.added == [tmp_path / "more"] and "mine" in again.places.models()
    card, update = _folder(again, str(tmp_path / "none"))
    assert "no such folder" in card and update == {"__type__": "update"}
    card, update = _folder(again, f"{tmp_path}/more")
    assert "Added." in card and "mine" in [name for name, _ in update.choices]

    others = Bench(replace(settings, listen=True))
    assert not others.places.added and "mine" not in others.places.models()
    with pytest.raises(TenutoError, match="Other machines use this app"):
        added(others, str(tmp_path / "more"))
    with pytest.raises(TenutoError, match="There is no model"):
        others.places.model(str(tmp_path / "more" / "mine"))


@pytest.mark.parametrize("name", ["", "~nobody/x", "a\0b", "/proc/self/mem", "x" * 4000])
def test_what_is_no_folder(settings: Settings, name: str) -> None:
    with pytest.raises(TenutoError, match="no such folder"):
        added(Bench(settings), name)


@pytest.mark.parametrize("text", ["", "{}", '["relative", 7, "/none/such"]', "[[1]]", "\xff"])
def test_what_was_kept_may_be_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "folders.json").write_text(text, "latin-1")
    assert kept(tmp_path) == []


def test_models_of_the_hub_have_their_ids(tmp_path: Path) -> None:
    """Those that are there whole enough to be named; nothing is fetched."""
    hub = tmp_path / "hub"
    one = model(hub / "models--org--one" / "snapshots" / "abc")
    model(hub / "models--org--two" / "snapshots" / "abc")  # without a reference
    (hub / "models--org--three" / "refs").mkdir(parents=True)
    for name in ("one", "three"):
        refs = hub / f"models--org--{name}" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text("abc")
    places = Places(tmp_path, (), hub)
    assert [name for name in places.models() if "/" in name] == ["org/one"]
    assert places.model("org/one") == str(one)
    with pytest.raises(TenutoError, match="hf download does that"):
        places.model("org/three")
    with pytest.raises(TenutoError, match=r"of single files it takes \.safetensors"):
        places.model("sdxl.ckpt")
    assert not [name for name in Places(tmp_path).models() if "/" in name]


@pytest.mark.parametrize(("file", "wanted"), [("", True), (".fp16", False), ("plain", False)])
def test_a_model_with_files_of_a_variant_alone_is_not_bare(
    tmp_path: Path, file: str, wanted: bool
) -> None:
    """Such a download is listed; one of configurations alone lends these, and is not."""
    part = tmp_path / "unet"
    part.mkdir()
    (tmp_path / "model_index.json").write_text(
        '{"unet": ["diffusers", "UNet2DConditionModel"]}', encoding="utf-8"
    )
    (part / "config.json").write_text("{}", encoding="utf-8")
    if file:
        middle = "" if file == "plain" else file
        (part / f"diffusion_pytorch_model{middle}.safetensors").touch()
    assert bare(tmp_path) is wanted
