"""`compare` on a small random denoiser in pixel space, and on a small pipeline."""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.measure.compare import compare
from tenuto.measure.comparison import Comparison
from tenuto.measure.metrics import psnr
from tenuto.model.operations import multiply_adds
from tenuto.runtime.timing import percentile

KEYS = (
    *("psnr_db", "ssim", "lpips", "bf16_floor_psnr_db", "reuse_ratio", "reuse_flops"),
    *("int8_weight_share", "seconds_per_picture", "speedup", "resident_weight_bytes"),
    *("peak_memory_bytes", "execution", "device", "threads", "versions"),
    *("steps", "guidance", "count"),
)
COMPARE = importlib.import_module("tenuto.measure.compare")
FULL, MINE, LOW = COMPARE.FULL, COMPARE.ARTIFACT, COMPARE.BF16


pytestmark = pytest.mark.usefixtures("one_thread")


def sample(denoiser: nn.Module, seed: int, batch: int, steps: int = 4) -> Tensor:
    """DDIM without noise, written out; each image depends on its own seed alone."""
    seeds = range(seed, seed + batch)
    x = torch.stack(
        [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    labels = torch.tensor([s % 10 for s in seeds])
    alphas = torch.linspace(0.02, 1, steps + 1)
    times = torch.linspace(999, 250, steps).long()
    for t, now, later in zip(times, alphas, alphas[1:], strict=False):
        noise = denoiser(x, timestep=t.expand(batch), class_labels=labels).sample
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x = later.sqrt() * clean + (1 - later).sqrt() * noise
    return (x / 8).clamp(-1, 1)


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3,
            num_layers=2, sample_size=32, patch_size=8, num_embeds_ada_norm=1000,
        )  # fmt: skip
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model.train()  # compare switches to eval and back


@pytest.fixture(scope="module")
def trajectory(denoiser: nn.Module) -> tn.Trajectory:
    return tn.record(denoiser, sample=sample, runs=1, batch=2)


@pytest.fixture(scope="module")
def quantized(denoiser: nn.Module, trajectory: tn.Trajectory) -> tn.Artifact:
    return tn.quantize(denoiser, tn.schemes.W8A8, trajectory)


def routed(denoiser: nn.Module, trajectory: tn.Trajectory, table: Tensor) -> tn.Artifact:
    """An artifact with a route alone."""
    branches = [branch.name for branch in tn.describe(denoiser).branches]
    times = list(trajectory.timesteps)
    artifact = tn.Artifact.new(denoiser, {"timesteps": times, "steps": 4, "guidance": None})
    ratio = 1 - table.float().mean().item()
    artifact.header["route"] = {
        "policy": "test", "timesteps": times, "branches": branches,
        "reuse_ratio": ratio, "scores": {},
    }  # fmt: skip
    artifact.tensors["route/table"] = table
    return artifact


def parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything by which a patched module differs from an unpatched one."""
    for name, child in module.named_modules():
        yield name, (type(child), child.training, "forward" in vars(child))
        yield f"{name} hooks", (len(child._forward_pre_hooks), len(child._forward_hooks))


def state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return dict(parts(module)), {k: v.clone() for k, v in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    now = state(module)
    assert now[0] == before[0]
    assert now[1].keys() == before[1].keys()
    assert all(torch.equal(now[1][name], value) for name, value in before[1].items())


def test_compare_says_what_was_measured_and_leaves_the_model(
    denoiser: nn.Module, quantized: tn.Artifact
) -> None:
    before = state(denoiser)
    seen: list[tuple[int, int, str]] = []
    found = compare(
        denoiser, quantized, count=5, batch=2, seed=3, sample=sample,
        on_progress=lambda *facts: seen.append(facts),
    )  # fmt: skip
    assert_untouched(denoiser, before)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(KEYS) <= set(data)
    assert (data["count"], data["steps"], data["guidance"], data["batch"]) == (5, 4, None, 2)
    assert data["psnr_db"]["p5"] <= data["psnr_db"]["median"]
    assert 25 < data["psnr_db"]["median"] < 80 and 25 < data["bf16_floor_psnr_db"]["median"] < 80
    assert 0.5 < data["ssim"] <= 1 and 0 < data["lpips"] < 0.2
    assert data["int8_weight_share"] == 1.0
    assert (data["reuse_ratio"], data["reuse_flops"]) == (0.0, 0.0)
    weights = sum(p.numel() * 4 for p in denoiser.parameters())
    assert weights <= data["resident_weight_bytes"]["float"] < weights * 1.1  # and buffers
    assert data["resident_weight_bytes"]["artifact"] < weights
    assert data["peak_memory_bytes"] > weights and data["peak_memory_source"]
    assert data["dtype"] == "float32" and data["device"].startswith("cpu")
    assert {"tenuto", "torch", "python", "diffusers"} <= set(data["versions"])
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[0][:2] == (0, 15) and seen[-1][:2] == (15, 15)
    notes = [note for _, _, note in seen[:7]]
    assert notes == [FULL, MINE, LOW, LOW, MINE, FULL, FULL]


def test_pictures_are_those_of_each_seed(
    denoiser: nn.Module, trajectory: tn.Trajectory, quantized: tn.Artifact
) -> None:
    """The distance is the one between images generated by hand, in one go."""
    found = compare(denoiser, quantized, count=3, batch=2, seed=20, sample=sample)
    denoiser.eval()
    with torch.no_grad():
        full = sample(denoiser, 20, 3)
        with tn.attach(denoiser, quantized):
            low = sample(denoiser, 20, 3)
    denoiser.train()
    values = psnr(full, low).tolist()
    assert found.psnr_db["median"] == pytest.approx(percentile(values, 50), abs=0.5)
    assert found.psnr_db["p5"] == pytest.approx(percentile(values, 5), abs=0.5)


def test_an_artifact_that_changes_nothing(denoiser: nn.Module, trajectory: tn.Trajectory) -> None:
    table = torch.ones(4, 4, dtype=torch.bool)
    found = compare(denoiser, routed(denoiser, trajectory, table), count=2, sample=sample)
    assert found.identical_pictures == 2 and found.psnr_db["median"] == float("inf")
    assert found.to_json()["psnr_db"] == {"median": None, "p5": None}
    assert found.lpips == 0 and found.ssim == pytest.approx(1)
    assert found.execution["mode"] == "float" and found.int8_weight_share == 0
    assert found.resident_weight_bytes["float"] == found.resident_weight_bytes["artifact"]
    assert found.speedup is not None


def test_reuse_is_counted_as_it_happens(denoiser: nn.Module, trajectory: tn.Trajectory) -> None:
    table = torch.ones(4, 4, dtype=torch.bool)  # (steps, attn and ff of two blocks)
    table[1:, 0] = table[2, 3] = False
    artifact = routed(denoiser, trajectory, table)
    found = compare(denoiser, artifact, count=3, batch=1, sample=sample)
    assert found.reuse_ratio == pytest.approx(4 / 16) and not found.whole_calls
    assert "branch calls reused" in str(found)
    names = artifact.header["route"]["branches"]
    call = trajectory.calls[0].inputs
    work = multiply_adds(denoiser, (), call, names)
    expected = (0.75 * work[names[0]] + 0.25 * work[names[3]]) / work[""]
    assert 0 < expected < 0.25 and found.reuse_flops == pytest.approx(expected)
    assert found.identical_pictures == 0

    longer = functools.partial(sample, steps=6)  # other steps: what happens, not what the file says
    found = compare(denoiser, artifact, count=2, sample=longer)
    assert found.steps == 6 and found.reuse_ratio is not None and 0 < found.reuse_ratio < 0.5
    assert found.reuse_ratio != pytest.approx(4 / 16)


def test_a_simulated_time_is_no_gain(
    denoiser: nn.Module, quantized: tn.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module("tenuto.measure.compare"),
        "attach",
        functools.partial(tn.attach, simulate=True),
    )
    found = compare(denoiser, quantized, count=2, sample=sample)
    assert found.execution["mode"] == "simulated"
    assert found.speedup is None and found.speedup_quartiles is None
    assert "simulated" in found.speed_note() and "no gain" in str(found)


def of(found: Comparison, **changes: Any) -> Comparison:
    return Comparison(**{**vars(found), **changes})


def test_the_table_says_plainly_when_it_is_slower(
    denoiser: nn.Module, quantized: tn.Artifact
) -> None:
    found = compare(denoiser, quantized, count=2, sample=sample)
    seconds = {"float": 2.0, "artifact": 1.0, "bf16": None}
    run = {"execution": {"mode": "int8", "layers": {"int8": 3}}, "seconds_per_picture": seconds}
    assert of(found, **run, speedup=2.0).speed_note() == "2.00 times as fast as float32."
    slower = of(found, **run, speedup=0.5)
    assert slower.speed_note() == "Here slower than float32 (2.00 times the time)."
    assert slower.speed_note() in str(slower)
    run["seconds_per_picture"] = {"float": 2.0, "artifact": 1.0, "bf16": 0.5}
    assert of(found, **run, speedup=2.0).speed_note() == (
        "2.00 times as fast as float32, but here slower than plain bf16 (2.00 times the time)."
    )
    run["seconds_per_picture"] = {"float": 2.0, "artifact": 1.0, "bf16": 1.5}
    assert of(found, **run, speedup=2.0).speed_note() == (
        "2.00 times as fast as float32 and 1.50 times as fast as plain bf16."
    )


def test_the_table_has_every_value_under_what_it_is_of(
    denoiser: nn.Module, quantized: tn.Artifact
) -> None:
    """Of the artifact, of bf16 or of full precision; a line fits 80 columns, one thread is one."""
    states = {
        "cosine": {"mean": 0.99},
        "relative_l2": 0.25,
        "bf16": {"cosine": 0.999, "relative_l2": 0.125},
    }
    found = of(
        compare(denoiser, quantized, count=2, sample=sample), threads=1, lpips=0.375, ssim=0.75,
        psnr_db={"median": 41.5, "p5": 40.5}, bf16_floor_psnr_db={"median": 51.5, "p5": 50.5},
        seconds_per_picture={"float": 2.0, "artifact": 1.0, "bf16": 0.625}, speedup=0.5,
        reuse_ratio=0.3, reuse_flops=0.2, encoders={"text_encoder_2": states},
    )  # fmt: skip
    lines = str(found).splitlines()
    head = lines[0]
    assert head.split() == ["float32", "bf16", "artifact"]
    ends = {name: head.index(name) + len(name) for name in head.split()}

    def under(value: str) -> str:
        found = [re.search(rf"(?<!\S){re.escape(value)}(?!\S)", line) for line in lines[1:]]
        (end,) = (match.end() for match in found if match)
        return next(name for name, place in ends.items() if place == end)

    for name, values in {
        "float32": ("2.000",),
        "bf16": ("0.625", "51.5", "50.5", "0.99900", "0.1250"),
        "artifact": ("1.000", "41.5", "40.5", "0.7500", "0.3750", "30.0%", "20.0%", "0.99000",
                     "0.2500"),
    }.items():  # fmt: skip
        assert {value: under(value) for value in values} == dict.fromkeys(values, name)
    assert all(len(line) <= 80 for line in lines)
    assert ", 1 thread, " in str(found)


def test_a_note_says_when_int8_is_slower_and_what_happens_by_default(
    denoiser: nn.Module, quantized: tn.Artifact
) -> None:
    found = compare(denoiser, quantized, count=2, sample=sample)
    run = {"execution": {"mode": "int8", "layers": {"int8": 3}}}
    cases = [  # seconds of float, artifact, bf16; in the note
        ((2.0, 1.0, None), ()),
        ((2.0, 1.0, 1.5), ()),
        ((2.0, 1.0, 0.5), ("bf16",)),
        ((1.0, 2.0, None), ("float32",)),
        ((1.0, 2.0, 0.5), ("bf16 and float32",)),
    ]
    changed = found
    for (full, mine, low), words in cases:
        seconds = {"float": full, "artifact": mine, "bf16": low}
        changed = of(found, **run, seconds_per_picture=seconds, speedup=full / mine)
        note = changed.to_json()["note"]
        assert (note is not None) == bool(words)
        if note is not None:
            assert f"slower than {words[0]} on this machine" in note and "attach" in note
            assert note.count(". ") == 0 and note.endswith(".")
            assert note in " ".join(str(changed).splitlines())
            assert all(len(line) <= 100 for line in str(changed).splitlines())
    for execution in ({"dequantized": 3}, {"float": 3}):
        other = of(changed, execution={"mode": "float", "layers": execution})
        assert other.note() is None and other.to_json()["note"] is None
    real = of(changed, execution={"mode": "mixed", "layers": {"fp8": 2, "simulated": 1}})
    assert (real.note() or "").startswith("Fp8 is slower than ")
    both = of(real, execution={"mode": "mixed", "layers": {"int8": 1, "fp8": 2}}).note() or ""
    assert both.startswith("Int8 and fp8 are slower than ") and both.endswith("they slow down.")
    assert of(changed, speedup=None).note() is None


@pytest.mark.parametrize("execution", ["int8", "float", "auto"])
def test_it_is_measured_as_asked(
    denoiser: nn.Module, quantized: tn.Artifact, execution: str
) -> None:
    """The artifact's own arithmetic unless told otherwise; copies in float are counted."""
    options = {} if execution == "int8" else {"execution": execution}
    before = state(denoiser)
    found = compare(denoiser, quantized, count=2, sample=sample, **options)
    assert_untouched(denoiser, before)
    mode = "dequantized" if execution == "float" else "int8"
    assert found.execution["mode"] == mode
    assert found.int8_weight_share == (0.0 if execution == "float" else 1.0)
    plain = compare(denoiser, quantized, count=2, sample=sample)
    mine, theirs = (c.resident_weight_bytes["artifact"] for c in (found, plain))
    weights = sum(math.prod(f["shape"]) for f in quantized.header["layers"].values())
    assert mine == theirs if execution != "float" else mine > theirs + 3.5 * weights
    assert execution != "float" or found.psnr_db["median"] > plain.psnr_db["median"]
    with pytest.raises(tn.TenutoError, match="auto, int8, float"):
        compare(denoiser, quantized, count=2, sample=sample, execution="fast")


def test_all_sides_are_compiled(
    denoiser: nn.Module, quantized: tn.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full precision, bf16 and the artifact, turn by turn; one run of a turn is not timed."""
    on: set[str] = set()
    runs = 0

    def stand_in(block: Any, **options: Any) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            quantized = any(isinstance(m, tn.runtime.QLayer) for m in block.modules())
            on.add("W8A8" if quantized else str(args[0].dtype))
            return block._call_impl(*args, **kwargs)

        block._compiled_call_impl = run

    def counted(*args: Any) -> Tensor:
        nonlocal runs
        runs += 1
        return sample(*args)

    monkeypatch.setattr(nn.Module, "compile", stand_in)
    before = state(denoiser)
    found = compare(denoiser, quantized, count=2, sample=counted, compile=True)
    assert_untouched(denoiser, before)
    assert not any("_compiled_call_impl" in vars(m) for m in denoiser.modules())
    assert on == {"torch.float32", "torch.bfloat16", "W8A8"}
    assert runs == 1 + 2 * 3, "what is called first, then each way untimed and timed"
    assert found.to_json()["compiled"] and "blocks compiled" in str(found)
    if not torch.cuda.is_available():
        with pytest.raises(tn.TenutoError, match="need a GPU"):
            compare(denoiser, quantized, count=2, sample=sample, graphs=True)


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_stopping_in_the_middle_leaves_the_model(
    denoiser: nn.Module, quantized: tn.Artifact, stop: int
) -> None:
    before = state(denoiser)

    def on_progress(done: int, total: int, note: str) -> None:
        if done >= stop:
            raise tn.Cancelled

    with pytest.raises(tn.Cancelled):
        compare(denoiser, quantized, count=2, batch=1, sample=sample, on_progress=on_progress)
    assert_untouched(denoiser, before)


def test_bad_input_gets_one_sentence(denoiser: nn.Module, quantized: tn.Artifact) -> None:
    other = tn.Artifact({**quantized.header, "fingerprint": {"parameters": 1, "values": []}})
    cases: list[tuple[str, dict[str, Any]]] = [
        ("nothing to compare", {"count": 0, "sample": sample}),
        ("nothing to compare", {"batch": 0, "sample": sample}),
        ("bare denoiser needs `sample", {}),
        ("another model", {"artifact": other, "sample": sample}),
        ("did not call the denoiser", {"sample": lambda d, s, n: torch.zeros(n, 3, 32, 32)}),
        ("should return images", {"count": 2, "sample": lambda d, s, n: sample(d, s, n)[0]}),
    ]
    before = state(denoiser)
    for message, changes in cases:
        artifact = changes.pop("artifact", quantized)
        with pytest.raises(tn.TenutoError, match=message):
            compare(denoiser, artifact, **changes)
    assert_untouched(denoiser, before)


def test_small_pictures_have_no_perceptual_distance(
    denoiser: nn.Module, quantized: tn.Artifact
) -> None:
    def tiny(model: nn.Module, seed: int, batch: int) -> Tensor:
        return sample(model, seed, batch)[..., :8, :8]

    found = compare(denoiser, quantized, count=2, sample=tiny)
    assert found.ssim is None and found.lpips is None and found.psnr_db["median"] > 20
    assert "-" in str(found)


def test_a_model_in_bf16_has_no_floor_below_it(denoiser: nn.Module) -> None:
    import copy

    model = nn.Module.to(copy.deepcopy(denoiser), torch.bfloat16)

    def lower(module: nn.Module, seed: int, batch: int) -> Tensor:
        class Cast(nn.Module):
            def forward(self, x: Tensor, **rest: Tensor) -> Any:
                return module(x.bfloat16(), **rest)

        return sample(Cast(), seed, batch)

    trajectory = tn.record(model, sample=lower, runs=1, batch=2)
    found = compare(model, tn.quantize(model, tn.schemes.W8A8, trajectory), count=2, sample=lower)
    assert found.dtype == "bfloat16"
    assert found.bf16_floor_psnr_db is None and found.seconds_per_picture["bf16"] is None


def test_a_pipeline_draws_at_the_artifacts_steps_and_guidance(tiny_pixart_folder: Path) -> None:
    from tenuto.sampling.loading import load

    pipe = load(str(tiny_pixart_folder))
    prompts = ["a photo of a lemon", "a red school bus", "goldfish at night"]
    trajectory = tn.record(pipe, prompts[:2], steps=3, guidance=2.0)
    artifact = tn.quantize(pipe, tn.schemes.W8A8, trajectory)
    before = state(pipe.transformer)
    found = compare(pipe, artifact, prompts, count=3, batch=2)
    assert_untouched(pipe.transformer, before)
    assert (found.steps, found.guidance, found.count) == (3, 2.0, 3)
    assert found.psnr_db["median"] > 20 and found.lpips is not None
    found = compare(pipe, artifact, prompts, count=1, steps=2, guidance=1.5)
    assert (found.steps, found.guidance) == (2, 1.5)
    with pytest.raises(tn.TenutoError, match="at least one step"):
        compare(pipe, artifact, prompts, count=1, steps=0)
