"""The fallback on models as people write them, and which layers are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto import Artifact, attach, describe, quantize, record, schemes
from tenuto.errors import ModelError
from tenuto.model import Backbone, watched
from tenuto.model.backbone import layers
from tenuto.numerics import Recipe, Rule
from tenuto.runtime.layers import QLayer

WIDTH = 16


class Residual(nn.Module):
    """Two convolutions and a `mlp` of the timestep, as in many a copied U-Net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * width))
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.mlp(t)[..., None, None].chunk(2, dim=1)
        return x + self.block2(F.silu(self.block1(x) * (1 + scale) + shift))


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.ModuleList()
        self.to_out += [nn.Linear(width, width), nn.Linear(width, width)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.to_out[1](self.to_out[0](x))


class Copied(nn.Module):
    """Lists in a list: a level is two residual blocks, one with attention, and a convolution."""

    def __init__(self, convolution: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.init_conv = convolution(3, WIDTH, 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.downs = nn.ModuleList(
            nn.ModuleList([Residual(WIDTH), Pixels(WIDTH), convolution(WIDTH, WIDTH, 3, padding=1)])
            for _ in range(2)
        )
        self.final_conv = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] / 1000 * 2.0 ** torch.arange(WIDTH)
        x, t = self.init_conv(x), self.time_mlp(angles.sin())
        for level in self.downs:
            residual, attention, last = level.children()
            x = last(attention(residual(x, t)))
        return self.final_conv(x)


class Pixels(nn.Module):
    """Attention and a feed-forward over the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = Mixer(width)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        y = y + self.self_attn(y)
        return (y + self.ffn(y)).transpose(1, 2).unflatten(2, x.shape[2:])


class Holder(nn.Module):
    """Calls what it holds."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Held(nn.Module):
    """Blocks in holders, then blocks in a Sequential; a list of one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.held = nn.ModuleList([Holder(Pixels(WIDTH))])
        self.body = nn.Sequential(Pixels(WIDTH), Pixels(WIDTH))
        self.head = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.held:
            x = block(x if x.shape[1] == WIDTH else self.stem(x)) + t[:, None, None, None] / 1000
        return self.head(self.body(x))


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised at every call."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), True), self.weight.var((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * (var + 1e-5).rsqrt()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class Inside(nn.Conv2d):
    """The same by another way in."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.norm(), bias)


def called(model: nn.Module, names: list[str]) -> list[str]:
    seen: list[str] = []
    with torch.no_grad(), watched(model, names, before=lambda name, *_: seen.append(name)):
        model(torch.randn(2, 3, 4, 4), torch.full((2,), 500.0))
    return seen


def branches(backbone: Backbone) -> list[tuple[str, str]]:
    return [(b.name, b.kind) for b in backbone.branches]


def test_blocks_of_nested_lists_are_what_is_called() -> None:
    model = Copied()
    backbone = describe(model)
    wanted = [f"downs.{level}.{i}" for level in range(2) for i in range(2)]
    assert list(backbone.blocks) == wanted == called(model, wanted)
    assert backbone.ends == (
        "init_conv", "time_mlp.0", "time_mlp.2", "downs.0.2", "downs.1.2", "final_conv",
    )  # fmt: skip


def test_a_layer_to_qkv_of_its_own_is_a_layer() -> None:
    """Beside `to_q` it is what diffusers fused; alone it computes, and is quantized."""
    mixer = Mixer(WIDTH)
    assert "to_qkv" in dict(layers(mixer))
    mixer.to_q = nn.Linear(WIDTH, WIDTH)
    assert "to_qkv" not in dict(layers(mixer))


def test_a_mlp_of_the_timestep_is_no_feed_forward() -> None:
    """It is a sliver of its block, which is reused as a whole."""
    first = branches(describe(Copied()))[:3]
    assert first == [
        ("downs.0.0", "block"),
        ("downs.0.1.self_attn", "attention"),
        ("downs.0.1.ffn", "feed-forward"),
    ]


def test_blocks_in_holders_and_in_a_sequential() -> None:
    model = Held()
    backbone = describe(model)
    assert list(backbone.blocks) == called(model, list(backbone.blocks))
    assert backbone.blocks == ("held.0.block", "body.0", "body.1")
    assert backbone.ends == ("stem", "head")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((n, "attention") for n in ("attn", "attn1", "self_attn", "attention", "audio_attn1")),
        *((n, "cross-attention") for n in ("attn2", "cross_attn", "audio_to_video_attn")),
        *((n, "feed-forward") for n in ("ff", "ff_i", "ff_t", "ff_context", "feed_forward", "ffn")),
        *((n, "feed-forward") for n in ("mlp", "img_mlp", "txt_mlp", "audio_ff", "moe")),
        *((n, None) for n in ("time_mlp", "t_mlp", "adaln_mlp", "norm1", "to_out", "net", "proj")),
    ],
)
def test_parts_are_known_by_their_names(name: str, kind: str | None) -> None:
    """Beside a part of that name, the block would be the branch otherwise."""
    block = nn.ModuleDict({name: Pixels(WIDTH)})
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(block), Block(block)])})
    found = branches(describe(model))[0]
    assert found == (("layers.0", "block") if kind is None else (f"layers.0.{name}", kind))


