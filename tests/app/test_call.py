"""The pipeline's own settings without a server: given, checked, kept in files, and read back."""

from __future__ import annotations

import json
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
from PIL import Image

from gradio_app import calibrate_fields, jobs, worker
from gradio_app.bench import Bench
from gradio_app.call import as_fields, checked, from_fields, kept, others, recalled, taken
from gradio_app.infotext import LONGEST, LONGEST_CALL, parsed, written
from gradio_app.pictures import restored, saved
from gradio_app.places import Places
from gradio_app.settings import Settings
from gradio_app.studio import Generated, Wanted
from gradio_app.viewer import DIFFERENCE, SLIDER, A, show
from gradio_app.worker import Reports
from tenuto.artifact import read_header
from tenuto.errors import TenutoError
from tenuto.sampling import described
from tests.core.tiny_pipelines import picture, stable_diffusion
from tests.patience import PATIENCE

INPAINT = diffusers.StableDiffusionInpaintPipeline
VIDEO = diffusers.StableVideoDiffusionPipeline
EMPTY: dict[str, Any] = {
    "image": None, "mask": None, "height": "", "width": "", "frames": "", "negative": "",
}  # fmt: skip


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The app's temporary folder, with an upload in it."""
    folder = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    (folder / "a").mkdir(parents=True)
    picture().save(folder / "a" / "my photo.png")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that says of which class its pipeline is, and has no more."""
    folder = tmp_path / "roots" / "inpaint"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": INPAINT.__name__}))
    return str(folder)


def test_what_pipelines_take() -> None:
    assert taken(INPAINT) == {
        "image": "image", "mask": "mask_image", "height": "height", "width": "width",
        "negative": "negative_prompt",
    }  # fmt: skip
    assert list(taken(VIDEO)) == ["image", "height", "width", "frames"]
    assert taken(diffusers.StableDiffusionControlNetPipeline)["image"] == "image"
    assert taken(None) == {} and others(None) == []
    assert "strength" in others(INPAINT) and not {"height", "guidance_scale"} & {*others(INPAINT)}


def test_only_fields_that_are_shown_count() -> None:
    fields = EMPTY | {"height": "48", "frames": "3", "negative": "blur"}
    more = 'strength = 0.5\n\n clip-skip=1 \rpadding = "a = b"\nnegative_prompt= worse'
    assert from_fields(INPAINT, fields, more) == {
        "height": "48", "negative_prompt": "worse", "strength": 0.5, "clip_skip": 1,
        "padding": "a = b",
    }  # fmt: skip
    assert from_fields(VIDEO, fields, "") == {"height": "48", "num_frames": "3"}
    for line in ("strength", "= 3", "a b = 3"):
        with pytest.raises(TenutoError, match=r"^Other settings are lines NAME = VALUE, not "):
            from_fields(INPAINT, EMPTY, line)


def test_a_file_is_not_read_by_its_name(model: str, tmp_path: Path) -> None:
    """@FILE is the command's alone, where it is its user who names the file."""
    picture().save(tmp_path / "secret.png")
    for line in (f"image = @{tmp_path}/secret.png", f"image = {tmp_path}/secret.png"):
        call = from_fields(INPAINT, EMPTY, line)
        with pytest.raises(TenutoError, match="There is no image"):
            checked(model, call, tmp_path / "inputs")


def test_half_a_character_is_refused(model: str, tmp_path: Path) -> None:
    """No file can hold it; JSON that comes over the network can."""
    with pytest.raises(TenutoError, match="half a character"):
        checked(model, {"negative_prompt": "\ud800"}, tmp_path)


