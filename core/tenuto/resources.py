"""Where the files that ship with the library are: demo models, prompts, the network of LPIPS."""

from __future__ import annotations

from pathlib import Path

from .errors import TenutoError

HERE = Path(__file__).resolve().parent
PLACES = (HERE / "assets", HERE.parents[1] / "assets")  # installed; a clone or editable install


def asset(name: str) -> Path:
    """The shipped file or folder `name`, such as "lpips-alex.safetensors".

    Raises TenutoError if it is not there.
    """
    found = next((place / name for place in PLACES if (place / name).exists()), None)
    if found is None:
        raise TenutoError(f"{name} should have come with Tenuto and is missing: install it again.")
    return found


def prompts(name: str = "default") -> tuple[str, ...]:
    """The lines of the shipped prompt list `prompts/NAME.txt`."""
    text = asset(f"prompts/{name}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())
