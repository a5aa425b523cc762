"""Text encoders in 8 and 4 bits: calls as the pipeline makes them, weights, the file, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tenuto as tn
from tenuto.calibration import algorithms, held_out
from tenuto.calibration.algorithms.awq import AWQ
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.bank import Bank
from tenuto.calibration.quantize_encoder import encoder_scheme
from tenuto.measure.encoder_states import hidden_distance
from tenuto.model.families import describe
from tenuto.numerics.qtensor import QTensor, layout
from tenuto.numerics.scheme import Scheme, schemes
from tenuto.resources import prompts as shipped
from tenuto.runtime.layers import QLayer
from tenuto.sampling.encoder_calls import encoder_calls

LINES = ("a photo of a lemon", "a school bus", "two goldfish")


@pytest.fixture(autouse=True, scope="module")
def _few_captions() -> Iterator[None]:
    """Four general captions in place of 32, and two that are held out in place of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "prompts", lambda name: shipped(name)[:8])
        yield


@pytest.fixture(scope="module", params=["transformer", "unet"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tn.demo(request.param)


@pytest.fixture(scope="module")
def gptq(pipe: Any) -> tn.Artifact:
    return tn.quantize_encoder(pipe, "w4", LINES, method="gptq")


def test_calls_are_those_of_the_pipeline(pipe: Any) -> None:
    """The empty prompt first, every row once, and a mask where the pipeline gives one."""
    calls = encoder_calls(pipe, [*LINES, LINES[0]], batch=2)["text_encoder"]
    ids = torch.cat([call.inputs["input_ids"] for call in calls])
    assert len(ids) == len(LINES) + 1 == len({tuple(row) for row in ids.tolist()})
    words = pipe.tokenizer([""], padding="max_length", max_length=ids.shape[1]).input_ids[0]
    assert ids[0].tolist() == words
    masked = hasattr(pipe, "transformer")  # PixArt gives a mask, Stable Diffusion does not
    counted = calls[0].counted
    assert (counted is not None) == masked
    if counted is not None:
        assert counted[0].sum() < counted[1].sum() < counted.shape[1]


def test_subsets_cover_every_layer_of_the_blocks(pipe: Any) -> None:
    """Each Linear once; layers of a subset see one input; what a scale folds into is there."""
    encoder = pipe.text_encoder
    backbone = describe(encoder)
    named = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(n for s in backbone.subsets for n in s.linears) == sorted(named)
    for subset in backbone.subsets:
        widths = {encoder.get_submodule(n).in_features for n in subset.linears}
        assert len(widths) == 1
        if subset.fold is not None:
            target: Any = encoder.get_submodule(subset.fold)
            assert target.weight.shape[0] == widths.pop()


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibrated_is_nearer_than_rounded(pipe: Any, method: str) -> None:
    """At the states that the denoiser reads, on prompts that calibration has not seen."""
    lines, unseen = tn.prompts("default")[:8], tn.prompts("evaluation")[:8]
    found = {
        m: hidden_distance(pipe, tn.quantize_encoder(pipe, "w4", lines, method=m), unseen)
        for m in ("rtn", method)
    }
    near, far = (found[m]["text_encoder"] for m in (method, "rtn"))
    assert near["cosine"]["mean"] > far["cosine"]["mean"] and near["cosine"]["mean"] > 0.995
    assert near["relative_l2"] < far["relative_l2"]
    assert near["bf16"]["relative_l2"] < near["relative_l2"] and near["empty"]["cosine"] > 0.99


def test_attach_and_detach(pipe: Any, gptq: tn.Artifact, tmp_path: Path) -> None:
    """From the file; the pipeline's encoder computes with it, and is as it was afterwards."""
    gptq.save(tmp_path / "encoder.safetensors")
    loaded = tn.Artifact.load(tmp_path / "encoder.safetensors")
    call = encoder_calls(pipe, LINES)["text_encoder"][0]
    before = {n: p.clone() for n, p in pipe.text_encoder.named_parameters()}
    with torch.no_grad():
        plain = pipe.text_encoder(**call.inputs)[0]
        with tn.attach(pipe, loaded) as attached:
            low = pipe.text_encoder(**call.inputs)[0]
            inside = [m for m in pipe.text_encoder.modules() if isinstance(m, QLayer)]
            assert attached.encoders() == {"text_encoder": len(inside)}
            assert {layer.execution for layer in inside} == {"weight-only"}
        assert torch.equal(pipe.text_encoder(**call.inputs)[0], plain)
    counted = torch.ones(plain.shape[:2]) if call.counted is None else call.counted
    gap, whole = ((t * counted[..., None]).norm() for t in (low - plain, plain))
    assert 0 < gap / whole < 0.1
    after = dict(pipe.text_encoder.named_parameters())
    assert before.keys() == after.keys() and all(
        torch.equal(after[n], p) for n, p in before.items()
    )


def test_the_error_of_its_states_is_in_the_header(gptq: tn.Artifact) -> None:
    check = gptq.header["encoders"]["text_encoder"]["check"]
    assert 0 < check["relative_error"] < 0.5


def test_merges_with_a_denoisers_artifact(pipe: Any, gptq: tn.Artifact) -> None:
    """Either way round: its schedule and sections stay, the encoder's come."""
    schedule = {"timesteps": [900.0, 400.0], "steps": 2, "guidance": 3.0}
    route = tn.Artifact.new(pipe, schedule)
    branch = describe(pipe.transformer if hasattr(pipe, "transformer") else pipe.unet).branches[0]
    route.header["route"] = {"timesteps": [900.0, 400.0], "branches": [branch.name]}
    route.tensors["route/table"] = torch.ones(2, 1, dtype=torch.bool)
    whole = route | gptq
    assert whole.header["schedule"] == schedule and "route" in whole.header
    assert set(whole.section("encoder")) == set(gptq.section("encoder"))
    assert set((gptq | route).tensors) == set(whole.tensors)
    with tn.attach(pipe, whole) as attached:
        assert attached.encoders()["text_encoder"] > 10


def test_another_encoder_is_refused(pipe: Any, gptq: tn.Artifact) -> None:
    """Before anything changes, in one sentence."""
    weight = next(pipe.text_encoder.parameters())
    kept = weight.detach().clone()
    try:
        weight.data.mul_(1.5)
        with pytest.raises(tn.ArtifactError, match="another text_encoder"):
            tn.attach(pipe, gptq)
        assert not any(isinstance(m, QLayer) for m in pipe.text_encoder.modules())
    finally:
        weight.data.copy_(kept)


def test_resumes_and_ends_in_the_same_bytes(pipe: Any, gptq: tn.Artifact, tmp_path: Path) -> None:
    """Cancelled in the middle, the finished blocks are kept."""

    def stop(done: int, total: int, note: str) -> None:
        if done > total // 2:
            raise tn.Cancelled

    work = tmp_path / "work"
    with pytest.raises(tn.Cancelled):
        tn.quantize_encoder(pipe, "w4", LINES, method="gptq", work=work, on_progress=stop)
    kept = list((work / "text_encoder").glob("*.safetensors"))
    assert kept
    times = {p: p.stat().st_mtime_ns for p in kept}
    again = tn.quantize_encoder(pipe, "w4", LINES, method="gptq", work=work)
    assert all(p.stat().st_mtime_ns == when for p, when in times.items())
    assert again.header == gptq.header and again.tensors.keys() == gptq.tensors.keys()
    assert all(torch.equal(again.tensors[k], gptq.tensors[k]) for k in gptq.tensors)


@pytest.mark.parametrize(("width", "method"), [("w3", "gptq"), ("w4", "magic")])
def test_unknown_widths_and_methods(width: str, method: str) -> None:
    with pytest.raises(tn.SchemeError, match=", ".join(algorithms.names("encoder"))):
        encoder_scheme(width, method)


def test_a_file_that_lacks_a_scale_is_refused(pipe: Any, tmp_path: Path) -> None:
    found = tn.quantize_encoder(pipe, "w8", LINES[:1], method="awq")
    key = next(k for k in found.tensors if k.endswith(".channel"))
    del found.tensors[key]
    found.save(tmp_path / "a.safetensors")
    with pytest.raises(tn.ArtifactError, match="lacks encoder/"):
        tn.Artifact.load(tmp_path / "a.safetensors")


class Outlier(nn.Module):
    """One Linear whose input has a channel a hundred times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_awq_spares_the_columns_that_matter() -> None:
    """Nearer than to nearest where few channels carry the input; s is what it should be."""
    torch.manual_seed(0)
    block, x = Outlier(), torch.randn(32, 6, 64)
    x[..., 5] *= 100
    bank = Bank(((_rows(),), {}), {0: x}, {}, torch.zeros(32, dtype=torch.long))
    with torch.no_grad():
        target = block(x)
    form = replace(schemes.W4A16.weight, smooth=True)
    q = AWQ()(block, {"layer": Scheme("smooth", form)}, bank, target)["layer"]
    plain = RoundToNearest()(block, {"layer": schemes.W4A16})["layer"]
    weight = block.layer.weight.detach()

    def error(found: QTensor) -> float:
        return float(((found.dequantize() - weight) @ x.flatten(0, 1).mT).norm())

    assert error(q) < 0.8 * error(plain)
    assert q.channel is not None and int(q.channel.argmax()) == 5
    stored = q.tensors("layer")
    facts = layout("layer", (48, 64), form)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == facts
    again = QTensor.from_tensors(stored, "layer", (48, 64), form)
    assert torch.equal(again.dequantize(), q.dequantize())


def _rows() -> Any:
    from tenuto.calibration.bank import Rows

    return Rows(0)


def test_a_scale_per_column_is_for_weights_alone() -> None:
    smooth = replace(schemes.W8A8.weight, smooth=True)
    with pytest.raises(tn.SchemeError, match="inputs stay in float"):
        Scheme("no", smooth, schemes.W8A8.activation)
    assert Scheme.from_json(Scheme("yes", smooth).to_json()).weight.smooth
    assert "smooth" not in schemes.W8A8.to_json()["weight"]


def test_methods_by_name() -> None:
    """Those of an encoder, with their own defaults; "rtn" is another name of "nearest"."""
    found = [algorithms.by_name(name, "encoder") for name in algorithms.names("encoder")]
    assert {AWQ(), GPTQ(), RoundToNearest()} <= set(found)
    assert algorithms.by_name("rtn", "encoder") == RoundToNearest()
    with pytest.raises(tn.SchemeError, match="awq"):
        algorithms.by_name("adaround", "encoder")
