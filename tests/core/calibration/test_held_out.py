"""What calibration does not see decides: narrow prompts make no encoder worse on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tenuto as tn
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.bank import Bank, Rows
from tenuto.calibration.held_out import MOST, apart, better, calibration_prompts, captions
from tenuto.measure.encoder_states import hidden_distance
from tenuto.numerics.qtensor import QTensor
from tenuto.numerics.scheme import schemes
from tenuto.sampling import HELD_OUT, encoder_calls


def test_held_out_captions_are_never_calibrated_on() -> None:
    general, held = captions()
    assert not set(tn.prompts("general")[3::4]) & {*general, *held}
    assert (len(general), len(held)) == (32, 16)
    assert calibration_prompts(held) == general
    assert calibration_prompts(["a dog", *held, "a dog"]) == ["a dog", *general]
    many = [f"dog {i}" for i in range(500)]
    assert len(calibration_prompts(many)) == MOST + len(general)


@pytest.mark.slow
def test_a_narrow_list_makes_an_encoder_no_worse_on_other_captions() -> None:
    """The demo's T5 in 4 bits by 16 prompts of one form: nearer than to nearest on captions too."""
    pipe = tn.demo("transformer")
    lines, unseen = tn.prompts("default")[:16], tn.prompts("general")[3::4]
    made = {m: tn.quantize_encoder(pipe, "w4", lines, method=m) for m in ("nearest", "gptq")}
    for prompts in (unseen, lines):
        far, near = (
            hidden_distance(pipe, made[m], prompts)["text_encoder"]["cosine"] for m in made
        )
        assert near["mean"] > far["mean"]
        assert near["p5"] > far["p5"], "the captions that are hurt most are the ones that show it"
    facts = made["gptq"].header["encoders"]["text_encoder"]["held_out"]
    assert facts["captions"] == 16 and facts["cosine"] > facts["nearest"]


def test_each_layer_has_what_is_better_on_what_was_held_out() -> None:
    """One layer was spoilt and the other improved: the first is rounded to nearest, that stays."""
    torch.manual_seed(0)
    first, last = nn.Linear(32, 32), nn.Linear(32, 32)
    block = nn.Sequential(first, nn.ReLU(), last).requires_grad_(False)
    x = torch.randn(16, 5, 32)
    steps = torch.tensor([0] * 8 + [HELD_OUT] * 8)
    bank = Bank(((Rows(0),), {}), {0: x}, {}, steps, torch.ones(16, 5))
    (seen, _), held = apart(bank, block(x))
    assert held is not None and torch.equal(seen.tensors[0], x[:8])
    assert torch.equal(held[0].tensors[0], x[8:]) and len(held[1]) == 8
    layers = {"0": schemes.W4A16, "2": schemes.W4A16}
    fine = QTensor.nearest(last.weight, schemes.W8A16.weight)
    spoilt = QTensor.nearest(-first.weight, schemes.W4A16.weight)
    found = better(block, {"0": spoilt, "2": fine}, layers, held)
    plain = RoundToNearest()(block, layers)
    assert torch.equal(found["0"].dequantize(), plain["0"].dequantize()) and found["2"] is fine


def test_what_an_encoder_generates_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that has its encoder write a better prompt first; `generate` is its own after."""
    from tests.core import tiny_language

    pipe, call = tiny_language.asked("flux2")
    plain = encoder_calls(pipe, ["a dog"], call=call)["text_encoder"]
    encode, seen = pipe.encode_prompt, []

    def enhanced(*args: Any, **kwargs: Any) -> Any:
        ids = torch.tensor([[5, 6, 7]])
        seen.append(pipe.text_encoder.generate(input_ids=ids, max_new_tokens=2, do_sample=False))
        return encode(*args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", enhanced)
    found = encoder_calls(pipe, ["a dog"], call=call)["text_encoder"]
    assert seen and "generate" not in vars(pipe.text_encoder)
    assert [c.inputs["input_ids"].tolist() for c in found] == [
        c.inputs["input_ids"].tolist() for c in plain
    ]
    assert found[0].read == plain[0].read == (0, 1, 2)
