"""The pipeline's own call: every pipeline is recorded as its user calls it, whatever it returns."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy
import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.model import denoiser_of, tensors_in
from tenuto.resume import Work
from tenuto.sampling import PipelineCall, described, keep, kept, repeated, sampler
from tenuto.sampling.images import generate_images
from tenuto.sampling.pipeline_call import guidance_name
from tenuto.sampling.record import recording
from tenuto.sampling.results import images_of, latents_of, pil_of
from tests.core import family_pipelines as families
from tests.core import tiny_pipelines as tiny

asked = cache(tiny.asked)


@cache
def recorded(kind: str) -> tn.Trajectory:
    """4 steps, guidance 3, three images in batches of two."""
    pipe, prompts, call = asked(kind)
    return tn.record(pipe, prompts, steps=4, guidance=3.0, batch=2, call=call)


def equal(one: Any, other: Any) -> bool:
    """Whether two calls have the same arguments, lists of tensors included."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# --- every kind of pipeline -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_pipeline_is_recorded_as_it_is_called(kind: str) -> None:
    """Every image, at the steps that were asked for; what it was called with is known."""
    trajectory = recorded(kind)
    visited = {"img2img": 2, "sd3 img2img": 3}.get(kind, 4)
    twice = kind in ("qwen-image", "wan")  # guidance in two calls
    runs = 3 if "image" in asked(kind)[2] else 2  # a start image is for one image
    assert (trajectory.steps, len(trajectory.timesteps)) == (4, visited)
    assert trajectory.runs == runs
    assert len(trajectory.calls) == runs * visited * (2 if twice else 1)
    assert trajectory.call == described(asked(kind)[2])
    assert trajectory.about().get("call", {}) == trajectory.call
    assert trajectory.schedule().get("call", {}) == trajectory.call


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_runs_again_and_returns_images(kind: str) -> None:
    """A rollout makes the recorded calls; images are in [-1, 1], the frames of a video each one."""
    trajectory, calls = recorded(kind), list[Any]()
    denoiser = denoiser_of(asked(kind)[0])
    with torch.no_grad():
        with recording(denoiser, calls):
            latents = trajectory.rollout()(denoiser, 0, 2)
        assert trajectory.sample is not None
        images = trajectory.sample(denoiser, 0, 2)
    assert len(latents) == 2 and latents.is_floating_point()
    assert images.ndim == 4 and images.shape[1] == 3 and images.dtype is torch.float32
    assert len(images) == (6 if kind == "wan" else 2)
    assert images.min() < -0.01 and images.min() >= -1 and images.max() <= 1
    for new, old in zip(calls, trajectory.calls, strict=False):
        assert all(equal(new.inputs[name], value) for name, value in old.inputs.items())


@pytest.mark.parametrize("kind", ["img2img", "z-image", "qwen-image"])
def test_a_recording_is_kept_with_its_call(kind: str, tmp_path: Path) -> None:
    trajectory, (pipe, prompts, call) = recorded(kind), asked(kind)
    work = Work(tmp_path / "work", {})
    assert keep(work, trajectory)
    found = kept(work, pipe, prompts or (), 4, 3.0, call)
    assert found is not None and found.call == trajectory.call and found.steps == 4
    for one, other in zip(found.calls, trajectory.calls, strict=True):
        assert equal(list(one.inputs.values()), list(other.inputs.values()))


@pytest.mark.parametrize("kind", ["img2img", "wan"])
def test_compare_repeats_the_call(kind: str) -> None:
    """At the steps asked for, not those visited; pictures and embeddings are given again."""
    pipe, prompts, call = asked(kind)
    artifact = tn.quantize(pipe, "w8a8", recorded(kind), temporal="none")
    assert artifact.header["schedule"]["call"] == described(call)
    with pytest.raises(tn.TenutoError, match=r"was calibrated with (image|prompt_embeds)"):
        tn.compare(pipe, artifact, prompts, count=1)
    again = {name: value for name, value in call.items() if not isinstance(value, int | float)}
    calls: list[Any] = []
    with recording(denoiser_of(pipe), calls):
        found = tn.compare(pipe, artifact, prompts, count=1, batch=1, call=again, seed=0)
    assert (found.steps, found.count) == (4, 3 if kind == "wan" else 1)
    assert found.psnr_db["median"] > 25
    assert {call.timestep for call in calls} == set(recorded(kind).timesteps)


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("StableDiffusionPipeline", "guidance_scale"), ("FluxPipeline", "guidance_scale"),
     ("WanPipeline", "guidance_scale"), ("ZImagePipeline", "guidance_scale"),
     ("QwenImagePipeline", "true_cfg_scale"), ("QwenImageEditPipeline", "true_cfg_scale"),
     ("QwenImageControlNetInpaintPipeline", "true_cfg_scale"),
     ("HunyuanImagePipeline", "distilled_guidance_scale"), ("HunyuanVideo15Pipeline", None)],
)  # fmt: skip
def test_guidance_has_the_pipelines_own_name(kind: str, name: str | None) -> None:
    import inspect

    found = inspect.signature(getattr(diffusers, kind).__call__).parameters
    assert guidance_name({n: p.default for n, p in found.items()}) == name


