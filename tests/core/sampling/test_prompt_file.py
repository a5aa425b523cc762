"""The file of a `PromptCache` while others damage, remove and write it; and wrong arguments."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tenuto as tn
from tenuto.lock import one_at_a_time
from tenuto.sampling import PromptFile, prompt_file
from tenuto.sampling.prompt_cache import Unknown
from tests.core import tiny_pipelines as tiny
from tests.patience import PATIENCE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.safetensors"


@pytest.fixture
def pipe() -> Any:
    found = tiny.stable_diffusion("StableDiffusionPipeline")
    found.set_progress_bar_config(disable=True)
    return found


def encoded(pipe: Any, prompt: str = "a dog") -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def latents(pipe: Any, prompt: str = "a dog", **call: Any) -> torch.Tensor:
    noise = torch.Generator("cpu").manual_seed(0)
    return pipe(prompt, num_inference_steps=2, output_type="latent", generator=noise, **call).images


# --- damaged --------------------------------------------------------------------------------------


def flipped(file: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_noticed(pipe: Any, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With an encoder the states are made anew, and stored; without, it is one sentence."""
    with tn.PromptCache(file).used_by(pipe, "mine"):
        own = encoded(pipe)
    flipped(file)
    encoder, pipe.text_encoder = pipe.text_encoder, None
    with (
        tn.PromptCache(file).used_by(pipe, "mine"),
        pytest.raises(tn.TenutoError, match="another one than was written") as error,
    ):
        encoded(pipe)
    assert "\n" not in str(error.value)
    pipe.text_encoder = encoder
    cache = tn.PromptCache(file)
    with caplog.at_level(logging.WARNING, "tenuto"), cache.used_by(pipe, "mine"):
        assert torch.equal(encoded(pipe), own) and cache.made == 1
    assert "encoded anew" in caplog.text
    again = tn.PromptCache(file)
    with again.used_by(pipe, "mine"):
        assert torch.equal(encoded(pipe), own) and again.found == 1


# --- others ---------------------------------------------------------------------------------------


def removed(file: Path) -> None:
    file.unlink()


def made_smaller(file: Path) -> None:
    """Another run that keeps less has let the entry go."""
    store = PromptFile(file, most=500)
    store.put("other", torch.ones(100), {})
    store.save()
    assert list(store.facts()) == ["other"]


def replaced(file: Path) -> None:
    store = PromptFile(file, fresh=True)
    store.put("other", torch.ones(100), {})
    store.save()


def broken(file: Path) -> None:
    file.write_bytes(b"junk")


@pytest.mark.parametrize("change", [removed, made_smaller, replaced, broken])
def test_what_others_do_to_the_file_costs_no_image(pipe: Any, file: Path, change: Any) -> None:
    cache, plain = tn.PromptCache(file), latents(pipe)
    with cache.used_by(pipe):
        latents(pipe)
    change(file)
    with cache.used_by(pipe):
        assert torch.equal(latents(pipe), plain)
    assert (cache.made, cache.found) == (2, 0)
    if change is broken:
        assert file.read_bytes() == b"junk", "it may be the user's"
    else:
        again = tn.PromptCache(file)
        with again.used_by(pipe):
            assert torch.equal(latents(pipe), plain) and again.found == 1


def test_what_others_add_is_found(pipe: Any, file: Path) -> None:
    one, other = tn.PromptCache(file), tn.PromptCache(file)
    with other.used_by(pipe):
        encoded(pipe)
    with one.used_by(pipe):
        encoded(pipe)
    assert (one.made, one.found) == (0, 1)


WRITER = """
import sys, torch
from tenuto.sampling import PromptFile
path, tag, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for i in range(count):
    store = PromptFile(path)
    store.put(f"{tag}{i}", torch.full((50, 50), float(i)), {})
    store.save()
    assert store.get(f"{tag}{i}") is not None
"""


def test_two_processes_lose_nothing(file: Path) -> None:
    """Both write at once, all the time: each waits for the other."""
    command = [sys.executable, "-c", WRITER, str(file)]
    given = os.environ | {"PYTHONPATH": str(Path(tn.__file__).parents[1])}
    jobs = [subprocess.Popen([*command, tag, "12"], env=given) for tag in "ab"]
    assert [job.wait(PATIENCE) for job in jobs] == [0, 0]
    store = PromptFile(file)
    assert len(store) == 24 and all(
        store.get(f"{tag}{i}") is not None for tag in "ab" for i in range(12)
    )
    assert [*file.parent.iterdir()] == [file]