class Block(nn.Module):
    """What `parts` holds, beside a norm."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_norms_and_time_embedders_are_no_parts_and_no_blocks() -> None:
    """Cosmos calls the norm in front of attention by its name; some have a list that embeds t."""
    block = nn.ModuleDict({"norm_self_attn": nn.LayerNorm(WIDTH), "mlp": Pixels(WIDTH)})
    block["cross_attn"], block["self_attn"] = Pixels(WIDTH), Pixels(WIDTH)
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(block)])})
    model["t_embedder"] = nn.ModuleList([nn.Identity(), Pixels(WIDTH)])
    backbone = describe(model)
    assert backbone.blocks == ("layers.0",)
    assert [name for name, _ in branches(backbone)] == [
        "layers.0.self_attn", "layers.0.cross_attn", "layers.0.mlp",
    ], "in the order in which they run, not in that of their definition"  # fmt: skip


class Folded(nn.Module):
    """A denoiser of which encode and decode are the halves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pixels(WIDTH)])

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return self.layers[0](x)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def test_an_autoencoder_is_refused() -> None:
    """Its levels would do for blocks. A denoiser with such methods sees a timestep."""
    from diffusers import AutoencoderKL

    assert describe(Folded()).blocks == ("layers.0",)

    with pytest.raises(ModelError, match="AutoencoderKL is an autoencoder"):
        describe(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


def test_what_is_no_denoiser_is_said_where_something_is_attached() -> None:
    """Not that Tenuto lacks a list of it."""
    with pytest.raises(ModelError, match=r"Linear is no denoiser .*Give the denoiser or"):
        attach(nn.Linear(4, 4), "w8a8")


@pytest.mark.parametrize("kind", [Standardised, Inside])
def test_a_layer_with_a_forward_of_its_own_stays_in_float(kind: type[nn.Conv2d]) -> None:
    """What it computes is not known: replaced by a plain product, it would be another model."""
    torch.manual_seed(0)
    model = Copied(kind).eval()
    own = {name for name, m in model.named_modules() if isinstance(m, kind)}
    assert own == {"init_conv", "downs.0.2", "downs.1.2"}
    assert not own & {name for name, _ in layers(model)}

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        x = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        for t in (900.0, 600.0, 300.0):
            x = x - 0.1 * denoiser(x, torch.full((batch,), t))
        return x.clamp(-1, 1)

    with torch.no_grad():
        every = Recipe((Rule("*", schemes.W8A8),))  # the ends, too
        made: Artifact = quantize(model, every, record(model, sample=sample, batch=2, runs=1))
        given = torch.randn(2, 3, 4, 4), torch.full((2,), 600.0)
        plain = model(*given)
        with attach(model, made, simulate=True):
            assert all(type(model.get_submodule(name)) is kind for name in own)
            assert isinstance(model.final_conv, QLayer)
            found = model(*given)
    assert made.header["layers"] and not own & made.header["layers"].keys()
    assert float((found - plain).norm() / plain.norm()) < 0.05


def test_the_layers_of_hosts_are_known_by_their_module(monkeypatch: Any) -> None:
    """They cast the weight first, and then compute as torch does."""

    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.to(input.dtype), self.bias)

    model = nn.ModuleDict({"a": Linear(2, 2), "b": nn.Linear(2, 2)})
    assert [name for name, _ in layers(model)] == ["b"]
    for module in ("comfy.ops", "backend.operations", "ldm_patched.modules.ops"):
        monkeypatch.setattr(Linear.forward, "__module__", module)
        assert [name for name, _ in layers(model)] == ["a", "b"]


def test_a_host_that_patches_torch_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A1111 puts its LoRA into torch's own class; what derives from it goes the same way."""
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: plain(self, input))
    derived = type("Derived", (nn.Linear,), {})(2, 2)
    model = nn.ModuleList([nn.Linear(2, 2), derived])
    assert [name for name, _ in layers(model)] == ["0", "1"]


def test_a_class_of_a_hosts_name_may_be_another_model() -> None:
    """AuraFlow is an `MMDiT` in ComfyUI, as SD3 is."""
    assert describe(type("MMDiT", (Held,), {})()).family == "generic"