def test_guidance_reaches_the_model() -> None:
    """FLUX takes it as an input; Qwen-Image guides in two calls, with an empty negative prompt."""
    assert recorded("flux").calls[0].inputs["guidance"].tolist() == [3.0, 3.0]
    halves = [c.inputs["encoder_hidden_states"] for c in recorded("qwen-image").calls[:2]]
    assert not torch.equal(*halves)
    pipe = tiny.qwen_image()
    pipe.register_modules(text_encoder=tiny.qwen3())
    given = PipelineCall(pipe, ("a", "b"), 4, 3.0).fixed
    assert (given["true_cfg_scale"], given["negative_prompt"]) == (3.0, " ")
    assert "guidance_scale" not in given
    assert PipelineCall(pipe, ("a",), 4, 3.0, {"negative_prompt": "blur"}).fixed[
        "negative_prompt"
    ] == "blur"  # fmt: skip
    assert "negative_prompt" not in PipelineCall(pipe, ("a",), 4, 1.0).fixed
    assert "negative_prompt" not in PipelineCall(pipe, ("a",), 4).fixed


# --- what is refused, before the denoiser is called -----------------------------------------------


class Guideless(diffusers.StableDiffusionPipeline):
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, prompt: Any, subject: str, num_inference_steps: int = 50
    ) -> Any:
        raise AssertionError("was called")


def refused(pipe: Any, words: str, **options: Any) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the denoiser was called")

    hook = denoiser_of(pipe).register_forward_pre_hook(fail)
    try:
        with pytest.raises(tn.TenutoError, match=words) as found:
            tn.record(pipe, options.pop("prompts", tiny.PROMPTS), steps=2, **options)
        assert "\n" not in str(found.value)
    finally:
        hook.remove()


def test_what_the_pipeline_does_not_take_is_named() -> None:
    pipe = asked("img2img")[0]
    image = tiny.picture()
    refused(pipe, r"takes no imgae \(did you mean image\?\)", call={"imgae": image})
    refused(pipe, "takes no num_frames", call={"image": image, "num_frames": 3})
    refused(pipe, "given no image", call={"strength": 0.4})
    refused(asked("inpaint")[0], "given no mask_image", call={"image": image})
    refused(pipe, "num_inference_steps follows from", call={"num_inference_steps": 3})
    refused(pipe, "generator follows from", call={"generator": None})
    embeds = {"image": image, "prompt_embeds": tiny.embeds(2)}
    refused(pipe, "prompts or prompt_embeds", call=embeds)
    refused(asked("flux")[0], "divisible|cannot be called", call={"max_sequence_length": 5000})


def test_what_is_needed_is_named() -> None:
    pipe = Guideless(**asked("sd")[0].components, requires_safety_checker=False)
    refused(pipe, "Guideless needs subject")
    refused(pipe, "takes no guidance", guidance=3.0, call={"subject": "dog"})
    options = {"image_encoder": None, "image_processor": None}
    wan = tiny.wan("WanImageToVideoPipeline", **options)
    refused(wan, "needs image", prompts=None, call={"prompt_embeds": tiny.embeds(2)})
    refused(wan, "at least one prompt", prompts=None, call={"image": tiny.picture()})


def test_an_error_of_the_model_stays_what_it_is() -> None:
    """Only what the pipeline says before its denoiser is called becomes a sentence on the call."""
    pipe = tiny.asked("sd")[0]

    def fail(*args: Any) -> None:
        raise ValueError("mine")

    pipe.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=r"^mine$"):
        tn.record(pipe, tiny.PROMPTS, steps=2)


