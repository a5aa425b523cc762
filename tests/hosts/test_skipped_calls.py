"""The node's speedup in real ComfyUI graphs: with what else packs do to a MODEL, and in words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import schemes
from tenuto.artifact import Artifact
from tenuto.artifact.host_names import canonicalized
from tenuto.errors import TenutoError
from tenuto.model import override_
from tenuto.runtime import Patches
from tenuto.sampling import OutputKernel

STEPS, WIDTH = 12, 24


@pytest.fixture
def model(in_comfy: Any) -> Any:
    """A tiny SD 1.5."""
    return in_comfy("unet")


@pytest.fixture
def artifact(model: Any) -> Artifact:
    """Its kernel, of smooth random outputs."""
    angle = torch.linspace(1.5, 0.05, 20, dtype=torch.float64)
    values = torch.exp(-(angle[:, None] - angle).square() / 0.7)
    values = values + 1e-3 * torch.eye(20, dtype=torch.float64)
    times = tuple(torch.linspace(999, 20, 20, dtype=torch.float64).tolist())
    alpha, sigma = tuple(angle.cos().tolist()), tuple(angle.sin().tolist())
    denoiser = model.model.diffusion_model
    made = Artifact.new(denoiser, {"timesteps": list(times), "steps": 20, "guidance": 2.0})
    made.add_forecast(OutputKernel(values, times, alpha, sigma, "eps", 2))
    return canonicalized(made, denoiser)


def faster(model: Any, artifact: Any, speedup: float = 2.0) -> Any:
    """By the node, as an old workflow has it beside."""
    from comfy_nodes.nodes import ApplyCache
    from tenuto.caching import LateInterval

    rule = LateInterval.title
    return ApplyCache.execute(model, rule, 6, 1, 0.0, 1.0, True, artifact, speedup)[0]


def cond(seed: int, **facts: Any) -> list[Any]:
    text = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    return [text, {"pooled_output": text[:, 0]} | facts]


def sampled(
    model: Any, sampler: str = "euler", steps: int = STEPS, positive: Any = None, side: int = 8,
    start: int = 0, stop: int | None = None,
) -> Tensor:  # fmt: skip
    """The latents of a run with guidance. stop: the step in which a user interrupts it."""
    from comfy import sample, samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = samplers.calculate_sigmas(sampling, "normal", steps)[start:]
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))

    def step(number: int, *_: Any) -> None:
        if number == stop:
            from comfy.model_management import InterruptProcessingException

            raise InterruptProcessingException

    return sample.sample_custom(
        model, noise, 2.0, samplers.sampler_object(sampler), sigmas, positive or [cond(1)],
        [cond(2)], torch.zeros_like(noise), disable_pbar=True, seed=0, callback=step,
    )  # fmt: skip


def told(model: Any) -> str:
    from comfy_nodes.report import Report

    return Report.execute(model, None)[0]


def calls(model: Any, **how: Any) -> tuple[Tensor, int]:
    """The latents, and how often the network ran."""
    seen: list[int] = []
    module = model.model.diffusion_model.input_blocks[0][0]

    def count(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    patch = override_(module, count)
    try:
        return sampled(model, **how), len(seen)
    finally:
        patch.retire()


def test_a_hook_that_reads_along_is_told(model: Any, artifact: Artifact) -> None:
    made, module = faster(model, artifact), model.model.diffusion_model.input_blocks[0][0]
    hook = module.register_forward_hook(lambda *_: None)
    sampled(made)
    hook.remove()
    assert "a hook in input_blocks.0.0 reads along" in told(made)
    assert "0 of 12 calls" in told(made)


def test_one_is_off_and_old_workflows_are_as_they_were(model: Any, artifact: Artifact) -> None:
    from comfy_nodes.nodes import ApplyCache
    from tenuto.caching import LateInterval

    (found,) = (i for i in ApplyCache.define_schema().inputs if i.id == "speedup")
    assert found.optional and found.default == 1.0
    old = ApplyCache.execute(model, LateInterval.title, 6, 1, 0.0, 1.0, True)[0]
    plain = sampled(model)
    assert torch.equal(sampled(old), plain)
    assert torch.equal(sampled(faster(model, artifact, 1.0)), plain)


def test_the_report_counts_calls(model: Any, artifact: Artifact) -> None:
    made = faster(model, artifact)
    assert "no run yet" in told(made)
    plain = sampled(model)
    found, ran = calls(made)
    assert ran == 6 and not torch.equal(found, plain)
    assert "6 of 12 calls of the model skipped and forecast (50%), 6 computed" in told(made)
    assert torch.equal(sampled(model), plain), "the MODEL that was given stays"
    from comfy_nodes.report import heat_map

    assert heat_map(made.get_attachment("tenuto_cache").last).shape[0] == 1


@pytest.mark.parametrize(
    "how,why",
    [
        ({"sampler": "euler_ancestral"}, "adds noise of its own"),
        ({"sampler": "dpmpp_2m_sde"}, "adds noise of its own"),
        ({"sampler": "lcm"}, "adds noise of its own"),
        ({"steps": 8}, "in a run of 8 steps"),
        ({"start": 6}, "in a run of 6 steps"),
        ({"sampler": "dpm_fast"}, "other steps than it had said"),
    ],
)
def test_what_skips_nothing_says_so(
    model: Any, artifact: Artifact, how: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, plain = faster(model, artifact), sampled(model, **how)
    with caplog.at_level(logging.INFO, "tenuto"):
        assert torch.equal(sampled(made, **how), plain)
    assert why in told(made) and "0 of" in told(made)
    known = how.get("sampler") != "dpm_fast"
    assert any(why in record.message for record in caplog.records) == known


def bare(artifact: Artifact) -> Artifact:
    """Without its forecast."""
    return Artifact(
        {k: v for k, v in artifact.header.items() if k != "forecast"},
        {k: v for k, v in artifact.tensors.items() if not k.startswith("forecast/")},
    )


# --- without an artifact --------------------------------------------------------------------------


def by_slider(model: Any, speedup: float = 2.0, artifact: Any = None) -> Any:
    from comfy_nodes.speed import SpeedUp

    return SpeedUp.execute(model, speedup, artifact)[0]


def sampled_as(model: Any, kind: str) -> Any:
    """By ComfyUI's own node."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, kind, False)[0]


