"""The whole call as what is reused: pipelines, lists, two passes a step, the search for it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tenuto as tn
from tenuto.artifact import Artifact
from tenuto.artifact.summary import step_map
from tenuto.caching import CacheSchedule
from tenuto.errors import TenutoError
from tenuto.model import WHOLE, denoiser_of, tensors_in, watched
from tests.core import tiny_pipelines as tiny

STEPS = 9  # of fewer nothing is reused, but by a schedule of their own


@pytest.fixture(scope="module", params=["z-image", "wan", "sd"])
def asked(request: pytest.FixtureRequest, one_thread: None) -> Any:
    """(pipeline, trajectory): a list an image, two calls a step, one call of both halves."""
    pipe, prompts, call = tiny.asked(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other libraries
        found = tn.record(pipe, prompts, steps=STEPS, call=call, guidance=2.0, batch=2, runs=1)
    return pipe, found


def made_of(pipe: Any, trajectory: Any, rows: list[bool]) -> Artifact:
    made = Artifact.new(pipe, trajectory.schedule())
    made.header["route"] = {
        "policy": "by hand", "timesteps": list(trajectory.timesteps), "branches": [WHOLE.name],
        "reuse_ratio": 1 - sum(rows) / len(rows),
    }  # fmt: skip
    made.tensors["route/table"] = torch.tensor(rows)[:, None]
    return made


def test_a_reused_call_returns_what_the_last_one_did(asked: Any) -> None:
    """Of the same half of guidance; nothing of the denoiser runs, and nothing is left behind."""
    pipe, trajectory = asked
    rows = [True, True, *[False, True, False] * 3][:STEPS]
    denoiser, run = denoiser_of(pipe), trajectory.rollout()
    outs: list[Any] = []

    def keep(name: str, args: Any, kwargs: Any, out: Any) -> None:
        outs.append([t.clone() for t in tensors_in(out)])

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = run(denoiser, 5, 1).clone()
        with tn.attach(pipe, made_of(pipe, trajectory, rows)) as attached:
            with watched(denoiser, after=keep):
                other = run(denoiser, 5, 1).clone()
            counts = attached.counts()[WHOLE.name]
        again = run(denoiser, 5, 1)
    assert torch.equal(plain, again) and not torch.equal(plain, other)
    passes = len(outs) // STEPS
    assert counts == [passes * sum(rows), passes * (STEPS - sum(rows))]
    for step in (n for n, computed in enumerate(rows) if not computed):
        for which in range(passes):
            now, last = outs[passes * step + which], outs[passes * (step - 1) + which]
            assert len(now) == len(last) and all(map(torch.equal, now, last))


def test_computing_everything_changes_no_bit(asked: Any) -> None:
    pipe, trajectory = asked
    denoiser, run = denoiser_of(pipe), trajectory.rollout()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = run(denoiser, 5, 2).clone()
        with tn.attach(pipe, made_of(pipe, trajectory, [True] * STEPS)):
            assert torch.equal(run(denoiser, 5, 2), plain)


def test_another_batch_and_another_run_compute_first(asked: Any) -> None:
    pipe, trajectory = asked
    denoiser, run = denoiser_of(pipe), trajectory.rollout()
    made = made_of(pipe, trajectory, [True, *[False] * (STEPS - 1)])
    with torch.no_grad(), warnings.catch_warnings(), tn.attach(pipe, made) as attached:
        warnings.simplefilter("ignore")
        one = run(denoiser, 5, 2).clone()
        before = attached.counts()[WHOLE.name]
        run(denoiser, 8, 1)
        assert attached.counts()[WHOLE.name][0] > before[0]
        assert torch.equal(run(denoiser, 5, 2), one)


def test_a_schedule_is_of_the_whole_call_or_of_branches() -> None:
    with pytest.raises(TenutoError, match="not of both"):
        CacheSchedule.steps([True, False], (2.0, 1.0), (WHOLE.name, "blocks.0"))
    schedule = CacheSchedule.steps([True, False], (2.0, 1.0), (WHOLE.name,))
    assert schedule.over(("a", "b")) is schedule


def test_a_search_for_whole_calls(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves what it says: a speedup is a share of steps, not of the work in branches."""
    from importlib import import_module

    search = import_module("tenuto.calibration.router.effort")
    small = search.RoutePreset(search.HarmoniCa(iterations=2, batch=1), 1)
    monkeypatch.setitem(search.PRESETS, "quick", small)
    pipe, trajectory = asked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = tn.train_router(pipe, trajectory, speedup=1.5, whole=True)
        route = made.header["route"]
        assert route["branches"] == [WHOLE.name]
        assert route["reuse_ratio"] == pytest.approx(1 / 3, abs=0.01)
        assert route["reuse_flops"] == pytest.approx(route["reuse_ratio"])
        assert any(line.startswith(WHOLE.kind) for line in step_map(made))
        with tn.attach(pipe, made) as attached, torch.no_grad():
            trajectory.rollout()(denoiser_of(pipe), 5, 1)
            assert attached.counts()[WHOLE.name][1] > 0
