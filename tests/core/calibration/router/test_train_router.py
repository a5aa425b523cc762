"""`train_router`: what was asked, the best of what was measured, and the contract for long work."""

import itertools

import pytest
import torch

import tenuto as tn
from tenuto.caching.budget import reuse_for, saved, whole_steps
from tenuto.caching.schedule import CacheSchedule
from tenuto.calibration.train_router import PRESETS, train_router

FAST = {"iterations": 2}


@pytest.fixture
def route(transformer, trajectory):
    return train_router(transformer, trajectory, reuse=0.4, **FAST)


def test_the_best_candidate_is_the_route(route, branches, trajectory):
    facts = route.header["route"]
    assert facts["policy"] == min(facts["scores"], key=facts["scores"].get)
    kinds = {" ".join(name.split()[:2]) for name in facts["scores"]}
    assert kinds == {"router spread", "late interval", "step programme"}
    assert "step programme age^3, extrapolated" in facts["scores"]
    assert facts["branches"] == list(branches)
    assert facts["timesteps"] == list(trajectory.timesteps)
    assert facts["reuse_ratio"] == pytest.approx(
        1 - float(route.tensors["route/table"].float().mean())
    )
    router = route.tensors["route/router"]
    assert facts["whole_outputs"] == []  # what is added to a stream, all of it
    assert route.tensors["route/logits"].shape == router.shape == (6, 9)


def test_the_route_survives_a_file_and_runs(tmp_path, route, transformer, loop):
    route.save(tmp_path / "r.safetensors")
    loaded = tn.Artifact.load(tmp_path / "r.safetensors")
    before = loop()(transformer, 3, 2)
    with tn.attach(transformer, loaded) as attached:
        loop()(transformer, 3, 2)
        counts = attached.counts()
    held, computed = (sum(c[i] for c in counts.values()) for i in (1, 0))
    share = loaded.header["route"]["reuse_ratio"]
    always = sum(0 if sum(c) else 6 for c in counts.values())  # branches that are never reused
    assert held / (held + computed + always) == pytest.approx(share)
    assert torch.equal(loop()(transformer, 3, 2), before)


def test_a_speedup_is_one_of_multiply_adds(transformer, trajectory):
    route = train_router(transformer, trajectory, speedup=1.4, **FAST)
    facts = route.header["route"]
    assert 1 / (1 - facts["reuse_flops"]) >= 1.4 - 1e-3
    router = CacheSchedule(
        route.tensors["route/router"], tuple(facts["timesteps"]), tuple(facts["branches"])
    )
    counts = tn.model.multiply_adds(
        transformer, (), trajectory.calls[0].inputs, names=facts["branches"]
    )
    assert 1.4 <= 1 / (1 - saved(router, counts)) + 1e-6 < 1.5


def test_a_share_is_one_of_work(route, transformer, trajectory):
    """Not of cells: cross-attention is a third of the work of self-attention here."""
    facts = route.header["route"]
    counts = tn.model.multiply_adds(
        transformer, (), trajectory.calls[0].inputs, names=facts["branches"]
    )
    table = CacheSchedule(
        route.tensors["route/router"], tuple(facts["timesteps"]), tuple(facts["branches"])
    )
    inside = sum(counts[name] for name in facts["branches"]) / counts[""]
    most = max(counts[name] for name in facts["branches"]) / counts[""] / 6
    assert 0.4 * inside - 1e-6 <= saved(table, counts) <= 0.4 * inside + most + 1e-6


def test_costs_are_those_of_full_precision(transformer, trajectory, route):
    """Of a quantized model too: its rounding is a floor under which late steps are alike."""
    artifact = tn.quantize(transformer, tn.schemes.W4A8, trajectory)
    low = train_router(transformer, trajectory, reuse=0.4, artifact=artifact, **FAST)
    assert torch.equal(low.tensors["route/costs"], route.tensors["route/costs"])


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("taylorseer", (1, 2)),
        ("growing window", (0,)),
        ("learning-to-cache", (0,)),
        ("random", (0,)),
    ],
)
def test_a_policy_by_name(policy, order, transformer, trajectory, loop):
    """It alone is measured, a control too; what it extrapolates is in the header and is done."""
    made = train_router(transformer, trajectory, reuse=1 / 3, policy=policy, **FAST)
    facts = made.header["route"]
    assert not any(name.startswith(("router", "step", "late")) for name in facts["scores"])
    found = facts["order"]
    assert found in order and "route/logits" not in made.tensors
    with tn.attach(transformer, made):
        one = loop()(transformer, 3, 2)
    made.header["route"]["order"] = 0
    with tn.attach(transformer, made):
        assert torch.equal(one, loop()(transformer, 3, 2)) == (found == 0)


