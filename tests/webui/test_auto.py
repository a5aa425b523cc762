"""The default of the feature cache: calls are skipped where a run allows it, else blocks reused."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HOSTS = ("a1111", "neo")  # the two that share the least: the others have their own parts elsewhere
BALANCED = "Built-in: Balanced"
ROUTER = "Router (from artifact)"
ON = (True,)  # what a user ticks
OFF = (False,)
PLAIN = (True, BALANCED, "Off")
alike = partial(torch.allclose, rtol=1e-4, atol=1e-5)  # the same work done twice


def as_router(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with the cache that was the default before."""
    return (*args, BALANCED, "W8A8", ROUTER) if args is ON else (*args[:3], ROUTER)


@pytest.mark.parametrize("args", [ON, PLAIN], ids=["ticked", "full precision"])
def test_half_of_the_calls_are_skipped(host: Any, args: Any) -> None:
    """By what ticking the box gives, with nothing else chosen."""
    plain = host.pictures(host.p(*OFF, steps=12))
    p = host.p(*args, steps=12)
    found = host.pictures(p)
    assert "6 of 12 calls of the model skipped (50%)" in p.processed.comments
    assert "blocks" not in p.processed.comments
    assert ("layers W8A8" in p.processed.comments) == (args is ON)
    assert "not measured on your model" in host.infotext(p)["Tenuto predicted"]
    assert alike(host.pictures(host.p(*host.paste(host.infotext(p)), steps=12)), found)
    alone = (*args, BALANCED, "W8A8")[:3] if args is ON else args
    speedup = (*alone, "Off", 2.0, 0.15, 1.0, True, 3, "Both", 2.0)
    assert alike(host.pictures(host.p(*speedup, steps=12)), found), "as Speedup has it"
    assert torch.equal(host.pictures(host.p(*OFF, steps=12)), plain)


@pytest.mark.parametrize("args", [ON, PLAIN], ids=["ticked", "full precision"])
def test_blocks_are_reused_where_no_call_can_be_skipped(host: Any, args: Any) -> None:
    """As before, and one sentence says so."""
    facts = {"sampler": "euler_ancestral", "steps": 12}
    plain = host.pictures(host.p(*OFF, **facts))
    p, before = host.p(*args, **facts), host.p(*as_router(args), **facts)
    found = host.pictures(p)
    assert alike(found, host.pictures(before)) and not torch.equal(found, plain)
    said = p.processed.comments
    assert said.count("adds noise of its own at every step, so blocks are reused instead") == 1
    assert "calls of the model skipped" not in said and "Tenuto predicted" not in host.infotext(p)
    computed = re.findall(r"\d+ of \d+ blocks computed \(..%\)", said)
    assert len(computed) == 1 and computed[0] in before.processed.comments
    assert torch.equal(host.pictures(host.p(*OFF, **facts)), plain)


def test_few_steps_have_none_to_spare(host: Any) -> None:
    plain = host.pictures(host.p(*OFF, steps=8))
    p = host.p(*PLAIN, steps=8)
    assert torch.equal(host.pictures(p), plain)
    assert p.processed.comments.count("No call is skipped in a run of 8 steps: it takes 9") == 1
    assert "reused instead" not in p.processed.comments


def test_where_the_noise_is_not_known(host: Any) -> None:
    """No kernel ships for a model that predicts the image itself."""
    known = sys.modules["tenuto_webui.hosts"].sampling_of(host.sd_model)
    known.prediction_type = "sample"
    before = host.pictures(host.p(*as_router(PLAIN), steps=12))
    p = host.p(*PLAIN, steps=12)
    assert alike(host.pictures(p), before)
    why = "There is no default forecast for this model"
    assert p.processed.comments.count(why) == 1
    assert "so blocks are reused instead" in p.processed.comments
    alone = host.p(*PLAIN, "Off", 2.0, 0.15, 1.0, True, 3, "Both", 2.0, steps=12)
    host.pictures(alone)
    assert "so blocks" not in alone.processed.comments, "Speedup is that or nothing"


