"""Three ways to calibrate that have a name, and what was measured of each on the models that ship.

The numbers are those of docs/results.md: 64 prompts, 20 steps, one NVIDIA H200.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from .view import table

OWN = "own"
LABEL = "My own choice of the fields below"


class Profile(NamedTuple):
    """scheme, preset, reuse in percent, text_encoder: values of the fields of the tab Calibrate.

    size, measured: what that means, in words.
    """

    label: str
    scheme: str
    preset: str
    reuse: int
    text_encoder: str
    size: str
    measured: str

    @property
    def chosen(self) -> list[Any]:
        """The values, in the order of the fields."""
        return [self.scheme, self.preset, self.reuse, self.text_encoder]


PROFILES = {
    "small": Profile(
        "Small", "w4a8", "standard", 0, "w4", "4-bit weights, about 30 % of 16 bits",
        "35 to 37 dB: small differences that one sees",
    ),
    "balanced": Profile(
        "Balanced", "w8a8", "quick", 30, "", "8-bit weights, about half of 16 bits",
        "weights: 45 to 49 dB; 30 % of branch calls reused: 43 to 48 dB",
    ),
    "best": Profile(
        "Best quality", "w8a8", "standard", 0, "", "8-bit weights, about half of 16 bits",
        "45 to 49 dB: at most differences that one has to look for",
    ),
}  # fmt: skip
FIRST = "balanced"
HEAD = ["", "the denoiser", "PSNR on the models that ship, of each part alone"]
KNOWN = json.dumps({name: profile.chosen for name, profile in PROFILES.items()})
CHOSEN = f"(name, ...now) => ({KNOWN})[name] || now"
FOUND = f"""(...now) => {{
  const same = ([, then]) => now.every((value, i) => value == then[i]);
  return [(Object.entries({KNOWN}).find(same) || ["{OWN}"])[0]];
}}"""


def profile_field() -> gr.Radio:
    """The choice, and below it what each means."""
    choices = [*((p.label, name) for name, p in PROFILES.items()), (LABEL, OWN)]
    radio = gr.Radio(
        choices, value=FIRST, label="Profile", elem_id="calibrate-profile",
        info="Sets the fields below; what it takes of your model is said before Start",
    )  # fmt: skip
    with gr.Accordion("What the profiles mean", open=False):
        rows = [(p.label, p.size, p.measured) for p in PROFILES.values()]
        gr.HTML(table(rows, HEAD), elem_id="calibrate-profiles")
    return radio


def follow(profile: gr.Radio, fields: Sequence[Any]) -> None:
    """A profile sets its fields, and fields that are changed are another one; all in the page.

    fields: in the order of `Profile.chosen`.
    """
    private: dict[str, Any] = {"api_visibility": "private"}
    profile.input(
        None, [profile, *fields], [*fields], js=CHOSEN, trigger_mode="always_last", **private
    )  # fmt: skip
    gr.on([field.change for field in fields], None, [*fields], profile, js=FOUND, **private)
