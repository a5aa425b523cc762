"""docs/models.md, made by doing it: every family through every step on a tiny model of its class.

    python -m tests.core.models_table           prints the page
    python -m tests.core.models_table --write   writes it

`tests/core/test_models_page.py` compares the page with what it finds, row by row.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact import Artifact
from tenuto.caching import CacheSchedule
from tenuto.model import WHOLE, denoiser_of, describe, layers
from tenuto.runtime import default_recipe, quantizable
from tests.core.family_pipelines import MODELS, Ready
from tests.core.model.test_models import HIDREAM, KLEIN, MEDIUM, WAN_5B, XL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
STEPS = 4
COLUMNS = (
    "record", "W8A8", "W4A8", "cache schedule", "text encoders", "attach", "compare",
    "save and load", "detach",
)  # fmt: skip
YES, NONE = "yes", "none"


# --- what works -----------------------------------------------------------------------------------


class Row:
    """One family: each column is done once, when it is asked for, on what others have made."""

    def __init__(self, ready: Ready) -> None:
        self.ready, self.model = ready, ready.model
        self.denoiser = denoiser_of(ready.model)
        self.before = [p.detach().clone() for p in self.denoiser.parameters()]

    @cached_property
    def trajectory(self) -> Any:
        """Recorded as its user would."""
        given: dict[str, Any] = {"batch": 2}
        if self.ready.sample is not None:
            given |= {"sample": self.ready.sample, "runs": 1}
        else:
            given |= {"guidance": self.ready.guidance, "call": self.ready.call, "steps": STEPS}
        return tn.record(self.model, self.ready.prompts or None, **given)

    @cached_property
    def route(self) -> Artifact:
        """A search for a cache schedule, as short as it gets."""
        module = import_module("tenuto.calibration.router.effort")
        small = module.RoutePreset(module.HarmoniCa(iterations=1, batch=1), 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module.PRESETS, "quick", small)
            return tn.train_router(self.model, self.trajectory, reuse=0.5)

    @property
    def times(self) -> tuple[float, ...]:
        return self.trajectory.timesteps

    @cached_property
    def w8a8(self) -> Artifact:
        return self.quantized("w8a8")

    @cached_property
    def w4a8(self) -> Artifact:
        return self.quantized("w4a8")

    def quantized(self, scheme: str) -> Artifact:
        """With a short search for layers that stay in float: with random weights none stands out.

        `tests/core/calibration/test_spared.py` has the whole of it.
        """
        module = import_module("tenuto.calibration.spared")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "TRIALS", 3)
            return tn.quantize(self.model, scheme, self.trajectory)

    @cached_property
    def whole(self) -> Artifact:
        """W4A8 with the cache schedule; W8A8 where W4A8 is not to be had."""
        try:
            return self.w4a8 | self.route
        except Exception:  # its own column has it
            return self.w8a8 | self.route

    @cached_property
    def images(self) -> tuple[Tensor, Tensor, Tensor, dict[str, list[int]]]:
        """In full precision, with everything attached, after detaching; what was reused."""
        run = self.trajectory.rollout()
        with torch.no_grad():
            plain = run(self.denoiser, 3, 1).clone()
            with tn.attach(self.model, self.whole) as attached:
                other, counts = run(self.denoiser, 3, 1).clone(), attached.counts()
            return plain, other, run(self.denoiser, 3, 1).clone(), counts


def record(row: Row) -> None:
    assert row.trajectory.calls and len(row.times) >= STEPS


def w8a8(row: Row) -> None:
    check_layers(row, row.w8a8)


def w4a8(row: Row) -> None:
    check_layers(row, row.w4a8)
    assert any(f["scheme"].startswith("w4a8") for f in row.w4a8.header["layers"].values())


def check_layers(row: Row, made: Artifact) -> None:
    """Every layer of every denoiser is quantized, or in a table, or one that stays in float."""
    known = tuple(f"{name}." for name in made.header.get("temporal", {}).get("modules", ()))
    keep = default_recipe(tn.schemes.W8A8, describe(row.denoiser))
    wanted = {n for n, layer in layers(row.denoiser) if quantizable(layer)}
    wanted = {n for n in wanted if keep.rule(n) is not None and keep.rule(n).scheme is not None}
    done = set(made.header["layers"]) | set(made.header.get("kept_in_float", ()))
    assert {n for n in wanted - done if not f"{n}.".startswith(known)} == set()


def cache_schedule(row: Row) -> None:
    """A trained one, and one of whole calls."""
    assert 0 < row.route.header["route"]["reuse_ratio"] < 1
    times = row.trajectory.of("").timesteps  # of the main denoiser, where there are several
    schedule = CacheSchedule.steps([step == 0 for step in range(len(times))], times, (WHOLE.name,))
    made = Artifact.new(row.model, row.trajectory.of("").schedule())
    made.header["route"] = {"timesteps": list(times), "branches": [WHOLE.name]}
    made.tensors["route/table"] = schedule.table
    with torch.no_grad(), tn.attach(row.model, made) as attached:
        row.trajectory.rollout()(row.denoiser, 3, 1)
        assert attached.counts()[WHOLE.name][1] > 0


def text_encoders(row: Row) -> str | None:
    """All of them in 4 bits by GPTQ; attached, each of them has quantized layers."""
    parts = {} if row.ready.sample else row.model.components
    encoders = {n for n, part in parts.items() if n.startswith("text_encoder") and part is not None}
    if not encoders:
        return NONE
    made = tn.quantize_encoder(
        row.model, "w4", row.ready.prompts, method="gptq", steps=STEPS, call=row.ready.call
    )
    with tn.attach(row.model, made) as attached:
        assert set(attached.encoders()) == encoders
    return None


def attach(row: Row) -> None:
    plain, other, _, counts = row.images
    assert not torch.equal(plain, other) and bool(other.isfinite().all())
    assert sum(reused for _, reused in counts.values()) > 0


def compare(row: Row) -> None:
    ready = row.ready
    given: dict[str, Any] = {"sample": ready.sample}
    if ready.sample is None:
        given = {"prompts": ready.prompts or None, "call": ready.call}
    found = tn.compare(row.model, row.whole, count=2, batch=2, **given)
    assert str(found)


def save_and_load(row: Row) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.safetensors"
        row.whole.save(path)
        found = Artifact.load(path)
        assert found.parts.keys() == row.whole.parts.keys()
        pairs = [(found, row.whole), *((found.parts[n], row.whole.parts[n]) for n in found.parts)]
        for one, other in pairs:
            version = {"format_version": one.header["format_version"]}  # of a file with parts
            assert one.header == other.header | version
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(t, other.tensors[k]) for k, t in one.tensors.items())


def detach(row: Row) -> None:
    plain, _, after, _ = row.images
    assert torch.equal(plain, after)
    assert all(map(torch.equal, row.before, row.denoiser.parameters()))


DONE: dict[str, Callable[[Row], str | None]] = dict(
    zip(
        COLUMNS,
        (record, w8a8, w4a8, cache_schedule, text_encoders, attach, compare, save_and_load, detach),
        strict=True,
    )
)


def cells(name: str) -> list[tuple[str, BaseException | None]]:
    """(what the page says, what went wrong) of each column of the family `name`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers and transformers
        row, found = Row(MODELS[name]()), []
        for do in DONE.values():
            try:
                found.append((do(row) or YES, None))
            except Exception as error:  # whatever it is, the page has to say so
                found.append(("no", error))
    return found


