"""Pipelines of several denoisers: Wan 2.2 has one for much noise and one for little."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact import compact, read_header
from tenuto.artifact.plots import plot_all
from tenuto.artifact.summary import about, facts_of
from tenuto.errors import ArtifactError, Cancelled, TenutoError
from tenuto.measure import resident_weight_bytes
from tenuto.model import denoisers_of, encoders_of, parts_of
from tenuto.resume import Work
from tenuto.runtime import QLayer
from tenuto.sampling import keep, kept
from tests.core import tiny_pipelines as tiny

SECOND = "transformer_2"
CALL: dict[str, Any] = {
    "prompt_embeds": tiny.embeds(3), "negative_prompt_embeds": tiny.embeds(3, seed=1),
    "num_frames": 5, "guidance_scale_2": 3.0,
} | tiny.SMALL  # fmt: skip
STEPS, GUIDANCE = 8, 5.0


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.wan_22()


@pytest.fixture(scope="module")
def recorded(pipe: Any) -> tn.Trajectory:
    return tn.record(pipe, steps=STEPS, guidance=GUIDANCE, call=CALL, runs=1)


@pytest.fixture(scope="module")
def quantized(pipe: Any, recorded: tn.Trajectory) -> tn.Artifact:
    return tn.quantize(pipe, "w8a8-static", recorded)


@pytest.fixture(scope="module")
def routed(pipe: Any, recorded: tn.Trajectory, quantized: tn.Artifact) -> tn.Artifact:
    return quantized | tn.train_router(pipe, recorded, artifact=quantized, reuse=0.5, iterations=1)


def video(pipe: Any, steps: int = STEPS) -> Tensor:
    """The final latent, as a user's own call gives it."""
    call = {name: x[:1] if "embeds" in name else x for name, x in CALL.items()}
    draw = torch.Generator().manual_seed(0)
    return pipe(
        num_inference_steps=steps, guidance_scale=GUIDANCE, generator=draw, output_type="latent",
        **call,
    ).frames  # fmt: skip