def test_half_of_the_calls_without_an_artifact(
    model: Any, artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    from tenuto.caching.forecast_plan import PLANS

    PLANS.clear()  # of this process: a warning comes once for each plan
    plain, known = sampled(model), sampled(faster(model, artifact))
    with caplog.at_level(logging.WARNING, "tenuto"):
        made = by_slider(model)
        found, ran = calls(made)
    assert ran == 6 and torch.isfinite(found).all() and not torch.equal(found, plain)
    text, foreign = told(made), "by the forecast that ships, not measured on your model)."
    assert "6 of 12 calls of the model skipped" in text
    (line,) = [line for line in text.splitlines() if line.endswith(foreign)]
    db = line.removeprefix("Predicted: about ").partition(" dB")[0]
    assert 10 < int(db) < 80
    (warned,) = [r.message for r in caplog.records if "not measured on your model" in r.message]
    assert f"{db} dB" in warned and "6 of 12" in warned
    for same in (faster(model, None), by_slider(model, 2.0, bare(artifact))):
        assert torch.equal(sampled(same), found)
    own = by_slider(model, 2.0, artifact)
    assert torch.equal(sampled(own), known) and not torch.equal(known, found)
    assert "dB PSNR to the image with every call (higher is nearer)." in told(
        own
    ) and "not measured" not in told(own)
    assert by_slider(model, 1.0) is model and torch.equal(sampled(model), plain)
    assert told(model).startswith("Off")


def test_what_the_model_predicts_is_that_of_the_run(model: Any) -> None:
    """Whether the host's node that says so comes before or after."""
    before, after = by_slider(sampled_as(model, "v_prediction")), by_slider(model)
    after = sampled_as(after, "v_prediction")
    assert torch.equal(sampled(before), sampled(after))
    kept = [m.get_attachment("tenuto_cache").last.said for m in (before, after)]
    sampled(eps := by_slider(model))
    assert kept[0] == kept[1] != eps.get_attachment("tenuto_cache").last.said
    for kind in ("x0", "lcm"):
        with pytest.raises(TenutoError, match="no default forecast"):
            by_slider(sampled_as(model, kind))
        with pytest.raises(TenutoError, match="no default forecast"):
            sampled(sampled_as(by_slider(model), kind))


def test_every_prediction_of_the_host_is_known() -> None:
    from comfy import model_base, supported_models

    from tenuto.sampling import host_noise, host_prediction

    wanted = {
        "EPS": "eps", "V_PREDICTION": "v", "V_PREDICTION_EDM": "v", "STABLE_CASCADE": "eps",
        "EDM": "v", "FLOW": "flow", "V_PREDICTION_CONTINUOUS": "v", "FLUX": "flow",
        "IMG_TO_IMG": "x0", "FLOW_COSMOS": "flow", "IMG_TO_IMG_FLOW": "x0",
        "V_PREDICTION_DDPM": "v", "FLOW_AV": "flow",
    }  # fmt: skip
    for kind in model_base.ModelType:
        made = model_base.model_sampling(supported_models.SD15({}), kind)
        assert host_prediction(made) == wanted[kind.name], kind
        noise = host_noise(made)
        assert noise is not None
        sigmas = made.sigmas[[-1, len(made.sigmas) // 2, 0]]
        times = [float(t) for t in made.timestep(sigmas)]
        for (alpha, sigma), given in zip(noise(times), sigmas, strict=True):
            unit = float(getattr(made, "sigma_data", 1.0)) if wanted[kind.name] != "flow" else 1.0
            ratio = float(given) / unit
            if kind.name in ("FLOW", "FLUX", "FLOW_AV"):
                ratio = float(given) / max(1e-9, 1 - float(given))
            assert sigma / max(alpha, 1e-9) == pytest.approx(ratio, rel=1e-3) or alpha < 1e-4


@pytest.mark.parametrize(
    "how,why",
    [
        ({"sampler": "euler_ancestral"}, "adds noise of its own"),
        ({"steps": 8}, "in a run of 8 steps"),
    ],
)
def test_what_skips_nothing_without_an_artifact_says_so(model: Any, how: Any, why: str) -> None:
    made = by_slider(model)
    assert torch.equal(sampled(made, **how), sampled(model, **how))
    assert why in told(made) and "0 of" in told(made) and "predicted" not in told(made)


# --- off, and other samplers ----------------------------------------------------------------------


def test_off_is_off_whatever_the_file_says(model: Any, artifact: Artifact) -> None:
    """A file may have a speedup of its own, for where nobody is asked."""
    from comfy_nodes.adapter import ComfyUI

    artifact.header["forecast"]["default"] = 2.0
    attached = ComfyUI().install(model, Patches(artifact, weights=False))
    assert not attached.parts and "forecast" in artifact.header
    assert torch.equal(sampled(attached.handle), sampled(model))


def test_what_is_in_a_file_is_told(artifact: Artifact) -> None:
    from comfy_nodes.nodes import info

    assert "forecast: from 20 steps of 2 images" in info(artifact, "a")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "heun", "dpm_2", "lms", "res_multistep"])
def test_other_samplers(model: Any, artifact: Artifact, sampler: str) -> None:
    full = calls(model, sampler=sampler)[1]
    found, ran = calls(faster(model, artifact), sampler=sampler)
    assert torch.isfinite(found).all() and ran < full
    again = calls(faster(model, artifact), sampler=sampler)
    assert torch.equal(again[0], found) and again[1] == ran


def test_a_later_start_and_another_size_have_runs_of_their_own(
    model: Any, artifact: Artifact
) -> None:
    """As a second pass at twice the size: nothing of the first is used."""
    made = faster(model, artifact)
    alone = {n: calls(faster(model, artifact), **how)[0] for n, how in PASSES.items()}
    for name in (*PASSES, *reversed(PASSES)):
        found, ran = calls(made, **PASSES[name])
        assert torch.equal(found, alone[name]) and ran < PASSES[name].get("steps", STEPS)


PASSES: dict[str, Any] = {"first": {}, "hires": {"steps": 20, "start": 8, "side": 16}}


def test_an_interrupt_leaves_nothing(model: Any, artifact: Artifact) -> None:
    from comfy.model_management import InterruptProcessingException

    made, plain = faster(model, artifact), sampled(model)
    expected = sampled(made)
    with pytest.raises(InterruptProcessingException):
        sampled(made, stop=7)
    cache = made.get_attachment("tenuto_cache")
    assert cache.run is None and not cache.last.cells, "outputs go with the run"
    assert torch.equal(sampled(made), expected)
    assert torch.equal(sampled(model), plain)
    assert "forward" not in vars(model.model.diffusion_model)


def test_a_prompt_that_comes_late_computes(model: Any, artifact: Artifact) -> None:
    """Two of different times: where the second begins, its first calls compute whatever is due."""
    prompts = [cond(1, start_percent=0.0, end_percent=0.6), cond(3, start_percent=0.6)]
    found, ran = calls(faster(model, artifact), positive=prompts)
    assert torch.isfinite(found).all() and 6 < ran < STEPS
    whole = calls(faster(model, artifact), positive=[cond(1)])[1]
    assert whole == 6


def test_regions(model: Any, artifact: Artifact) -> None:
    """A prompt for a part of the image is a call of another size, with outputs of its own."""
    prompts = [cond(1), cond(3, area=(4, 4, 0, 4), strength=1.0)]
    full = calls(model, positive=prompts)[1]
    found, ran = calls(faster(model, artifact), positive=prompts)
    assert ran * 2 == full and torch.isfinite(found).all()


def test_with_quantized_layers_in_either_order(model: Any, artifact: Artifact) -> None:
    from comfy_nodes.adapter import ComfyUI

    def quantized(given: Any) -> Any:
        patches = Patches(scheme=schemes.W8A8, execution="float")
        return ComfyUI().install(given, patches).handle

    first = calls(faster(quantized(model), artifact))
    after = calls(quantized(faster(model, artifact)))
    assert first[1] == after[1] == 6 and torch.equal(first[0], after[0])
    assert not torch.equal(first[0], sampled(faster(model, artifact)))
    text = told(faster(quantized(model), artifact))
    assert "Quantized layers" in text and "Cache" in text


def test_with_a_lora_and_its_clones(model: Any, artifact: Artifact) -> None:
    """Before or after; the artifact is of the weights without it."""
    from comfy import weight_adapter

    denoiser = model.model.diffusion_model
    name = next(n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and "to_q" in n)
    rows, columns = denoiser.get_submodule(name).weight.shape
    draw = torch.Generator().manual_seed(2)
    up, down = (torch.randn(s, generator=draw) for s in ((rows, 2), (2, columns)))
    adapter = weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, None))

    def with_lora(given: Any) -> Any:
        made = given.clone()
        made.add_patches({f"diffusion_model.{name}.weight": adapter}, 1.0)
        return made

    plain = calls(faster(model, artifact))
    before = calls(faster(with_lora(model), artifact))
    after = calls(with_lora(faster(model, artifact)))
    assert before[1] == after[1] == plain[1] == 6
    assert torch.equal(before[0], after[0]) and not torch.equal(before[0], plain[0])
    assert torch.equal(sampled(faster(model, artifact)), plain[0])


def test_with_wrappers_of_other_packs(model: Any, artifact: Artifact) -> None:
    """One round every call sees them all; one inside the network sees what is computed."""
    from comfy.patcher_extension import WrappersMP

    seen = {"outside": 0, "inside": 0}

    def count(where: str) -> Any:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            seen[where] += 1
            return executor(*args, **kwargs)

        return wrapper

    theirs = model.clone()
    theirs.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", count("outside"))
    theirs.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", count("inside"))
    expected = sampled(faster(model, artifact))
    assert torch.equal(sampled(faster(theirs, artifact)), expected)
    assert seen == {"outside": 12, "inside": 6}


def test_guidance_by_a_further_pass_has_outputs_of_its_own(model: Any, artifact: Artifact) -> None:
    """Perturbed attention of ComfyUI's own node, too slight to matter."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    expected = sampled(faster(model, artifact))
    slight = PerturbedAttentionGuidance.execute(model, 1e-9)[0]
    found, ran = calls(faster(slight, artifact))
    assert float((found - expected).norm() / expected.norm()) < 1e-4 and ran == 12
