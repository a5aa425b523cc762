"""What a user reads on the page and in --help: the field's words, none of the house's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest
from typer.main import get_command

from tenuto.cli.program import program

HOUSE = re.compile(
    r"\b(drawn?|draws|drew|held[ -]out|holds?|aims?|told|bench(es)?|rooms?|gates?|laid|"
    r"lay(s|ing)? on|turned|pictured?|desk|studio|hoisted|twin|ladder|budgeted)\b",
    re.IGNORECASE,
)
SHOWN = ("label", "info", "placeholder", "value", "title", "alt_text")


def texts(config: dict[str, Any]) -> Iterator[str]:
    """All that the page shows before anything is pressed."""
    for component in config["components"]:
        props = component["props"]
        if component["type"] in ("json", "state", "browserstate"):
            continue
        for name in SHOWN:
            if isinstance(props.get(name), str):
                yield unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", props[name]))
        yield from (str(choice[0]) for choice in props.get("choices") or ())


def helps(command: Any, name: str = "tenuto") -> Iterator[str]:
    """Every help of the command, of its commands, options and arguments."""
    yield f"{name}: {command.help or ''} {command.epilog or ''}"
    for parameter in command.params:
        yield f"{name} {parameter.name}: {getattr(parameter, 'help', '') or ''}"
    for under, child in getattr(command, "commands", {}).items():
        yield from helps(child, f"{name} {under}")


@pytest.mark.slow
def test_the_page_has_no_house_words(app: Any) -> None:
    found = [*texts(json.loads(app.get("/config")[1]))]
    assert len(found) > 100 and any("Calibrate a diffusion model" in text for text in found)
    assert not [text for text in found if HOUSE.search(text)]


def test_the_command_has_no_house_words() -> None:
    found = [*helps(get_command(program))]
    assert len(found) > 60 and any("--out" in text or "resumes" in text for text in found)
    assert not [text for text in found if HOUSE.search(text)]


@pytest.mark.parametrize("text", ["A calibration is told what to do.", "Held-out prompts", "Draws"])
def test_house_words_are_found(text: str) -> None:
    assert HOUSE.search(text)
