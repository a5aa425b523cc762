"""The pipeline's own settings: as the page and the API give them, checked, kept and read back.

A call is a mapping of the pipeline's own keywords. What is kept of it, in the request of a job and
in a PNG, is plain data (`described`); its images are files in the folder `inputs`, each under a
name that says what is in it, and are found again by that.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tenuto.errors import TenutoError
from tenuto.text import lines_of, printable

from .given import real, whole, words
from .infotext import LONGEST_CALL

OPTIONS = ("image", "mask", "height", "width", "frames", "negative")  # each has a field
IMAGES = ("image", "mask")
SIDE, FRAMES, PIXELS = 16_384, 10_000, 2**26  # at most
NUMBERS = {
    "height": ("The height", SIDE), "width": ("The width", SIDE),
    "frames": ("The number of frames", FRAMES),
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 2**53  # of a number: whole ones are exact up to it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}\.png")
OTHERS = 12  # names that are told as those of other settings


# --- what a pipeline takes ------------------------------------------------------------------------


def taken(kind: type | None) -> dict[str, str]:
    """The options with a field that such a pipeline takes, and what it calls each."""
    from tenuto.cli.calls import OPTIONS as NAMES
    from tenuto.cli.calls import fitted

    if kind is None:
        return {}
    known = inspect.signature(kind.__call__).parameters
    found = {option: next(iter(fitted(kind, {NAMES[option]: None}))) for option in OPTIONS}
    return {option: name for option, name in found.items() if name in known}


def prompted(model: str) -> bool:
    """Whether the pipeline of a model takes prompts."""
    from tenuto.sampling.loading import class_of

    kind = class_of(model)
    return kind is None or "prompt" in inspect.signature(kind.__call__).parameters


def others(kind: type | None) -> list[str]:
    """Names of settings without a field: those that are a number, a text, or yes or no."""
    from tenuto.sampling.pipeline_call import GUIDANCE, OURS, TRUE_CFG

    if kind is None:
        return []
    known = inspect.signature(kind.__call__).parameters
    apart = {*taken(kind).values(), *GUIDANCE, TRUE_CFG, *OURS, "self"}
    plain = [n for n, p in known.items() if isinstance(p.default, int | float | str)]
    return [name for name in plain if name not in apart][:OTHERS]


# --- as it is given -------------------------------------------------------------------------------


def from_fields(kind: type | None, fields: Mapping[str, Any], more: Any) -> dict[str, Any]:
    """What the page's fields say; one that is not shown for such a pipeline does not count.

    fields: by option; an image is the path of an upload. more: a line each, NAME = VALUE.
    """
    from tenuto.cli.calls import setting

    names = taken(kind)
    shown = {o: fields[o] for o in OPTIONS if o in names and fields[o] not in (None, "")}
    found = {names[o]: {"path": v} if o in IMAGES else v for o, v in shown.items()}
    for line in map(str.strip, lines_of(words(more, "Other settings", LONGEST_CALL))):
        if line:
            name, _, value = line.partition("=")
            sign = "=" if "=" in line else ""
            name, read = setting(
                f"{name}{sign}{value.strip()}", "Other settings are lines NAME = VALUE"
            )
            found[name] = read
    return found


def checked(model: str, call: Any, folder: Path) -> dict[str, Any]:
    """A call as the pipeline of `model` takes it, its images opened; TenutoError, one sentence.

    call: plain data. An image is {"path": an upload}, the name of a file in `folder`, or what was
    kept of one.
    """
    from tenuto.cli.calls import fitted
    from tenuto.cli.session import check_call
    from tenuto.sampling.loading import class_of

    if call is None:
        return {}
    if not isinstance(call, dict):
        raise TenutoError('The call is an object of settings, such as {"height": 512}.')
    if not all(name.isidentifier() and len(name) <= 60 for name in call):
        raise TenutoError("The name of a setting is a word, such as strength or guidance_rescale.")
    kind = class_of(model)
    names = taken(kind)
    found = {name: value for name, value in call.items() if value not in (None, "")}
    found = found if kind is None else fitted(kind, found)
    check_call(model, found)
    for option, (what, most) in NUMBERS.items():
        name = names.get(option, "")
        if name in found:
            found[name] = whole(found[name], what, 1, most)
    found = {name: _opened(name, value, folder) for name, value in found.items()}
    _check_plain(found)
    return found


def _check_plain(call: Mapping[str, Any]) -> None:
    """TenutoError for what is too long, too large or no text."""
    from tenuto.sampling import described

    text = json.dumps(described(call), ensure_ascii=False)
    words(text, "The call", LONGEST_CALL)
    for name, value in _leaves(call):
        if isinstance(value, int | float) and not isinstance(value, bool):
            real(value, name, -LARGEST, LARGEST)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, name or str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, name)
    else:
        yield name, value


# --- images ---------------------------------------------------------------------------------------


def _opened(name: str, value: Any, folder: Path) -> Any:
    """A value with the image that it stands for in its place."""
    from tenuto.sampling import MARK
    from tenuto.sampling.pipeline_call import IMAGE_NAMES

    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return opened(Path(value["path"]), name)
    if isinstance(value, dict) and MARK in value:
        found = recalled({name: value}, folder)
        return found[name]
    if name in IMAGE_NAMES:
        file = folder / value if isinstance(value, str) and NAME.fullmatch(value) else None
        if file is None or not file.is_file():
            raise TenutoError(f"There is no image {printable(value, 60)!r} in the folder inputs.")
        return read(file, name)
    return value


def opened(path: Path, name: str) -> Any:
    """An uploaded image, for the keyword `name`; TenutoError for any other file."""
    from .guard import uploaded

    if not uploaded(path):
        raise TenutoError("An image is uploaded first: there is no such upload, or not any more.")
    return read(path, name)


def read(path: Path, name: str) -> Any:
    """The image in a PNG, JPEG or WebP of no more than `PIXELS`; TenutoError for any other."""
    from PIL import Image

    from tenuto.cli.calls import read_image

    try:
        with Image.open(path, formats=FORMATS) as image:
            wide, high = image.size
    except Image.DecompressionBombError as error:
        raise TenutoError("An image of so many pixels is too large.") from error
    except Exception as error:  # of a file that was made to break readers
        raise TenutoError("A start image or a mask is a PNG, JPEG or WebP.") from error
    if wide * high > PIXELS:
        raise TenutoError(f"An image of {wide} x {high} pixels is too large.")
    try:
        return read_image(path, name)
    except TenutoError as error:  # its path is of no use to anyone
        raise TenutoError("This image is damaged.") from error


def kept(call: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A call as plain data; its images are now in `folder`, and named after what is in them."""
    from tenuto.files import whole_file
    from tenuto.sampling import MARK, described

    marks = described(call)
    for name, value in call.items():
        if hasattr(value, "getbands"):
            sign = marks[name][MARK][:8]
            stem = Path(str(getattr(value, "filename", "") or "image")).stem
            stem = re.sub(r"[^A-Za-z0-9]+", "-", stem.removesuffix(f"-{sign}")).strip("-")[:40]
            value.filename = f"{stem or 'image'}-{sign}.png"
            file = folder / value.filename
            if file.is_file():
                file.touch()  # it is in use: others are older
            else:
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as part:
                    value.save(part, format="PNG")
    return described(call)