# --- how much of a released model -----------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Of a model of released size: parameters, and shares of its weights."""

    parameters: int
    quantized: float
    branches: float
    blocks: float
    call: float

    def line(self, name: str) -> str:
        """A row of the second table."""
        size = f"{self.parameters / 1e9:.2f} B"
        shares = (self.quantized, self.branches, self.blocks, self.call)
        return f"| {name} | {size} | " + " | ".join(f"{100 * s:.1f} %" for s in shares) + " |"


FLUX_KLEIN_9B = KLEIN | {
    "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}  # fmt: skip
WAN_1B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "qk_norm": "rms_norm", "pos_embed_max_size": 192}  # fmt: skip
SD15 = {"cross_attention_dim": 768}
SMALLER = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5": ("UNet2DConditionModel", SD15),
    "SDXL": ("UNet2DConditionModel", XL),
    "Stable Diffusion 3 medium": ("SD3Transformer2DModel", SMALLER),
    "Stable Diffusion 3.5 medium": ("SD3Transformer2DModel", MEDIUM),
    "Stable Diffusion 3.5 large": ("SD3Transformer2DModel", LARGE),
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2 dev": ("Flux2Transformer2DModel", {}),
    "FLUX.2 klein 9B": ("Flux2Transformer2DModel", FLUX_KLEIN_9B),
    "FLUX.2 klein 4B": ("Flux2Transformer2DModel", KLEIN),
    "FLUX.3": ("Flux3Transformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Qwen-Image-Edit-2511": ("QwenImageTransformer2DModel", {"zero_cond_t": True}),
    "Qwen-Image-2.1": ("QwenImage21Transformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Wan 14B (2.1, 2.2: each of two)": ("WanTransformer3DModel", {}),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", WAN_1B),
    "Wan 2.2 5B": ("WanTransformer3DModel", WAN_5B),
    "Krea 2": ("Krea2Transformer2DModel", {}),
    "LTX-2": ("LTX2VideoTransformer3DModel", {}),
    "MiniMax H3": ("MiniMaxH3Transformer3DModel", {}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", {}),
    "HunyuanImage 2.1": ("HunyuanImageTransformer2DModel", {}),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "Sana 1.6B": ("SanaTransformer2DModel", {}),
    "HiDream-I1": ("HiDreamImageTransformer2DModel", HIDREAM),
    "PixArt-α, -Σ": ("PixArtTransformer2DModel", {}),
    "DiT-XL/2": ("DiTTransformer2DModel", {"num_layers": 28}),
    "Cosmos Predict 1 7B": ("CosmosTransformer3DModel", {}),
    "Anima": (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 16, "extra_pos_embed_type": None},
    ),
    "AnimateDiff (SD 1.5)": ("UNetMotionModel", SD15),
    "Stable Video Diffusion": ("UNetSpatioTemporalConditionModel", {}),
    "Kandinsky 3": ("Kandinsky3UNet", {}),
    "UNet2D": ("UNet2DModel", {}),
}


def share(kind: str, config: dict[str, Any]) -> Share:
    """Of the class `kind` of diffusers, built without memory."""
    import diffusers

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = getattr(diffusers, kind)(**config)
    backbone = describe(model)
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    recipe, tables = default_recipe(tn.schemes.W8A8, backbone), inside(backbone.temporal)

    def quantized(name: str, layer: nn.Module) -> bool:
        rule = recipe.rule(name)
        known = name in own and quantizable(layer) and rule is not None
        return f"{name}.".startswith(tables) or (known and rule.scheme is not None)

    own = {name for name, _ in layers(model)}
    weights = {n: m.weight.numel() for n, m in every.items()}
    low = sum(size for n, size in weights.items() if quantized(n, every[n]))
    total = sum(p.numel() for p in model.parameters())

    def within(names: Iterable[str]) -> float:
        start = inside(names)
        found = (p.numel() for n, p in model.named_parameters() if n.startswith(start))
        return sum(found) / total

    parts = within(b.name for b in backbone.branches)
    called = sum(p.numel() for p in model.get_submodule(WHOLE.name).parameters()) / total
    return Share(total, low / sum(weights.values()), parts, within(backbone.blocks), called)


def inside(names: Iterable[str]) -> tuple[str, ...]:
    """What the names of parameters in these modules begin with."""
    return tuple(f"{name}." for name in names)


# --- the page -------------------------------------------------------------------------------------


def row_line(name: str, found: Iterable[str]) -> str:
    """A row of the first table."""
    return f"| {name} | " + " | ".join(found) + " |"


def page(rows: dict[str, list[str]], shares: dict[str, Share]) -> str:
    """The whole page: TEXT with both tables in it."""
    head = row_line("model", COLUMNS) + "\n|" + " --- |" * (len(COLUMNS) + 1)
    works = "\n".join([head, *(row_line(n, found) for n, found in rows.items())])
    sizes = "\n".join(s.line(n) for n, s in shares.items())
    return TEXT.format(works=works, sizes=sizes)


TEXT = """# Models: what works with which

Every row of the first table was done, step by step, on a pipeline of diffusers' own classes with
random weights, made as small as the classes allow (under 3 M parameters): it shows that the code
runs and gives back what it should, not how good the images of the trained model are.
`tests/core/test_models_page.py` does it again and compares. FLUX.3, MiniMax H3 and Anima have no
plain pipeline in diffusers: they are tried as bare denoisers, with `sample=`.

{works}

- *record*: `tn.record` of the pipeline's own call. *W8A8*, *W4A8*: `tn.quantize` of every layer
  that is not to stay in float; W4A8 by GPTQ, the default. *cache schedule*: `tn.train_router`, and
  a schedule of whole calls. *text encoders*: all of them in 4 bits by GPTQ; "none" has no prompts,
  or gets them embedded.
- *attach*: W4A8 and the cache schedule together: another image, all of it finite, something reused.
  *compare*: `tn.compare` runs through. *save and load*: equal to the bit. *detach*: the image and
  all weights are as they were, to the bit.

## Models without a row

A model that no family file knows is taken apart by its lists of blocks: its layers are quantized,
its blocks and its calls reused. What is lost is detail, such as which layers share their input.
`tests/core/test_further_models.py` takes classes of diffusers that are such models through
recording, W4A8, a cache schedule and back: CogView 4, GLM-Image, ERNIE-Image, Ideogram 4, FIBO 2,
LongCat-Image, Ovis-Image, Kandinsky 5, JoyImage-Edit, Nucleus-Image, PRX, Wan-Animate and
Sana-Video, as bare denoisers with random weights. The experts of Nucleus-Image are not layers but
one weight for all of them, and stay in float.

## How much of a released model

The classes at the released sizes, built without memory. *quantized*: the share of the weights of
linear and convolution layers that is in 8 bits, or in a table by the timestep in place of the
module, under the default recipe. The other columns: the share of all weights inside something that
a cache schedule can reuse. *branches*: attention, feed-forward and the like, what schedules are
made of unless you say otherwise. *blocks*: with their norms and modulations, where a schedule names
whole blocks; FLUX.3's lacks the blocks of a condition image, which run only where there is one.
*the call*: with `whole=True` (`tenuto train-router --whole`) `train_router` makes a schedule of
whole calls, where a reused step computes nothing at all; that holds for any denoiser, also for one
that no family file knows.

| model | parameters | quantized | branches | blocks | the call |
| --- | --- | --- | --- | --- | --- |
{sizes}
"""


def main(write: bool) -> None:
    """Print the page, or write it."""
    torch.set_num_threads(1)
    rows = {}
    for name in MODELS:
        found = cells(name)
        rows[name] = [said for said, _ in found]
        for column, (_, error) in zip(COLUMNS, found, strict=True):
            if error is not None:
                print(f"{name}, {column}: {type(error).__name__}: {error}", file=sys.stderr)
    text = page(rows, {name: share(*what) for name, what in RELEASED.items()})
    if write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
