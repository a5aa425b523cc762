"""Which calls of real pipelines could be graphs: on the CPU, where operations are recorded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import denoiser_of
from tenuto.numerics import Recipe, Rule
from tenuto.runtime import Patches, TemporalTable, denoiser_call
from tenuto.runtime.attachment import install
from tenuto.runtime.denoiser_call import Calls
from tenuto.runtime.graphs import Graphs
from tenuto.sampling.pipeline_call import PipelineCall
from tests.core import tiny_pipelines as tiny
from tests.core.runtime.recorded import Recorded, alike


class Case:
    """A tiny pipeline whose calls are captured on the CPU, by W8A8 as it is attached."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipe, prompts, self.call = tiny.asked(kind)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = (prompts or ())[:1]
        self.again = Recorded()
        on_cpu = partial(Graphs, capture=lambda _: self.again, device="cpu")
        monkeypatch.setattr(denoiser_call, "Graphs", on_cpu)

    def attach(
        self, graphs: bool, compile: bool = False, artifact: tn.Artifact | None = None
    ) -> tn.Tenuto:
        """As `tenuto.attach` does, but with graphs on the CPU. artifact: in place of W8A8."""
        scheme = None if artifact else tn.schemes.W8A8
        patches = Patches(artifact, scheme=scheme, execution="int8")
        return install(self.pipe, patches, None, Calls(compile, graphs))

    def run(self, seed: int, steps: int = 6) -> list[Tensor]:
        """What the whole pipeline returns."""
        asked = PipelineCall(self.pipe, self.prompts, steps, None, self.call)
        with torch.no_grad():
            found = asked(denoiser_of(self.pipe), seed, 1, "latent")
        return [t for out in found for t in tn.model.tensors_in(dict(out))]

    @property
    def graphs(self) -> Graphs:
        """Those of the denoiser."""
        return vars(denoiser_of(self.pipe))["forward"].__self__.call.graphs


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_of_a_pipeline_keeps_its_calls_from_being_graphs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the registry of hooks that is left on a model which diffusers calls in a context."""
    case = Case(kind, monkeypatch)
    with case.attach(False):
        expected = [case.run(seed) for seed in range(2)]
    attached = case.attach(True)
    for seed, wanted in enumerate(expected):
        for found, other in zip(case.run(seed), wanted, strict=True):
            assert alike(found, other)
    assert case.graphs.reason is None and case.graphs.weights.walks <= 3
    assert case.again.captured >= 1 and case.again.replayed >= 2
    attached.detach()


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_run_of_other_steps_than_the_calibrated_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table has no row of them: the module computes, which is a graph of its own."""
    case = Case(kind, monkeypatch)
    trajectory = tn.record(case.pipe, case.prompts, steps=6, call=case.call)
    recipe = Recipe((Rule("*", tn.schemes.W8A8, RoundToNearest()),))
    artifact = tn.quantize(case.pipe, recipe, trajectory, temporal="table")
    runs = (6, 6, 5, 6, 5)
    with case.attach(False, artifact=artifact):
        expected = [case.run(seed, steps) for seed, steps in enumerate(runs)]
    attached = case.attach(True, artifact=artifact)
    for seed, (steps, wanted) in enumerate(zip(runs, expected, strict=True)):
        for found, other in zip(case.run(seed, steps), wanted, strict=True):
            assert alike(found, other), (seed, steps)
    assert case.again.captured == 2 and case.graphs.reason is None
    attached.clock.index = attached.clock.index.clone()  # as when the model comes from elsewhere
    assert all(map(alike, case.run(0), expected[0]))
    table = next(m for m in denoiser_of(case.pipe).modules() if isinstance(m, TemporalTable))
    (original,) = table._original
    for weight in original.parameters():
        weight.data = weight.data * 1.5
    changed = case.run(0, 5)
    hook = original.register_forward_hook(lambda *args: None)
    assert all(map(alike, changed, case.run(0, 5)))
    assert "a hook lies on its" in str(case.graphs.reason)
    hook.remove()
    assert not alike(changed[0], expected[2][0])
    attached.detach()


def adapters(kind: str, folder: Path, count: int) -> list[str]:
    """Files of LoRAs of one shape, as a pipeline of diffusers saves them."""
    from peft import LoraConfig, get_peft_model_state_dict

    found = []
    for seed in range(count):
        pipe = tiny.asked(kind)[0]
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)
        file = f"{seed}.safetensors"
        weights = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(folder, transformer_lora_layers=weights, weight_name=file)
        found.append(file)
    return found


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("hotswap", [False, True], ids=["loaded anew", "hotswap"])
def test_another_lora_of_a_pipeline_takes_the_graph_of_the_first(
    hotswap: bool, compile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By diffusers' own `load_lora_weights`: nothing is captured nor compiled for the others."""
    torch._dynamo.reset()
    case = Case("flux", monkeypatch)
    files = adapters("flux", tmp_path, 2)

    def load(file: str, first: bool) -> None:
        more: dict[str, Any] = {"hotswap": hotswap and not first}
        if not hotswap:
            case.pipe.unload_lora_weights()
        case.pipe.load_lora_weights(tmp_path, weight_name=file, adapter_name="style", **more)

    expected = []
    for file in files:
        load(file, file == files[0])
        with case.attach(False):
            expected.append(case.run(0))
    case.pipe.unload_lora_weights()
    plain = nn.Module.compile
    eager = {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: plain(self, **eager))
    attached = case.attach(True, compile)
    for file, wanted in zip(files, expected, strict=True):
        load(file, file == files[0])
        with torch._dynamo.config.patch(error_on_recompile=file == files[-1]):
            found = case.run(0)
        assert all(map(alike, found, wanted)), file
        assert case.again.captured == 1 and case.graphs.reason is None, file
    attached.detach()
    torch._dynamo.reset()
