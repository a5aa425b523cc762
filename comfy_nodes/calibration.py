"""Calibration in the graph: MODEL, conditioning and sampler settings in, an artifact out.

The library's own loops do it, on the inputs of the denoiser in real sampling runs. ComfyUI's
Cancel stops it like Ctrl-C stops the command: what is finished stays, the same graph goes on there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from torch import Tensor, nn

from tenuto.artifact import Artifact, canonicalized
from tenuto.calibration import PRESETS, quantize
from tenuto.calibration.temporal.maintenance import CHOICES
from tenuto.errors import TenutoError
from tenuto.model import map_tensors, names_in_host
from tenuto.numerics import known, named
from tenuto.resume import Work
from tenuto.sampling import Call, Trajectory, record

from .api import ArtifactType, found_by, io, ui
from .cache import is_stochastic
from .nodes import info, title
from .outputs import HostOutputs
from .own_formats import check_plain
from .weights import Weights, patched

SCHEMES = {title(scheme): name for name, scheme in known().items()}
TYPES = {"EPS": "epsilon", "V_PREDICTION": "v_prediction", "FLOW": "flow", "FLUX": "flow"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")


@dataclass(frozen=True)
class Sampling:
    """How the model is sampled: what KSampler takes."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: Any
    negative: Any
    latent: Tensor

    def run(self, model: Any, seed: int) -> Tensor:
        """One sampling run, with ComfyUI's own progress and preview; the final latents."""
        latent = comfy.sample.fix_empty_latent_channels(model, self.latent)
        noise = comfy.sample.prepare_noise(latent, seed, None)
        return comfy.sample.sample(
            model, noise, self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive,
            self.negative, latent, callback=latent_preview.prepare_callback(model, self.steps),
            disable_pbar=True, seed=seed,
        )  # fmt: skip


class Calibrate(io.ComfyNode):
    """An output node: it writes models/tenuto/NAME.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """MODEL and what KSampler takes."""
        return io.Schema(
            node_id="Tenuto_Calibrate",
            **found_by("calibrate", "quantization", "GPTQ"),
            display_name="Tenuto Calibrate",
            category="Tenuto",
            description="Quantizes the model on what it sees in a few sampling runs of its own and "
            "writes an artifact to models/tenuto. Once a model; Cancel stops it, and queueing the "
            "same graph again goes on there.",
            inputs=[
                io.Model.Input("model", tooltip="The model itself: without LoRA, not quantized."),
                io.Conditioning.Input("positive", tooltip="As for KSampler."),
                io.Conditioning.Input("negative", tooltip="As for KSampler."),
                io.Latent.Input("latent", tooltip="An empty latent of the usual size."),
                io.String.Input("name", default="my-model", tooltip="Of the file."),
                io.Combo.Input(
                    "scheme", options=[*SCHEMES], default="W8A8",
                    tooltip="4-bit weights are fitted block by block, which takes long.",
                ),
                io.Combo.Input(
                    "preset", options=[*PRESETS], default="quick", tooltip="Effort, at 4 bits."
                ),
                io.Combo.Input(
                    "temporal", options=[*CHOICES], default="table",
                    tooltip="What becomes of modules that depend on the timestep alone: a table of "
                    "their values at these steps (int8: in half the bytes), a reconstruction, what "
                    "does least harm in half the bytes (select), the better one (auto), or none.",
                ),
                io.Int.Input("runs", default=2, min=1, max=64, tooltip="Sampling runs to record."),
                io.Int.Input("seed", default=0, min=0, max=2**48, tooltip="Of the first run."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="As for KSampler."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, tooltip="As for KSampler."),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler",
                    tooltip="As for KSampler.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal",
                    tooltip="As for KSampler.",
                ),
            ],
            outputs=[
                ArtifactType.Output("artifact", "artifact", tooltip="For Quantize Model."),
                io.String.Output("info", "info", tooltip="What is in it, in a few lines."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A sentence where the name would lead out of the folder."""
        if NAME.fullmatch(name) is None:
            return "The name of an artifact has letters, digits, dots, hyphens and underscores."
        return True

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: Any, name: str, scheme: str,
        preset: str, temporal: str, runs: int, seed: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str,
    ) -> io.NodeOutput:  # fmt: skip
        """Raises TenutoError in one sentence if the model cannot be calibrated."""
        check(model)
        samples = latent["samples"]
        how = Sampling(seed, steps, cfg, sampler_name, scheduler, positive, negative, samples)
        folder = Path(folder_paths.get_folder_paths("tenuto")[0])
        work = folder / f"{name}.work"
        seen = recorded(model, how, runs)
        with torch.inference_mode(False), torch.no_grad():  # in which something can be learnt
            seen = replace(seen, calls=[replace(c, inputs=plain(c)) for c in seen.calls])
            made = calibrated(model, seen, named(SCHEMES[scheme]), preset, temporal, seed, work)
        made.save(folder / f"{name}.safetensors")
        Work(work, {}).discard()
        text = info(made, f"{name}.safetensors")
        return io.NodeOutput(made, text, ui=ui.PreviewText(text))


def check(model: Any) -> None:
    """TenutoError where the MODEL is not one that an artifact could be of."""
    if names_in_host(model.model.diffusion_model) is None:
        kind = type(model.model.diffusion_model).__name__
        raise TenutoError(f"Tenuto has no names for the parts of a {kind} in other hosts yet.")
    if patched(model):
        raise TenutoError("Calibrate the model itself: put LoRA loaders after this node.")
    if model.get_attachment(Weights.key) is not None:
        raise TenutoError("Calibrate the model itself: put Tenuto Quantize Model after this node.")
    check_plain(model.model.diffusion_model)


def recorded(model: Any, how: Sampling, runs: int) -> Trajectory:
    """The inputs of the denoiser in `runs` sampling runs, and how to repeat them."""
    denoiser: nn.Module = model.model.diffusion_model
    noisy = is_stochastic(comfy.samplers.sampler_object(how.sampler_name))
    outputs = HostOutputs(model, noisy)

    def sample(given: nn.Module, seed: int, batch: int) -> Tensor:
        if given is not denoiser:
            raise TenutoError("This trajectory is not run again with another denoiser yet.")
        with outputs.run():
            return how.run(outputs.model, seed)

    size = len(how.latent)
    found = record(denoiser, sample=sample, batch=size, runs=runs, seed=how.seed)
    return replace(found, guidance=how.cfg, kernel=outputs.kernel())


def plain(call: Call) -> dict[str, Any]:
    """The inputs of a call without what is the host's: wrappers, ids, controls, live tensors."""
    kept = {n: v for n, v in call.inputs.items() if v is not None and n != "control"}
    return {n: {} if n == "transformer_options" else normal(v) for n, v in kept.items()}


def normal(value: Any) -> Any:
    """Copies that remember how they were made, which tensors of inference mode do not."""
    return map_tensors(Tensor.clone, value)


def calibrated(
    model: Any, seen: Trajectory, scheme: Any, preset: str, temporal: str, seed: int, work: Path
) -> Artifact:
    """The artifact in canonical names. Cancel in the page raises through; `work` stays then."""
    bar = comfy.utils.ProgressBar(1)

    def on_progress(done: int, total: int, note: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    denoiser = model.model.diffusion_model
    made = quantize(
        denoiser, scheme, seen, preset=preset, temporal=temporal, seed=seed, work=work,
        on_progress=on_progress,
    )  # fmt: skip
    kind = getattr(model.model.model_type, "name", "")
    made.header["prediction_type"] = TYPES.get(kind)
    return canonicalized(made, denoiser)
