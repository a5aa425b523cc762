"""What tests of the library share: tiny denoisers with random weights, loops that sample them."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

KINDS = ("pixart", "dit", "unet", "home")  # what every test of patches runs on
LATENT = ("pixart", "unet", "sd3", "flux")  # their samples have 4 channels


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """These models are too small for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- a denoiser that no family knows --------------------------------------------------------------


class HomeBlock(nn.Module):
    """Attention called by keyword, a feed-forward of named parts, one modulation for all rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = HomeAttention(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                up=nn.Linear(width, 2 * width), act=nn.GELU(), down=nn.Linear(2 * width, width)
            )
        )

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        x = x + self.attn(hidden=self.norm(x) + shift)
        return x + self.mlp(x)


class HomeAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.qkv(hidden).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class HomeMade(nn.Module):
    """(x (B, 3, 8, 8), a timestep of one element, labels (B,)) -> (B, 3, 8, 8)."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, stride=2)
        self.step, self.label = nn.Linear(8, width), nn.Embedding(11, width)
        self.layers = nn.ModuleList(HomeBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t.reshape(1, 1).float() / 1000 * 2.0 ** torch.arange(8)
        shift = self.step(angles.sin())[:, None]  # (1, 1, D): no row of its own for an image
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.label(labels)[:, None]
        for layer in self.layers:
            tokens = layer(tokens, shift=shift)
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


# --- tiny denoisers -------------------------------------------------------------------------------


def _made(kind: str) -> nn.Module:
    from diffusers import (
        DiTTransformer2DModel,
        FluxTransformer2DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
    )

    if kind == "sd3":
        return SD3Transformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            num_layers=3, joint_attention_dim=24, caption_projection_dim=32, sample_size=8,
            patch_size=2, pooled_projection_dim=24, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip
    if kind == "flux":
        return FluxTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=16, num_layers=2,
            num_single_layers=2, joint_attention_dim=24, pooled_projection_dim=24,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    if kind == "pixart":
        return PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            num_layers=3, cross_attention_dim=32, sample_size=8, patch_size=2,
            caption_channels=24, use_additional_conditions=False,
        )  # fmt: skip
    if kind == "dit":
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3,
            num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
    if kind == "unet":  # the blocks of SD 1.5, one level less
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24, attention_head_dim=2,
        )  # fmt: skip
    return HomeMade()


def _randomized(module: nn.Module) -> nn.Module:
    """Random weights, of the same seed each time: nothing stays zero, and quantization shows."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                width = 0.2 if "table" in name or "embed" in name else 1.2 / math.sqrt(p[0].numel())
                p.copy_(torch.randn(p.shape, generator=draw) * width)
            else:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
                p.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], nn.Module]:
    """tiny(kind): a new denoiser, of KINDS, "sd3" or "flux"; the same weights each time."""
    made: dict[str, nn.Module] = {}

    def build(kind: str) -> nn.Module:
        if kind not in made:
            with torch.random.fork_rng(devices=[]):
                made[kind] = _randomized(_made(kind))
        return copy.deepcopy(made[kind])

    return build


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of denoiser in turn."""
    return request.param


# --- loops that sample them -----------------------------------------------------------------------


def rows(kind: str, seeds: list[int]) -> dict[str, Tensor]:
    """The conditions of images `seeds`; seed -1 is the empty one of guidance."""
    if kind in ("dit", "home"):
        return {"labels": torch.tensor([10 if s < 0 else s % 10 for s in seeds])}
    draws = [torch.Generator().manual_seed(7000 + s) for s in seeds]
    return {"text": torch.stack([torch.randn(5, 24, generator=g) for g in draws])}


