"""Which run a call belongs to, in pipelines, after interrupts, in copies; nobody writes into it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact.artifact import Artifact
from tenuto.model.patches import override_

FLUX = {"num_inference_steps": 4, "guidance_scale": 3.5, "height": 32, "width": 32,
        "output_type": "latent"}  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture
def flux() -> Any:
    """FLUX's pipeline round a tiny denoiser; it divides its timesteps by 1000 for every call."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe: Any = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer.eval()
    )  # pyright: ignore
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, seed: int, **options: Any) -> Tensor:
    """The latent of one image; every seed has the same prompt."""
    draw = torch.Generator().manual_seed(9)
    return pipe(
        prompt_embeds=torch.randn(1, 6, 32, generator=draw),
        pooled_prompt_embeds=torch.randn(1, 32, generator=draw),
        generator=torch.Generator().manual_seed(seed), **(FLUX | options),
    ).images  # fmt: skip


def schedule(pipe: Any) -> Artifact:
    """Computes the first of four steps and reuses every block at the others."""
    branches = [b.name for b in tn.describe(pipe.transformer).branches]
    pipe.scheduler.set_timesteps(4, mu=1.0)
    times = [float(t) for t in torch.linspace(1000, 250, 4)]
    made = Artifact.new(pipe.transformer, {"timesteps": times, "steps": 4, "guidance": 3.5})
    made.header["route"] = {"timesteps": times, "branches": branches}
    made.tensors["route/table"] = (
        torch.tensor([[True], [False], [False], [False]]).expand(4, len(branches)).contiguous()
    )
    return made


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupt_leaves_nothing_for_the_next_image(flux: Any, stop: int) -> None:
    """Broken off after any step, then another seed: as if the first had never been begun."""

    def leave(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == stop:
            raise Interrupted
        return values

    with tn.attach(flux, schedule(flux)):
        wanted = generate(flux, 2)
        with pytest.raises(Interrupted):
            generate(flux, 1, callback_on_step_end=leave)
        assert torch.equal(generate(flux, 2), wanted)
        for seed in (1, 2):  # one step: it begins where it ends
            one = generate(flux, seed, num_inference_steps=1)
            generate(flux, 3, num_inference_steps=1)
            assert torch.equal(generate(flux, seed, num_inference_steps=1), one)


def test_late_single_steps_compute(flux: Any) -> None:
    """As image-to-image of little strength does: each image has one step, at which a branch reuses
    whatever it has; it must have nothing."""
    sigmas = [0.25]
    plain = [generate(flux, seed, sigmas=sigmas, num_inference_steps=1) for seed in (1, 2, 1)]
    with tn.attach(flux, schedule(flux)):
        found = [generate(flux, seed, sigmas=sigmas, num_inference_steps=1) for seed in (1, 2, 1)]
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_a_pipeline_is_as_it_was(flux: Any) -> None:
    generate(flux, 1)  # a pipeline keeps some facts of its last run
    before = set(vars(flux)), set(vars(flux.scheduler))
    with tn.attach(flux, schedule(flux)):
        assert set(vars(flux)) != before[0]
        twin = copy.deepcopy(flux)
        assert torch.equal(generate(twin, 1), generate(flux, 1))
    assert (set(vars(flux)), set(vars(flux.scheduler))) == before


def test_a_scheduler_is_exchanged_and_copied(flux: Any) -> None:
    """While an artifact is attached: the new one is followed, a copy is a scheduler of its own."""
    with tn.attach(flux, schedule(flux)):
        wanted = generate(flux, 2)
        twin = copy.copy(flux.scheduler)
        flux.scheduler.set_timesteps(4, mu=1.0)
        twin.set_timesteps(7, mu=1.0)
        assert (len(flux.scheduler.timesteps), len(twin.timesteps)) == (4, 7)
        flux.scheduler = type(flux.scheduler).from_config(flux.scheduler.config)
        generate(flux, 1, num_inference_steps=1)
        assert torch.equal(generate(flux, 2), wanted)


def test_what_was_reused_is_written_to(
    tiny: Callable[[str], nn.Module], kind: str, recorded: Any
) -> None:
    """Blocks and hosts add to a branch's output in place; that reaches no later step."""
    model, calls = tiny(kind), recorded(kind).calls[:4]
    branches = [b.name for b in tn.describe(model).branches]
    times = [float(c.timestep) for c in calls]
    made = Artifact.new(model, {"timesteps": times, "steps": 4, "guidance": 2.0})
    made.header["route"] = {"timesteps": times, "branches": branches}
    table = torch.zeros(4, len(branches), dtype=torch.bool)
    table[0] = True
    made.tensors["route/table"] = table

    def doubled(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        for t in (out,) if isinstance(out, Tensor) else out:
            t.mul_(2)
        return out

    def run(patched: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            outs = [patched(**call.inputs) for call in calls]
        return [out if isinstance(out, Tensor) else out[0] for out in outs]

    with tn.attach(model, made):
        seen: list[list[Tensor]] = []
        for name in branches:
            override_(model.get_submodule(name), doubled)
        seen = [run(model), run(model)]
        for name in branches:
            model.get_submodule(name).__dict__["forward"].remove()
        # the same by hand: what every branch gave at the first step, doubled once
        given: dict[str, Any] = {}

        def fixed(name: str) -> Any:
            def call(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if name not in given:
                    given[name] = doubled(original, module, *args, **kwargs)
                first = given[name]
                if isinstance(first, Tensor):
                    return first.clone()
                return tuple(t.clone() for t in first)

            return call

        for name in branches:
            override_(model.get_submodule(name), fixed(name))
        wanted = run(model)
        for name in branches:
            model.get_submodule(name).__dict__["forward"].remove()
    for found in seen:
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_copy_in_another_thread(
    tiny: Callable[[str], nn.Module], kind: str, loop: Any, recorded: Any
) -> None:
    """A model and its deep copy at once: each has the images that it has alone."""
    model = tiny(kind)
    artifact = tn.quantize(model, tn.schemes.W8A8_STATIC, recorded(kind), temporal="table")
    sample, found = loop(kind), {}
    with tn.attach(model, artifact, execution="int8"), torch.no_grad():
        twin = copy.deepcopy(model)
        alone = [sample(model, seed, 1) for seed in (1, 2)]

        def work(name: int, denoiser: nn.Module) -> None:
            with torch.no_grad():
                found[name] = [sample(denoiser, name, 1) for _ in range(4)]

        threads = [threading.Thread(target=work, args=p) for p in ((1, model), (2, twin))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(x, alone[0]) for x in found[1])
    assert all(torch.equal(x, alone[1]) for x in found[2])
