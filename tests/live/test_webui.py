"""A WebUI that is running: TENUTO_WEBUI_URL=http://127.0.0.1:7860 names one started with --api.

The host comes from its user's own installation, with the extension in it and any checkpoint; the
smaller, the faster. Pixels are compared, not files: those hold the infotext.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
from PIL import Image

URL = os.environ.get("TENUTO_WEBUI_URL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not URL, reason="TENUTO_WEBUI_URL names no running WebUI"),
]
BALANCED = "Built-in: Balanced"
CACHE = [True, BALANCED, "Off", "Uniform", 2, 0, 1, False, 0]
ARGS = {
    "uniform 2": CACHE,
    "uniform 3": [*CACHE[:4], 3, *CACHE[5:]],
    "router": [True, BALANCED, "Off", "router"],
    "w8a8": [True, BALANCED, "W8A8", "Off"],
    "w4a8": [True, BALANCED, "W4A8", "Off"],
    "both": [True, BALANCED, "W8A8", "Uniform", 2, 0],
}
PROMPTS = {
    "usual": {},
    "AND": {"prompt": "a cat AND a dog :0.5"},
    "unequal lengths": {"prompt": "a cat, " * 60},
    "batch of 2": {"batch_size": 2},
    "NGMS": {"s_min_uncond": 8.0},
    "Heun": {"sampler_name": "Heun"},
    "DPM++ 2M": {"sampler_name": "DPM++ 2M"},
    "DDIM": {"sampler_name": "DDIM"},
    "UniPC": {"sampler_name": "UniPC"},
    "hires": {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent",
              "hr_second_pass_steps": 4, "denoising_strength": 0.7},
    "one call a half": {"override_settings": {"batch_cond_uncond": False}},
}  # fmt: skip


def get(path: str, data: Any = None) -> Any:
    """JSON from the host; an HTTP error with what it says."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(URL + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read()[:300]!r}") from error


def draw(args: list[Any] | None = None, route: str = "txt2img", **more: Any) -> Any:
    """(pixels of every image, infotext, what is said under it)."""
    asked: dict[str, Any] = {
        "prompt": "a cat", "steps": 6, "width": 128, "height": 128, "seed": 1, "cfg_scale": 5,
        "sampler_name": "Euler a", "save_images": False,
        "override_settings": {"batch_cond_uncond": True}, "override_settings_restore_afterwards":
        False,
    }  # fmt: skip
    if more.get("enable_hr") and get("/tenuto/v1/status")["host"] == "forge":
        asked["hr_additional_modules"] = ["Use same choices"]  # or Forge answers 500
    if args is not None:
        asked["alwayson_scripts"] = {"Tenuto": {"args": args}}
    found = get(f"/sdapi/v1/{route}", asked | more)
    info = json.loads(found["info"])
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in found["images"]]
    return pictures, info["infotexts"][0], get("/tenuto/v1/status")["last"]


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether all pixels are equal."""
    return len(one) == len(other) and all(map(np.array_equal, one, other))


@pytest.mark.parametrize("facts", PROMPTS)
def test_off_on_off(facts: str) -> None:
    more = PROMPTS[facts]
    plain = draw(**more)[0]
    changed, _, last = draw(ARGS["both"], **more)
    assert same(draw(**more)[0], plain)
    assert not same(changed, plain)
    assert not last["notes"] and last["computed"] > 0 and last["layers"]
    assert same(draw(ARGS["both"], **more)[0], changed)
    assert same(draw([*CACHE[:4], 1], **more)[0], plain), "an interval of one computes everything"


@pytest.mark.parametrize("args", ARGS)
def test_each_choice(args: str) -> None:
    plain = draw()[0]
    changed, text, last = draw(ARGS[args])
    assert not same(changed, plain) and same(draw()[0], plain)
    assert not last["notes"] and "Tenuto: " in text
    assert get("/tenuto/v1/status")["attached"] is False
    assert last["held"] > 0 or args in ("w8a8", "w4a8")
    if args in ("uniform 2", "uniform 3"):  # of 6 steps
        assert last["computed"] == last["held"] * {"uniform 2": 1, "uniform 3": 0.5}[args]


def test_passes_of_hires() -> None:
    """The first alone, the second alone: the counts add up."""
    counts = []
    for passes in ("Both", "First pass only", "Hires only"):
        last = draw([*CACHE, passes], **PROMPTS["hires"])[2]
        counts.append(last["computed"] + last["held"])
    assert counts[0] == counts[1] + counts[2] > counts[1] > 0


def test_an_infotext_brings_the_picture_back() -> None:
    """The API fills the script's arguments from it."""
    picture, text, _ = draw([True, BALANCED, "W8A8", "Uniform", 2.5, 0.3, 0.9, False, 4])
    assert re.search(r"Tenuto: W8A8\+uniform, .*Tenuto speed: 2.5", text)
    found = get("/sdapi/v1/txt2img", {
        "infotext": text, "save_images": False, "override_settings": {"batch_cond_uncond": True},
    })  # fmt: skip
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["images"][0]))))
    assert np.array_equal(again, picture[0])


def test_an_unknown_artifact_is_a_sentence() -> None:
    plain = draw()[0]
    found, text, last = draw([True, "nowhere.safetensors"])
    assert same(found, plain) and "Tenuto" not in text
    assert "no artifact called" in last["text"]


def test_the_grid_has_our_axes() -> None:
    """Each cell's own; arguments by the host's own description, which differs between hosts."""
    known = get("/sdapi/v1/script-info")
    facts = next(s for s in known if s["name"] == "x/y/z plot" and not s["is_img2img"])
    labels = [a["label"] for a in facts["args"]]
    args = [a["value"] for a in facts["args"]]
    axes = facts["args"][labels.index("X type")]["choices"]
    axis = axes.index("[Tenuto] Speed")
    args[labels.index("X type")], args[labels.index("X values")] = axis, "1, 2, 3"
    for label, value in (("Y type", 0), ("Z type", 0)):
        args[labels.index(label)] = value
    for label in ("Draw legend", "Include Sub Images"):
        args[labels.index(label)] = label != "Draw legend"
    found = draw(CACHE, script_name="x/y/z plot", script_args=args)[0]
    assert len(found) >= 4 and same(found[1:2], draw()[0]), "speed 1 is the plain picture"
    assert not same(found[2:3], found[1:2]) and not same(found[3:4], found[2:3])


def test_img2img() -> None:
    picture = Image.fromarray(draw()[0][0])
    file = io.BytesIO()
    picture.save(file, "png")
    more = {"init_images": [base64.b64encode(file.getvalue()).decode()], "denoising_strength": 0.6}
    plain = draw(route="img2img", **more)[0]
    changed, _, last = draw(CACHE, route="img2img", **more)
    assert last["held"] > 0 and not same(changed, plain)
    assert same(draw(route="img2img", **more)[0], plain)