def test_a_file_with_nothing_to_reuse_says_why(host: Any, tmp_path: Path) -> None:
    """Where the noise is not known either, nothing is attached."""
    from tenuto.artifact import Artifact
    from tenuto.artifact.host_names import canonicalized

    made = Artifact.new(host.unet, {"timesteps": [999.0], "steps": 1, "guidance": 1.0})
    made.tensors["route/costs"] = torch.zeros(1)  # safetensors 0.4.2 wants one
    (tmp_path / "tenuto").mkdir()
    canonicalized(made, host.unet).save(tmp_path / "tenuto" / "bare.safetensors")
    sys.modules["tenuto_webui.hosts"].sampling_of(host.sd_model).prediction_type = "sample"
    plain = host.pictures(host.p(*OFF, steps=12))
    p = host.p(True, "bare.safetensors", "Off", steps=12)
    assert torch.equal(host.pictures(p), plain)
    assert p.processed.comments.count("no default forecast for this model") == 1


def test_a_sampler_that_does_not_say_its_steps(
    host: Any, stubs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["tenuto_webui.forecast"]
    before = host.pictures(host.p(*as_router(PLAIN), steps=12))
    monkeypatch.setattr(module, "times_of", lambda *_: [])
    p = host.p(*PLAIN, steps=12)
    assert alike(host.pictures(p), before)
    assert "does not say its steps before it begins, so blocks are" in p.processed.comments


def shifted(stubs: Any, every: int) -> Any:
    """A sampler that goes elsewhere: at all steps, or (2) between the steps that it said."""
    own = stubs._function

    def function(name: str) -> Any:
        def sample(model: Any, x: Tensor, sigmas: Tensor, **more: Any) -> Tensor:
            if every == 1:
                return own(name)(model, x, sigmas * 0.97 + 0.03, **more)
            between = (sigmas[:-2] + sigmas[1:-1]) / 2
            mixed = torch.stack([sigmas[:-2], between], 1).flatten()
            return own(name)(model, x, torch.cat([mixed, sigmas[-2:]]), **more)

        return sample

    return function


def test_a_sampler_that_goes_elsewhere(
    host: Any, stubs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1111's UniPC: that shows as it goes, and blocks are reused from there on."""
    monkeypatch.setattr(stubs, "_function", shifted(stubs, 1))
    plain = host.pictures(host.p(*OFF, steps=12))
    p = host.p(*PLAIN, steps=12)
    assert not torch.equal(host.pictures(p), plain)
    assert "steps than it had said, so blocks are reused instead" in p.processed.comments
    assert "calls of the model" not in p.processed.comments


def test_a_step_in_between_is_no_other_way(
    host: Any, stubs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPM2 evaluates between two steps of its own: some of those that it said are skipped."""
    monkeypatch.setattr(stubs, "_function", shifted(stubs, 2))
    p = host.p(*PLAIN, steps=12)
    host.pictures(p)
    assert "6 of 23 calls of the model skipped" in p.processed.comments
    assert "blocks" not in p.processed.comments


def test_a_hook_that_reads_along(host: Any) -> None:
    """Self-attention guidance keeps what it sees: it would miss the skipped calls."""
    seen: list[int] = []
    layer = host.unet.middle_block[1].transformer_blocks[0].attn1
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    p = host.p(*PLAIN, steps=12)
    host.pictures(p)
    hook.remove()
    assert len(seen) == 12 and "reads along" in p.processed.comments
    assert "so blocks are reused instead" in p.processed.comments


def test_each_pass_has_its_own(host: Any) -> None:
    """And images of others in between are computed as ever."""
    plain = host.pictures(host.p(*OFF, seed=3))
    found: list[Tensor] = []

    def nest(step: int) -> None:
        if step == 5:
            inner = host.p(*OFF, seed=3)
            found.append(host.sampled(inner, host._noise(inner, None)))

    p = host.p(*PLAIN, steps=12, hires=True, on_step=nest)
    host.pictures(p)
    assert "12 of 24 calls of the model skipped" in p.processed.comments
    assert len(found) == 2 and all(torch.equal(image, plain) for image in found)


def artifact_with(host: Any, folder: Path, forecast: bool) -> str:
    """A file with a schedule of twelve steps, and with a forecast beside it."""
    from tenuto.artifact import Artifact
    from tenuto.artifact.host_names import canonicalized
    from tenuto.caching import CacheSchedule
    from tenuto.model import describe
    from tenuto.sampling import OutputKernel

    times = [999.2 - i * 1000 / 12 for i in range(12)]
    branches = [b.name for b in describe(host.unet).branches]
    made = Artifact.new(host.unet, {"timesteps": times, "steps": 12, "guidance": 2.0})
    schedule = CacheSchedule.steps([i < 3 or i % 3 == 0 for i in range(12)], times, branches)
    made.header["route"] = {"timesteps": times, "branches": branches, "policy": "late interval"}
    made.tensors["route/table"] = schedule.table
    if forecast:
        angle = torch.linspace(1.5, 0.05, 12, dtype=torch.float64)
        values = torch.exp(-(angle[:, None] - angle).square() / 0.7)
        values = values + 1e-3 * torch.eye(12, dtype=torch.float64)
        scale = tuple(angle.cos().tolist()), tuple(angle.sin().tolist())
        made.add_forecast(OutputKernel(values, tuple(times), *scale, "eps", 2))
    path = folder / "tenuto" / "mine.safetensors"
    path.parent.mkdir(exist_ok=True)
    canonicalized(made, host.unet).save(path)
    return path.name


@pytest.mark.parametrize("forecast", [True, False], ids=["both", "schedule alone"])
def test_what_a_file_has_goes_first(host: Any, tmp_path: Path, forecast: bool) -> None:
    """Its forecast, and its schedule under a sampler that adds noise; or that alone."""
    args = (True, artifact_with(host, tmp_path, forecast), "Off")
    p = host.p(*args, steps=12)
    host.pictures(p)
    said = p.processed.comments
    assert ("6 of 12 calls of the model skipped" in said) == forecast
    assert ("blocks computed" in said) != forecast and "not measured" not in said
    noisy = {"steps": 12, "sampler": "euler_ancestral"}
    p, before = host.p(*args, **noisy), host.p(*args, ROUTER, **noisy)
    assert alike(host.pictures(p), host.pictures(before))
    assert "blocks computed" in p.processed.comments
    assert ("so blocks are reused instead" in p.processed.comments) == forecast


def test_it_is_nearer_to_the_full_run_than_blocks_by_a_rule() -> None:
    """Of the shipped U-Net, at the same share, W8A8 in both: 10 dB in docs/webui.md."""
    pytest.importorskip("diffusers", reason="the demo U-Net needs diffusers, which hosts may lack")
    import tenuto
    from tenuto.caching import unmeasured
    from tenuto.numerics import named
    from tenuto.runtime.default_forecast import default_kernel_of
    from webui_ext.adapter import Chosen, WebUI
    from webui_ext.cache import Limits

    pipe = tenuto.demo("unet")
    pipe.set_progress_bar_config(disable=True)
    net: nn.Module = pipe.unet

    def images() -> Tensor:
        draws = [torch.Generator().manual_seed(i) for i in range(2)]
        made: Any = pipe(
            ["a photo of a pretzel", "a photo of a trolleybus"], num_inference_steps=20,
            guidance_scale=2.5, generator=draws, output_type="np",
        )  # fmt: skip
        return torch.from_numpy(made.images)

    def db(**more: Any) -> float:
        policy, limits = partial(unmeasured, 0.5, 3), Limits(0.15, 1.0, True, 3)
        given = {"scheme": named("w8a8"), "execution": "float", "policy": policy, "limits": limits}
        installed, step = WebUI().install(net, Chosen(**given, **more)), iter(range(20))
        hook = net.register_forward_pre_hook(
            lambda *_: installed.run.evaluates(next(step), 20, pipe), prepend=True
        )
        if installed.skips is not None:
            pipe.scheduler.set_timesteps(20)
            installed.skips.begins([float(t) for t in pipe.scheduler.timesteps], False, 2.5)
        found = images()
        hook.remove()
        counts = [sum(kind) for kind in zip(*installed.counts().values(), strict=True)]
        assert counts[0] == counts[1], "half of all"
        installed.detach()
        return float(-10 * (found - full).square().mean().log10())

    full = images()
    skipped = db(speedup=2.0, fallback=True, kernel=default_kernel_of(pipe))
    assert skipped > db() + 5 and skipped > 38
