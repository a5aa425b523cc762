"""Conditioning in a file of models/tenuto_prompts: the text encoder runs once, and need not again.

The file is that of `tenuto.PromptCache`: safetensors, its header checked before a tensor is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch

from tenuto.errors import TenutoError
from tenuto.model import tensors_in
from tenuto.sampling import PromptFile
from tenuto.text import printable

from .api import found_by, io, ui
from .calibration import NAME
from .files import NO_FILE, choices, fingerprint, is_there

FOLDER = "tenuto_prompts"  # below models/
POSITIVE, NEGATIVE = "positive", "negative"  # the entries of a file


def path_of(name: str) -> Path | None:
    """The file of that name in the folder; None where there is none, or a name leads out."""
    found = folder_paths.get_full_path(FOLDER, name)
    return Path(found) if found is not None and Path(found).is_file() else None


class SavePrompt(io.ComfyNode):
    """An output node: it writes models/tenuto_prompts/NAME.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What text encoders made, and a name."""
        return io.Schema(
            node_id="Tenuto_SavePrompt",
            **found_by("save conditioning", "prompt cache"),
            display_name="Tenuto Save Prompt",
            category="Tenuto",
            description="Writes what the text encoder made of a prompt to models/tenuto_prompts. "
            "Tenuto Load Prompt reads it in later graphs, which then need no CLIP.",
            inputs=[
                io.Conditioning.Input(POSITIVE, tooltip="Right from the text encoder's node."),
                io.String.Input("name", default="my-prompt", tooltip="Of the file."),
                io.Conditioning.Input(
                    NEGATIVE, optional=True, tooltip="The one for KSampler's negative, if any."
                ),
                io.String.Input(
                    "text", default="", optional=True, multiline=True,
                    tooltip="The prompt in words, for the info of Tenuto Load Prompt alone.",
                ),
            ],
            outputs=[io.String.Output("info", "info", tooltip="What is in the file.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A sentence where the name would lead out of the folder."""
        if NAME.fullmatch(name) is None:
            return "The name of a prompt has letters, digits, dots, hyphens and underscores."
        return True

    @classmethod
    def execute(
        cls, positive: Any, name: str, negative: Any = None, text: str = ""
    ) -> io.NodeOutput:
        """Raises TenutoError in one sentence if something in it is no state of a prompt."""
        path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"
        given = {POSITIVE: positive} | ({} if negative is None else {NEGATIVE: negative})
        store = PromptFile(path, fresh=True)
        for key, conditioning in given.items():
            if not store.put(key, conditioning, {"kind": "conditioning", "text": text}):
                raise TenutoError(refusal(key, conditioning))
        store.save()
        said = info(path.name, given, text)
        return io.NodeOutput(said, ui=ui.PreviewText(said))


class LoadPrompt(io.ComfyNode):
    """A file of models/tenuto_prompts as conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One file in, what was saved out."""
        return io.Schema(
            node_id="Tenuto_LoadPrompt",
            **found_by("load conditioning", "prompt cache"),
            display_name="Tenuto Load Prompt",
            category="Tenuto",
            description="Reads what Tenuto Save Prompt wrote to models/tenuto_prompts: "
            "conditioning without CLIP, for models with the text encoder that made it.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=choices(folder_paths.get_filename_list(FOLDER)),
                    tooltip="A .safetensors file of models/tenuto_prompts, made by Tenuto Save "
                    "Prompt. The key R reads the folder anew.",
                )
            ],
            outputs=[
                io.Conditioning.Output(POSITIVE, POSITIVE, tooltip="As it was saved."),
                io.Conditioning.Output(
                    NEGATIVE, NEGATIVE,
                    tooltip="As it was saved; where none was, zeros in the form of the positive.",
                ),
                io.String.Output("info", "info", tooltip="What is in the file, and its text."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A sentence where the file is not there."""
        return is_there(name, path_of, missing)

    @classmethod
    def fingerprint_inputs(cls, name: str) -> Any:
        """Another file of the same name is another prompt."""
        return fingerprint(name, path_of)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Raises TenutoError in one sentence if it is no such file."""
        path = path_of(name)
        if path is None:
            raise TenutoError(missing(name))
        store = PromptFile(path)
        facts = store.facts().get(POSITIVE, {})
        found = {key: store.get(key) for key in (POSITIVE, NEGATIVE)}
        given = {key: value for key, value in found.items() if value is not None}
        if facts.get("kind") != "conditioning" or not all(map(is_conditioning, given.values())):
            raise TenutoError(f"{name} has no conditioning: Tenuto Save Prompt makes such files.")
        said = info(name, given, str(facts.get("text", "")))
        positive = given[POSITIVE]
        return io.NodeOutput(positive, given.get(NEGATIVE, zeroed(positive)), said)


def missing(name: str) -> str:
    """One sentence on a file that is not there."""
    if name == NO_FILE:
        return f"There is no file in models/{FOLDER} yet: Tenuto Save Prompt writes one."
    return f"There is no prompt called {printable(name)} in models/{FOLDER}."


def is_conditioning(value: Any) -> bool:
    """Whether this is what ComfyUI calls so: pairs of states (B, N, C) and settings."""
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], torch.Tensor)
        and isinstance(pair[1], dict)
        for pair in value
    )


def refusal(key: str, conditioning: Any) -> str:
    """One sentence on a conditioning that no file can hold: what lies in it beside states."""
    odd = sorted(
        {
            str(name)
            for pair in conditioning
            for name, value in pair[1].items()
            if not PromptFile().put("", value, {})
        }
    )
    what = f"has {', '.join(odd)}" if odd else "is too large"
    return (
        f"The {key} conditioning {what}, which is not stored: put Tenuto Save Prompt right after "
        "the text encoder, before ControlNets, hooks and the like."
    )


def zeroed(conditioning: Any) -> Any:
    """As ConditioningZeroOut: states and pooled ones are zeros, the settings stay."""
    return [
        [
            torch.zeros_like(states),
            {k: torch.zeros_like(v) if k == "pooled_output" else v for k, v in more.items()},
        ]
        for states, more in conditioning
    ]


def info(name: str, given: dict[str, Any], text: str) -> str:
    """What is in a file, in a few lines."""
    lines = [
        f"{key}: {' + '.join(' x '.join(map(str, pair[0].shape)) for pair in value)}, "
        f"{sum(x.nbytes for x in tensors_in(value)) / 2**20:.1f} MiB"
        for key, value in given.items()
    ]
    return "\n".join([name, *lines, *([printable(text, 400)] if text else [])])
