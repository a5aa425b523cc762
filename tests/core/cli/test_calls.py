"""The pipeline's own call from the command line: a start image, its strength, what is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
from PIL import Image

from tenuto import calibration, cli
from tenuto.artifact import Artifact
from tenuto.cli import commands
from tenuto.cli.calls import fitted, gathered, given_again, images_in, read_image, with_images
from tenuto.cli.checks import read_prompts
from tenuto.errors import TenutoError
from tenuto.model import Signature
from tenuto.sampling import described
from tenuto.sampling.loading import class_of
from tests.core import tiny_pipelines as tiny
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Stable Diffusion that starts from an image."""
    folder = tmp_path_factory.mktemp("models") / "tiny-img2img"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.stable_diffusion("StableDiffusionImg2ImgPipeline").save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with two prompts and an image in a folder of its own."""
    (tmp_path / "p.txt").write_text("a red dog\ntwo cats\n")
    (tmp_path / "mine").mkdir()
    tiny.picture().save(tmp_path / "mine" / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(path: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """The size of a PNG, and what it says of itself."""
    with Image.open(path) as image:
        return image.size, json.loads(image.text["tenuto"])  # type: ignore[attr-defined]


def answer(capfd: Any, *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def test_what_was_given_is_given_again(here: Path) -> None:
    """The words of the next command read as the ones that were typed."""
    typed = {
        "image": here / "mine" / "photo.png", "height": 64, "negative": "a 'b' $c", "frames": None,
        "given": ["strength=0.5", "name=two words", 'number="5"', "many=[1, 2]", "no=null"],
    }  # fmt: skip
    call = gathered("quantize", typed)["call"]
    line = given_again(call, steps=8, guidance=2.5, device=None, compile=True, graphs=False)
    words = shlex.split(line)
    assert words[:5] == ["--steps", "8", "--guidance", "2.5", "--compile"]
    pairs = list(zip(words[5::2], words[6::2], strict=True))
    assert ("--image", str(here / "mine" / "photo.png")) in pairs and ("--height", "64") in pairs
    assert ("--negative", "a 'b' $c") in pairs and len(pairs) == 3 + 5
    again = gathered("quantize", {"given": [value for flag, value in pairs if flag == "--set"]})
    assert again["call"] == {k: call[k] for k in ("strength", "name", "number", "many", "no")}
    assert given_again(images_in(call)).split()[0] == "--image" and given_again() == ""


def test_a_start_image_through_all_commands(here: Path, model: Path, capfd: Any) -> None:
    """Quantized with it, compared and continued without naming it again while it is at hand."""
    call = ("--image", "mine/photo.png", "--set", "strength=0.5", "--negative", "blur")
    done = answer(
        capfd, "quantize", model, "--scheme", "w8a8", "--steps", 4, "--prompts", "p.txt", *call,
        "--text-encoder", "w8", "--method", "rtn", "--out", "a.safetensors",
    )  # fmt: skip
    assert done[0] == 0, done[2]
    schedule = Artifact.load("a.safetensors").header["schedule"]
    assert (schedule["steps"], len(schedule["timesteps"])) == (4, 2)
    facts = schedule["call"]
    assert (facts["strength"], facts["negative_prompt"]) == (0.5, "blur")
    assert facts["image"]["file"] == "photo.png" and "mine" not in json.dumps(facts)
    text = answer(capfd, "inspect", "a.safetensors")[1]
    assert "image photo.png" in text and "strength 0.5" in text

    compare = ("compare", model, "--artifact", "a.safetensors", "--prompts", "p.txt", "--json")
    code, out, err = answer(capfd, *compare, "--count", 1)
    assert (code, out) == (2, "") and "photo.png" in err and "--image" in err
    (here / "photo.png").write_bytes((here / "mine" / "photo.png").read_bytes())
    code, out, err = answer(capfd, *compare, "--count", 1)
    assert code == 0, err
    assert json.loads(out)["steps"] == 4
    Image.new("RGB", (32, 32)).save(here / "photo.png")  # another one of that name
    assert answer(capfd, *compare, "--count", 1)[0] == 2
    other = ("--image", "mine/photo.png")
    code, _, err = answer(
        capfd, "generate", model, "--prompt", "a dog", "--artifact", "a.safetensors", *other,
        "--out", "x.png",
    )  # fmt: skip
    assert code == 0 and png("x.png")[0] == (32, 32), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "strength"), "--set takes NAME=VALUE, not 'strength'"),
        (("--set", "=3"), "--set takes NAME=VALUE"),
        (("--image", "none.png"), "Cannot read none.png: No such file"),
        (("--image", "p.txt"), "Cannot read p.txt: it is no image"),
        (("--set", "image=@p.txt"), "Cannot read p.txt: it is no image"),
        (("--image", "mine/photo.png", "--frames", "3"), "takes no num_frames"),
        (("--image", "mine/photo.png", "--set", "strenght=1"), "did you mean strength?"),
        (("--image", "mine/photo.png", "--set", "generator=1"), "generator follows from"),
        (("--height", "0"), "--height: takes a whole number"),
        ((), "given no image"),
    ],
)
def test_what_is_refused(
    here: Path, model: Path, capfd: Any, options: tuple[str, ...], words: str
) -> None:
    """In one sentence, and nothing is written."""
    before = sorted(here.rglob("*"))
    code, out, err = answer(
        capfd,
        "quantize",
        model,
        "--scheme",
        "w8a8",
        "--prompts",
        "p.txt",
        *options,
        "--out",
        "o.safetensors",
    )
    assert (code, out) == (2, "") and words in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1
    assert sorted(here.rglob("*")) == before


def test_names_are_checked_before_a_model_is_loaded(
    here: Path, model: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenuto.cli.session.load", None)
    options = ("--image", "mine/photo.png", "--set", "strenght=1")
    code, _, err = answer(capfd, "generate", model, "--prompt", "a", *options)
    assert code == 2 and "takes no strenght (did you mean strength?)" in err
    code = "import sys; from tenuto import cli; sys.exit(cli.main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", code, "generate", "demo:unet", "--prompt", "a", "--frames", "3"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "core")}, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    said = "tenuto: StableDiffusionPipeline takes no num_frames.\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", said)
    assert class_of("demo:unet") is diffusers.StableDiffusionPipeline
    (here / "model_index.json").write_text("[]")
    assert class_of(str(here)) is class_of("org/name") is None


def test_sizes_reach_the_pipeline(
    here: Path, tiny_pixart_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Height and width, of commands and of what an artifact repeats; given anew, the new ones."""
    shared = ("--prompts", "p.txt", "--height", "16", "--width", "24")
    done = answer(
        capfd, "quantize", tiny_pixart_folder, "--scheme", "w8a8", *shared, "--out", "a.safetensors"
    )
    assert done[0] == 0, done[2]
    assert Artifact.load("a.safetensors").header["schedule"]["call"] == {"height": 16, "width": 24}
    draw = ("generate", tiny_pixart_folder, "--prompt", "a dog", "--artifact", "a.safetensors")
    for options, size in (((), (24, 16)), (("--width", "32"), (32, 16))):
        assert answer(capfd, *draw, *options, "--out", "x.png")[0] == 0
        assert png("x.png")[0] == size
    assert png("x.png")[1]["call"] == {"height": 16, "width": 32}
    code = answer(
        capfd, "train-router", tiny_pixart_folder, "--artifact", "a.safetensors", "--iterations",
        "1", "--out", "b.safetensors",
    )  # fmt: skip
    assert code[0] == 0, code[2]
    schedule = Artifact.load("b.safetensors").header["schedule"]
    assert schedule["call"] == {"height": 16, "width": 24}


