"""Checkpoints that ComfyUI quantized itself: named as what they are, and a cache works on them.

Up to 0.3.75 8-bit floats alone are; a mark on a plain layer stands in for the formats since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto import schemes
from tenuto.artifact.export import export
from tenuto.caching import CacheSchedule, LateInterval
from tenuto.errors import ModelError
from tenuto.runtime import Patches

STEPS = 10


@pytest.fixture
def native(original: Any, from_file: Any, tmp_path: Path) -> Any:
    """native(family): a MODEL whose Linears the host quantized, from a file of 8-bit floats."""

    def build(family: str) -> Any:
        from comfy.model_patcher import ModelPatcher

        out, cpu = tmp_path / f"{family}.safetensors", torch.device("cpu")
        export(original(family), "comfy", out, scheme="fp8")
        return ModelPatcher(from_file(family, out), load_device=cpu, offload_device=cpu)

    return build


def sampled(model: Any, prompts: Any, steps: int = STEPS) -> Tensor:
    import comfy.sample

    text, empty = prompts([1]), torch.zeros(1, 16, 8, 8)
    given = [[text, {"pooled_output": text[:, 0].clone(), "num_tokens": text.shape[1]}]]
    noise = comfy.sample.prepare_noise(empty, 3, None)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", given, given, empty, disable_pbar=True, seed=3
    )


@pytest.mark.parametrize("family", ["sd3", "flux", "lumina2"])
def test_they_are_named_and_refused_for_rounding(native: Any, family: str) -> None:
    """Before anything changes, by every way to new codes."""
    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.calibration import check
    from comfy_nodes.export import check as check_export
    from comfy_nodes.own_formats import own_formats
    from comfy_nodes.report import Report

    model = native(family)
    formats = own_formats(model.model.diffusion_model)
    assert formats and set(formats.values()) <= {"float8_e4m3fn", "TensorCoreFP8Layout"}
    said = f"{len(formats)} in {next(iter(formats.values()))}"
    for refused in (
        lambda: ComfyUI().install(model, Patches(scheme=schemes.W8A8)),
        lambda: check(model),
        lambda: check_export(model),
    ):
        with pytest.raises(ModelError, match=said):
            refused()
    assert said in Report.execute(model, None)[0]


@pytest.mark.parametrize("family", ["sd3", "flux", "lumina2"])
def test_a_cache_works_on_them(native: Any, prompts: Any, family: str) -> None:
    """It reuses; all-compute and taking it out again leave every bit."""
    from comfy_nodes.adapter import ComfyUI

    model = native(family)
    plain = sampled(model, prompts)
    nothing = ComfyUI().install(model, Patches(policy=LateInterval(2, 1)))
    assert torch.equal(sampled(nothing.handle, prompts), plain)
    for patches in (Patches(policy=LateInterval(2, 2)), Patches(speedup=2.0)):
        made = ComfyUI().install(model, patches)
        found = sampled(made.handle, prompts)
        assert found.isfinite().all() and not torch.equal(found, plain)
        assert int(made.parts[0].last.reused.sum()) > 0
        made.detach()
    assert torch.equal(sampled(model, prompts), plain)


def test_blocks_whose_parts_are_passed_by_are_reused_whole(
    in_comfy: Any, prompts: Any, monkeypatch: Any
) -> None:
    """Later hosts compute int8 feed-forwards without calling the module; a mark stands in."""
    from comfy_nodes.adapter import ComfyUI

    model = in_comfy("lumina2")
    blocks = model.model.diffusion_model.layers
    for block in blocks:
        block.feed_forward.w2.layout_type = "TensorWiseINT8Layout"
    seen: list[Any] = []

    def inline(self: Any, x: Tensor) -> Tensor:
        seen.append(self)
        return self.w2(self._forward_silu_gating(self.w1(x), self.w3(x)))

    monkeypatch.setattr(type(blocks[0].feed_forward), "__call__", inline)
    inside = [block.feed_forward for block in blocks]
    plain = sampled(model, prompts)
    assert sum(one in inside for one in seen) == STEPS * len(blocks)
    seen.clear()
    made = ComfyUI().install(model, Patches(policy=LateInterval(2, 2)))
    last = sampled(made.handle, prompts), made.parts[0].last
    computed = sum(one in inside for one in seen)
    assert computed == len(blocks) * (STEPS - 4)
    names = {name for name in last[1].names if name.startswith("layers.")}
    assert names == {f"layers.{i}" for i in range(len(blocks))}
    assert int(last[1].reused.sum()) > 0 and not torch.equal(last[0], plain)
    made.detach()
    assert torch.equal(sampled(model, prompts), plain)


def test_a_block_computes_where_any_of_its_parts_does() -> None:
    from comfy_nodes.cache import in_blocks

    table = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    schedule = CacheSchedule(table, (3.0, 2.0, 1.0), ("a.x", "a.y", "b"))
    found = in_blocks(schedule, {"a.x": "a", "a.y": "a"})
    assert found.branches == ("a", "b")
    assert found.table.tolist() == [[True, True], [True, False], [False, True]]
    assert in_blocks(schedule, {}) is schedule
