"""`check`: what works with a model and what does not, said before the denoiser is called."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.calibration.check import estimates
from tenuto.calibration.check.layers import weighted
from tenuto.calibration.check.problems import of_machine
from tenuto.calibration.check.report import gib
from tenuto.errors import SchemeError, TenutoError
from tenuto.model import Backbone, Branch, denoiser_of, watched
from tenuto.sampling import skeleton
from tests.core import tiny_pipelines as tiny

asked = cache(tiny.asked)


@contextmanager
def never_called(pipe: Any) -> Iterator[None]:
    """No network of the pipeline is called meanwhile."""
    calls: list[str] = []

    def note(name: str, args: Any, kwargs: Any) -> None:
        calls.append(name)

    with watched(denoiser_of(pipe), before=note):
        yield
    assert not calls


def checked(pipe: Any, **options: Any) -> tn.Check:
    """`check` of a pipeline that is not called by it."""
    with never_called(pipe):
        return tn.check(pipe, **options)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_is_described_without_a_call(kind: str) -> None:
    pipe, prompts, call = asked(kind)
    found = checked(pipe, prompts=prompts or (), call=call, steps=20, scheme="w4a8")
    denoiser = denoiser_of(pipe)
    every = sum(p.numel() for p in denoiser.parameters())
    assert not found.stopping() and found.known
    assert found.weights["all"] == every
    assert sum(facts["weights"] for facts in found.layers.values()) == found.weights["quantized"]
    rest = sum(facts["weights"] for facts in found.floats)
    assert found.weights["quantized"] + rest == sum(size for _, _, size in weighted(denoiser))
    assert {"w4a8", "w8a8"} >= set(found.layers) and found.layers["w4a8"]["layers"]
    assert found.weights["quantized"] > 0.8 * every
    assert sum(found.branches.values()) and found.temporal
    assert set(found.encoders) == {n for n in vars(pipe) if "text_encoder" in n and vars(pipe)[n]}
    assert found.memory["needed"] == 4 * every
    assert found.time["uses"]["quantize"]["calls"] > 0
    assert found.time["uses"]["train-router"]["seconds"] > 0
    assert json.loads(json.dumps(found.to_json()))["stops"]["quantize"] == []
    assert found.hosts
    assert type(denoiser).__name__ in str(found) and "in w4a8" in str(found)


@cache
def stable_diffusion() -> Any:
    return tiny.stable_diffusion("StableDiffusionPipeline")


def sd() -> Any:
    """A pipeline of one's own."""
    return copy.deepcopy(stable_diffusion())


def attached(pipe: Any) -> None:
    tn.attach(pipe, "w8a8")


def on_meta(pipe: Any) -> None:
    pipe.unet.to("meta")


def cast(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cached(pipe: Any) -> None:
    from diffusers import FasterCacheConfig

    pipe.unet._cache_config = FasterCacheConfig()


def grouped(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        pipe.unet, torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1
    )


def fused(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()


def quantized_before(pipe: Any) -> None:
    pipe.unet.register_to_config(quantization_config={"quant_method": "bitsandbytes"})


ALL = ("quantize", "text-encoder", "train-router", "compare")
STATES: list[tuple[Callable[[Any], None], str, tuple[str, ...]]] = [
    (attached, "attached to the model already", ALL),
    (on_meta, "offloaded until they are called", ALL),
    (cast, "Layerwise casting is on", ALL),
    (grouped, "Group offloading is on", ALL),
    (cached, "The FasterCache of diffusers is on", ("train-router", "compare")),
    (fused, "projections are fused", ("quantize", "compare")),
    (quantized_before, "quantized by bitsandbytes already", ("quantize",)),
]


@pytest.mark.parametrize(
    ("change", "words", "stops"), STATES, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_state_of_the_model_is_named(
    change: Callable[[Any], None], words: str, stops: tuple[str, ...]
) -> None:
    """The sentence is the one that the function itself would raise, and stops what that would."""
    pipe = sd()
    change(pipe)
    found = checked(pipe)
    for use in ALL:
        said = [sentence for sentence in found.stopping(use) if words in sentence]
        assert bool(said) == (use in stops), use
    with pytest.raises(TenutoError, match=words):
        found.refuse(stops[0])
    assert words in str(found)


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 1001}, "at most 1000 steps, not 1001"), ({"steps": 0}, "at least one step"),
    ({"call": {"hight": 8}}, "takes no hight (did you mean height?)"),
    ({"call": {"generator": 3}}, "generator follows from"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), CALLS)
