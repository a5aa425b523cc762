"""What the extension does to images: what is stored, what is quantized, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

HOSTS = ("a1111", "neo")  # the two that share the least: the others have their own parts elsewhere
BALANCED = "Built-in: Balanced"
OFF = (False,)
CACHE = (True, BALANCED, "Off", "Uniform", 2.0, 0.0, 1.0, False, 0)
W8A8 = (True, BALANCED, "W8A8", "Off")
BOTH = (True, BALANCED, "W8A8", "Router (from artifact)", 2.0, 0.0)


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def counted(p: Any) -> tuple[int, int]:
    """(computed, all) of "66 of 150 blocks computed" under the image."""
    words = p.processed.comments.split("Tenuto: ")[1].split()
    return int(words[0]), int(words[2])


def test_interval_two_holds_half(host: Any) -> None:
    p = host.p(*CACHE)
    host.pictures(p)
    computed, total = counted(p)
    assert computed * 2 == total and total % 6 == 0
    p = host.p(*CACHE[:7], True, 0)  # the last step too
    host.pictures(p)
    assert counted(p) == (total // 6 * 4, total)
    p = host.p(*CACHE[:4], 6.0, 0.0, 1.0, False, 2)  # at most twice in a row
    host.pictures(p)
    assert counted(p) == (total // 6 * 2, total)


def test_the_step_is_the_nearest_calibrated_one(host: Any, tmp_path: Any) -> None:
    """Fractional timesteps in A1111, rounded ones in Forge: each takes its own row."""
    save_route(host, tmp_path, [1, 0, 1, 1, 0, 0])
    p = host.p(True, "route.safetensors", "Off", "Router (from artifact)", 2.0, 0, 1, False, 0)
    host.pictures(p)
    computed, total = counted(p)
    assert computed * 2 == total


def save_route(host: Any, folder: Any, rows: list[int]) -> Any:
    """An artifact of the host's model in models/tenuto, with a route of whole steps."""
    from tenuto.artifact.artifact import Artifact
    from tenuto.artifact.host_names import canonicalized
    from tenuto.caching.schedule import CacheSchedule
    from tenuto.model.families import describe

    times = [999.2 - i * 1000 / len(rows) for i in range(len(rows))]
    branches = [b.name for b in describe(host.unet).branches]
    made = Artifact.new(host.unet, {"timesteps": times, "steps": len(rows), "guidance": 2.0})
    schedule = CacheSchedule.steps([bool(r) for r in rows], times, branches)
    made.header["route"] = {"timesteps": times, "branches": branches, "policy": "late interval"}
    made.tensors["route/table"] = schedule.table
    path = folder / "tenuto" / "route.safetensors"
    path.parent.mkdir(exist_ok=True)
    canonicalized(made, host.unet).save(path)
    return path


def test_batched_and_split(host: Any) -> None:
    """Both halves of guidance in one call or in two: sums alone differ."""
    for args in (CACHE, BOTH):
        whole = host.pictures(host.p(*args))
        p = host.p(*args, split=True)
        assert gap(host.pictures(p), whole) < (1e-5 if args is CACHE else 5e-2)
    plain = host.pictures(host.p(*OFF, split=True))
    assert torch.equal(host.pictures(host.p(*CACHE[:4], 1.0, split=True)), plain)


@pytest.mark.parametrize("split", [False, True])
def test_ngms_is_never_mixed_up(host: Any, split: bool) -> None:
    """Batches of 2, 1, 2, 1: what does not fit is computed."""
    plain = host.pictures(host.p(*OFF, ngms=True, split=split))
    p = host.p(*CACHE, ngms=True, split=split)
    found = host.pictures(p)
    if not split:
        assert torch.equal(found, plain)
    assert torch.isfinite(found).all() and gap(found, plain) < 1


def test_and_prompts_and_batches(host: Any) -> None:
    for facts in ({"prompts": ("cat", "a dog")}, {"batch_size": 3}, {"size": 12}):
        found = host.pictures(host.p(*CACHE, **facts))
        assert torch.equal(host.pictures(host.p(*CACHE, **facts)), found)


def test_heun_counts_steps_and_not_evaluations(host: Any) -> None:
    p = host.p(*CACHE, sampler="heun")
    found = host.pictures(p)
    computed, total = counted(p)
    assert total % 11 == 0 and computed < total  # 6 steps, the last of which evaluates once
    assert torch.equal(host.pictures(host.p(*CACHE, sampler="heun")), found)