def test_call_is_for_pipelines_alone(tiny: Any, loop: Any) -> None:
    with pytest.raises(tn.TenutoError, match="not both"):
        tn.record(tiny("dit"), sample=loop("dit"), call={"height": 3})


# --- rows -----------------------------------------------------------------------------------------


def test_embeddings_are_drawn_like_prompts() -> None:
    """Image i has row i modulo their number, in lists of tensors too."""
    pipe = asked("wan")[0]
    calls: list[Any] = []
    call = {k: v for k, v in asked("wan")[2].items() if k != "negative_prompt_embeds"}
    with recording(pipe.transformer, calls), torch.no_grad():
        sampler(pipe, (), 1, 1.0, "latent", call)(pipe.transformer, 2, 2)
    assert torch.equal(calls[0].inputs["encoder_hidden_states"], call["prompt_embeds"][[2, 0]])
    rows = PipelineCall(asked("z-image")[0], (), 1, None, {"prompt_embeds": list(tiny.embeds(3))})
    assert rows.count == 3


@pytest.mark.parametrize("kind", ["wan", "qwen-image"])
def test_embeddings_go_where_the_pipeline_computes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines move what they encode themselves, and no more: not what is given from the CPU."""
    pipe, _, call = asked(kind)
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("meta"))
    seen: dict[str, Any] = {}

    def encode(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise tn.Cancelled

    monkeypatch.setattr(type(pipe), "encode_prompt", encode)
    with pytest.raises(tn.Cancelled):
        PipelineCall(pipe, (), 1, None, call)(pipe.transformer, 0, 1, "latent")
    given = [t for name in call for t in tensors_in(seen.get(name)) if "prompt" in name]
    assert given and {t.device.type for t in given} == {"meta"}


def test_one_negative_prompt_is_for_all_images() -> None:
    pipe = asked("sd")[0]
    halves = tn.record(pipe, tiny.PROMPTS[:2], steps=1, call={"negative_prompt": "a red bus"})
    states = halves.calls[0].inputs["encoder_hidden_states"]
    plain = tn.record(pipe, tiny.PROMPTS[2:], steps=1)
    assert torch.allclose(states[0], states[1])
    assert torch.allclose(states[0], plain.calls[0].inputs["encoder_hidden_states"][1], atol=1e-5)


def test_what_stands_before_every_prompt_is_one_text_and_labels_are_one_an_image() -> None:
    """Lumina 2 puts a text before each prompt; DiT has no prompt, but a class for each image."""
    lumina = families.lumina2()
    call = lumina.call | {"system_prompt": "draw"}
    found = tn.record(lumina.model, tiny.PROMPTS, steps=1, batch=3, call=call, guidance=1.0)
    assert len(found.calls) == 1
    dit = families.dit()
    found = tn.record(dit.model, steps=1, call={"class_labels": [1, 7]}, guidance=2.0)
    labels = [call.inputs["class_labels"].tolist() for call in found.calls]
    assert labels == [[1, 1000], [7, 1000]]


class Variations(diffusers.StableDiffusionPipeline):
    """A pipeline that takes no prompt, and calls what it returns by its own name."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, seeds: int, num_inference_steps: int = 50, generator: Any = None
    ) -> Any:
        found = super().__call__(
            "a dog", num_inference_steps=num_inference_steps, generator=generator,
            output_type="np",
        )  # fmt: skip
        return SimpleNamespace(audios=found.images[:, 0, :, 0])


def test_without_prompts_images_come_one_by_one_and_nothing_of_the_result_is_needed() -> None:
    """Sound: it is recorded, and images are refused in one sentence."""
    pipe = Variations(**asked("sd")[0].components, requires_safety_checker=False)
    trajectory = tn.record(pipe, steps=2, batch=2, runs=3, call={"seeds": 1})
    assert (trajectory.runs, trajectory.batch, len(trajectory.calls)) == (3, 1, 6)
    assert trajectory.sample is not None
    with pytest.raises(tn.TenutoError, match="no images in what the pipeline returns"):
        trajectory.sample(pipe.unet, 0, 1)
    with pytest.raises(tn.TenutoError, match="no latents in what the pipeline returns"):
        trajectory.rollout()(pipe.unet, 0, 1)


