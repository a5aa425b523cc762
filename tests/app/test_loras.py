"""LoRAs in the app without a browser: found by name, put on, taken off, kept and read back."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tenuto as tn
from gradio_app.api import _about
from gradio_app.bench import NO_ARTIFACT, Bench
from gradio_app.compare import CHOSEN, filled
from gradio_app.jobs import RUNNING
from gradio_app.lora_field import LISTED, given, shown
from gradio_app.loras import chosen
from gradio_app.pictures import restored
from gradio_app.png import texts
from gradio_app.restore import NAMES, _restored
from gradio_app.settings import Settings
from gradio_app.worker import Reports, compare
from tenuto.errors import Cancelled, TenutoError
from tests.core import lora_files, single_files
from tests.core import tiny_pipelines as tiny

pytestmark = pytest.mark.filterwarnings("ignore")
UNET, DIT, ARTIFACT = "demo:unet", "demo:transformer", "shipped:demo-unet.w8a8"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs of the demo with a U-Net, one of another model, and a file that is none."""
    root, pipe = tmp_path_factory.mktemp("roots"), tn.demo("unet")
    for folder in ("loras", "xl"):
        (root / folder).mkdir()
    lora_files.lora_file(pipe.unet, root / "loras" / "style.safetensors")
    shutil.copy(root / "loras" / "style.safetensors", root / "loras" / "same.safetensors")
    lora_files.lora_file(single_files.sdxl().unet, root / "xl" / "same.safetensors")
    words = root / "loras" / "words.safetensors"
    lora_files.lora_file(pipe.text_encoder, words, "text_encoder", targets=("q_proj",))
    save_file({"a": torch.ones(1)}, root / "other.safetensors")
    return root


def opened(roots: Path, out: Path) -> Bench:
    out.mkdir()
    return Bench(Settings(out, (roots,), device="cpu"))