def test_another_call_is_another_recording(
    here: Path, tiny_pixart_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted command left is not taken for that of another size."""
    seen: list[tuple[int, ...]] = []

    def stop(*args: Any, **options: Any) -> None:
        denoiser, trajectory = args[0].transformer, args[2]
        seen.append(tuple(Signature(denoiser).sample(trajectory.calls[0].inputs).shape))  # type: ignore[union-attr]
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "quantize", stop)
    for width in (16, 32):
        with pytest.raises(KeyboardInterrupt):
            commands.quantize(
                str(tiny_pixart_folder), scheme="w8a8", out=Path("o.safetensors"),
                prompts=Path("p.txt"), call={"width": width, "height": 16},
            )  # fmt: skip
    assert [shape[-1] for shape in seen] == [4, 8]


def test_a_pipeline_without_prompts(
    here: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    """A picture becomes a video: the built-in prompts are of no use, and its frames are images."""
    folder = tmp_path_factory.mktemp("models") / "tiny-svd"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.video_diffusion().save_pretrained(folder)
    call = ("--image", "mine/photo.png", "--height", "32", "--width", "32", "--frames", "2")
    done = answer(
        capfd, "quantize", folder, "--scheme", "w8a8", "--steps", "2", "--prompts", "p.txt", *call,
        "--out", "a.safetensors",
    )  # fmt: skip
    assert done[0] == 0, done[2]
    calibration = Artifact.load("a.safetensors").header["made"]["calibration"]
    assert (calibration["runs"], calibration["batch"]) == (2, 1)
    refused = answer(
        capfd, "quantize", folder, "--text-encoder", "w8", *call, "--out", "b.safetensors"
    )
    assert refused[0] == 2 and "has no text encoder to quantize." in refused[2]
    code, out, err = answer(
        capfd, "compare", folder, "--artifact", "a.safetensors", "--count", "2", "--json",
        "--image", "mine/photo.png",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["count"] == 4, err


def test_what_a_pipeline_needs_is_told_before_it_is_loaded(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenuto.cli.session.load", None)
    (here / "m").mkdir()
    (here / "m" / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    code, out, err = answer(capfd, "generate", "m", "--prompt", "a", "--frames", 3)
    assert (code, out) == (2, "") and "StableVideoDiffusionPipeline needs image: " in err


def test_an_image_is_read_upright_or_not_at_all(tmp_path: Path) -> None:
    """As its file says how the camera was held; damage of any kind is one sentence."""
    exif = Image.Exif()
    exif[274] = 6  # turned to the right
    tiny.picture(16, 8).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (8, 16)
    tiny.picture().save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    for number, data in enumerate((whole[:-40], whole[:60] + b"x" * 40 + whole[100:], b"", b"x")):
        file = tmp_path / f"{number}.png"
        file.write_bytes(data)
        with pytest.raises(TenutoError, match=rf"^Cannot read .*{number}.png: .*\.$"):
            read_image(file)


def test_a_prompt_may_hold_other_separators(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a red\u2028dog\x0c, old\ntwo cats", encoding="utf-8")
    assert read_prompts(file) == ["a red\u2028dog\x0c, old", "two cats"]


class Control:
    def __call__(self, prompt: str, control_image: Any = None, mask: Any = None) -> None: ...


def test_options_have_the_names_of_the_pipeline() -> None:
    image, mask = tiny.picture(), tiny.picture(mode="L")
    call = {"image": image, "mask_image": mask, "num_frames": 3}
    assert fitted(Control, call) == {"control_image": image, "mask": mask, "num_frames": 3}
    both = {"image": image, "control_image": mask}
    assert fitted(Control, both) == both


def test_only_the_same_image_is_found_again(tmp_path: Path) -> None:
    """By its name and what is in it; a name with a folder in it is none."""
    image = tiny.picture()
    image.save(tmp_path / "a.png")
    image.filename = "a.png"
    facts = described({"image": image, "strength": 0.5})
    found = with_images({"call": facts}, {}, (tmp_path / "none", tmp_path))
    assert described(found) == {"image": facts["image"]}
    assert with_images({"call": facts}, {"image": 3}, (tmp_path,)) == {"image": 3}
    for wrong in ("../a.png", str(tmp_path / "a.png"), 3, None):
        mark = {"image": facts["image"] | {"file": wrong}}
        assert with_images({"call": mark}, {}, (tmp_path,)) == {}
    assert with_images({"call": []}, {}, (tmp_path,)) == {}
