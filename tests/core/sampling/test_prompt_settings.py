"""The key of stored states: whatever changes what a pipeline makes of a prompt is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from transformers import AddedToken, CLIPTokenizer

import tenuto as tn
from tenuto.sampling.prompt_settings import settings_of
from tests.core import family_pipelines as families
from tests.core import tiny_pipelines as tiny


def diffusion() -> Any:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    tiny.randomized(pipe.text_encoder, 0)
    return pipe


def encoded(pipe: Any, prompt: Any = "a Dog, far away", **call: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = pipe.encode_prompt(prompt, **call)
    found = found if isinstance(found, tuple) else (found,)
    parts = [x for part in found for x in (part if isinstance(part, list) else [part])]
    return [x for x in parts if isinstance(x, torch.Tensor)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


OF_SD = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}


def shorter(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = 6


def other_side(pipe: Any) -> None:
    pipe.tokenizer.padding_side = "left"


def cut_before(pipe: Any) -> None:
    pipe.tokenizer.truncation_side = "left"


def other_words(pipe: Any) -> None:
    """As many, in another order."""
    letters = [*reversed(tiny.LETTERS), *(f"{x}</w>" for x in tiny.LETTERS)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    pipe.tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16
    )


def other_pad(pipe: Any) -> None:
    pipe.tokenizer.pad_token = "a"


def stripping(pipe: Any) -> None:
    """A word that is there already, and takes the spaces round it now."""
    pipe.tokenizer.add_tokens(AddedToken("g</w>", lstrip=True, rstrip=True))


def without_lower_case(pipe: Any) -> None:
    from tokenizers import normalizers

    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


CHANGES = [
    shorter, other_side, cut_before, other_words, other_pad, stripping, without_lower_case,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_tokenizer_does_is_in_the_key(change: Callable[[Any], None]) -> None:
    prompt = "a Dog g, far away from all houses"
    cache, pipe = tn.PromptCache(), diffusion()
    with cache.used_by(pipe):
        before = encoded(pipe, prompt, **OF_SD)
    change(pipe)
    with cache.used_by(pipe):
        assert equal(encoded(pipe, prompt, **OF_SD), encoded(diffusers_own(pipe), prompt, **OF_SD))
        assert equal(encoded(pipe, prompt, **OF_SD), encoded(diffusers_own(pipe), prompt, **OF_SD))
    assert (cache.made, cache.found) == (2, 1)
    assert change is stripping or not equal(encoded(pipe, prompt, **OF_SD), before)


def diffusers_own(pipe: Any) -> Any:
    """The same parts in a pipeline that knows no cache."""
    return type(pipe)(**pipe.components, requires_safety_checker=False)


def with_template(pipe: Any) -> None:
    pipe.tokenizer.chat_template = "{% for m in messages %}other: {{ m['content'] }}{% endfor %}"


def with_system(pipe: Any) -> None:
    pipe.system_message = "You are a poet."


def with_zeros(pipe: Any) -> None:
    pipe.register_to_config(
        force_zeros_for_empty_prompt=not pipe.config.force_zeros_for_empty_prompt
    )


def with_layers(pipe: Any) -> None:
    vars(pipe)["text_encoder_select_layers"] = (3, 2, 1)  # diffusers cannot set a tuple


@pytest.mark.parametrize(
    ("family", "change", "call"),
    [
        ("z_image", with_template, {}),
        ("hunyuan_video15", with_template, {}),
        ("hunyuan_video15", with_system, {}),
        ("sdxl", with_zeros, {"do_classifier_free_guidance": True}),
        ("krea2", with_layers, {}),
    ],
)
def test_settings_of_a_pipeline_are_in_the_key(
    family: str, change: Callable[[Any], None], call: dict[str, Any]
) -> None:
    pipe, cache = getattr(families, family)().model, tn.PromptCache()
    with cache.used_by(pipe):
        before = encoded(pipe, "a dog", **call)
    change(pipe)
    with cache.used_by(pipe):
        after = encoded(pipe, "a dog", **call)
    assert equal(after, encoded(pipe, "a dog", **call)) and not equal(after, before)
    assert (cache.made, cache.found) == (2, 0)


def test_autocast_is_in_the_key() -> None:
    pipe, cache = diffusion(), tn.PromptCache()
    with cache.used_by(pipe):
        with torch.autocast("cpu", torch.bfloat16):
            half = encoded(pipe, **OF_SD)
        full = encoded(pipe, **OF_SD)
    assert equal(full, encoded(pipe, **OF_SD)) and not equal(full, half)


def test_guidance_that_a_pipeline_keeps_to_itself_is_in_the_key() -> None:
    """I2VGenXL's encode_prompt takes no word of guidance, and looks at the pipeline."""

    class Own(diffusers.StableDiffusionPipeline):
        def encode_prompt(self, prompt: Any, device: Any) -> Any:  # pyright: ignore
            guided = self.do_classifier_free_guidance
            return super().encode_prompt(prompt, device, 1, guided)

    pipe, cache = Own(**diffusion().components, requires_safety_checker=False), tn.PromptCache()
    with cache.used_by(pipe):
        for scale, count in ((1.0, 1), (7.0, 2), (1.0, 1)):
            pipe._guidance_scale = scale
            assert len(encoded(pipe, "a dog", device="cpu")) == count
    assert (cache.made, cache.found) == (2, 1)


def test_what_each_call_sets_anew_is_not() -> None:
    """Truncation and padding of the tokenizer before it: a prompt is found after any other."""
    pipe, cache = diffusion(), tn.PromptCache()
    first = settings_of(pipe)
    with cache.used_by(pipe):
        encoded(pipe, "a dog", **OF_SD)
        pipe.tokenizer("a much longer text than before", truncation=True, max_length=4)
        encoded(pipe, "a dog", **OF_SD)
    assert settings_of(pipe) == first and (cache.made, cache.found) == (1, 1)


def test_what_a_call_sets_for_good_is_known_twice() -> None:
    """Sana turns its tokenizer's side: a new process asks as the first call did, this one not."""
    pipe, cache = families.sana().model, tn.PromptCache()
    assert pipe.tokenizer.padding_side == "left"
    with cache.used_by(pipe):
        one = encoded(pipe, "a dog")
        assert pipe.tokenizer.padding_side == "right" and cache.made == 1
        assert equal(encoded(pipe, "a dog"), one)
        pipe.tokenizer.padding_side = "left"
        assert equal(encoded(pipe, "a dog"), one)
    assert (cache.made, cache.found) == (1, 2)
