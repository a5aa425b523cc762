"""The extension in the order of a host's calls: what it does to images, and that it is gone."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BALANCED = "Built-in: Balanced"
OFF = (False,)
CACHE = (True, BALANCED, "Off", "Uniform", 2.0, 0.0, 1.0, False, 0)
W8A8 = (True, BALANCED, "W8A8", "Off")
BOTH = (True, BALANCED, "W8A8", "Router (from artifact)", 2.0, 0.0)


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def bits(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        hooks = {k: list(v) for k, v in vars(m).items() if k.endswith("_hooks") and v}
        found[name] = id(m), m.training, vars(m).get("forward"), list(m._modules), hooks
    for name, p in module.named_parameters():
        found[f"tensor {name}"] = id(p), p.numpy().tobytes()
    return found


def counted(p: Any) -> tuple[int, int]:
    """(computed, all) of "66 of 150 blocks computed" under the image."""
    words = p.processed.comments.split("Tenuto: ")[1].split()
    return int(words[0]), int(words[2])


@pytest.mark.parametrize("args", [CACHE, W8A8, BOTH], ids=["cache", "w8a8", "both"])
def test_off_on_off(host: Any, args: Any) -> None:
    before = bits(host.unet)
    plain = host.pictures(host.p(*OFF))
    p = host.p(*args)
    changed = host.pictures(p)
    assert "Tenuto: " in p.processed.comments
    assert torch.equal(host.pictures(host.p(*args)), changed)
    assert torch.equal(host.pictures(host.p(*OFF)), plain)
    assert bits(host.unet) == before
    assert 0 < gap(changed, plain) < 1


def test_when_off_nothing_is_said_or_written(host: Any) -> None:
    p = host.p(*OFF)
    host.pictures(p)
    assert p.processed.comments == "" and not p.extra_generation_params


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_all_compute_is_exact(host: Any, sampler: str) -> None:
    plain = host.pictures(host.p(*OFF, sampler=sampler))
    for more in ((1.0,), (2.0, 1.0), (2.0, 0.0, 0.0)):  # speed 1, start at the end, stop at once
        p = host.p(True, BALANCED, "Off", "Uniform", *more, sampler=sampler)
        assert torch.equal(host.pictures(p), plain)


def test_an_error_or_an_interrupt_leaves_nothing(host: Any, stubs: Any) -> None:
    """Hosts call neither `post_sample` nor `postprocess` then."""
    before, plain = bits(host.unet), host.pictures(host.p(*OFF))
    expected = host.pictures(host.p(*BOTH))
    for error in (RuntimeError, stubs.Interrupted):

        def stop(step: int, error: Any = error) -> None:
            if step == 3:
                raise error

        with pytest.raises(error):
            host.pictures(host.p(*BOTH, on_step=stop))
        assert torch.equal(host.pictures(host.p(*BOTH)), expected)
        with pytest.raises(error):
            host.pictures(host.p(*BOTH, on_step=stop))
        assert torch.equal(host.pictures(host.p(*OFF)), plain)
        assert bits(host.unet) == before


def test_a_nested_call_of_somebody_else_is_left_alone(host: Any) -> None:
    """ADetailer and others sample with scripts of their own choice inside of a step."""
    plain, alone = host.pictures(host.p(*OFF, seed=3)), host.pictures(host.p(*CACHE))
    found: list[Tensor] = []

    def nest(step: int) -> None:
        if step == 3:
            inner = host.p(*OFF, seed=3)
            x = host._noise(inner, None)
            found.append(host.sampled(inner, x))

    assert torch.equal(host.pictures(host.p(*CACHE, on_step=nest)), alone)
    assert torch.equal(found[0], plain)


@pytest.mark.parametrize("passes", ["Both", "First pass only", "Hires only"])
def test_passes(host: Any, passes: str) -> None:
    p = host.p(*CACHE, passes, hires=True)
    host.pictures(p)
    one = host.p(*CACHE)
    host.pictures(one)
    assert counted(p)[1] == counted(one)[1] * (2 if passes == "Both" else 1)


def test_the_host_adds_in_place_and_what_is_held_stays(host: Any) -> None:
    """FreeU and Forge change what a branch returned: every holder gets a copy."""
    seen: list[Tensor] = []
    attention = host.unet.middle_block[1].transformer_blocks[0].attn1
    hook = attention.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    host.pictures(host.p(*CACHE[:4], 6.0, *CACHE[5:]))
    hook.remove()
    assert len(seen) == 6 and all(torch.equal(s, seen[0]) for s in seen)


def test_low_vram_hooks_stay_and_fire(host: Any) -> None:
    """They lie on whole blocks, of which something is always computed."""
    expected, fired = host.pictures(host.p(*BOTH)), []
    blocks = [*host.unet.input_blocks, *host.unet.output_blocks]
    layers = [m for block in blocks for m in (block[0] if host.unet.walks else block,)]
    hooks = [m.register_forward_pre_hook(lambda *_: fired.append(1)) for m in layers]
    assert torch.equal(host.pictures(host.p(*BOTH)), expected)
    assert len(fired) == len(hooks) * 6
    assert all(m._forward_pre_hooks for m in layers)


def test_a_replaced_forward_of_the_unet_composes(host: Any) -> None:
    """ControlNet calls the blocks itself and adds its residuals outside of them."""
    own = type(host.unet).forward

    def controlled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return own(host.unet, x, *args, **kwargs) + 0.1

    host.unet.forward = controlled
    alone = host.pictures(host.p(*OFF))
    assert torch.equal(host.pictures(host.p(*CACHE[:4], 1.0)), alone)
    assert not torch.equal(host.pictures(host.p(*CACHE)), alone)
    assert host.unet.forward is controlled
    assert torch.equal(host.pictures(host.p(*OFF)), alone)


def test_what_is_put_on_top_of_ours_does_not_keep_us_in(host: Any) -> None:
    """Hypertile wraps the forward that it finds and never takes itself off again."""
    plain = host.pictures(host.p(*OFF))
    attention = host.unet.middle_block[1].transformer_blocks[0].attn1

    def wrap(step: int) -> None:
        if step == 1:
            inner = attention.forward
            attention.forward = lambda *args, **kwargs: inner(*args, **kwargs)

    host.pictures(host.p(*BOTH, on_step=wrap))
    assert torch.equal(host.pictures(host.p(*OFF)), plain)


@pytest.mark.parametrize("event", ["on_model_loaded", "on_script_unloaded"])
def test_detached_when_the_model_or_the_page_is_loaded_anew(host: Any, event: str) -> None:
    before = bits(host.unet)

    def reload(step: int) -> None:
        if step == 2:
            host.fire(event, *([host.sd_model] if event == "on_model_loaded" else []))
            assert bits(host.unet) == before

    host.pictures(host.p(*BOTH, on_step=reload))
    assert bits(host.unet) == before


def test_weights_are_kept_from_run_to_run_and_dropped_with_the_model(host: Any) -> None:
    import sys

    session = sys.modules["tenuto_webui.session"].session
    host.pictures(host.p(*W8A8))
    first = session.host._known[1]
    layer = next(iter(first.kept.values()))[1]
    host.pictures(host.p(*W8A8))
    assert session.host._known[1] is first and next(iter(first.kept.values()))[1] is layer
    host.fire("on_model_loaded", host.sd_model)
    assert session.host._known is None


def test_the_denoiser_is_found_where_the_host_has_it(host: Any) -> None:
    hosts = sys.modules["tenuto_webui.hosts"]
    kinds = {"a1111": "a1111", "forge": "forge", "reforge": "forge-legacy", "neo": "forge"}
    assert hosts.detect() == kinds[host.kind]
    assert hosts.denoiser_of(host.sd_model) is host.unet
    with pytest.raises(Exception, match="finds no denoiser"):
        hosts.denoiser_of(SimpleNamespace(model=None))
