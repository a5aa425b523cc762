"""The page Generate encodes a prompt once: later images of it take what the encoder made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tenuto as tn
from gradio_app.bench import NO_ARTIFACT, Bench
from gradio_app.measured import generated
from gradio_app.settings import Settings

SAID = "the text encoder did not run"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Settings(tmp_path / "out", device="cpu"))


def image(bench: Bench, prompt: str, artifact: str = NO_ARTIFACT, **more: Any) -> tuple[bytes, str]:
    """(pixels, what the page says below them) of one image alone."""
    model = more.pop("model", "demo:unet")
    found = bench.generate(
        model, prompt, 3, more.pop("steps", 2), 2.0, artifact, False, lambda *_: None, more
    )
    (path,) = found["pictures"].values()
    with Image.open(path) as picture:
        return picture.tobytes(), generated(found["numbers"], 0.1, 2, "cpu")


def test_a_prompt_is_encoded_once(bench: Bench) -> None:
    first, said = image(bench, "a lemon")
    assert SAID not in said
    ran = list[int]()
    bench.studio.pipe(bench.places.model("demo:unet")).text_encoder.register_forward_hook(
        lambda *_: ran.append(1)
    )
    again, said = image(bench, "a lemon")
    assert again == first and SAID in said and not ran
    _, said = image(bench, "a lemon", steps=3)
    assert SAID in said and not ran, "steps change no states"
    _, said = image(bench, "a dog")
    assert SAID not in said and ran
    _, said = image(bench, "a lemon", negative_prompt="a cat")
    assert SAID not in said
    again, said = image(bench, "a lemon")
    assert again == first and SAID in said


def test_a_quantized_encoder_is_another_one(bench: Bench) -> None:
    pipe = tn.demo("unet")
    made = tn.quantize_encoder(pipe, "w4", ["a lemon", "a dog"], method="rtn", steps=2)
    made.save(bench.places.out / "low.safetensors")
    full, _ = image(bench, "a lemon")
    low, said = image(bench, "a lemon", "low")
    assert SAID not in said and low != full
    assert image(bench, "a lemon", "low")[0] == low
    again, said = image(bench, "a lemon")
    assert again == full and SAID in said