def test_every_layer_is_found(host: Any) -> None:
    """Forge's Linear is no nn.Linear; first and last layers stay in full precision."""
    p = host.p(*W8A8)
    host.pictures(p)
    kinds = [n for n, m in host.unet.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    ends = [n for n in kinds if n.startswith(("time_embed", "input_blocks.0", "out.", "label"))]
    assert f"{len(kinds) - len(ends)} layers W8A8" in p.processed.comments


@pytest.mark.parametrize("precision", ["W6A8", "W4A8"])
def test_other_precisions(host: Any, precision: str) -> None:
    plain = host.pictures(host.p(*OFF))
    near = gap(host.pictures(host.p(*W8A8)), plain)
    p = host.p(True, BALANCED, precision, "Off")
    assert near < gap(host.pictures(p), plain) < 1
    assert precision in p.processed.comments


def test_it_is_said_where_quantizing_gains_no_time(host: Any) -> None:
    host.opts.tenuto_execution = "float"
    p = host.p(*W8A8)
    host.pictures(p)
    assert "layers compute in float here, which gains no time" in p.processed.comments
    host.opts.tenuto_execution = "int8"
    p = host.p(*W8A8)
    host.pictures(p)
    assert ("in float" in p.processed.comments) == ("int8" not in p.processed.comments)


STORED = {
    "fp8": lambda layer: setattr(layer, "fp16_weight", layer.weight),
    "nf4": lambda layer: setattr(layer, "quant_state", object()),
    "gguf": lambda layer: setattr(layer.weight, "gguf_cls", object()),
}


@pytest.mark.parametrize("kind", STORED)
def test_low_bit_storage_is_refused_in_a_sentence(host: Any, kind: str) -> None:
    """And the cache still works."""
    plain = host.pictures(host.p(*CACHE))
    STORED[kind](host.unet.middle_block[0].out_layers[3])
    p = host.p(True, BALANCED, "W8A8", *CACHE[3:])
    assert torch.equal(host.pictures(p), plain)
    assert "the host stores the weights in" in p.processed.comments and kind in (
        p.processed.comments
    )


def test_nothing_acts_where_an_sd_unet_stands_in(host: Any) -> None:
    plain = host.pictures(host.p(*OFF))
    host.modules["modules.sd_unet"].current_unet = object()
    p = host.p(*BOTH)
    assert torch.equal(host.pictures(p), plain)
    assert "SD-Unet" in p.processed.comments


def test_a_failure_is_a_sentence_and_the_picture_goes_on(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenuto.runtime.layers import QLinear

    plain = host.pictures(host.p(*OFF))

    def broken(*args: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(QLinear, "forward", broken)
    p = host.p(*W8A8)
    found = host.pictures(p)
    assert "no kernel" in p.processed.comments and gap(found, plain) < 0.1
    monkeypatch.undo()


@pytest.mark.parametrize(
    "args", [(True, "nowhere.safetensors"), (True, BALANCED, "W3A3"), (True, BALANCED, "Off",
     "Uniform", "fast"), (True, BALANCED, "Off", "Uniform", 99)], ids=str
)  # fmt: skip
def test_bad_arguments_are_a_sentence(host: Any, args: Any) -> None:
    plain = host.pictures(host.p(*OFF))
    p = host.p(*args)
    assert torch.equal(host.pictures(p), plain)
    assert p.processed.comments.count("full precision") == 1


def test_another_models_artifact_is_refused(host: Any, tmp_path: Any) -> None:
    save_route(host, tmp_path, [1, 0, 1, 0, 1, 0])
    with torch.no_grad():
        for p in host.unet.parameters():
            p.add_(0.5)
    plain = host.pictures(host.p(*OFF))
    p = host.p(True, "route.safetensors", "Off", "Router (from artifact)")
    assert torch.equal(host.pictures(p), plain)
    assert "another model" in p.processed.comments


def test_a_speedup_is_told_only_where_a_full_run_was_timed(host: Any) -> None:
    def said(steps: int) -> str:
        p = host.p(*CACHE, steps=steps)
        host.pictures(p)
        return p.processed.comments

    assert "times as fast" not in said(8)
    host.pictures(host.p(*OFF, steps=8))
    assert "times as fast as without, measured in this session" in said(8)
    assert "times as fast" not in said(9)


def test_img2img_can_be_left_out(host: Any) -> None:
    host.script.is_txt2img, host.script.is_img2img = False, True
    host.opts.tenuto_img2img = False
    p = host.p(*CACHE)
    host.pictures(p)
    assert p.processed.comments == "" and not p.extra_generation_params


def test_fp16_storage_is_near(host: Any) -> None:
    full = host.pictures(host.p(*CACHE))
    host.opts.tenuto_cache_dtype = "fp16"
    found = host.pictures(host.p(*CACHE))
    assert 0 < gap(found, full) < 1e-2


def test_tiling_pads_round_and_such_layers_stay(host: Any) -> None:
    """A1111's option changes the padding of every convolution while it runs."""
    for module in host.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    plain = host.pictures(host.p(*OFF))
    assert gap(host.pictures(host.p(*W8A8)), plain) < 0.1