def test_one_at_a_time_waits_and_goes_on(tmp_path: Path) -> None:
    """Of two threads one waits; but not for ever."""
    seen, place = list[str](), tmp_path / "x"

    def other() -> None:
        with one_at_a_time(place):
            seen.append("other")

    with one_at_a_time(place):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        seen.append("one")
    thread.join()
    assert seen == ["one", "other"]
    with one_at_a_time(place):
        start = time.monotonic()
        with one_at_a_time(place, wait=0.05):
            assert time.monotonic() - start < 2


# --- where it cannot be written -------------------------------------------------------------------


def test_what_cannot_be_written_is_said_before_anything_is_encoded(pipe: Any, file: Path) -> None:
    """And what is known needs no writing."""
    place = file.parent / "sub"
    cache, ran = tn.PromptCache(place / "p.safetensors"), list[str]()
    with cache.used_by(pipe):
        encoded(pipe)
    pipe.text_encoder.register_forward_hook(lambda *_: ran.append("encoder"))
    pipe.unet.register_forward_hook(lambda *_: ran.append("denoiser"))
    (place / "p.safetensors").rename(file)
    place.rmdir()
    place.write_text("a file where a folder would be")
    with pytest.raises(tn.TenutoError, match="Cannot write"), cache.used_by(pipe):
        latents(pipe)
    assert not ran and "encode_prompt" not in vars(pipe)


@contextlib.contextmanager
def only_reading(folder: Path) -> Iterator[None]:
    """Nothing can be written there: of root, who can, another user is made meanwhile."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    else:
        folder.chmod(0o500)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        else:
            folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders have no such rights on Windows")
def test_a_folder_to_read_only_serves_what_is_known(pipe: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "prompts.safetensors"
        with tn.PromptCache(file).used_by(pipe):
            encoded(pipe)
        folder.chmod(0o755)
        file.chmod(0o644)
        with only_reading(folder):
            cache = tn.PromptCache(file)
            with cache.used_by(pipe):
                encoded(pipe)
                with pytest.raises(tn.TenutoError, match="Cannot write"):
                    encoded(pipe, "a cat")
        assert (cache.found, cache.made) == (1, 0)


def test_a_disk_that_fills_up_later_costs_no_image(
    pipe: Any, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning, and the states are still in memory."""
    plain, cache = latents(pipe), tn.PromptCache(file)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "tenuto"):
        patch.setattr(prompt_file, "write_tensors", full)
        with cache.used_by(pipe):
            assert torch.equal(latents(pipe), plain)
        assert cache.encode(pipe, "a cat", num_inference_steps=2)["prompt_embeds"] is not None
    assert caplog.text.count("No space left on device") == 2 and cache.file.unsaved
    with cache.used_by(pipe):
        assert torch.equal(latents(pipe), plain) and cache.made == 2
    assert len(tn.PromptCache(file).file) == 2 and not cache.file.unsaved


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"file": 5}, "is a path, not int"), ({"file": ""}, r"a \.safetensors file"),
        ({"most": -1}, "number of bytes, not -1"), ({"most": "1 GB"}, "number of bytes"),
        ({"most": 1.5}, "number of bytes"),
    ],
)  # fmt: skip
def test_a_wrong_file_or_size_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(tn.TenutoError, match=said) as error:
        tn.PromptCache(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", [None, 5, [], [5], b"a dog", {"a": 1}])
def test_a_wrong_prompt_is_one_sentence(pipe: Any, prompt: Any) -> None:
    with pytest.raises(tn.TenutoError, match="A prompt is a text or some texts"):
        tn.PromptCache().encode(pipe, prompt, num_inference_steps=1)
    with pytest.raises(tn.TenutoError, match="encodes no prompts"):
        tn.PromptCache().encode(object(), "a dog")


@pytest.mark.parametrize("own", [False, True])
def test_caches_may_end_in_any_order(pipe: Any, own: bool) -> None:
    """What was there before the first of them is there after the last."""
    before = None
    if own:
        before = vars(pipe)["encode_prompt"] = pipe.encode_prompt
    one, other, third = (tn.PromptCache() for _ in range(3))
    uses = [cache.used_by(pipe) for cache in (one, other, third)]
    for use in uses:
        use.__enter__()
    uses[1].__exit__(None, None, None)
    encoded(pipe)
    uses[0].__exit__(None, None, None)
    encoded(pipe, "a cat")
    uses[2].__exit__(None, None, None)
    assert (one.made, other.made, third.made) == (1, 0, 2)
    assert vars(pipe).get("encode_prompt") is before


def test_a_bare_cache_says_what_is_not_there(pipe: Any, file: Path) -> None:
    with tn.PromptCache(file).used_by(pipe, "mine"):
        encoded(pipe)
    pipe.text_encoder = None
    with tn.PromptCache(file).used_by(pipe, "mine"), pytest.raises(Unknown, match="no states of"):
        encoded(pipe, "a cat")