def test_sound_is_recorded_and_quantized() -> None:
    """Its latents can be measured; `compare`, which needs images, says so."""
    pipe, call = tiny.sound(), {"audio_end_in_s": 2.0}
    trajectory = tn.record(pipe, tiny.PROMPTS, steps=3, guidance=3.0, batch=2, call=call)
    assert (trajectory.steps, len(trajectory.calls), trajectory.call) == (3, 6, call)
    with torch.no_grad():
        assert trajectory.rollout()(pipe.transformer, 0, 2).shape == (2, 4, 8)
    artifact = tn.quantize(pipe, "w8a8", trajectory)
    with pytest.raises(tn.TenutoError, match="no images in what the pipeline returns"):
        tn.compare(pipe, artifact, tiny.PROMPTS, count=1)


# --- results --------------------------------------------------------------------------------------


def test_images_in_any_form() -> None:
    values = torch.rand(2, 3, 6, 4)
    videos = torch.rand(2, 5, 3, 6, 4)
    pil = pil_of(diffusers.ImagePipelineOutput(images=values))
    whole = values * 2 - 1
    for result in (values, (values, None), [*values], [values.numpy().transpose(0, 2, 3, 1)]):
        assert torch.allclose(images_of([result]), whole)
    assert torch.allclose(images_of([(pil,)]), whole, atol=0.01)
    assert torch.allclose(images_of([([pil, pil],)]), torch.cat([whole, whole]), atol=0.01)
    frames = diffusers.pipelines.wan.pipeline_output.WanPipelineOutput(frames=videos)
    assert torch.allclose(images_of([frames]), videos.flatten(0, 1) * 2 - 1)
    assert len(pil_of(frames)) == 10 and pil[0].size == (4, 6)
    assert latents_of([frames]).shape == videos.shape
    assert latents_of([[*values]]).shape == values.shape
    for sound in (numpy.zeros((2, 100)), torch.zeros(2, 2, 100)):
        with pytest.raises(tn.TenutoError, match="no images"):
            images_of([(sound,)])


def test_images_are_generated_by_the_same_call() -> None:
    """`tenuto generate`: a start image, and the frames of a video as images."""
    pipe, _, call = asked("img2img")
    found = generate_images(
        pipe, "a dog", negative="blur", steps=4, guidance=3.0, seed=0, count=2, call=call
    )  # fmt: skip
    assert [image.size for image in found] == [(32, 32)] * 2
    calls: list[Any] = []
    with recording(pipe.unet, calls):
        generate_images(
            pipe, "a dog", negative=None, steps=4, guidance=3.0, seed=0, count=1, call=call
        )
    assert len(calls) == 2


# --- what a header says ---------------------------------------------------------------------------


def test_a_call_as_plain_data() -> None:
    """Pictures and tensors are marks, by what is in them; a file is named without its folder."""
    import json

    image = tiny.picture()
    image.filename = "/home/me/secret/photo.png"
    call = {
        "image": image, "strength": 0.5, "sizes": (3, 4), "embeds": torch.ones(2, 3),
        "array": numpy.zeros(3), "kwargs": {"scale": 1.0}, "callback_on_step_end": print,
    }  # fmt: skip
    facts = described(call)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["image"]["file"] == "photo.png" and facts["image"]["image"] == [32, 32]
    assert (facts["strength"], facts["sizes"], facts["kwargs"]) == (0.5, [3, 4], {"scale": 1.0})
    assert described({"x": torch.ones(2, 3)})["x"] == facts["embeds"]
    assert described({"x": torch.zeros(2, 3)})["x"] != facts["embeds"]
    marks = {name: call[name] for name in ("image", "embeds", "array", "callback_on_step_end")}
    found = repeated({"call": facts}, marks | {"strength": 0.7})
    assert found == marks | {"strength": 0.7, "sizes": [3, 4], "kwargs": {"scale": 1.0}}
    with pytest.raises(tn.TenutoError, match=r"with image \(photo.png\)"):
        repeated({"call": {"image": facts["image"]}}, None)
    for wrong in ([], 3, {3: 4}):
        with pytest.raises(tn.ArtifactError, match="damaged"):
            repeated({"call": wrong}, None)
    assert repeated({}, None) == {}
