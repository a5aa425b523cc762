"""What the command passes on to the pipeline's own call: --set, --image, --height and so on."""

from __future__ import annotations

import inspect
import json
import shlex
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import TenutoError
from ..sampling import MARK, described
from ..text import printable

OPTIONS = {
    "image": "image", "mask": "mask_image", "height": "height", "width": "width",
    "frames": "num_frames", "negative": "negative_prompt",
}  # fmt: skip
OTHERWISE = {  # what pipelines that lack such a name call it
    "image": ("control_image", "images", "video"),
    "mask_image": ("mask", "control_mask"),
    "num_frames": ("video_length", "frames", "num_video_frames"),
}
MODES = {"mask_image": "L", "mask": "L", "control_mask": "L"}  # of images; else RGB


def gathered(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A command's options with those of the pipeline's call in one, `call`.

    `generate` takes --negative apart: it is of one prompt.
    """
    if "given" not in options:
        return dict(options)
    ours = {k for k in OPTIONS if (command, k) != ("generate", "negative")}
    found = {k: v for k, v in options.items() if k not in ours and k != "given"}
    named = {OPTIONS[k]: v for k, v in options.items() if k in ours and v is not None}
    call = {k: read_image(v, k) if isinstance(v, Path) else v for k, v in named.items()}
    return found | {"call": call | dict(map(_given, options["given"]))}


def _given(text: str) -> tuple[str, Any]:
    """What --set takes: `setting`, or an image where the value is @FILE."""
    name, value = setting(text, "--set takes NAME=VALUE")
    if isinstance(value, str) and value.startswith("@"):
        return name, read_image(Path(value[1:]), name)
    return name, value


def setting(text: str, what: str) -> tuple[str, Any]:
    """NAME=VALUE: a name and JSON, or text where it is no JSON; TenutoError begins with `what`."""
    name, sign, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not sign or not name.isidentifier():
        raise TenutoError(f"{what}, not {printable(text, 60)!r}.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def read_image(path: Path, name: str = "image") -> Any:
    """The image in a file, upright, for the keyword `name`; TenutoError if it is none."""
    from PIL import Image, ImageOps

    damaged = (SyntaxError, ValueError, LookupError, struct.error, Image.DecompressionBombError)
    try:
        with Image.open(path) as image:
            found = ImageOps.exif_transpose(image).convert(MODES.get(name, "RGB"))
    except (OSError, *damaged) as error:
        said = getattr(error, "strerror", None) or "it is no image"
        raise TenutoError(f"Cannot read {path}: {said}.") from error
    found.filename = path.name  # type: ignore[attr-defined]  # for the header
    found.place = str(path)  # type: ignore[attr-defined]  # for the next command
    return found


def given_again(call: Mapping[str, Any] | None = None, **options: Any) -> str:
    """Options of a command as the next one takes them, with a space before each; None is not given.

    call: of the pipeline's call, as `gathered` makes it; an image by the file that it was read
    from. What cannot be written on a command line is left out.
    """
    words = list[str]()
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    flags = {name: f"--{flag}" for flag, name in OPTIONS.items()}
    for name, value in (call or {}).items():
        file = getattr(value, "place", None)
        if file:
            words += [flags[name], file] if name in flags else ["--set", f"{name}=@{file}"]
        elif isinstance(value, str | int | float | list | dict | None):
            plain = isinstance(value, str) and setting(f"{name}={value}", "")[1] == value
            text = value if plain else json.dumps(value)
            words += [flags[name], str(value)] if name in flags else ["--set", f"{name}={text}"]
    return "".join(f" {shlex.quote(word)}" for word in words)


def images_in(call: Mapping[str, Any] | None) -> dict[str, Any]:
    """The images of the pipeline's call, which no artifact has."""
    return {name: value for name, value in (call or {}).items() if hasattr(value, "place")}


def fitted(kind: type, call: Mapping[str, Any]) -> dict[str, Any]:
    """`call` under the names that such a pipeline has for the options of the command."""
    known = inspect.signature(kind.__call__).parameters
    found = {}
    for name, value in call.items():
        others = OTHERWISE.get(name, ()) if name not in known else ()
        found[next((n for n in others if n in known and n not in call), name)] = value
    return found


def with_images(
    schedule: Mapping[str, Any], call: Mapping[str, Any], folders: Iterable[Path]
) -> dict[str, Any]:
    """`call` with the images that an artifact was calibrated with, where they are in `folders`.

    Only a file of the same name and content is taken.
    """
    known = schedule.get("call")
    found = dict(call)
    for name, mark in known.items() if isinstance(known, dict) else ():
        file = mark.get("file") if isinstance(mark, dict) else None
        if name in call or not isinstance(file, str) or Path(file).name != file:
            continue
        for path in (folder / file for folder in folders):
            if path.is_file() and _same(image := read_image(path, name), mark):
                found[name] = image
                break
    return found


def _same(image: Any, mark: Mapping[str, Any]) -> bool:
    return described({"image": image})["image"][MARK] == mark.get(MARK)