def call(kind: str, denoiser: nn.Module, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    """One denoiser call, as the diffusers pipeline of that kind makes it; `t` has no dimension."""
    if kind == "pixart":
        step = t[None].expand(len(x))
        return denoiser(x, encoder_hidden_states=given["text"], timestep=step).sample
    if kind == "dit":
        step = t[None].expand(len(x))
        return denoiser(x, timestep=step, class_labels=given["labels"]).sample
    if kind == "unet":
        return denoiser(x, t, encoder_hidden_states=given["text"]).sample
    if kind == "sd3":
        text, step = given["text"], t[None].expand(len(x))
        return denoiser(
            x, encoder_hidden_states=text, pooled_projections=text[:, 0], timestep=step
        ).sample
    if kind == "flux":
        return _packed_call(denoiser, x, t, given["text"])
    return denoiser(x, t, given["labels"])


def _packed_call(denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """FLUX takes 2 x 2 pixels as a token, with its place."""
    size = x.shape[-1] // 2
    tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    ids = torch.zeros(size, size, 3)
    ids[..., 1], ids[..., 2] = torch.arange(size)[:, None], torch.arange(size)[None]
    out = denoiser(
        tokens, encoder_hidden_states=text, pooled_projections=text[:, 0],
        timestep=t[None].expand(len(x)) / 1000, img_ids=ids.flatten(0, 1),
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample  # fmt: skip
    return nn.functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (size, size)), 2)


@dataclass
class Loop:
    """`sample(denoiser, seed, batch)`: DDIM with guidance, v-prediction, no pipeline.

    split: the halves of guidance in two calls. heun: every step but the last evaluates twice.
    start: the first step, as image-to-image has it. size: height and width of the sample.
    """

    kind: str
    steps: int = 4
    guidance: float = 2.0
    split: bool = False
    heun: bool = False
    start: int = 0
    size: int = 8

    def times(self) -> Tensor:
        """int64 (steps,), made anew for every run as schedulers do."""
        return torch.linspace(999, 0, self.steps + 1)[:-1].round().long()

    def noise(self, seed: int, batch: int) -> Tensor:
        """(batch, C, size, size); image i depends on seed + i alone."""
        channels = 4 if self.kind in LATENT else 3
        draws = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        shape = (channels, self.size, self.size)
        return torch.stack([torch.randn(shape, generator=g) for g in draws])

    def guided(self, denoiser: nn.Module, x: Tensor, t: Tensor, seeds: list[int]) -> Tensor:
        """Both halves, in one call or in two."""
        empty = [-1] * len(seeds)
        if self.split:
            without = call(self.kind, denoiser, x, t, rows(self.kind, empty))
            with_ = call(self.kind, denoiser, x, t, rows(self.kind, seeds))
        else:
            both = call(self.kind, denoiser, torch.cat([x, x]), t, rows(self.kind, empty + seeds))
            without, with_ = both.chunk(2)
        return without + self.guidance * (with_ - without)

    def __call__(self, denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        times, seeds = self.times(), [seed + i for i in range(batch)]
        x = self.noise(seed, batch)
        follow = [*times[1:], torch.tensor(0)]
        for t, after in list(zip(times, follow, strict=True))[self.start :]:
            v = self.guided(denoiser, x, t, seeds)
            if self.heun and int(after):
                ahead = self.step(x, v, t, after)
                v = (v + self.guided(denoiser, ahead, after, seeds)) / 2
            x = self.step(x, v, t, after)
        return x[:, :3].clamp(-1, 1)

    def step(self, x: Tensor, v: Tensor, t: Tensor, after: Tensor) -> Tensor:
        """From `t` to `after`, deterministic."""
        (a, s), (a_, s_) = _level(t), _level(after)
        return a_ * (a * x - s * v) + s_ * (s * x + a * v)


def _level(t: Tensor) -> tuple[float, float]:
    """Signal and noise at `t`, of unit variance together."""
    angle = float(t) / 1000 * math.pi / 2
    return math.cos(angle), math.sin(angle)


@pytest.fixture(scope="session")
def loop() -> type[Loop]:
    """The class `Loop`."""
    return Loop


@pytest.fixture(scope="session")
def call_as() -> Callable[..., Tensor]:
    """call_as(kind, denoiser, x, t, conditions)."""
    return call


@pytest.fixture(scope="session")
def conditions() -> Callable[[str, list[int]], dict[str, Tensor]]:
    """conditions(kind, seeds)."""
    return rows


@pytest.fixture(scope="session")
def recorded(tiny: Callable[[str], nn.Module]) -> Callable[..., Any]:
    """recorded(kind, **settings of the loop): the trajectory of 2 runs of 2 images; made once."""
    from tenuto.sampling.record import record

    made: dict[Any, Any] = {}

    def build(kind: str, **settings: Any) -> Any:
        key = (kind, *sorted(settings.items()))
        if key not in made:
            made[key] = record(tiny(kind), sample=Loop(kind, **settings), batch=2, runs=2)
        return made[key]

    return build


@pytest.fixture(scope="session")
def rounded(tiny: Callable[[str], nn.Module], recorded: Callable[..., Any]) -> Callable[..., Any]:
    """rounded(kind, scheme): a copy of an artifact, each layer rounded to nearest; made once."""
    from tenuto import quantize, schemes
    from tenuto.calibration.algorithms.nearest import RoundToNearest
    from tenuto.numerics.scheme import Recipe, Rule

    known: dict[tuple[str, str], Any] = {}

    def build(kind: str, scheme: str = "W8A8") -> Any:
        if (kind, scheme) not in known:
            recipe = Recipe((Rule("*", getattr(schemes, scheme), RoundToNearest()),))
            known[kind, scheme] = quantize(tiny(kind), recipe, recorded(kind))
        return copy.deepcopy(known[kind, scheme])

    return build


# --- a whole model, bit by bit --------------------------------------------------------------------


def _bits(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        hooks = {k: list(v) for k, v in vars(m).items() if k.endswith("_hooks") and v is not None}
        found[name] = (
            id(m), type(m), m.training, sorted(vars(m)), list(m._modules), hooks,
        )  # fmt: skip
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        found[f"tensor {name}"] = (id(p), p.requires_grad, p.detach().numpy().tobytes())
    return found


@pytest.fixture(scope="session")
def bits() -> Callable[[nn.Module], dict[str, Any]]:
    """bits(module): equal before and after if and only if nothing at all has changed."""
    return _bits