def test_a_call_that_cannot_be_is_named(options: dict[str, Any], words: str) -> None:
    found = checked(stable_diffusion(), **options)
    for use in ALL:
        assert any(words in sentence for sentence in found.stopping(use))


def test_a_missing_keyword_is_named() -> None:
    pipe = tiny.wan("WanImageToVideoPipeline", image_encoder=None, image_processor=None)
    assert any("needs image" in sentence for sentence in checked(pipe).stopping("quantize"))
    assert not checked(pipe, call={"image": tiny.picture()}).stopping("quantize")


def test_what_does_not_stop_is_a_warning() -> None:
    pipe = sd()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    found = checked(pipe, steps=4)
    assert not found.stopping()
    assert [s for s in found.warnings("train-router") if "4 steps are few" in s]
    assert not found.warnings("compare")
    assert "is compiled" in str(found)
    one = checked(stable_diffusion(), steps=1)
    assert one.stopping("train-router") == ["With one step there is nothing to reuse."]
    assert not one.stopping("quantize")


def test_another_network_that_is_called_is_named() -> None:
    pipe = tiny.wan(transformer_2=tiny.wan().transformer, boundary_ratio=0.5)
    call = asked("wan")[2]
    found = checked(pipe, prompts=(), call=call)
    assert not found.further and not found.warnings("quantize")  # it is calibrated too
    pipe = stable_diffusion()
    pipe.controlnet = tiny.unet()
    found = checked(pipe)
    assert found.further == {"controlnet": "UNet2DConditionModel"}
    assert any("controlnet" in sentence for sentence in found.warnings("quantize"))


def test_no_text_encoder_stops_its_quantization_alone() -> None:
    pipe, _, call = asked("qwen-image")
    found = checked(pipe, prompts=(), call=call, text_encoder=True)
    assert found.stopping("text-encoder") and not found.stopping("quantize")
    assert found.hosts == ("QwenImageTransformer2DModel",)
    far = sd()
    far.text_encoder.to("meta")
    assert not checked(far).stopping()
    (sentence,) = checked(far, text_encoder=True).stopping()
    assert "offloaded until they are called" in sentence


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (tiny.vae(), "AutoencoderKL is an autoencoder, where a denoiser is meant"),
        (tiny.t5().encoder.final_layer_norm, "no list of blocks"),
        (object(), "has no `transformer` or `unet`"),
    ],
)  # fmt: skip
def test_what_is_no_denoiser_is_named(model: Any, words: str) -> None:
    found = tn.check(model)
    assert all(words in found.stopping(use)[0] for use in ALL) and words in str(found)


# --- a model of no family -------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    """A convolution that computes with other weights than it has."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = Standardized(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.conv(x).relu())


