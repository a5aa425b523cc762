"""Real CUDA graphs of small pipelines, eager and compiled. Needs a GPU, torch and pytest.

python -m pytest tests/core/runtime/test_cuda_graphs.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.caching import Interval
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import denoiser_of
from tenuto.numerics import Recipe, Rule
from tenuto.runtime import Patches
from tenuto.runtime.attachment import install
from tenuto.runtime.denoiser_call import Calls, DenoiserCall
from tests.core import tiny_pipelines as tiny

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor's advice for fp32
]
CAPTURED = ("sd", "flux")  # of the others a part of the forward may have to run outside


class Case:
    """A small pipeline on the card, and an artifact of it."""

    def __init__(self, kind: str, device: str = "cuda") -> None:
        pipe, prompts, call = tiny.asked(kind)
        self.pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        trajectory = tn.record(pipe, prompts and prompts[:2], steps=4, call=call, batch=2)
        recipe = Recipe((Rule("*", tn.schemes.W8A8, RoundToNearest()),))
        self.artifact = tn.quantize(pipe, recipe, trajectory, temporal="table")
        found = (c for c in trajectory.calls if c.run == trajectory.calls[0].run)
        self.calls = [tn.model.map_tensors(lambda t: t.to(device), c.inputs) for c in found]

    def attach(self, how: Calls, policy: Any) -> tn.Tenuto:
        """With a schedule or none."""
        patches = Patches(self.artifact, policy=policy, route=False, execution="int8")
        return install(self.pipe, patches, None, how)

    def runs(self, count: int) -> list[Tensor]:
        """The outputs of so many runs of the recorded calls."""
        denoiser = denoiser_of(self.pipe)
        with torch.no_grad():
            outs = [denoiser(**dict(c)) for _ in range(count) for c in self.calls]
        found = [list(tn.model.tensors_in(out)) for out in outs]
        return [torch.cat([t.flatten() for t in some]) for some in found]

    def graphs(self) -> Any:
        """Those of the denoiser."""
        call = vars(denoiser_of(self.pipe))["forward"].__self__.call
        assert isinstance(call, DenoiserCall)
        return call.graphs


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("policy", [None, Interval(2)], ids=["whole", "schedule"])
def test_replayed_as_eager(kind: str, policy: Any) -> None:
    case = Case(kind)
    with case.attach(Calls(), policy):
        expected = case.runs(4)
    attached = case.attach(Calls(graphs=True), policy)
    for found, wanted in zip(case.runs(4), expected, strict=True):
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    graphs = case.graphs()
    if kind in CAPTURED:
        assert graphs.reason is None and graphs.known
    attached.detach()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs of CUDA: a model on the second one"
)
@pytest.mark.parametrize("graphs", [True, "auto"])
def test_a_pipeline_on_another_card_than_the_current_one(graphs: bool | str) -> None:
    """What is captured there is what is replayed there, step by step."""
    case = Case("flux", "cuda:1")
    with case.attach(Calls(), None):
        expected = case.runs(4)
    attached = case.attach(Calls.asked(False, graphs), None)
    assert torch.cuda.current_device() == 0
    for found, wanted in zip(case.runs(4), expected, strict=True):
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert case.graphs().reason is None and case.graphs().known
    attached.detach()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_other_weights_and_loras_are_what_is_computed_with(compile: bool) -> None:
    """What is exchanged between two calls is seen at the next; LoRAs of one shape share graphs."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    case = Case("flux")
    denoiser: Any = denoiser_of(case.pipe)
    attached = case.attach(Calls(compile=compile, graphs=True), None)

    def right(message: str) -> int:
        """The graphs that there are after many runs, the last as it is without any."""
        found = case.runs(6)[-1]
        call = vars(denoiser)["forward"].__self__.call
        graphs, call.graphs = call.graphs, None
        wanted = case.runs(1)[-1]
        call.graphs = graphs
        assert (found - wanted).norm() < 0.01 * wanted.norm(), message
        assert graphs.reason is None and graphs.known, message
        return len(graphs.known)

    before = right("as it was")
    norm = denoiser.norm_out.linear
    norm.bias = torch.nn.Parameter(torch.randn_like(norm.bias), requires_grad=False)
    assert right("another bias") == before + 1
    counts = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        inject_adapter_in_model(config, denoiser, "style")
        counts.append(right(f"LoRA {seed}"))
        recurse_remove_peft_layers(denoiser)
        del denoiser.peft_config
    assert counts == [before + 2] * 3
    attached.detach()
    torch._dynamo.reset()


