"""The page as Gradio serves it, with refusals in one sentence where Gradio would raise its own."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.text import printable

from .failures import sentence

SENTENCE = 300  # characters


class Page(gr.Blocks):
    """`gr.Blocks` whose listeners refuse wrong values in one sentence."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """gr.Error where there are too few."""
        wanted = len(block_fn.inputs)
        if not isinstance(inputs, list) or len(inputs) < wanted:
            raise refusal(f"/{block_fn.api_name} takes {wanted} values in a list.")

    async def preprocess_data(self, block_fn: Any, *args: Any, **options: Any) -> Any:
        """The values as the function gets them; gr.Error where a component cannot take one.

        What an older program leaves out of a call by name has its default.
        """
        try:
            inputs, *more = args
            inputs = _whole(block_fn, inputs)
            _check_files(inputs)
            return await super().preprocess_data(block_fn, inputs, *more, **options)
        except gr.Error as error:
            raise refusal(str(error.message)) from error
        except Exception as error:
            said = f"/{block_fn.api_name} cannot take these values ({type(error).__name__})."
            raise refusal(said) from error

    async def call_function(self, *args: Any, **options: Any) -> Any:
        """What a listener answers; gr.Error where it fails: no other reaches the client."""
        if getattr(args[0], "fn", args) is None:
            raise refusal("This listener is of the page alone.")
        try:
            return await super().call_function(*args, **options)
        except gr.Error:
            raise
        except TenutoError as error:
            raise refusal(str(error)) from error
        except Exception as error:
            traceback.print_exc()
            raise refusal(sentence(error)) from error


def _whole(block_fn: Any, inputs: Any) -> Any:
    """`inputs` with the defaults of what is missing at their end."""
    if not isinstance(inputs, list) or len(inputs) >= len(block_fn.inputs):
        return inputs
    known = list(inspect.signature(block_fn.fn).parameters.values())[len(inputs) :]
    if any(p.default is p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in known):
        return inputs
    return [*inputs, *(p.default for p in known)]


def _check_files(value: Any) -> None:
    """gr.Error for a file that is an address: Gradio would fetch it."""
    if isinstance(value, dict):
        path, url = value.get("path"), value.get("url")
        far = isinstance(path, str) and "://" in path
        if far or (isinstance(url, str) and url.startswith("data:")):
            raise refusal("A file is uploaded first; one that is an address is not fetched.")
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _check_files(item)


def refusal(sentence: str) -> gr.Error:
    """An error that reaches the client as this sentence, and the log not at all."""
    return gr.Error(printable(sentence, SENTENCE), print_exception=False)
