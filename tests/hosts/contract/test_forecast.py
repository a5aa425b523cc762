"""A forecast in every host: what it skips is what its plan says, and what the host says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.artifact import kernel_of
from tenuto.caching import Forecast, ForecastPlan
from tenuto.model import describe, override_

LONG = tuple(range(999, 0, -90))  # 12 steps


def plan_for(made: Any, family: str, times: tuple[int, ...] = LONG) -> ForecastPlan:
    """Made in diffusers' names, from the file, for a run at `times`."""
    kernel = kernel_of(made.artifact)
    assert kernel is not None
    unit = 1000 if family == "flux" else 1
    return Forecast(kernel, made.options["speedup"]).plan([t / unit for t in times])


def counted(bench: Any, made: Any, settings: Any) -> tuple[Tensor, int, list[int]]:
    """The latents, how often the network ran, and what the host says: computed, forecast."""
    handle, seen = bench.fresh(), []
    with bench.on(handle, made) as attached:
        denoiser = bench.host.denoiser(attached.handle)
        block = denoiser.get_submodule(describe(denoiser).blocks[0])

        def count(original: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return original(*args, **kwargs)

        patch = override_(block, count)  # a hook may keep what it sees: nothing is skipped then
        try:
            found = bench.run(attached.handle, settings)
        finally:
            patch.retire()
        return found, len(seen), bench.counts(attached)[""]


@pytest.mark.parametrize("split", [False, True])
def test_what_is_skipped_does_not_run(bench: Any, forecast: Any, split: bool) -> None:
    """As many calls as the plan says, all of one step alike: guidance in one call or in two."""
    made = forecast(bench.family)
    plan, calls = plan_for(made, bench.family), 2 if split else 1
    _, ran, counts = counted(bench, made, made.run(split=split))
    assert plan.calls == 6
    assert ran == calls * plan.calls and counts == [calls * 6, calls * 6]


@pytest.mark.parametrize("speedup,steps", [(1.0, 12), (2.0, 8), (4.0, 12)])
def test_the_budget(bench: Any, forecast: Any, speedup: float, steps: int) -> None:
    """1 is off, and so are few steps: not a bit is another."""
    made = forecast(bench.family, speedup)
    how = made.run(times=LONG[:steps])
    found, ran, counts = counted(bench, made, how)
    plain = bench.run(bench.fresh(), how)
    if speedup == 4:
        assert counts == [3, 9] and ran == 3 and not torch.equal(found, plain)
    elif bench.tells or speedup == 1:
        assert counts == [steps, 0] and ran == steps and torch.equal(found, plain)


@pytest.mark.parametrize("batch", [1, 4])
def test_images_of_a_batch_are_as_alone(bench: Any, forecast: Any, batch: int) -> None:
    """Each by its own outputs."""
    made = forecast(bench.family)
    whole = counted(bench, made, made.run(batch=batch))[0]
    alone = counted(bench, made, made.run())[0]
    assert float((whole[:1] - alone).norm() / alone.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_half_precision(bench: Any, forecast: Any, dtype: torch.dtype) -> None:
    """The network's outputs are half: sums are not, and what is skipped is near what it is full."""
    made = forecast(bench.family)
    full = counted(bench, made, made.run())[0]
    with bench.at(dtype):
        found, ran, counts = counted(bench, made, made.run())
    assert ran == 6 and counts == [6, 6] and torch.isfinite(found).all()
    most = 0.2 if dtype is torch.bfloat16 else 0.03
    assert 0 < float((found - full).norm() / full.norm()) < most