@pytest.fixture(scope="module")
def bench(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return opened(roots, tmp_path_factory.mktemp("app") / "out")


def made(bench: Bench, loras: str = "", artifact: str = NO_ARTIFACT, **more: Any) -> dict[str, Any]:
    """What a press of Generate gives: two steps of one prompt."""
    more = {"beside": False, "on_call": lambda *_: None} | more
    return bench.generate(UNET, "a lemon", 3, 2, 2.0, artifact, **more, loras=loras)


def pixels(found: dict[str, Any]) -> dict[str, bytes]:
    return {which: Image.open(path).tobytes() for which, path in found["pictures"].items()}


# --- names ----------------------------------------------------------------------------------------


def test_loras_are_found_by_their_names(bench: Bench, roots: Path) -> None:
    """By the file's name, or by the path below the folder of models where two have the same."""
    names = ["loras/same", "style", "words", "xl/same"]
    assert sorted(bench.places.loras()) == names and _about(bench)["loras"]
    file = roots / "loras" / "style.safetensors"
    for name in ("style", "loras/style", "style.safetensors", "loras/style.safetensors"):
        assert bench.places.lora(name) == ("style", file)
    assert bench.places.lora("xl/same") == ("xl/same", roots / "xl" / "same.safetensors")
    folder = bench.places.model(UNET)
    found = chosen(bench.places, folder, "\n style : 0.50\nloras/same:1\nwords:-2\n")
    assert [*found] == ["style:0.5", "loras/same", "words:-2"]
    assert [lora.weight for lora in found.values()] == [0.5, 1, -2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none", r"There is no LoRA 'none' in the folders of models\."),
        ("../style", "There is no LoRA '../style'"), ("same", "Several LoRAs are called 'same'"),
        ("other", r"other is no LoRA: its tensors are others\."),
        ("style:x", "The weight of a LoRA is a number from -100 to 100"),
        ("style:nan", "The weight of a LoRA is a number"), ("style:101", "not 101"),
        ("style\nstyle:2", "The LoRA style is in the list twice"),
        ("style\n" * 21, "at most 20 are taken"), ("x" * 20_000, "at most 10000"),
        (["style"], "The list of LoRAs is a text"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_gets_one_sentence(bench: Bench, text: Any, said: str) -> None:
    with pytest.raises(TenutoError, match=said) as error:
        chosen(bench.places, bench.places.model(UNET), text)
    assert str(error.value).endswith(".") and str(error.value).isprintable()


def test_files_elsewhere_are_no_loras(bench: Bench, roots: Path, tmp_path: Path) -> None:
    """By a link or by a path: one sentence, and they are not in the list."""
    outside = shutil.copy(roots / "loras" / "style.safetensors", tmp_path / "secret.safetensors")
    link = roots / "link.safetensors"
    link.symlink_to(outside)
    try:
        assert "link" not in bench.places.loras()
        for name in ("link", str(outside), str(roots / "loras" / "style"), "loras/../loras/style"):
            with pytest.raises(TenutoError, match="There is no LoRA"):
                bench.places.lora(name)
    finally:
        link.unlink()


def test_what_a_pipeline_and_a_machine_must_have(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused in one sentence before anything is loaded; the field says it first."""
    with pytest.raises(TenutoError, match="PixArtAlphaPipeline of diffusers takes no LoRA"):
        chosen(bench.places, bench.places.model(DIT), "style")
    assert shown(bench.places, DIT).visible is False
    assert given(bench.places, DIT, "style") == "", "the field is not shown"
    assert given(bench.places, UNET, "style") == "style"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TenutoError, match=r"LoRAs need PEFT, .* pip install peft"):
        chosen(bench.places, bench.places.model(UNET), "style")
    assert "pip install peft" in shown(bench.places, UNET).info


def test_the_field_says_which_there_are(bench: Bench, roots: Path, tmp_path: Path) -> None:
    """A dozen at most, in no markup, or where to put them."""
    assert shown(bench.places, UNET).info == "There are: loras/same, style, words, xl/same"
    none = opened(tmp_path, tmp_path / "out").places
    assert "put .safetensors files into a folder" in shown(none, UNET).info
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(LISTED + 1):
        shutil.copy(roots / "loras" / "style.safetensors", folder / f"_{number:02}_<b>.safetensors")
    said = shown(opened(folder, tmp_path / "second").places, UNET).info
    assert said.count(",") == LISTED - 1 and said.endswith(" and more")
    assert "_" not in said and "<" not in said and "&#60;b&#62;" in said


# --- generating -----------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", [NO_ARTIFACT, ARTIFACT], ids=["full", "artifact"])
def test_on_and_off_again(bench: Bench, artifact: str) -> None:
    """Without one, an image has the bits that it had before; with one, those of the last time.

    A stop and an error in between change nothing; a LoRA of another model is one sentence.
    """
    pipe = bench.studio.pipe(bench.places.model(UNET))
    plain, styled = (pixels(made(bench, text, artifact)) for text in ("", "style:0.5"))
    assert styled != plain
    assert pixels(made(bench, artifact=artifact)) == plain
    with pytest.raises(Cancelled):
        made(bench, "style\nwords", artifact, on_call=lambda *_: bench.studio.stop())
    assert pixels(made(bench, artifact=artifact)) == plain
    with pytest.raises(TenutoError, match=r"^same.safetensors is no LoRA of this Stable"):
        made(bench, "words\nstyle\nxl/same", artifact)
    assert pixels(made(bench, artifact=artifact)) == plain
    assert pixels(made(bench, "style:0.5", artifact)) == styled
    assert bench.studio.pipe(bench.places.model(UNET)) is pipe, "nothing was loaded anew"


def test_the_states_of_a_prompt_are_those_of_its_encoder(bench: Bench) -> None:
    """A LoRA may change text encoders: their states are kept apart."""
    plain = made(bench)
    assert made(bench)["numbers"]["prompt_reused"]
    changed = made(bench, "words")
    assert not changed["numbers"]["prompt_reused"] and pixels(changed) != pixels(plain)
    again = made(bench, "words")
    assert again["numbers"]["prompt_reused"] and pixels(again) == pixels(changed)
    assert not made(bench, "words:0.5")["numbers"]["prompt_reused"]
    after = made(bench)
    assert after["numbers"]["prompt_reused"] and pixels(after) == pixels(plain)


def test_a_lora_that_changes_a_model_for_good(tmp_path: Path) -> None:
    """A Control LoRA widens FLUX's first layer: it is refused, and the next image is of a model
    loaded anew."""
    root, pipe = tmp_path / "roots", tiny.flux()
    pipe.save_pretrained(root / "flux")
    first = pipe.transformer.x_embedder
    wide = {
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 2 * first.in_features),
        "transformer.x_embedder.lora_B.weight": torch.ones(first.out_features, 2),
    }
    save_file(wide, root / "control.safetensors")
    bench = opened(root, tmp_path / "out")

    def image(loras: str) -> dict[str, Any]:
        size = {"height": 32, "width": 32}
        return bench.generate(
            "flux", "a", 3, 1, 2.0, "", False, lambda *_: None, size, loras=loras
        )  # fmt: skip

    plain, pipe = pixels(image("")), bench.studio.pipe(bench.places.model("flux"))
    with pytest.raises(TenutoError, match=r"control.safetensors is a Control LoRA"):
        image("control")
    assert pixels(image("")) == plain
    assert bench.studio.pipe(bench.places.model("flux")) is not pipe


# --- kept and read back ---------------------------------------------------------------------------


TWO = "style:0.05\nloras/same:0.02"  # more is noise


@pytest.fixture(scope="module")
def pairs(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full precision beside the artifact, without LoRAs and with two."""
    plain, styled = (made(bench, text, ARTIFACT, beside=True) for text in ("", TWO))
    return plain, styled


def test_both_images_have_and_say_them(bench: Bench, pairs: Any) -> None:
    plain, styled = pairs
    assert r'Tenuto LoRAs: "style:0.05\nloras/same:0.02"' in styled["infotext"]
    assert "LoRA" not in plain["infotext"]
    for which, path in styled["pictures"].items():
        assert pixels(plain)[which] != pixels(styled)[which]
        assert json.loads(texts(Path(path))["tenuto"])["loras"] == TWO.splitlines()
        assert restored(bench.places, path)["loras"] == TWO


def test_the_field_is_filled_by_a_dropped_image(
    bench: Bench, pairs: Any, roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not there any more is named; an image without any empties the field."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def dropped(found: dict[str, Any]) -> tuple[str, str]:
        upload = tmp_path / "a" / "x.png"
        upload.parent.mkdir(exist_ok=True)
        shutil.copy(found["pictures"]["full"], upload)
        _, said, *values = _restored(bench, str(upload))
        return said, values[NAMES.index("loras")]

    plain, styled = pairs
    said, text = dropped(styled)
    assert text == TWO and "LoRAs" in said
    moved = roots / "loras" / "same.safetensors"
    moved.rename(roots / "gone")
    try:
        said, text = dropped(styled)
    finally:
        (roots / "gone").rename(moved)
    assert text == "style:0.05" and "Not here: loras/same:0.02." in said
    said, text = dropped(plain)
    assert text == "" and "LoRA" not in said


def test_a_comparison_has_them_in_all_its_ways(bench: Bench, pairs: Any) -> None:
    """And a page that is opened while it runs shows them again."""
    jobs = list[Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.desk, "start", lambda job: jobs.append(job) or job)
        bench.compare(UNET, [ARTIFACT], 1, 2, 2.0, 3, prompts="a lemon", loras=TWO)
    found = compare(jobs[0].request, Reports(lambda **_: None, threading.Event()))
    assert found["loras"] == TWO.splitlines() and len(found["pictures"]) == 3
    plain, styled = (Image.open(one["pictures"]["full"]) for one in pairs)
    for way, (name,) in found["pictures"].items():
        file = Path(found["folder"]) / name
        assert restored(bench.places, file)["loras"] == TWO
        near, far = (distance(Image.open(file), image) for image in (styled, plain))
        assert 3 * near < far, (way, near, far)
    jobs[0].state = RUNNING
    assert filled(bench, jobs[0])[CHOSEN - 1] == TWO


def distance(a: Image.Image, b: Image.Image) -> float:
    """Root of the mean square of the differences, in levels."""
    return float((pil_to_tensor(a) - pil_to_tensor(b)).square().mean().sqrt())


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float()
