"""diffusers and transformers, whose parts are imported when they are first asked for.

Not by two threads at once: when its own import ends, transformers puts another module in its
place, and a thread that waited for that gets the old one ("cannot import name 'T5EncoderModel'",
transformers 5.17, Python 3.11). All of Tenuto that runs in a thread of an app imports them here.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = ("diffusers", "transformers")
_one = threading.RLock()


def library(name: str) -> ModuleType:
    """The module `name`: one of `LIBRARIES`, or a part of one, such as "diffusers.utils"."""
    with _one:
        for each in LIBRARIES:  # whole, both: each imports from the other
            importlib.import_module(each)
        return importlib.import_module(name)


def imported(name: str, of: str = "diffusers") -> Any:
    """What a library has under a name, such as a class of models; None where it has none."""
    with _one, quiet_loading():
        return getattr(library(of), name, None)


def import_parts(folder: Path) -> None:
    """Import what a pipeline is made of, so that loading it imports as good as nothing."""
    library("diffusers")
    try:
        facts = json.loads((folder / "model_index.json").read_text("utf-8"))
        rows = [["diffusers", facts["_class_name"]], *facts.values()]
    except (OSError, ValueError, KeyError, AttributeError):
        return  # loading says what is wrong
    for row in rows:
        if isinstance(row, list) and len(row) == 2 and row[0] in LIBRARIES:
            imported(str(row[1]), row[0])


def typed(dtype: Any) -> dict[str, Any]:
    """`dtype`, fp32 where it is None, by the keyword that this diffusers has for it."""
    import torch

    new = tuple(int(n) for n in library("diffusers").__version__.split(".")[:2]) >= (0, 40)
    return {"dtype" if new else "torch_dtype": dtype or torch.float32}


def silence(watched: bool) -> None:
    """Keep the libraries' chatter and loading bars away; where one watches, downloads show."""
    from huggingface_hub.utils import disable_progress_bars

    for name in LIBRARIES:
        of_library = library(f"{name}.utils.logging")
        of_library.set_verbosity_error()
        of_library.disable_progress_bar()
    if not watched:
        disable_progress_bars()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' advice to install torchvision: sampling reads no image."""

    def other(record: logging.LogRecord) -> bool:
        return "requires torchvision" not in record.getMessage()

    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


@contextmanager
def silent() -> Iterator[None]:
    """Without the bar of loading, and the word that weights stay on disk."""
    of_library, logger = library("transformers.utils.logging"), logging.getLogger("accelerate")
    shown, level = of_library.is_progress_bar_enabled(), logger.level
    of_library.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            of_library.enable_progress_bar()
