"""Which pass of a step a call is: words that tell passes apart and are the same at every step."""

from __future__ import annotations

from functools import partial
from typing import Any

from tenuto.model.passes import patches_on, which_pass


class Adapter:
    def __call__(self, *_: Any) -> None: ...


def skipping(place: tuple[str, int]) -> dict[str, Any]:
    """As a node makes it at every step: a function of its own each time."""

    def skip(*_: Any) -> None: ...

    return {"patches_replace": {"dit": {place: skip}}, "sigmas": object()}


def test_the_same_patches_are_the_same_words() -> None:
    assert patches_on(skipping(("double_block", 7))) == patches_on(skipping(("double_block", 7)))
    assert patches_on(skipping(("double_block", 7))) != patches_on(skipping(("double_block", 8)))
    assert patches_on({}) == patches_on({"patches": {}, "patches_replace": {"dit": {}}}) == ""


def test_whatever_can_be_called_has_a_name() -> None:
    kinds: list[Any] = [Adapter(), Adapter().__call__, partial(print), print, lambda: None]
    words = [patches_on({"patches": {"attn1_patch": [one]}}) for one in kinds]
    assert len(set(words)) == len(kinds) and all("0x" not in word for word in words)


def test_what_is_left_out_counts_too() -> None:
    assert which_pass({"skip_layers": [7], "timestep": 1.0}) == "skip_layers=[7]"
    assert which_pass({"skip_layers": None, "transformer_options": None}) == ""
    both = which_pass({"skip_layers": [7], "transformer_options": skipping(("double_block", 7))})
    assert both.startswith("skip_layers=[7] patches_replace.dit.")
