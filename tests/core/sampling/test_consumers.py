"""The consumers of text encoders are as the pipelines of diffusers that they stand for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.errors import TenutoError
from tenuto.model import describe
from tenuto.model.encoder_names import NAMES
from tenuto.sampling import HELD_OUT, Call, encoder_calls
from tenuto.sampling.consumers import CONSUMERS, Consumer, calls_for, consumer_of, states_of
from tests.core import tiny_language
from tests.core.tiny_encoders import language, t5
from tests.core.tiny_pipelines import qwen_tokenizer, t5_tokenizer

LINES = ["a cat", "two dogs in a park"]


def diffusers(module: str) -> Any:
    return importlib.import_module(f"diffusers.pipelines.{module}")


def test_every_row_has_a_source_and_encoders_that_files_have() -> None:
    for name, row in CONSUMERS.items():
        assert row.source and set(row.kinds) <= set(NAMES), name
        assert row.template.count("{}") == 1 and not (row.drop and row.template == "{}"), name


@pytest.mark.parametrize(
    ("name", "build", "asked"),
    [
        ("qwen-image", tiny_language.qwen_image, {"height": 16, "width": 16}),
        ("hunyuan-image", tiny_language.hunyuan_image, {"height": 16, "width": 16}),
    ],
)
def test_a_pipeline_asks_its_encoder_the_same(name: str, build: Any, asked: Any) -> None:
    """The same tokens, and the same states are read."""
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    by_pipe = encoder_calls(pipe, LINES, call=asked)["text_encoder"]
    encoder, blocks = pipe.text_encoder, len(describe(pipe.text_encoder).blocks)
    ours = calls_for(CONSUMERS[name], encoder, pipe.tokenizer, blocks, ["", *LINES])

    def texts(calls: Sequence[Call]) -> set[tuple[int, ...]]:
        pairs = [(c.inputs["input_ids"], c.inputs.get("attention_mask")) for c in calls]
        return {
            tuple(ids[mask > 0].tolist())
            for some, masks in pairs
            for ids, mask in zip(some, torch.ones_like(some) if masks is None else masks,
                                 strict=True)
        }  # fmt: skip

    assert len(texts(ours)) == 3 and texts(by_pipe) == texts(ours)
    assert {c.read for c in by_pipe} == {c.read for c in ours}


def test_templates_are_those_of_the_pipelines() -> None:
    rows = CONSUMERS
    video = diffusers("hunyuan_video.pipeline_hunyuan_video").DEFAULT_PROMPT_TEMPLATE
    assert rows["hunyuan-video"].template == video["template"]
    system = diffusers("flux2.system_messages").SYSTEM_MESSAGE
    assert rows["flux2"].template == f"[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{{}}[/INST]"
    lumina = tiny_language.lumina2().system_prompt
    assert rows["lumina2"].template == f"{lumina} <Prompt Start> {{}}"


def calls(row: Consumer, encoder: Any, tokenizer: Any, **more: Any) -> list[Call]:
    blocks = len(describe(encoder).blocks)
    return calls_for(row, encoder, tokenizer, blocks, ["", *LINES], **more)


def test_what_fills_a_text_up_counts_where_the_denoiser_reads_it() -> None:
    for name, length in (("flux", 256), ("sd3", 77), ("cogvideox", 226)):
        (call,) = calls(CONSUMERS[name], t5(), t5_tokenizer())
        assert call.inputs["input_ids"].shape == (3, length) and call.counted is None
        assert "attention_mask" not in call.inputs and call.read == ()


def test_else_it_is_hidden_and_does_not_count() -> None:
    (call,) = calls(CONSUMERS["ltx"], t5(), t5_tokenizer())
    mask: Tensor = call.inputs["attention_mask"]
    assert call.counted is not None and torch.equal(call.counted, mask.float())
    assert mask.sum(1).tolist() == [1, *(len(t5_tokenizer()(x)["input_ids"]) for x in LINES)]


def test_the_template_does_not_count_where_the_denoiser_drops_it() -> None:
    encoder, tokenizer = language("Qwen3Model"), qwen_tokenizer()
    row = Consumer(("qwen3",), "", (-1,), "abc {} de", drop=True)
    (whole,), (read,) = (
        calls(row, encoder, tokenizer, read_alone=alone) for alone in (False, True)
    )
    start = len(tokenizer("abc ")["input_ids"])
    assert whole.counted is not None and read.counted is not None and start == 4
    assert not read.counted[:, :start].any()
    assert torch.equal(read.counted[:, start:], whole.counted[:, start:])
    assert whole.read == read.read == (3,)


def test_held_out_prompts_are_marked() -> None:
    found = calls(CONSUMERS["z-image"], language("Qwen3Model"), qwen_tokenizer(),
                  held_out=["a hill"])  # fmt: skip
    assert [call.row for call in found] == [0, HELD_OUT]


def test_states_are_counted_from_the_end_and_must_be_there() -> None:
    assert states_of(CONSUMERS["z-image"], 36) == (35,)
    assert states_of(CONSUMERS["qwen-image"], 28) == (28,)
    assert states_of(CONSUMERS["hunyuan-image"], 28) == (26,)
    assert states_of(CONSUMERS["ltx2"], 3) == (0, 1, 2, 3)
    with pytest.raises(TenutoError, match="reads hidden state 30, and this encoder has 3 blocks"):
        states_of(CONSUMERS["flux2"], 3)
    with pytest.raises(TenutoError, match="Unknown consumer 'sdxl': choose one of flux, sd3"):
        consumer_of("sdxl")
