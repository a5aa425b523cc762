"""Whole calls that are skipped: the steps that the host's sampler says, and what is said of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.model import override_

HOSTS = ("a1111", "neo")  # the two that share the least: the others have their own parts elsewhere
BALANCED = "Built-in: Balanced"
NAME = "half.safetensors"


def half(speedup: float = 2.0, precision: str = "Off") -> tuple[Any, ...]:
    """The fields of the accordion, with no other cache."""
    return True, NAME, precision, "Off", 2.0, 0.15, 1.0, True, 3, "Both", speedup


@pytest.fixture
def kernel(host: Any, tmp_path: Path) -> Any:
    """An artifact of the host's model with the kernel of 20 steps; the kernel."""
    from tenuto.artifact import Artifact
    from tenuto.artifact.host_names import canonicalized
    from tenuto.sampling import OutputKernel

    angle = torch.linspace(1.5, 0.05, 20, dtype=torch.float64)
    values = torch.exp(-(angle[:, None] - angle).square() / 0.7)
    values = values + 1e-3 * torch.eye(20, dtype=torch.float64)
    times = tuple(torch.linspace(999, 20, 20, dtype=torch.float64).tolist())
    alpha, sigma = tuple(angle.cos().tolist()), tuple(angle.sin().tolist())
    found = OutputKernel(values, times, alpha, sigma, "eps", 2)
    made = Artifact.new(host.unet, {"timesteps": list(times), "steps": 20, "guidance": 2.0})
    path = tmp_path / "tenuto" / NAME
    path.parent.mkdir(exist_ok=True)
    canonicalized(made.add_forecast(found), host.unet).save(path)
    return found


