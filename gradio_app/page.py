"""The page as Gradio serves it, with refusals in one sentence where Gradio would raise its own."""

from __future__ import annotations

import traceback
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.text import printable

SENTENCE = 300  # characters


class Page(gr.Blocks):
    """`gr.Blocks` whose listeners refuse wrong values in one sentence."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """gr.Error where there are too few."""
        wanted = len(block_fn.inputs)
        if not isinstance(inputs, list) or len(inputs) < wanted:
            raise refusal(f"/{block_fn.api_name} takes {wanted} values in a list.")

    async def preprocess_data(self, block_fn: Any, *args: Any, **options: Any) -> Any:
        """The values as the function gets them; gr.Error where a component cannot take one."""
        try:
            return await super().preprocess_data(block_fn, *args, **options)
        except gr.Error as error:
            raise refusal(str(error.message)) from error
        except Exception as error:
            said = f"/{block_fn.api_name} cannot take these values ({type(error).__name__})."
            raise refusal(said) from error

    async def call_function(self, *args: Any, **options: Any) -> Any:
        """What a listener answers; gr.Error where it fails: no other reaches the client."""
        try:
            return await super().call_function(*args, **options)
        except gr.Error:
            raise
        except TenutoError as error:
            raise refusal(str(error)) from error
        except Exception as error:
            traceback.print_exc()
            raise refusal(f"It failed: {type(error).__name__}: {error}") from error


def refusal(sentence: str) -> gr.Error:
    """An error that reaches the client as this sentence, and the log not at all."""
    return gr.Error(printable(sentence, SENTENCE), print_exception=False)