def test_a_run_of_other_steps_than_the_calibrated_ones() -> None:
    """A table has no row of their timesteps: the module computes, in a graph of its own."""
    case = Case("flux")

    def runs() -> list[Tensor]:
        found = case.runs(3)
        between = [dict(c) for c in case.calls]
        for call in between:
            call["timestep"] = call["timestep"] * 0.97
        kept, case.calls = case.calls, between
        found += case.runs(3)
        case.calls = kept
        return found + case.runs(1)

    with case.attach(Calls(), None):
        expected = runs()
    attached = case.attach(Calls(graphs=True), None)
    for found, wanted in zip(runs(), expected, strict=True):
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert len(case.graphs().known) == 2 and case.graphs().reason is None
    attached.detach()


def test_when_all_graphs_are_gone_others_are_made() -> None:
    """Their pool of memory cannot be used again, and `cublas` may still have some of it."""
    case = Case("flux")
    with case.attach(Calls(), None):
        expected = case.runs(3)
    attached = case.attach(Calls(graphs=True), None)
    for _ in range(2):
        for found, wanted in zip(case.runs(3), expected, strict=True):
            assert (found - wanted).norm() < 0.01 * wanted.norm()
        assert case.graphs().known and case.graphs().reason is None
        case.graphs().forget()
    attached.detach()


def test_graphs_where_they_are_faster() -> None:
    """The calls of a model as small as this one are all launches."""
    case = Case("flux")
    with tn.attach(case.pipe, case.artifact, graphs=False):
        expected = case.runs(4)
    attached = tn.attach(case.pipe, case.artifact, graphs="auto")
    for found, wanted in zip(case.runs(4), expected, strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
    graphs = case.graphs()
    assert graphs.choose and graphs.reason is None and graphs.known, graphs.reason
    there = next(denoiser_of(case.pipe).parameters()).device
    assert set(graphs.gains.values()) == {True} and graphs.capture(there).bytes > 0
    attached.detach()


def test_offloading_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline whose models come to the card one at a time runs without graphs, and says so."""
    pipe, prompts, call = tiny.asked("flux")
    pipe.set_progress_bar_config(disable=True)
    assert prompts is not None
    attached = tn.attach(pipe, tn.schemes.W8A8, execution="int8", graphs=True)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        pipe(prompts[0], num_inference_steps=3, output_type="latent", **call)
    said = [r.getMessage() for r in caplog.records if "without CUDA graphs" in r.getMessage()]
    assert len(said) == 1 and "offloading moves its weights" in said[0]
    pipe.remove_all_hooks()
    attached.detach()


def test_compiled_blocks_are_captured() -> None:
    case = Case("flux")
    with case.attach(Calls(), Interval(2)):
        expected = case.runs(6)
    attached = case.attach(Calls(compile=True, graphs=True), Interval(2))
    for found, wanted in zip(case.runs(6), expected, strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert case.graphs().reason is None and len(case.graphs().known) == 2
    attached.detach()
    torch._dynamo.reset()


def test_after_a_move_nothing_is_read_where_it_was() -> None:
    case = Case("flux")
    attached = case.attach(Calls(graphs=True), None)
    expected = case.runs(4)
    denoiser = denoiser_of(case.pipe)
    denoiser.to("cpu")
    torch.cuda.empty_cache()
    taken = torch.randn(64, 2**20, device="cuda")  # where the weights were
    denoiser.to("cuda")
    for found, wanted in zip(case.runs(4), expected, strict=True):
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    del taken
    attached.detach()
