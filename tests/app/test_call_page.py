"""In Chromium: an image is made from an image, found again from its PNG; a video is looked at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.app.conftest import choose, restore
from tests.core.tiny_pipelines import picture
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An image to start from."""
    picture(48, 32).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def opened(tab: Any, model: str) -> Any:
    """The pipeline's own settings of a model, in the tab Generate."""
    page = tab.page
    page.wait_for_selector("#generate-call")
    choose(page, "#model", model)
    page.get_by_text("The pipeline's own settings").locator("visible=true").click()
    page.wait_for_selector("#generate-image-from")
    return page


def given(page: Any, place: str, file: Path) -> None:
    page.set_input_files(f"{place} input[type=file]", file)
    page.wait_for_selector(f"{place} img")


def write(page: Any, **values: str) -> None:
    for name, value in values.items():
        page.fill(f"#generate-{name} input, #generate-{name} textarea", value)


def made(tab: Any, count: int = 1) -> list[Path]:
    """The files of what is generated now."""
    page, folder = tab.page, tab.out / "pictures"
    before = {*folder.glob("*.png")}
    page.click("#generate")
    end, new = time.monotonic() + PATIENCE, list[Path]()
    while (
        len(new) < count and time.monotonic() < end
    ):  # the page need not show at once that it works
        page.wait_for_timeout(100)
        new = sorted({*folder.glob("*.png")} - before)
    page.wait_for_function(
        "document.querySelector('#generate-working')?.offsetParent == null"
        " && !document.querySelector('#generate').disabled"
    )
    assert len(new) == count, tab.text("#numbers")
    return new


def said(file: Path) -> dict[str, Any]:
    with Image.open(file) as image:
        return json.loads(image.text["tenuto"])  # type: ignore[attr-defined]


def test_an_image_from_an_image_comes_back(app: Any, visit: Any, photo: Path) -> None:
    tab = visit(app)
    tab.out = app.out
    page = opened(tab, "mine/inpaint")
    assert page.locator("#generate-frames").count() == 0
    assert "strength" in tab.text("#generate-more")
    page.set_input_files("#generate-image-from input[type=file]", __file__)
    page.wait_for_timeout(300)
    assert page.locator("#generate-image-from img").count() == 0
    photo.with_name("no.png").write_bytes(photo.read_bytes()[:-40])
    page.set_input_files("#generate-image-from input[type=file]", photo.with_name("no.png"))
    page.wait_for_selector("#generate-call-said [role=alert]")
    assert "no.png is not taken" in tab.text("#generate-call-said")
    given(page, "#generate-image-from", photo)
    page.wait_for_selector("#generate-call-said", state="hidden")
    given(page, "#generate-mask", photo)
    write(page, height="32", width="32", negative="blur,\nhaze", more="strength = 0.5")
    page.fill("#steps input", "4")
    (file,) = made(tab)
    call = said(file)["call"]
    assert call == {
        "image": call["image"], "mask_image": call["mask_image"], "height": 32, "width": 32,
        "negative_prompt": "blur,\nhaze", "strength": 0.5,
    }  # fmt: skip
    assert (app.out / "inputs" / call["image"]["file"]).is_file()

    page.reload()
    page.wait_for_selector("#generate-call")
    restore(page, file)
    assert "mask image" in tab.text("#aside-said")
    page.wait_for_selector("#generate-image-from img")  # it is not folded any more
    page.wait_for_selector("#generate-mask img")
    assert page.input_value("#generate-negative textarea") == "blur,\nhaze"
    assert said(made(tab)[0])["call"] == call


def test_a_video_is_looked_at(app: Any, visit: Any, photo: Path) -> None:
    """It moves, and its frames can be looked at one by one, by the keyboard too."""
    tab = visit(app)
    tab.out = app.out
    page = opened(tab, "mine/video")
    assert page.locator("#generate-mask, #generate-negative").count() == 0
    page.fill("#steps input", "2")
    page.click("#generate")
    page.wait_for_selector("#numbers [data-state=failed]")
    assert "StableVideoDiffusionPipeline needs image" in tab.text("#numbers")
    given(page, "#generate-image-from", photo)
    write(page, height="32", width="32", frames="3")
    (file,) = made(tab)
    with Image.open(file) as image:
        assert (image.n_frames, image.size) == (3, (32, 32))  # type: ignore[attr-defined]
    assert said(file)["call"]["num_frames"] == 3 and said(file)["prompt"] == ""
    first = page.get_attribute("#generate-image img", "src")
    assert first and first.endswith(".png")
    page.focus("#generate-frame input[type=range]")
    seen = {first}
    for frame in ("1", "2", "3"):
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "seen => !seen.includes(document.querySelector('#generate-image img').src)",
            arg=sorted(seen),
        )
        seen.add(page.get_attribute("#generate-image img", "src"))
        assert page.input_value("#generate-frame input[type=number]") == frame