def damaged(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Uploads that are no images of the kind that is taken."""
    picture().save(folder / "x.gif")
    whole = (folder / "a" / "my photo.png").read_bytes()
    head = b"IHDR" + struct.pack(">II", 16_384, 16_384) + whole[24:29]
    return {
        "gif": ((folder / "x.gif").read_bytes(), "is a PNG, JPEG or WebP"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is a PNG, JPEG or WebP"),
        "cut": (whole[:-60], "damaged"), "empty": (b"", "is a PNG, JPEG or WebP"),
        "huge": (whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:], "too large"),
    }  # fmt: skip


def test_uploads_that_are_refused(uploads: Path, model: str, tmp_path: Path) -> None:
    outside = tmp_path / "x.png"
    picture().save(outside)
    (uploads / "link.png").symlink_to(outside)
    for path in (outside, uploads / "link.png", uploads / "none.png", uploads, "a\0b"):
        with pytest.raises(TenutoError, match="no such upload"):
            checked(model, {"image": {"path": str(path)}}, tmp_path / "inputs")
    for name, (data, words) in damaged(uploads).items():
        (uploads / f"{name}.png").write_bytes(data)
        with pytest.raises(TenutoError, match=words) as error:
            checked(model, {"image": {"path": str(uploads / f"{name}.png")}}, tmp_path / "inputs")
        assert str(tmp_path) not in str(error.value)
    assert not (tmp_path / "inputs").exists()


def test_a_call_is_kept_and_read_back(uploads: Path, model: str, tmp_path: Path) -> None:
    """In a request, in a PNG and in the fields; the upload may be gone by then."""
    inputs = tmp_path / "inputs"
    upload = str(uploads / "a" / "my photo.png")
    fields = EMPTY | {"image": upload, "mask": upload, "width": "32", "negative": "bad,\nugly: x"}
    call = checked(model, from_fields(INPAINT, fields, "strength = 0.5"), inputs)
    assert (call["image"].mode, call["mask_image"].mode, call["width"]) == ("RGB", "L", 32)
    plain = kept(call, inputs)
    assert json.loads(json.dumps(plain)) == plain
    Path(upload).unlink()
    assert described(recalled(plain, inputs)) == plain
    assert described(checked(model, plain, inputs)) == plain
    assert kept(recalled(plain, inputs), inputs) == plain, "under the same names"
    names = sorted(p.name for p in inputs.iterdir())
    assert len(names) == 2 and all(name.startswith("my-photo-") for name in names)
    by_name = checked(model, {"image": plain["image"]["file"]}, inputs)
    assert described(by_name)["image"] == plain["image"]

    found = as_fields(plain, inputs)
    assert found.more == "strength = 0.5" and not found.lost
    assert found.values["width"] == "32" and found.values["negative"] == "bad,\nugly: x"
    shown = {k: str(v) for k, v in found.values.items() if k in ("image", "mask")}
    assert shown == {
        "image": str(inputs / plain["image"]["file"]),
        "mask": str(inputs / plain["mask_image"]["file"]),
    }
    (inputs / plain["image"]["file"]).unlink()
    assert as_fields(plain, inputs).lost == {"image": plain["image"]["file"]}
    with pytest.raises(TenutoError, match=r"image for image \(my-photo-.* choose it again"):
        recalled(plain, inputs)


def test_a_png_has_the_call(uploads: Path, model: str, tmp_path: Path) -> None:
    """Of an image and of a video; what cannot be a call is left out."""
    places = Places(tmp_path / "out", (tmp_path / "roots",))
    upload = {"path": str(uploads / "a" / "my photo.png")}
    given = {"image": upload, "mask": None, "strength": 0.5, "negative_prompt": "a\nSteps: 3"}
    call = checked(model, {k: v for k, v in given.items() if v is not None}, places.inputs)
    wanted = Wanted(model, "inpaint", "Negative prompt: x", 1, 2, 2.0, call=call)
    frames = [Image.new("RGB", (8, 8), (30 * i, 0, 0)) for i in range(4)]
    for pictures in ([frames[0]], frames):
        answer = saved(places, Generated({"full": pictures}, 1.0, wanted))
        path = answer["pictures"]["full"]
        assert answer["frames"] == len(pictures)
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == len(pictures)
        found = restored(places, path)
        assert found["prompt"] == "Negative prompt: x" and found["model"] == "inpaint"
        assert found["call"] == kept(call, places.inputs)
    for text in ("[1]", "[" * 5000, "x", "3"):
        assert "call" not in parsed(f"a\nSteps: 3, Tenuto call: {json.dumps(text)}")
    strange = as_fields({"a b": 1, "image": {"sha256": 3, "file": "../x"}, "eta": 1}, places.inputs)
    assert strange.more == "eta = 1" and strange.lost == {"image": "../x"}


def test_the_longest_prompt_and_call_come_back(tmp_path: Path) -> None:
    """Every character is escaped, twice where it is JSON in JSON."""
    places = Places(tmp_path)
    call = {"negative_prompt": "\x01" * ((LONGEST_CALL - 40) // 6)}
    prompt = "Negative prompt:\n" + "\x01" * (LONGEST - 20)
    wanted = Wanted("demo:unet", "demo:unet", prompt, 1, 2, None, call=call)
    answer = saved(places, Generated({"full": [Image.new("RGB", (8, 8))]}, 1.0, wanted))
    found = restored(places, answer["pictures"]["full"])
    assert (found["prompt"], found["call"]) == (prompt, call)
    assert written({"prompt": "", "steps": 1, "guidance": None, "seed": 1, "model": "m"}) == (
        "Steps: 1, Seed: 1, Model: m"
    )


def test_a_calibration_keeps_its_image(
    uploads: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs its fields show it, and it is resumed with it when the upload is gone."""
    monkeypatch.setattr(jobs, "WORKER", "import sys; sys.stdin.readline(); sys.exit(7)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stable_diffusion(INPAINT.__name__).save_pretrained(model)
    bench = Bench(Settings(tmp_path / "out", (tmp_path / "roots",)))
    upload = uploads / "a" / "my photo.png"
    call = {"image": {"path": str(upload)}, "strength": 0.5}
    job = bench.calibrate("inpaint", "x", "w4a8", "quick", None, call=call)
    assert job.over.wait(PATIENCE)
    upload.unlink()
    job = bench.resume("x") if bench.places.request("x") else job
    assert job.over.wait(PATIENCE)
    image = recalled(job.request["call"], Path(job.request["inputs"]))["image"]
    assert image.size == picture().size
    job.state = "running"
    own = calibrate_fields.filled(bench, job)[calibrate_fields.CHOSEN :]
    *own, accordion = own
    assert accordion.open and own == [
        str(bench.places.inputs / image.filename),
        None,
        *[""] * 4,
        "strength = 0.5",
    ]
    with pytest.raises(TenutoError, match="takes no colour"):
        bench.compare("demo:unet", ["shipped:demo-unet.w8a8"], 1, call={"colour": 1})
    assert not (tmp_path / "out" / "comparisons").exists()


def test_frames_are_looked_at(uploads: Path, tmp_path: Path) -> None:
    """A number is a frame, 0 the file that moves; a difference is of two frames."""
    paths = []
    for name, red in (("a", 10), ("b", 11)):
        first, *more = [Image.new("RGB", (8, 8), (red * i, 0, 0)) for i in range(1, 4)]
        first.save(tmp_path / f"{name}.png", save_all=True, append_images=more)
        paths.append(str(tmp_path / f"{name}.png"))
    pair = {"a": paths[0], "b": paths[1], "names": ["full", "x"], "frames": 3}
    updates = show(pair, SLIDER, 0)
    shown = Path(updates[1].value[0]["path"])
    assert shown.read_bytes() == Path(paths[0]).read_bytes() and updates[3].visible
    assert updates[3].maximum == 3
    updates = show(pair, SLIDER, 2)
    with Image.open(updates[1].value[1]["path"]) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (22, 0, 0)
    with Image.open(show(pair, DIFFERENCE, 3)[4].value["path"]) as image:
        assert image.getpixel((0, 0))[0] == 8 * 3
    single = {"a": paths[0], "names": ["full"]}
    assert not show(single, A, 9)[3].visible


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_a_start_image_reaches_the_artifact(
    uploads: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Chosen once: the artifact repeats the call, and all that a video's frames are shown in."""
    bench = Bench(Settings(tmp_path / "out", (models,), device="cpu"))
    monkeypatch.setattr(bench.desk, "start", lambda job, after=None: job)  # done here instead
    bars = Reports(lambda **event: None, threading.Event())
    upload = uploads / "a" / "my photo.png"
    call = {"image": {"path": str(upload)}, "height": 32, "width": 32, "num_frames": 2}
    job = bench.calibrate(
        "mine/video", "x", "w8a8", "quick", None, steps=2, prompts="a red dog", call=call
    )
    upload.unlink()
    worker.calibrate(job.request, bars)
    found = read_header(tmp_path / "out" / "x.safetensors")["schedule"]["call"]
    assert (found["num_frames"], found["image"]["image"]) == (2, list(picture().size))

    job = bench.compare("mine/video", ["x"], 2)
    result = worker.compare(job.request, bars)
    assert result["prompts"] == [""] * 4 and result["numbers"]["x"]["count"] == 4
    file = Path(result["folder"]) / result["pictures"]["x"][-1]
    assert restored(bench.places, file)["call"] == found

    answer = bench.generate("mine/video", "", 3, 2, None, "x", True, lambda *_: None)
    assert answer["frames"] == 2 and answer["numbers"]["psnr_db"]
    for path in answer["pictures"].values():
        assert restored(bench.places, path)["call"] == found
        with Image.open(path) as image:
            assert image.n_frames == 2  # type: ignore[attr-defined]