def test_a_policy_without_a_table_is_refused(transformer, trajectory):
    with pytest.raises(tn.TenutoError, match="decides at run time"):
        train_router(transformer, trajectory, policy="easycache")
    with pytest.raises(tn.TenutoError, match="Unknown policy"):
        train_router(transformer, trajectory, policy="magic")
    with pytest.raises(tn.TenutoError, match="weighting"):
        train_router(transformer, trajectory, weighting="magic")


def test_shares_and_speedups():
    counts = {"": 100, "a": 30, "b": 60}
    assert reuse_for(1.5, counts, 20) == pytest.approx((1 / 3) / 0.9)
    table = torch.tensor([[True, True], [False, True], [False, False]])
    assert saved(CacheSchedule(table, (2.0, 1.0, 0.0), ("a", "b")), counts) == pytest.approx(0.4)
    with pytest.raises(tn.TenutoError, match=r"1 to 6\.90"):
        reuse_for(10, counts, 20)
    assert [whole_steps(r, 20) for r in (0.3, 0.31, 0.99)] == [0.3, 0.35, 0.95]


def test_a_quantized_model_is_teacher_and_student(transformer, trajectory, bits_of):
    artifact = tn.quantize(transformer, tn.schemes.W8A8, trajectory)
    before = bits_of(transformer)
    route = train_router(transformer, trajectory, reuse=0.4, artifact=artifact, **FAST)
    assert bits_of(transformer) == before
    whole = artifact | route
    whole.validate()
    assert set(whole.header) >= {"layers", "route"}
    with tn.attach(transformer, whole) as attached:
        assert attached.counts()
        kept = len(artifact.header.get("kept_in_float", {}))
        assert attached.execution()["layers"].get("float", 0) == kept
    assert bits_of(transformer) == before


@pytest.fixture
def bits_of():
    def bits(module):
        found = {name: sorted(vars(m)) for name, m in module.named_modules()}
        for name, p in module.named_parameters():
            found[f"weight {name}"] = (id(p), p.requires_grad, p.detach().numpy().tobytes())
        return found

    return bits


def test_progress_goes_from_nothing_to_all(transformer, trajectory):
    seen = []
    train_router(transformer, trajectory, reuse=0.4, on_progress=lambda *a: seen.append(a), **FAST)
    done = [s[0] for s in seen]
    assert done[0] == 0 and done == sorted(done)
    assert {s[1] for s in seen} == {done[-1]}


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95])
def test_stopped_anywhere_it_ends_in_the_same_file(
    tmp_path, share, transformer, trajectory, bits_of
):
    before = bits_of(transformer)

    def stop(done, total, note):
        if done >= share * total:
            raise tn.Cancelled

    settings = {"reuse": 0.4, "work": tmp_path / "w", **FAST}
    train_router(transformer, trajectory, **settings | {"work": None}).save(tmp_path / "whole")
    with pytest.raises(tn.Cancelled):
        train_router(transformer, trajectory, on_progress=stop, **settings)
    assert bits_of(transformer) == before
    kept = set((tmp_path / "w").iterdir())
    train_router(transformer, trajectory, **settings).save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert kept <= set((tmp_path / "w").iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reuse": 0.3, "speedup": 1.5}, "not for both"),
        ({"reuse": 0.9}, "cannot reuse"),
        ({"reuse": 0.0}, "cannot reuse"),
        ({"speedup": 50}, "saves a factor"),
        ({"preset": "heroic"}, "quick, standard, thorough"),
        ({"iterations": 0}, "one trajectory"),
    ],
)
def test_bad_requests_get_one_sentence(wrong, message, tmp_path, transformer, trajectory):
    with pytest.raises(tn.TenutoError, match=message):
        train_router(transformer, trajectory, work=tmp_path / "w", **wrong)
    assert not (tmp_path / "w").exists()


def test_an_artifact_with_ranges_of_other_steps_is_refused(transformer, trajectory, loop):
    other = tn.record(transformer, sample=loop(4), batch=2, runs=1, guidance=2.0)
    artifact = tn.quantize(transformer, tn.schemes.W8A8_STATIC, other)
    with pytest.raises(tn.TenutoError, match="its own 4 steps"):
        train_router(transformer, trajectory, artifact=artifact, **FAST)


def test_presets_grow():
    for one, more in itertools.pairwise(PRESETS[n] for n in ("quick", "standard", "thorough")):
        work = [p.router.iterations * p.batch for p in (one, more)]
        assert work[0] < work[1] and one.batches * one.batch < more.batches * more.batch