def made_with(host: Any, p: Any) -> tuple[Tensor, int]:
    """The latents, and how often the network ran."""
    seen: list[int] = []

    def count(original: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    patch = override_(host.unet.input_blocks[0][0], count)
    found = host.pictures(p)
    patch.retire()
    own, put = host.unet.__dict__.get("forward"), p.sampler.func
    assert own is None and not hasattr(put, "__wrapped__"), "something was left behind"
    return found, len(seen)


def test_half_of_the_calls(host: Any, kernel: Any) -> None:
    plain, ran = made_with(host, host.p(False, steps=12))
    assert ran == 12
    p = host.p(*half(), steps=12)
    found, ran = made_with(host, p)
    assert ran == 6 and not torch.equal(found, plain)
    assert "6 of 12 calls of the model skipped (50%)" in p.processed.comments
    assert torch.equal(made_with(host, host.p(False, steps=12))[0], plain)
    assert torch.equal(made_with(host, host.p(*half(1.0), steps=12))[0], plain)


def test_guidance_in_two_calls_and_batches(host: Any, kernel: Any) -> None:
    whole, ran = made_with(host, host.p(*half(), steps=12))
    apart, twice = made_with(host, host.p(*half(), steps=12, split=True))
    assert twice == 2 * ran and float((apart - whole).norm() / whole.norm()) < 1e-5
    assert made_with(host, host.p(*half(), steps=12, batch_size=3))[1] == ran
    assert made_with(host, host.p(*half(), steps=12, prompts=("cat", "a dog")))[1] == ran


def test_rows_that_come_and_go_are_computed(host: Any, kernel: Any) -> None:
    """NGMS leaves the negative half out of every other step: no such batch was seen before."""
    assert made_with(host, host.p(*half(), steps=12, ngms=True))[1] > 6


def test_both_passes_have_plans_of_their_own(host: Any, kernel: Any) -> None:
    p = host.p(*half(), steps=12, hires=True)
    assert made_with(host, p)[1] == 12
    assert "12 of 24 calls" in p.processed.comments
    first = (*half()[:9], "First pass only", 2.0)
    assert made_with(host, host.p(*first, steps=12, hires=True))[1] == 6 + 12


def test_heun_keeps_to_one_decision_a_step(host: Any, kernel: Any) -> None:
    plain = made_with(host, host.p(False, steps=12, sampler="heun"))[1]
    found, ran = made_with(host, host.p(*half(), steps=12, sampler="heun"))
    assert plain == 23 and ran < 14 and torch.isfinite(found).all()


@pytest.mark.parametrize(
    "facts,why",
    [
        ({"sampler": "euler_ancestral", "steps": 12}, "adds noise of its own"),
        ({"steps": 8}, "in a run of 8 steps"),
    ],
)
def test_what_skips_nothing_says_so(host: Any, kernel: Any, facts: Any, why: str) -> None:
    plain, ran = made_with(host, host.p(False, **facts))
    p = host.p(*half(), **facts)
    found, here = made_with(host, p)
    assert torch.equal(found, plain) and here == ran == facts["steps"]
    assert p.processed.comments.count(why) == 1
    assert f"0 of {ran} calls" in p.processed.comments


def test_a_sampler_that_does_not_say_its_steps(
    host: Any, kernel: Any, stubs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some host that we do not know: everything is computed, in one sentence."""
    plain = made_with(host, host.p(False, steps=12))[0]
    monkeypatch.setattr(stubs._Denoiser, "inner_model", None)
    for model in (getattr(getattr(host.sd_model, "forge_objects", None), "unet", None),):
        for name in ("predictor", "model_sampling"):
            if model is not None and hasattr(model.model, name):
                delattr(model.model, name)
    p = host.p(*half(), steps=12)
    found, ran = made_with(host, p)
    assert ran == 12 and torch.equal(found, plain)
    assert "does not say its steps" in p.processed.comments


def test_a_sampler_that_goes_elsewhere(
    host: Any, kernel: Any, stubs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1111's UniPC has steps of its own."""
    own = stubs._function

    def function(name: str) -> Any:
        def sample(model: Any, x: Tensor, sigmas: Tensor, **more: Any) -> Tensor:
            return own(name)(model, x, sigmas * 0.97 + 0.03, **more)

        return sample

    monkeypatch.setattr(stubs, "_function", function)
    p = host.p(*half(), steps=12)
    assert made_with(host, p)[1] == 12
    assert "other steps than it had said" in p.processed.comments


def test_half_of_the_calls_without_an_artifact(host: Any, kernel: Any) -> None:
    """By the kernel that ships: the words are under the image, in its infotext and in the page."""
    plain = made_with(host, host.p(False, steps=12))[0]
    p = host.p(True, BALANCED, *half()[2:], steps=12)
    found, ran = made_with(host, p)
    assert ran == 6 and torch.isfinite(found).all() and not torch.equal(found, plain)
    foreign, said = "by the forecast that ships, not measured on your model)", p.processed
    assert said.comments.count(foreign) == 1
    assert re.fullmatch(
        r"about \d+ dB .*" + re.escape(foreign), host.infotext(p)["Tenuto predicted"]
    )
    assert host.paste(host.infotext(p))[10] == 2.0
    words = sys.modules["tenuto_webui.words"]
    choices = sys.modules["tenuto_webui.choices"].Choices
    assert "not measured on your model" in words.forecast(choices.of(p.script_args))
    assert "not measured" not in words.forecast(choices.of(half()))
    own = host.p(*half(), steps=12)
    assert not torch.equal(made_with(host, own)[0], found)
    assert (
        "dB PSNR to the image with every call (higher is nearer);" in own.processed.comments + ";"
    )
    assert "not measured" not in own.processed.comments
    few = host.p(True, BALANCED, *half()[2:], steps=8)
    assert made_with(host, few)[1] == 8 and "in a run of 8 steps" in few.processed.comments
    assert "Tenuto predicted" not in host.infotext(few)


def test_weights_are_kept_and_the_noise_is_that_of_the_run(host: Any, kernel: Any) -> None:
    """Quantized once; but hosts change the noise of a checkpoint by an option."""
    adapter, kept = sys.modules["tenuto_webui.session"].session.host, []
    p = (True, BALANCED, "W8A8", *half()[3:])
    for _ in range(2):
        assert made_with(host, host.p(*p, steps=12))[1] == 6
        kept.append(adapter._known)
    assert kept[0] is kept[1]
    known = sys.modules["tenuto_webui.hosts"].sampling_of(host.sd_model)
    words, found = [], []
    for kind in ("epsilon", "v_prediction", "sample"):
        known.prediction_type = kind
        request = host.p(*p, steps=12)
        found.append(made_with(host, request)[0])
        words.append(request.processed.comments)
    assert "dB PSNR to the image" in words[0] and "dB PSNR to the image" in words[1]
    assert not torch.equal(found[0], found[1]), "each has a kernel, and so a plan, of its own"
    assert words[2].count("no default forecast for this model") == 1


def test_weights_are_quantized_once_for_every_speedup(host: Any, kernel: Any) -> None:
    adapter, kept = sys.modules["tenuto_webui.session"].session.host, []
    for speedup, ran in ((2.0, 6), (1.5, 8), (4.0, 3)):
        p = host.p(*half(speedup, "W8A8"), steps=12)
        assert made_with(host, p)[1] == ran
        assert "layers W8A8" in p.processed.comments
        kept.append(adapter._known)
    assert kept[0] is kept[1] is kept[2]


def test_an_infotext_brings_it_back(host: Any, kernel: Any) -> None:
    p = host.p(*half(2.5), steps=12)
    host.pictures(p)
    params = host.infotext(p)
    assert params["Tenuto speedup"] == "2.5"
    assert host.paste(params)[10] == 2.5
    plain = host.p(*half(1.0), steps=12)
    host.pictures(plain)
    assert "Tenuto speedup" not in host.infotext(plain)


def test_an_interrupt_leaves_nothing(host: Any, kernel: Any, stubs: Any) -> None:
    plain = made_with(host, host.p(False, steps=12))[0]
    expected = made_with(host, host.p(*half(), steps=12))[0]

    def stop(step: int) -> None:
        if step == 7:
            raise stubs.Interrupted

    p = host.p(*half(), steps=12, on_step=stop)
    with pytest.raises(stubs.Interrupted):
        host.pictures(p)
    assert torch.equal(made_with(host, host.p(*half(), steps=12))[0], expected)
    assert not hasattr(p.sampler.func, "__wrapped__")
    assert torch.equal(made_with(host, host.p(False, steps=12))[0], plain)


def test_a_controlnet_round_the_network_is_skipped_with_the_call(host: Any, kernel: Any) -> None:
    """It replaces the forward of the network before a pass, and takes its own back after it."""
    own, calls = host.unet.forward, list[int]()

    def controlled(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return own(*args, **kwargs) + 0.01

    host.unet.forward = controlled
    host.pictures(host.p(*half(), steps=12))
    assert host.unet.__dict__.pop("forward") is controlled and len(calls) == 6


def test_images_of_others_in_between_are_computed(host: Any, kernel: Any) -> None:
    """ADetailer samples inside of a step, with a sampler of its own."""
    plain, alone = host.pictures(host.p(False, seed=3)), host.pictures(host.p(*half(), steps=12))
    found: list[Tensor] = []

    def nest(step: int) -> None:
        if step == 5:
            inner = host.p(False, seed=3)
            found.append(host.sampled(inner, host._noise(inner, None)))

    assert torch.equal(host.pictures(host.p(*half(), steps=12, on_step=nest)), alone)
    assert torch.equal(found[0], plain)
