"""`PromptCache`: whose states a pipeline takes, and what its key and its mark see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tenuto as tn
from tenuto.sampling.prompt_cache import Unknown
from tests.core import tiny_pipelines as tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.safetensors"


def diffusion(seed: int = 0) -> Any:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    tiny.randomized(pipe.text_encoder, seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(pipe: Any, *args: Any, **call: Any) -> Any:
    """What the pipeline makes of a prompt: the tensors of it."""
    if not args and not call:
        args = ("a dog", "cpu", 1, True, "bad")
    with torch.no_grad():
        return [x for x in pipe.encode_prompt(*args, **call) if isinstance(x, torch.Tensor)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- whose states ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models as the hub's client keeps them, of different text encoders."""
    from huggingface_hub import constants

    for name, seed in (("A", 1), ("B", 2)):
        place = tmp_path / f"models--org--{name}"
        diffusion(seed).save_pretrained(place / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def of_hub(hub: Path, name: str, **parts: Any) -> Any:
    """As `from_pretrained("org/NAME")` gives it without a network."""
    from diffusers import StableDiffusionPipeline

    place = hub / f"models--org--{name}" / "snapshots" / "abc"
    pipe = StableDiffusionPipeline.from_pretrained(place, **parts)
    pipe.register_to_config(_name_or_path=f"org/{name}")
    return pipe


def test_a_hub_id_is_known_by_its_own_folder(hub: Path, file: Path) -> None:
    """A model of the hub without its encoder takes its own states, never those of another one."""
    cache, whole = tn.PromptCache(file), of_hub(hub, "A")
    with cache.used_by(whole):
        own = encoded(whole)
    bare = of_hub(hub, "A", text_encoder=None)
    with cache.used_by(bare):
        assert equal(encoded(bare), own)
    other = of_hub(hub, "B", text_encoder=None)
    with cache.used_by(other), pytest.raises(Unknown, match="no states of this prompt"):
        encoded(other)


def test_revisions_that_differ_are_refused(hub: Path, file: Path) -> None:
    pipe, bare = of_hub(hub, "A"), of_hub(hub, "A", text_encoder=None)
    diffusion(3).save_pretrained(hub / "models--org--A" / "snapshots" / "def")
    cache = tn.PromptCache(file)
    with cache.used_by(pipe):
        encoded(pipe)
    with cache.used_by(bare), pytest.raises(Unknown, match="Nothing says whose"):
        encoded(bare)


def test_a_pipeline_of_nowhere_takes_no_states(file: Path) -> None:
    """It has neither an encoder nor a folder; what the user calls it is enough."""
    cache, pipe = tn.PromptCache(file), diffusion()
    with cache.used_by(pipe):
        encoded(pipe)
    named = tn.PromptCache()
    with named.used_by(pipe, "mine"):
        own = encoded(pipe)
    pipe.text_encoder = None
    with cache.used_by(pipe), pytest.raises(Unknown, match=r"mark=") as error:
        encoded(pipe)
    assert "\n" not in str(error.value)
    with named.used_by(pipe, "mine"):
        assert equal(encoded(pipe), own)


def test_a_relative_folder_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(tmp_path)
    for name, seed in (("A", 1), ("B", 2)):
        diffusion(seed).save_pretrained(name)
    one = StableDiffusionPipeline.from_pretrained("A")
    other = StableDiffusionPipeline.from_pretrained("B", text_encoder=None)
    cache = tn.PromptCache(file)
    with cache.used_by(one):
        encoded(one)
    monkeypatch.chdir("/")
    with cache.used_by(other), pytest.raises(Unknown):
        encoded(other)