class Home(nn.Module):
    """(x (B, 8, 4, 4), timestep (B,)) -> the same; most of its weights are in its stem."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.clock, self.stem = nn.Linear(1, 8), nn.Linear(16, 16 * width)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.back = nn.Linear(16 * width, 16)
        self.up = nn.ConvTranspose2d(8, 8, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.clock(timestep[:, None] / 1000)[:, :, None, None]
        x = self.back(self.stem(x.flatten(2))).view_as(x)
        for block in self.blocks:
            x = block(x)
        return self.up(x)


def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    x = torch.randn(batch, 8, 4, 4, generator=torch.Generator().manual_seed(seed))
    for t in (900.0, 500.0, 100.0):
        x = x - 0.1 * denoiser(x, torch.full((batch,), t))
    return x[:, :3].clamp(-1, 1)


def test_what_stays_in_float_is_named_with_its_reason() -> None:
    found = tn.check(Home())
    reasons = {facts["why"]: facts for facts in found.floats}
    own, up = (
        "Standardized computes in a way of its own",
        "ConvTranspose2d has no number format here",
    )
    assert set(reasons) == {own, up}
    assert reasons[own]["layers"] == 2 and reasons[own]["names"] == [
        "blocks.0.conv",
        "blocks.1.conv",
    ]
    assert reasons[up]["weights"] == 64
    assert not found.known and found.temporal is None and not found.hosts
    assert "described by its lists of blocks" in str(found)


def test_a_schedule_that_would_gain_nothing_is_named() -> None:
    """Two small blocks beside a stem of 2.6 million weights."""
    found = tn.check(Home(5000))
    (sentence,) = found.stopping("train-router")
    assert "would gain nothing" in sentence and "below 0.1 % of the work" in sentence
    assert not found.stopping("quantize")
    assert not tn.check(Home()).stopping("train-router")


def test_a_description_of_ones_own_counts() -> None:
    model = Home(5000)
    own = Backbone("home", ("stem", "blocks.0"), (Branch("stem", "block", "stem"),), keep=("up",))
    found = tn.check(model, describe=own)
    assert found.family == "home" and found.known and found.branches == {"block": 1}
    assert not found.stopping()


def test_one_call_says_time_work_and_time_only_modules() -> None:
    model, calls = Home().eval(), list[str]()
    with watched(model, before=lambda name, args, kwargs: calls.append(name)):
        found = tn.check(model, sample=sample, run=True)
    assert found.temporal == ("clock",) and found.weights["time-only"] == 16
    assert found.time["seconds_per_row"] > 0 and "% in branches" in found.time["how"]
    assert 0 < len(calls) < 12
    with pytest.raises(TenutoError, match="needs `sample=fn`"):
        tn.check(model, run=True)
    narrow = Home().eval()
    narrow.stem = nn.Linear(4, 128)
    (sentence,) = tn.check(narrow, sample=sample, run=True).stopping("quantize")
    assert sentence.startswith("The model cannot run: ")
    pipe = stable_diffusion()
    assert tn.check(pipe, run=True, call=tiny.SMALL).time["uses"]["quantize"]["seconds"] > 0


def test_memory_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "free_memory", lambda device: 1000)
    found = tn.check(Home())
    (sentence,) = found.warnings("quantize")
    assert "MiB are free" in sentence and not found.stopping()
    assert found.memory["by block"] >= found.memory["needed"], "no less: it is not named"
    assert "--low-memory" not in sentence
    least = dict(found.memory) | {"needed": 9 * 2**30, "by block": 4 * 2**30, "free": 2**30}
    (large,) = of_machine(least)
    assert "(block by block, --low-memory, 4.0 GiB), and 1.0 GiB are free." in large.sentence


def test_free_memory_is_within_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = estimates.free_memory(torch.device("cpu"))
    assert free is not None and free > 2**20
    for name, value in (("LIMIT", 5000), ("USED", 1000)):
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.setattr(estimates, name, tmp_path / name)
    assert estimates.free_memory(torch.device("cpu")) == 4000
    monkeypatch.setattr(estimates, "MEMORY", tmp_path / "none")
    assert estimates.free_memory(torch.device("cpu")) == 4000


def test_a_question_that_is_wrong_is_refused() -> None:
    for options in ({"scheme": "w3a3"}, {"preset": "best"}, {"rounding": "up"}):
        with pytest.raises(SchemeError):
            tn.check(Home(), **options)


# --- folders --------------------------------------------------------------------------------------


def folder(path: Path, pipe: str, parts: dict[str, tuple[str, str, Any]]) -> Path:
    """A pipeline's folder with configurations alone. parts: name: (library, class, settings)."""
    import diffusers

    index: dict[str, Any] = {"_class_name": pipe}
    for name, (library, cls, settings) in parts.items():
        index[name] = [library, cls]
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            if library == "diffusers":
                getattr(diffusers, cls)(**settings).save_config(path / name)
            else:
                settings.save_pretrained(path / name)
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_huge_model_is_checked_without_its_weights(tmp_path: Path) -> None:
    """FLUX.2 of 32 billion parameters, of which there is the configuration alone."""
    flow = ("diffusers", "FlowMatchEulerDiscreteScheduler", {})
    parts = {"transformer": ("diffusers", "Flux2Transformer2DModel", {}), "scheduler": flow}
    model = folder(tmp_path, "Flux2Pipeline", parts)
    found = tn.check(str(model))
    assert (
        found.weights["all"] > 32e9
        and found.family == "flux2"
        and found.hosts == ("Flux", "IntegratedFluxTransformer2DModel")
    )
    assert found.memory["needed"] > 2 * 4 * 32e9
    (sentence,) = found.stopping("quantize")
    assert "has no weights in safetensors" in sentence
    named = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    named.write_text(json.dumps({"weight_map": {"x": "a-00001.safetensors"}}))
    (sentence,) = tn.check(model).stopping("quantize")
    assert "a-00001.safetensors is missing" in sentence