def weights(pipe: Any) -> dict[str, Tensor]:
    found = {}
    for name, denoiser in parts_of(pipe).items():
        found |= {f"{name}.{k}": v.clone() for k, v in denoiser.state_dict().items()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def content(artifact: tn.Artifact, folder: Path) -> bytes:
    artifact.save(folder / "x.safetensors")
    return (folder / "x.safetensors").read_bytes()


# --- which they are -------------------------------------------------------------------------------


def test_the_main_denoiser_comes_first(pipe: Any) -> None:
    assert list(denoisers_of(pipe)) == ["transformer", SECOND]
    assert parts_of(pipe) == {"": pipe.transformer, SECOND: pipe.transformer_2}
    assert tn.model.denoiser_of(pipe) is pipe.transformer
    assert denoisers_of(pipe.transformer_2) == {"": pipe.transformer_2}


def test_other_components_are_no_denoisers() -> None:
    class Pipe:
        def __init__(self) -> None:
            for name in ("vae", "controlnet", "image_encoder", "text_encoder", "safety_checker",
                         "transformer_blocks", "unconditional_transformer", "unet",
                         "text_encoder_4", "prior"):  # fmt: skip
                setattr(self, name, nn.Linear(1, 1))

    assert list(denoisers_of(Pipe())) == ["unet", "unconditional_transformer"]
    assert list(encoders_of(Pipe())) == ["text_encoder", "text_encoder_4"]
    assert list(denoisers_of(tiny.video_diffusion())) == ["unet"]


def test_a_pipeline_of_the_second_alone() -> None:
    """Diffusers lets `transformer` be None, for stages in two processes."""
    second = tiny.wan(transformer=None, transformer_2=tiny.wan_denoiser(1), boundary_ratio=1.1)
    found = tn.record(second, steps=2, guidance=GUIDANCE, call=CALL, runs=1)
    assert len(found.timesteps) == 2
    assert {call.denoiser for call in found.calls} == {""}


# --- recording ------------------------------------------------------------------------------------


def test_a_recording_knows_whose_each_call_is(recorded: tn.Trajectory) -> None:
    high, low = recorded.of(""), recorded.of(SECOND)
    assert len(recorded.timesteps) == recorded.steps == STEPS
    assert high.timesteps + low.timesteps == recorded.timesteps
    assert min(high.timesteps) >= 750 > max(low.timesteps)
    assert [call.row for call in low.calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(high.calls) + len(low.calls) == len(recorded.calls) == 2 * STEPS
    assert (high.guidance, low.guidance) == (GUIDANCE, CALL["guidance_scale_2"])
    assert high.schedule()["run"] == low.schedule()["run"] == list(recorded.timesteps)
    assert "run" not in recorded.schedule()


def test_a_part_runs_again_with_another_denoiser(pipe: Any, recorded: tn.Trajectory) -> None:
    low, plain = recorded.of(SECOND), recorded.rollout()(pipe.transformer, 0, 1)
    other = tiny.wan_denoiser(5)
    changed = low.rollout()(other, 0, 1)
    assert not torch.equal(changed, plain)
    swapped = recorded.of("", {SECOND: other}).rollout()(pipe.transformer, 0, 1)
    assert torch.equal(swapped, changed)
    assert torch.equal(low.rollout()(pipe.transformer_2, 0, 1), plain)


def test_a_kept_recording_is_whole(pipe: Any, recorded: tn.Trajectory, tmp_path: Path) -> None:
    one = tn.record(pipe, steps=STEPS, guidance=GUIDANCE, call=CALL, runs=1, batch=1)
    shelf = Work(tmp_path / "kept", {})
    assert keep(shelf, one)  # a timestep that is expanded to one row, among others
    found = kept(shelf, pipe, (), STEPS, GUIDANCE, CALL)
    assert found is not None and found.schedule() == recorded.schedule()
    assert [c.denoiser for c in found.calls] == [c.denoiser for c in recorded.calls]
    assert found.of(SECOND).timesteps == recorded.of(SECOND).timesteps


def test_a_denoiser_that_is_not_reached_is_named(pipe: Any) -> None:
    one = tn.record(pipe, steps=1, guidance=GUIDANCE, call=CALL, runs=1)
    with pytest.raises(TenutoError, match=f"no call of {SECOND}: record"):
        tn.quantize(pipe, "w8a8", one)


# --- quantizing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a8"])
def test_both_are_quantized(
    pipe: Any, recorded: tn.Trajectory, scheme: str, tmp_path: Path
) -> None:
    before, plain = weights(pipe), video(pipe)
    made = tn.quantize(pipe, scheme, recorded)
    whole = content(made, tmp_path)
    found = tn.Artifact.load(tmp_path / "x.safetensors")
    assert content(found, tmp_path) == whole
    assert found.header["format_version"] == "1.3"
    for name, part in {"": found, **found.parts}.items():
        own = recorded.of(name)
        assert part.header["schedule"] == json.loads(json.dumps(own.schedule()))
        assert len(part.header["layers"]) == 23 and len(part.section("temporal")) == 2
        if scheme == "w8a8-static":
            assert {len(x) for x in part.section("ranges").values()} == {len(own.timesteps)}
    with tn.attach(pipe, found, execution="int8") as attached:
        assert sum(attached.execution()["layers"].values()) == 46
        assert attached.int8_weight_share() == 1.0
        for denoiser in (pipe.transformer, pipe.transformer_2):
            assert sum(isinstance(m, QLayer) for m in denoiser.modules()) == 23
        low = video(pipe)
        assert 0 < float((low - plain).norm() / plain.norm()) < 0.1
        for steps in (5, 13):  # the nearest calibrated step of each
            assert bool(video(pipe, steps).isfinite().all())
    assert same(weights(pipe), before) and torch.equal(video(pipe), plain)


def test_each_uses_the_ranges_of_its_own_steps(pipe: Any, quantized: tn.Artifact) -> None:
    with tn.attach(pipe, quantized, execution="int8") as attached:
        video(pipe)
        clocks = {name: part.clock for name, part in attached.parts.items()}
        assert clocks[""].timesteps + clocks[SECOND].timesteps == tuple(
            quantized.header["schedule"]["run"]
        )
        assert all(clock.step == 3 and clock.exact for clock in clocks.values())


def test_a_cancelled_second_part_goes_on(
    pipe: Any, recorded: tn.Trajectory, tmp_path: Path
) -> None:
    """It ends in the same bytes, and the first part is not done again."""
    whole = content(tn.quantize(pipe, "w4a8", recorded), tmp_path)

    def stop(done: int, total: int, note: str) -> None:
        if note.startswith(f"{SECOND} blocks.1"):
            raise Cancelled

    with pytest.raises(Cancelled):
        tn.quantize(pipe, "w4a8", recorded, work=tmp_path / "work", on_progress=stop)
    first = sorted(p.name for p in (tmp_path / "work").glob("*.safetensors"))
    second = sorted(p.name for p in (tmp_path / "work" / SECOND).glob("*.safetensors"))
    assert "blocks.1.safetensors" in first and "blocks.0.safetensors" in second
    assert "blocks.1.safetensors" not in second
    stamps = {name: (tmp_path / "work" / name).stat().st_mtime_ns for name in first}
    again = tn.quantize(pipe, "w4a8", recorded, work=tmp_path / "work")
    assert content(again, tmp_path) == whole
    assert {name: (tmp_path / "work" / name).stat().st_mtime_ns for name in first} == stamps


def test_progress_grows_over_both(pipe: Any, recorded: tn.Trajectory) -> None:
    seen: list[tuple[int, int, str]] = []
    tn.quantize(pipe, "w8a8", recorded, on_progress=lambda *said: seen.append(said))
    done = [d for d, _, _ in seen]
    assert done == sorted(done) and len({total for _, total, _ in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    assert any(note.startswith(SECOND) for _, _, note in seen)


def test_a_scheme_rounds_both_where_they_are(pipe: Any) -> None:
    before = weights(pipe)
    with tn.attach(pipe, "w8a8", execution="int8") as attached:
        layers = attached.execution()["layers"]
        assert layers == {"int8": 40, "float": 12}  # the ends of each stay
    assert same(weights(pipe), before)


# --- the file -------------------------------------------------------------------------------------


def test_the_parts_are_beside_the_main_sections(quantized: tn.Artifact, tmp_path: Path) -> None:
    content(quantized, tmp_path)
    header = read_header(tmp_path / "x.safetensors")
    assert list(header["parts"]) == [SECOND]
    assert "format_version" not in header["parts"][SECOND]
    assert {k: v for k, v in header.items() if k not in ("parts", "format_version")} == {
        k: v for k, v in quantized.header.items() if k != "format_version"
    }


def test_an_artifact_of_one_denoiser_is_as_it_was(tmp_path: Path) -> None:
    """No part, no new key, the old version; a file of then is written again byte by byte."""
    pipe = tiny.wan()
    made = tn.quantize(pipe, "w8a8", tn.record(pipe, steps=2, guidance=2.0, call={
        k: v for k, v in CALL.items() if k != "guidance_scale_2"
    }, runs=1))  # fmt: skip
    assert made.header["format_version"] == "1.2" and made.parts == {}
    assert made.header["schedule"].keys() == {"timesteps", "steps", "guidance", "call"}
    content(made, tmp_path)
    header = read_header(tmp_path / "x.safetensors")
    assert header == json.loads(json.dumps(made.header)) and "parts" not in header
    old = Path(__file__).parents[1] / "data" / "v1.safetensors"
    assert content(tn.Artifact.load(old), tmp_path) == old.read_bytes()


def test_merging_is_part_by_part(pipe: Any, quantized: tn.Artifact, routed: tn.Artifact) -> None:
    assert routed.parts[SECOND].section("weights") and routed.parts[SECOND].section("route")
    assert routed.parts[SECOND].section("weights").keys() == routed.section("weights").keys()
    alone = quantized.alone()
    assert list((alone | quantized).parts) == list((quantized | alone).parts) == [SECOND]
    swapped = tn.Artifact(quantized.header, quantized.tensors, {SECOND: quantized.alone()})
    with pytest.raises(ArtifactError, match="different models"):
        _ = quantized | swapped
    with pytest.raises(ArtifactError, match=f"another model: those of {SECOND} differ"):
        tn.attach(pipe, swapped)


@pytest.mark.parametrize("change", [
    lambda h: h["parts"][SECOND].pop("fingerprint"),
    lambda h: h["parts"][SECOND].update(parts={}),
    lambda h: h["parts"].update({"../x": h["parts"].pop(SECOND)}),
    lambda h: h["parts"].update({"other": h["parts"].pop(SECOND)}),
    lambda h: h.update(parts=[1]),
    lambda h: h.pop("parts"),
    lambda h: h["parts"][SECOND]["schedule"].update(timesteps=[1.0]),
    lambda h: h["parts"][SECOND]["layers"]["proj_out"].update(shape=[1, 1]),
    lambda h: h["schedule"].update(run="x"),
])  # fmt: skip
def test_a_damaged_part_is_one_sentence(
    change: Any, routed: tn.Artifact, tmp_path: Path, forge: Any
) -> None:
    content(routed, tmp_path)
    path = forge(tmp_path / "x.safetensors", change)
    with pytest.raises(ArtifactError) as said:
        loaded = tn.Artifact.load(path)
        tn.attach(tiny.wan_22(), loaded).detach()
    assert len(str(said.value)) <= 300 and str(said.value).endswith(".")


@pytest.fixture
def forge() -> Any:
    """Rewrites the header of a file."""
    from safetensors.torch import load_file, save_file

    def forged(path: Path, change: Any) -> Path:
        header = copy.deepcopy(read_header(path))
        change(header)
        save_file(load_file(path), path, {"tenuto": json.dumps(header)})
        return path

    return forged


def test_it_is_shown_whole(routed: tn.Artifact) -> None:
    text, facts = about("x", routed, 1), facts_of(routed, 1)
    assert f"\n{SECOND}:\n" in text and text.count("computed (#) and reused (.)") == 2
    assert "8 steps, guidance 5" in text and "of these 4 steps here" in text
    assert facts["parts"][SECOND]["layers_by_scheme"] == facts["layers_by_scheme"]
    assert facts["parts"][SECOND]["header"]["route"]
    both, one = plot_all(routed, "x"), plot_all(routed.alone(), "x")
    assert both.height == 2 * one.height
    layer = next(iter(routed.parts[SECOND].header["layers"]))
    assert plot_all(routed, "x", f"{SECOND}/{layer}").size == plot_all(routed, "x", layer).size


def test_compact_weights_of_both(pipe: Any, quantized: tn.Artifact, tmp_path: Path) -> None:
    small = compact(quantized, pipe)
    assert len(content(small, tmp_path)) < len(content(quantized, tmp_path))
    small.save(tmp_path / "small.safetensors")
    found = tn.Artifact.load(tmp_path / "small.safetensors")
    outs = []
    for artifact in (quantized, found):
        with tn.attach(pipe, artifact, execution="int8"):
            outs.append(video(pipe))
    assert torch.equal(*outs)
    with pytest.raises(ArtifactError, match="give the pipeline"):
        compact(quantized, pipe.transformer)


# --- attaching ------------------------------------------------------------------------------------


def test_a_denoiser_by_itself_gets_its_part(pipe: Any, quantized: tn.Artifact) -> None:
    """Hosts load the two apart."""
    for part, denoiser in parts_of(pipe).items():
        codes = (quantized.parts[part] if part else quantized).section("weights")
        with tn.attach(denoiser, quantized) as attached:
            assert attached.clock.timesteps == tuple(
                (quantized.parts[part] if part else quantized).header["schedule"]["timesteps"]
            )
            layer = denoiser.blocks[0].attn1.to_q
            assert torch.equal(layer.weight_scale.flatten(), codes["blocks.0.attn1.to_q.scale"])
    with pytest.raises(ArtifactError, match="the weights differ"):
        tn.attach(tiny.wan_denoiser(7), quantized)


def test_what_an_artifact_lacks_is_told(
    pipe: Any, quantized: tn.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tenuto"), tn.attach(pipe, quantized.alone()):
        assert not any(isinstance(m, QLayer) for m in pipe.transformer_2.modules())
    assert f"{SECOND} stays as it is" in caplog.text


def test_a_refusal_changes_neither(pipe: Any, quantized: tn.Artifact) -> None:
    before = weights(pipe)
    other = tiny.wan_22()
    other.transformer_2 = tiny.wan_denoiser(9)
    with pytest.raises(ArtifactError, match=f"those of {SECOND} differ"):
        tn.attach(other, quantized)
    assert not any(isinstance(m, QLayer) for m in other.transformer.modules())
    with tn.attach(pipe.transformer_2, quantized), pytest.raises(TenutoError, match="already"):
        tn.attach(pipe, quantized)
    assert same(weights(pipe), before)


def test_saving_while_attached_gives_the_float_weights(
    quantized: tn.Artifact, tmp_path: Path
) -> None:
    pipe = tiny.wan_22()
    before = weights(pipe)
    with tn.attach(pipe, quantized) as attached:
        pipe.transformer_2.save_pretrained(tmp_path)
        attached.release()
        with pytest.raises(TenutoError, match="released"):
            pipe.transformer_2.save_pretrained(tmp_path)
        attached.patches.clear()
    loaded = type(pipe.transformer_2).from_pretrained(tmp_path).state_dict()
    assert same({f"{SECOND}.{k}": v for k, v in loaded.items()},
                {k: v for k, v in before.items() if k.startswith(SECOND)})  # fmt: skip


# --- the cache schedule ---------------------------------------------------------------------------


def test_each_has_its_part_of_the_schedule(pipe: Any, routed: tn.Artifact) -> None:
    for part in (routed, routed.parts[SECOND]):
        route = part.header["route"]
        assert route["timesteps"] == part.header["schedule"]["timesteps"]
        assert route["reuse_ratio"] == pytest.approx(0.5, abs=0.05)
        assert min(route["scores"].values()) > 0
    plain = video(pipe)
    with tn.attach(pipe, routed, execution="int8") as attached:
        video(pipe)
        counts = attached.counts()
        mine = {k: c for k, c in counts.items() if k.startswith(f"{SECOND}/")}
        assert len(mine) == 6 and len(counts) == 12
        tables = {"": routed, SECOND: routed.parts[SECOND]}
        for name, part in tables.items():
            table = part.tensors["route/table"]
            for column, branch in enumerate(part.header["route"]["branches"]):
                full = f"{name}/{branch}" if name else branch
                computed = int(table[:, column].sum())
                assert counts[full] == [2 * computed, 2 * (len(table) - computed)]  # cond, uncond
    assert torch.equal(video(pipe), plain)


@pytest.mark.parametrize("steps", [4, 6, 12, 20])
def test_a_run_of_other_steps_keeps_the_share(pipe: Any, routed: tn.Artifact, steps: int) -> None:
    """By the steps of the whole run; each denoiser's table is made of the steps that it has."""
    with tn.attach(pipe, routed, execution="int8") as attached:
        video(pipe, steps)
        for name, part in attached.parts.items():
            grid = part.clock.grid
            assert all((t >= 750) == (name == "") for t in grid) and part.clock.whole == steps
            counts = [c for k, c in attached.counts().items() if k.startswith(SECOND) == bool(name)]
            computed, reused = (sum(c[i] for c in counts) for i in (0, 1))
            share = (routed.parts[name] if name else routed).header["route"]["reuse_ratio"]
            assert computed + reused == 2 * 6 * len(grid)
            wanted = share if steps > 8 else 0.0
            assert reused / (computed + reused) == pytest.approx(wanted, abs=0.12)


def test_an_interrupted_run_leaves_nothing_behind(pipe: Any, routed: tn.Artifact) -> None:
    class Stop(Exception):
        pass

    def stop(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 5:  # in the second denoiser's part
            raise Stop
        return kept

    with tn.attach(pipe, routed, execution="int8"):
        fresh = video(pipe)
        other = {n: x[1:2] if "embeds" in n else x for n, x in CALL.items()}
        with pytest.raises(Stop):
            pipe(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
                 callback_on_step_end=stop, **other)  # fmt: skip
        assert torch.equal(video(pipe), fresh)


def test_a_search_that_was_stopped_in_the_second_goes_on(pipe: Any, tmp_path: Path) -> None:
    recorded = tn.record(pipe, steps=4, guidance=GUIDANCE, call=CALL, runs=1)
    asked: dict[str, Any] = {"reuse": 0.5, "iterations": 1}
    whole = content(tn.train_router(pipe, recorded, **asked), tmp_path)

    def stop(done: int, total: int, note: str) -> None:
        if note.startswith(f"{SECOND} measuring"):
            raise Cancelled

    with pytest.raises(Cancelled):
        tn.train_router(pipe, recorded, **asked, work=tmp_path / "work", on_progress=stop)
    found = tn.train_router(pipe, recorded, **asked, work=tmp_path / "work")
    assert content(found, tmp_path) == whole


def test_a_denoiser_with_one_step_has_no_route(pipe: Any) -> None:
    few = tn.record(pipe, steps=3, guidance=GUIDANCE, call=CALL, runs=1)
    assert (len(few.of("").timesteps), len(few.of(SECOND).timesteps)) == (2, 1)
    made = tn.train_router(pipe, few, reuse=0.5, iterations=1)
    assert "route" in made.header and "route" not in made.parts[SECOND].header
    with pytest.raises(TenutoError, match="leave `sample` out"):
        tn.train_router(pipe, few, sample=lambda d, seed, batch: torch.zeros(batch, 3, 8, 8))


# --- comparing ------------------------------------------------------------------------------------


def test_a_comparison_counts_both(pipe: Any, routed: tn.Artifact) -> None:
    before = weights(pipe)
    found = tn.compare(pipe, routed, count=1, call=CALL)
    both = resident_weight_bytes(pipe.transformer, pipe.transformer_2)
    assert found.resident_weight_bytes["float"] == both
    assert found.resident_weight_bytes["artifact"] < both
    assert found.execution["layers"] == {"int8": 46} and found.int8_weight_share == 1.0
    assert found.reuse_ratio == pytest.approx(0.5, abs=0.05)
    work = [part.header["route"]["reuse_flops"] for part in (routed, *routed.parts.values())]
    assert found.reuse_flops == pytest.approx(sum(work) / 2, abs=1e-3)  # four steps each
    assert found.bf16_floor_psnr_db is not None and found.bf16_floor_psnr_db["median"] < 80
    assert same(weights(pipe), before)


def test_image_to_video_of_two(tmp_path: Path) -> None:
    vae = tiny.video_vae("AutoencoderKLWan", scale_factor_temporal=2, scale_factor_spatial=2)
    pipe = tiny.wan_22(
        "WanImageToVideoPipeline", 10, image_encoder=None, image_processor=None, vae=vae
    )
    call = CALL | {"image": tiny.picture()}
    call |= {name: x[:1] for name, x in CALL.items() if "embeds" in name}
    found = tn.record(pipe, steps=4, guidance=GUIDANCE, call=call)
    made = tn.quantize(pipe, "w8a8", found)
    with tn.attach(pipe, made, execution="int8") as attached:
        assert attached.execution()["layers"] == {"int8": 46}
        assert bool(found.rollout()(pipe.transformer, 0, 1).isfinite().all())


# --- text encoders --------------------------------------------------------------------------------


def test_four_text_encoders() -> None:
    """HiDream has two of CLIP, T5 and Llama."""
    pipe, call = tiny.hidream(), tiny.SMALL | {"max_sequence_length": 16}
    names = ["text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"]
    assert list(encoders_of(pipe)) == names
    recorded = tn.record(pipe, tiny.PROMPTS[:1], steps=2, guidance=3.0, call=call)
    plain = recorded.rollout()(pipe.transformer, 0, 1)
    made = tn.quantize_encoder(
        pipe, "w8", tiny.PROMPTS, method="nearest", steps=2, guidance=3.0, call=call
    )
    assert list(made.header["encoders"]) == names
    with tn.attach(pipe, made) as attached:
        assert list(attached.encoders()) == names
        low = recorded.rollout()(pipe.transformer, 0, 1)
    assert 0 < float((low - plain).norm() / plain.norm()) < 0.2
    assert torch.equal(recorded.rollout()(pipe.transformer, 0, 1), plain)


# --- calls skipped without calibration ------------------------------------------------------------


def test_both_skip_their_calls_without_calibration(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of Wan 2.2's 24 steps each denoiser has its own, and skips of these; off is off."""
    plain = video(pipe, 24)
    with tn.attach(pipe, speedup=2) as attached:
        found = video(pipe, 24)
        said, counts = attached.forecast(), attached.counts()
    assert said is not None and said["steps"] == 24 and said["skipped"] >= 10
    assert said["predicted_db"] > 25
    assert counts.keys() == {"", f"{SECOND}/"}
    for computed, skipped in counts.values():
        assert skipped >= 4 and computed >= 4
    assert sum(map(sum, counts.values())) % 24 == 0, "every call of every step"
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.3
    torch.testing.assert_close(video(pipe, 24), plain)
    assert caplog.text.count("6 of 12 calls are skipped") == 2

    call = CALL | {name: x[:1] for name, x in CALL.items() if "embeds" in name}
    row = tn.compare(pipe, speedup=2, count=1, steps=24, guidance=GUIDANCE, call=call)
    assert (row.reuse_ratio, row.reuse_flops) == (0.5, 0.5)

    with tn.attach(pipe, speedup=2) as attached:
        video(pipe, 8)
        assert not any(skipped for _, skipped in attached.counts().values())
    assert "of a denoiser that has 4 of the 8 steps is skipped: it takes" in caplog.text
