"""Language models as text encoders: calibrated as pipelines use them, saved, attached, detached."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tenuto as tn
from tenuto.calibration import held_out
from tenuto.measure.encoder_states import hidden_distance
from tenuto.model import describe, encoders_of
from tenuto.runtime.layers import QLayer
from tests.core import tiny_language as tiny

LINES = ("a dog", "two cats by a red bus")
GENERAL = ["a quiet harbour", "a bowl of ramen", "old books"]
UNREAD = {  # pipelines that read no state after some block: how many blocks those are
    "flux2": 1, "flux2 klein": 1, "hunyuan-image": 2, "krea2": 1, "lumina2": 1, "hunyuan-video": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two general captions in place of 32, and one that is held out in place of 16."""
    monkeypatch.setattr(
        held_out, "prompts", lambda name: (GENERAL[0], "a fox asleep", *GENERAL[1:])
    )


@pytest.fixture(scope="module", params=tiny.KINDS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    return (request.param, *tiny.asked(request.param))


def quantized(case: tuple[str, Any, dict[str, Any]], method: str, width: str = "w4") -> tn.Artifact:
    _, pipe, call = case
    return tn.quantize_encoder(pipe, width, LINES, method=method, steps=2, call=call)


def test_from_prompts_to_images_and_back(case: Any, tmp_path: Path) -> None:
    """GPTQ, the file, an image with it; detached, every bit of the encoder is back."""
    kind, pipe, call = case
    made = quantized(case, "gptq")
    made.save(tmp_path / "e.safetensors")
    before = {n: state(e) for n, e in encoders_of(pipe).items()}
    with tn.attach(pipe, tmp_path / "e.safetensors") as attached, torch.no_grad():
        assert attached.encoders().keys() == made.header["encoders"].keys() == before.keys()
        out = pipe(**asked(pipe, call))
        assert torch.isfinite(next(iter(out.values()))).all()
    for name, encoder in encoders_of(pipe).items():
        assert not any(isinstance(m, QLayer) for m in encoder.modules())
        after = state(encoder)
        assert all(torch.equal(after[k], t) for k, t in before[name].items())
    facts = made.header["encoders"]["text_encoder"]
    cosine = hidden_distance(pipe, made, GENERAL, call)["text_encoder"]["cosine"]["mean"]
    assert 0.9 < cosine < 1 and facts["held_out"]["cosine"] >= facts["held_out"]["nearest"]
    backbone = describe(encoders_of(pipe)["text_encoder"])
    plain = {
        r["pattern"]
        for r in facts["recipe"]
        if (r["algorithm"] or {}).get("name") == "RoundToNearest"
    }
    assert len(plain) == UNREAD.get(kind, 0)
    assert plain == {f"{b}.*" for b in backbone.blocks[len(backbone.blocks) - len(plain) :]}


def asked(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    return call | {"prompt": LINES[0], "num_inference_steps": 1, "output_type": "latent"}


def state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in encoder.named_parameters()}


@pytest.mark.parametrize("method", ["nearest", "awq"])
@pytest.mark.parametrize("kind", ["qwen-image", "krea2"])
def test_other_methods(kind: str, method: str) -> None:
    """With places along three axes (Qwen-VL's), and at 8 bits as well."""
    case = (kind, *tiny.asked(kind))
    for width, least in (("w4", 0.9), ("w8", 0.999)):
        facts = quantized(case, method, width).header["encoders"]["text_encoder"]
        assert facts["held_out"]["cosine"] > least


def test_towers_and_heads_stay_in_full_precision(case: Any) -> None:
    """The blocks that read the text are quantized, and nothing else; each layer is in a subset."""
    _, pipe, _ = case
    for encoder in encoders_of(pipe).values():
        backbone = describe(encoder)
        linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
        kept = [n for n in linear if any(fnmatchcase(n, p) for p in backbone.keep)]
        assert {n for n in linear if backbone.block_of(n)} == set(linear) - set(kept)
        assert not any(word in n for n in set(linear) - set(kept) for word in ("vis", "head"))
        assert {n for s in backbone.subsets for n in s.linears} == set(linear) - set(kept)
        for subset in backbone.subsets:
            if subset.fold is not None:
                target: Any = encoder.get_submodule(subset.fold)
                layer: Any = encoder.get_submodule(subset.linears[0])
                assert target.weight.shape[0] == layer.in_features