def test_a_folder_is_checked_like_the_loaded_pipeline(tiny_pixart_folder: Path) -> None:
    from tenuto.sampling.loading import load

    lifeless, alive = tn.check(str(tiny_pixart_folder)), tn.check(load(str(tiny_pixart_folder)))
    one, other = lifeless.to_json(), alive.to_json()
    for changing in ("memory", "time"):
        del one[changing], other[changing]
    assert one == other
    stored = skeleton(str(tiny_pixart_folder))
    assert stored is not None and not stored.complaints
    files = {p.parent.name: p.stat().st_size for p in tiny_pixart_folder.glob("*/*.safetensors")}
    for name, size in stored.stored.items():
        assert 0.8 * files[name] < size < files[name]
    assert all(p.is_meta for p in denoiser_of(stored.pipe).parameters())


def test_a_folder_that_cannot_be_built_says_why(tmp_path: Path, tiny_pixart_folder: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny_pixart_folder, tmp_path / "broken")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "transformer" / "config.json").write_text("{}")
    shutil.rmtree(broken / "text_encoder")
    found = tn.check(broken)
    assert any(
        "text_encoder has no config.json" in sentence for sentence in found.stopping("quantize")
    )
    later = index | {"transformer": ["diffusers", "LaterTransformer"]}
    (broken / "model_index.json").write_text(json.dumps(later))
    with pytest.raises(TenutoError, match="no LaterTransformer"):
        tn.check(broken)
    (broken / "model_index.json").write_text("[")
    with pytest.raises(TenutoError):
        tn.check(broken)
    assert skeleton("some/model") is None
    with pytest.raises(TenutoError, match="only loading it tells"):
        tn.check("some/model")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_the_file_is_about_as_large_as_was_said(scheme: str, tmp_path: Path) -> None:
    """Its codes are; what else is in it is small beside those of a model of usual size."""
    pipe, prompts, call = asked(tiny.KINDS[0])
    found = checked(pipe, prompts=prompts or (), call=call, steps=2, scheme=scheme)
    taken = tn.record(pipe, prompts=prompts or ("a",), steps=2, call=call)
    made = tn.quantize(pipe, scheme, taken, temporal="none")
    codes = sum(x.nbytes for name, x in made.tensors.items() if name.startswith("weights/"))
    assert found.size["codes"] == pytest.approx(codes, rel=0.1)
    assert found.size["in 16 bits"] == 2 * found.weights["all"]
    assert f"about {gib(found.size['codes'])} for the denoiser" in str(found)


def test_an_estimate_is_no_less_than_its_calls(
    monkeypatch: pytest.MonkeyPatch, tiny_pixart_folder: Path
) -> None:
    """With one call timed: as often as that. Without: every call costs something, small or not."""
    from tenuto.sampling.loading import load

    monkeypatch.setattr(estimates, "seconds_of", lambda *given: 0.25)
    monkeypatch.setattr(estimates, "products_per_second", lambda *given: 1e15)
    monkeypatch.setattr(estimates, "seconds_a_module", lambda *given: 1e-3)
    pipe = load(str(tiny_pixart_folder))
    timed = tn.check(pipe, run=True).time
    rows = 2  # of a call of one image: with guidance
    assert timed["seconds_per_row"] == 0.25 / rows
    for facts in timed["uses"].values():
        assert facts["seconds"] >= facts["calls"] * 0.25 / rows
        assert facts["seconds_at_most"] > facts["seconds"]
    unseen = tn.check(str(tiny_pixart_folder)).time
    modules = sum(1 for m in pipe.transformer.modules() if not any(m.children()))
    batch = 4 * rows
    facts = unseen["uses"]["quantize"]
    assert facts["seconds"] >= facts["calls"] / batch * modules * 1e-3


def test_an_estimate_grows_with_the_work(
    monkeypatch: pytest.MonkeyPatch, tiny_pixart_folder: Path
) -> None:
    """With steps, effort and prompts that are looked at, whatever a machine does meanwhile."""
    monkeypatch.setattr(estimates, "products_per_second", lambda *given: 1e9)
    monkeypatch.setattr(estimates, "seconds_a_module", lambda *given: 1e-4)

    def seconds(use: str, **options: Any) -> float:
        return tn.check(str(tiny_pixart_folder), **options).time["uses"][use]["seconds"]

    for use in ("quantize", "train-router"):
        assert seconds(use, steps=10) < seconds(use, steps=20) < seconds(use, steps=40)
        assert seconds(use, steps=20) < seconds(use, steps=20, preset="thorough")
    assert seconds("quantize", steps=20) < seconds("quantize", steps=20, scheme="w4a8")
    rows = [estimates.spread(1.0, {"x": estimates.Calls(n, n)}, "", 0.5) for n in (1, 2, 9)]
    found = [row["uses"]["x"]["seconds"] for row in rows]
    assert found == [1.5, 3.0, 13.5]
