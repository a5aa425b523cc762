"""The node Calibrate records a kernel of its own, as the command does: the same in diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import kernel_of
from tests.hosts.test_skipped_calls import cond, sampled, told

STEPS, WIDTH = 12, 24


def seen(
    model: Any, sampler: str = "euler", cfg: float = 2.0, runs: int = 1, inference: bool = True
) -> Any:
    """What the node records; `inference`: as the host runs nodes."""
    from comfy_nodes.calibration import Sampling, recorded

    latent = torch.zeros(1, 4, 8, 8)
    how = Sampling(1, STEPS, cfg, sampler, "normal", [cond(1)], [cond(2)], latent)
    with torch.inference_mode(inference):
        return recorded(model, how, runs)


def test_the_kernel_is_that_of_the_outputs(in_comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of u + g (c - u) in what the model predicts, both halves apart; with the host's noise."""
    from comfy import samplers

    model, outputs = in_comfy("unet"), list[Tensor]()
    own = samplers.sampling_function

    def watched(inner: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        denoised = own(inner, x, sigma, *args, **kwargs)
        outputs.append(((x - denoised) / sigma.reshape(-1, 1, 1, 1)).double().flatten())
        return denoised

    monkeypatch.setattr(samplers, "sampling_function", watched)
    found = seen(model)
    kernel = found.kernel
    assert kernel is not None and kernel.prediction == "eps" and kernel.images == 1
    assert len(kernel.timesteps) == STEPS == len(outputs) and found.timesteps == kernel.timesteps
    rows = torch.stack(outputs)
    wanted = rows @ rows.T / rows.shape[1]
    assert torch.allclose(kernel.values, wanted, rtol=1e-3, atol=1e-4 * float(wanted.amax()))
    assert kernel.guidance == pytest.approx(2.0, abs=1e-3) and kernel.halves is not None
    sampling = model.get_model_object("model_sampling")
    sigmas = sampling.sigma(torch.tensor(kernel.timesteps)).double()
    share = torch.tensor(kernel.sigma) / torch.tensor(kernel.alpha)
    assert torch.allclose(share.double(), sigmas, rtol=1e-4)
    assert not kernel.values.is_inference()


def test_what_has_no_kernel(in_comfy: Any) -> None:
    """A sampler with noise of its own; without guidance there is one, of whole outputs."""
    model = in_comfy("unet")
    assert seen(model, "euler_ancestral").kernel is None
    plain = seen(model, cfg=1.0, runs=2).kernel
    assert plain.halves is None and plain.images == 2


def test_an_artifact_of_the_node_has_a_speedup_of_its_own(in_comfy: Any, tmp_path: Any) -> None:
    """By the slider, with its own kernel."""
    from comfy_nodes.calibration import calibrated
    from comfy_nodes.nodes import info
    from comfy_nodes.speed import SpeedUp

    model = in_comfy("unet")
    with torch.no_grad():
        found, how = seen(model, inference=False), ("quick", "none", 0, tmp_path / "work")
        made = calibrated(model, found, tn.schemes.W8A8, *how)
    made.save(tmp_path / "made.safetensors")
    made = tn.Artifact.load(tmp_path / "made.safetensors")
    kernel = kernel_of(made)
    assert kernel is not None and f"forecast: from {STEPS} steps of 1 images" in info(made, "made")
    faster = SpeedUp.execute(model, 2.0, made)[0]
    assert torch.isfinite(sampled(faster)).all()
    assert "6 of 12 calls" in told(faster) and "not measured" not in told(faster)


def test_noise_between_the_steps_is_counted_as_the_other_side_does(
    original: Any, in_comfy: Any
) -> None:
    """Lumina 2's time rises in diffusers and falls in ComfyUI."""
    from tenuto.artifact import Artifact
    from tenuto.artifact.host_names import canonicalized, localized
    from tenuto.sampling import OutputKernel

    share = torch.linspace(0.95, 0.05, 10, dtype=torch.float64).tolist()
    kept, times = [1 - s for s in share], [1 - s for s in share]
    known = OutputKernel(
        torch.eye(10).double(), tuple(times), tuple(kept), tuple(share), "flow", 1,
        noise_between=((0.02, 0.02, 0.98), (0.5, 0.5, 0.5)),
    )  # fmt: skip
    there = original("lumina2")
    schedule = {"timesteps": times, "steps": 10, "guidance": None}
    made = canonicalized(Artifact.new(there, schedule).add_forecast(known), there)
    found = kernel_of(localized(made, in_comfy("lumina2").model.diffusion_model))
    assert found is not None
    assert [t for t, *_ in found.noise_between] == pytest.approx([0.98, 0.5])
    assert found.at([0.9, 0.5, 0.03]).sigma == pytest.approx([0.9, 0.5, 0.03], abs=0.01)
