"""The first dimension is not always the batch: frames, two times a sample, routed tokens."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto import describe
from tenuto.caching import CacheSchedule, Slot, apply_schedule_
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.replay import inputs_of, outputs
from tenuto.model import Signature, tensors_in, watched
from tenuto.sampling import Clock, Follow

ODD = (  # known and unknown models in which it is not, or not everywhere
    "qwen_image edit", "qwen_image 2.1", "minimax_h3", "hidream", "krea2", "z_image",
    "unet motion", "unet image-to-video",
)  # fmt: skip


def recorded(case: Any) -> Any:
    """Two runs of two steps."""

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        for t in (0.8, 0.4):
            out = denoiser(**case.inputs(seed, t))
        return next(tensors_in(out))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers and torch
        return tn.record(case.model, sample=sample, batch=2, runs=2)


def check_replay(case: Any) -> None:
    """Each block replayed alone answers as it did in the model, row by row or call by call."""
    trajectory, blocks = recorded(case), describe(case.model).blocks
    for block in dict.fromkeys((blocks[0], blocks[len(blocks) // 2], blocks[-1])):
        wanted: list[Tensor] = []

        def note(name: str, args: Any, kwargs: Any, out: Any, wanted: Any = wanted) -> None:
            wanted.append(next(tensors_in(out)))

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bank = inputs_of(case.model, block, trajectory.calls, "cpu")
            found = outputs(case.model.get_submodule(block), bank, "cpu", size=3)
            with watched(case.model, [block], after=note):
                for call in trajectory.calls:
                    case.model(**call.inputs)
        found = found.flatten(0, 1) if bank.calls else found
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-3, atol=1e-4)


def test_blocks_of_a_family_are_replayed_alone(known: Any) -> None:
    check_replay(known)


def test_blocks_of_the_fallback_are_replayed_alone(unknown: Any) -> None:
    check_replay(unknown)


def check_streams(case: Any) -> None:
    """Two conditions in calls apart: each reuses what was its own, as if it were alone."""
    facts, times = Signature(case.model), (0.8, 0.6)
    names = [b.name for b in describe(case.model).branches]
    one, other = (
        [case.inputs(seed, t) | {facts.names[0]: case.inputs(0, t)[facts.names[0]]} for t in times]
        for seed in (1, 2)
    )

    def run(*calls: dict[str, Any]) -> list[Tensor]:
        clock = Clock([facts.step(inputs) for inputs in one])
        patches: list[Any] = [Follow(case.model, clock)]
        schedule = CacheSchedule.steps((True, False), clock.timesteps, names)
        patches += apply_schedule_(case.model, schedule, clock)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = [next(tensors_in(case.model(**inputs))).clone() for inputs in calls]
            assert all(p.call.counts[1] for p in patches[1:]), "nothing was reused"
        finally:
            for patch in patches[::-1]:
                patch.remove()
        return found

    alone = run(one[0], one[1])
    both = run(one[0], other[0], one[1], other[1])
    torch.testing.assert_close(both[2], alone[1], rtol=1e-4, atol=1e-5)
    apart = bool(facts.conditions(one[0]))  # a U-Net without any has one stream
    assert apart != torch.allclose(both[3], both[2], atol=1e-4)


def test_conditions_of_a_family_stay_apart(known: Any) -> None:
    check_streams(known)


def test_conditions_of_the_fallback_stay_apart(unknown: Any) -> None:
    check_streams(unknown)


def check_quantized(case: Any, algorithm: Any) -> None:
    """The middle block at 4 bits, all others in float: it attaches and is near."""
    trajectory, blocks = recorded(case), describe(case.model).blocks
    block = blocks[len(blocks) // 2]
    recipe = tn.Recipe((tn.Rule(f"{block}.*", tn.schemes.W4A8, algorithm),))
    inputs = case.inputs(7, 0.6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        artifact = tn.quantize(case.model, recipe, trajectory, temporal="none")
        plain = next(tensors_in(case.model(**inputs))).clone()
        with tn.attach(case.model, artifact):
            found = next(tensors_in(case.model(**inputs)))
    assert 0 < (found - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize("name", ODD)
def test_gptq(name: str, odd: Any) -> None:
    check_quantized(odd(name), GPTQ(rows=8))


@pytest.mark.parametrize("name", [name for name in ODD if "unet" not in name])
def test_adaround(name: str, odd: Any) -> None:
    check_quantized(odd(name), AdaRound(2, 4))


def test_outputs_without_rows_are_kept_by_call() -> None:
    """Two frames a sample: another order, or one of the two, computes anew."""
    clock, slot, out = Clock((9.0, 5.0)), Slot(), torch.arange(4.0)[:, None]
    clock.tick(9.0, ("a", "b"))
    slot.store(clock, 2, out)
    clock.tick(9.0, ("c", "d"))
    slot.store(clock, 2, out + 10)
    clock.tick(5.0, ("a", "b"))
    assert torch.equal(slot.find(clock, 2), out)
    for streams in (("b", "a"), ("a",), ("a", "c")):
        clock.tick(5.0, streams)
        assert slot.find(clock, 2) is None
    assert slot.bytes() == 2 * out.nbytes
