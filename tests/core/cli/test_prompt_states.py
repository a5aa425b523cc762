"""`tenuto generate --prompt-cache`: the same image, and no text encoder where states are known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import tenuto as tn
from tenuto import cli
from tenuto.cli import commands
from tenuto.sampling import PromptFile, prompt_file
from tenuto.sampling.loading import load

SPARED, KEPT = "no text encoder was loaded", "The states of the prompt are now in"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text encoders that are loaded from now on."""
    import transformers

    seen, own = list[str](), transformers.T5EncoderModel.from_pretrained.__func__

    def noted(cls: type, *args: Any, **options: Any) -> Any:
        seen.append(cls.__name__)
        return own(cls, *args, **options)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", classmethod(noted))
    return seen


def generated(model: Path | str, out: str, **options: Any) -> str:
    options = {"prompt": "a dog", "steps": 2, "prompt_cache": Path("p.safetensors"), **options}
    return commands.generate(str(model), out=Path(out), **options).text


def pixels(*names: str) -> list[bytes]:
    found = []
    for name in names:
        with Image.open(name) as image:
            found.append(image.tobytes())
    return found


def test_the_second_run_loads_no_encoder(
    here: Path, tiny_pixart_folder: Path, encoders: list[str]
) -> None:
    """Another prompt loads it again, and the file has both then."""
    model = tiny_pixart_folder
    generated(model, "plain.png", prompt_cache=None)
    assert KEPT in generated(model, "first.png") and len(encoders) == 2
    assert SPARED in generated(model, "second.png") and len(encoders) == 2
    first, *others = pixels("plain.png", "first.png", "second.png")
    assert others == [first, first]
    assert KEPT in generated(model, "other.png", prompt="two cats") and len(encoders) == 3
    assert len(PromptFile("p.safetensors")) == 2
    assert SPARED in generated(model, "again.png") and pixels("again.png") == [first]
    assert len(encoders) == 3


def test_options_that_change_states_are_not_mixed_up(
    here: Path, tiny_pixart_folder: Path, encoders: list[str]
) -> None:
    asked: list[dict[str, Any]] = [
        {}, {"negative": "a cat"}, {"guidance": 1.0}, {"call": {"max_sequence_length": 9}},
        {"batch": 9},
    ]  # fmt: skip
    for i, options in enumerate(asked):
        assert KEPT in generated(tiny_pixart_folder, f"{i}.png", **options), options
        assert SPARED in generated(tiny_pixart_folder, f"{i}b.png", **options), options
        one, other = pixels(f"{i}.png", f"{i}b.png")
        assert one == other
    assert len(encoders) == len(asked)


def test_quantized_encoders_have_states_of_their_own(
    here: Path, tiny_pixart_folder: Path, encoders: list[str]
) -> None:
    """What the artifact puts into the encoder is no reason to load it, once it is known."""
    pipe = load(str(tiny_pixart_folder))
    for bits in ("w4", "w8"):
        made = tn.quantize_encoder(pipe, bits, ["a dog", "two cats"], method="rtn", steps=2)
        made.save(f"{bits}.safetensors")
    del encoders[:]
    found = list[bytes]()
    for name in (None, "w4", "w8"):
        artifact = {"artifact": Path(f"{name}.safetensors")} if name else {}
        assert KEPT in generated(tiny_pixart_folder, "a.png", **artifact)
        assert SPARED in generated(tiny_pixart_folder, "b.png", **artifact)
        generated(tiny_pixart_folder, "c.png", prompt_cache=None, **artifact)
        one, other, plain = pixels("a.png", "b.png", "c.png")
        assert one == other == plain
        found.append(one)
    assert len(set(found)) == 3 and len(encoders) == 6


def test_a_shipped_model(here: Path) -> None:
    generated("demo:unet", "plain.png", prompt="a lemon", prompt_cache=None)
    assert KEPT in generated("demo:unet", "a.png", prompt="a lemon")
    assert SPARED in generated("demo:unet", "b.png", prompt="a lemon")
    one, *others = pixels("plain.png", "a.png", "b.png")
    assert others == [one, one]


@pytest.mark.parametrize("name", ["bad.safetensors", "stranger.txt"])
def test_a_bad_file_is_one_sentence_before_anything_is_loaded(
    here: Path, tiny_pixart_folder: Path, encoders: list[str], name: str, capfd: Any
) -> None:
    Path(name).write_text("junk")
    asked = ["generate", str(tiny_pixart_folder), "--prompt", "a", "--prompt-cache", name]
    assert cli.main(asked) == 2
    out, err = capfd.readouterr()
    assert not out and len(err.strip().splitlines()) == 1 and err.startswith("tenuto: ")
    assert not encoders and Path(name).read_text() == "junk"


def test_other_weights_in_the_folder_are_noticed(
    here: Path, tiny_pixart_folder: Path, encoders: list[str]
) -> None:
    """One value of one weight: the encoder is loaded, and the image is the one without a cache."""
    shutil.copytree(tiny_pixart_folder, here / "model")
    generated("model", "first.png")
    assert SPARED in generated("model", "again.png") and len(encoders) == 1
    weights = here / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith("wo.weight"))
    tensors[name][3, 5] += 100
    save_file(tensors, weights, {"format": "pt"})
    assert KEPT in generated("model", "other.png") and len(encoders) == 2
    generated("model", "plain.png", prompt_cache=None)
    first, other, plain = pixels("first.png", "other.png", "plain.png")
    assert other == plain != first
    assert SPARED in generated("model", "known.png") and len(encoders) == 3
    assert pixels("known.png") == [plain]


def test_the_same_weights_in_a_file_of_another_time_are_known(
    here: Path, tiny_pixart_folder: Path, encoders: list[str]
) -> None:
    """The encoder is loaded once to see it."""
    shutil.copytree(tiny_pixart_folder, here / "model")
    generated("model", "first.png")
    os.utime(here / "model" / "text_encoder" / "model.safetensors")
    assert "to see that it is the same" in generated("model", "again.png") and len(encoders) == 2
    assert SPARED in generated("model", "known.png") and len(encoders) == 2
    assert len(set(pixels("first.png", "again.png", "known.png"))) == 1


def test_a_file_that_cannot_be_written_is_said_first(
    here: Path, tiny_pixart_folder: Path, encoders: list[str]
) -> None:
    Path("sub").write_text("a file where a folder would be")
    with pytest.raises(tn.TenutoError, match="Cannot write"):
        generated(tiny_pixart_folder, "a.png", prompt_cache=Path("sub/p.safetensors"))
    assert not encoders and not Path("a.png").exists()


def test_a_disk_that_is_full_at_the_end_costs_no_image(
    here: Path, tiny_pixart_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_file, "write_tensors", full)
    said = generated(tiny_pixart_folder, "a.png")
    assert "could not be written to p.safetensors" in said and Path("a.png").exists()