def recalled(call: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The call that `kept` told of; TenutoError where an image is not in `folder` any more."""
    from tenuto.cli.calls import with_images
    from tenuto.sampling.described import is_plain

    found = with_images({"call": call}, {}, (folder,))
    plain = {name: value for name, value in call.items() if is_plain(value)}
    for name in call.keys() - plain.keys() - found.keys():
        mark = call[name]
        file = mark.get("file") if isinstance(mark, Mapping) else None
        said = f"{name} ({file})" if file else name
        raise TenutoError(
            f"The image for {printable(said, 120)} is not in the output folder: choose it again."
        )
    return {name: plain.get(name, found.get(name)) for name in call}


# --- read back ------------------------------------------------------------------------------------


class Fields(NamedTuple):
    """What fields show of a call. values: by option; lost: images that are not there, by name."""

    values: dict[str, Any]
    more: str
    lost: dict[str, str]


def as_fields(call: Mapping[str, Any], folder: Path) -> Fields:
    """The inverse of `from_fields`, whatever a pipeline calls the options."""
    from tenuto.cli.calls import OPTIONS as NAMES
    from tenuto.cli.calls import OTHERWISE

    options = {n: o for o in OPTIONS for n in (NAMES[o], *OTHERWISE.get(NAMES[o], ()))}
    values: dict[str, Any] = {o: None if o in IMAGES else "" for o in OPTIONS}
    more, lost = list[str](), dict[str, str]()
    for name, value in call.items():
        option = options.get(name)
        if not name.isidentifier():
            continue
        if isinstance(value, dict) and "sha256" in value:
            try:
                image = recalled({name: value}, folder)[name]
            except TenutoError:
                image = None
            if image is None or option not in IMAGES:
                lost[name] = str(value.get("file") or name)
            else:
                values[option] = str(folder / image.filename)
        elif option in OPTIONS and option not in IMAGES and not values[option]:
            values[option] = value if isinstance(value, str) else f"{value}"
        else:
            more.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return Fields(values, "\n".join(more), lost)
