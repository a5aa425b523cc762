"""Discovery claims what depends on the timestep alone: all of that, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import describe
from tenuto.calibration.temporal.discovery import changed, discover
from tenuto.sampling.trajectory import Call

B = 2


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def call_of(**inputs: Any) -> Call:
    return Call(0, 0, 700.0, inputs)


def unet(**extra: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 24,
        "attention_head_dim": 2,
    }  # fmt: skip
    return UNet2DConditionModel(**(settings | extra))


def sd15() -> tuple[nn.Module, Call]:
    text = randn(B, 5, 24)
    call = call_of(sample=randn(B, 4, 8, 8), timestep=torch.tensor(700), encoder_hidden_states=text)
    return unet(), call


def sdxl() -> tuple[nn.Module, Call]:
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * B)
    added = {"text_embeds": randn(B, 12), "time_ids": sizes}
    inputs = sd15()[1].inputs | {"added_cond_kwargs": added}
    return model, call_of(**inputs)


def unet_of_classes() -> tuple[nn.Module, Call]:
    inputs = sd15()[1].inputs | {"class_labels": torch.tensor([0, 4])}
    return unet(num_class_embeds=5), call_of(**inputs)


def sd3() -> tuple[nn.Module, Call]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
        caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip
    return model, call_of(
        hidden_states=randn(B, 4, 8, 8), encoder_hidden_states=randn(B, 5, 24),
        pooled_projections=randn(B, 12), timestep=torch.tensor([700.0] * B),
    )  # fmt: skip


def flux(guidance: bool) -> tuple[nn.Module, Call]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12,
        guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    given = {"guidance": torch.tensor([3.5] * B)} if guidance else {}
    return model, call_of(
        hidden_states=randn(B, 16, 4), encoder_hidden_states=randn(B, 5, 24),
        pooled_projections=randn(B, 12), timestep=torch.tensor([0.7] * B),
        img_ids=randn(16, 3).abs().mul(9).round(), txt_ids=torch.zeros(5, 3), **given,
    )  # fmt: skip


def pixart(sized: bool) -> tuple[nn.Module, Call]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_size=8, caption_channels=8, use_additional_conditions=sized,
    )  # fmt: skip
    sizes = {"resolution": torch.full((B, 2), 512.0), "aspect_ratio": torch.ones(B, 1)}
    given: dict[str, Any] = {"added_cond_kwargs": sizes} if sized else {}
    mask = torch.ones(B, 5, dtype=torch.int64)
    return model, call_of(
        hidden_states=randn(B, 4, 8, 8), encoder_hidden_states=randn(B, 5, 8),
        timestep=torch.tensor([700] * B), encoder_attention_mask=mask, **given,
    )  # fmt: skip


def dit() -> tuple[nn.Module, Call]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3,
        num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, call_of(
        hidden_states=randn(B, 3, 8, 8), timestep=torch.tensor([700] * B),
        class_labels=torch.tensor([10, 3]),
    )  # fmt: skip


RESNETS = (
    "down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0",
    "mid_block.resnets.1", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1",
    "up_blocks.1.resnets.0", "up_blocks.1.resnets.1",
)  # fmt: skip
EMBEDDER = ("time_text_embed.timestep_embedder",)
CASES = {
    "sd15": (sd15, ("time_embedding", *(f"{r}.time_emb_proj" for r in RESNETS))),
    "sdxl": (sdxl, ("time_embedding",)),
    "unet of classes": (unet_of_classes, ("time_embedding",)),
    "sd3": (sd3, EMBEDDER),
    "flux": (lambda: flux(False), EMBEDDER),
    "flux with guidance": (lambda: flux(True), EMBEDDER),
    "pixart": (lambda: pixart(False), ("adaln_single",)),
    "pixart with sizes": (lambda: pixart(True), ("adaln_single.emb.timestep_embedder",)),
    "dit": (
        dit,
        tuple(f"transformer_blocks.{i}.norm1.emb.timestep_embedder" for i in range(2)),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Call, tuple[str, ...]]:
    """A tiny random model with the class of diffusers, a call of it, what is time-only there."""
    make, expected = CASES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, call = make()
        for p in model.parameters():  # nothing stays zero: a zero hides what a module depends on
            if not p.detach().any():
                nn.init.normal_(p, std=0.1)
    return model, call, expected


def test_the_pure_part_and_nothing_else(case: Any, bits: Any) -> None:
    model, call, expected = case
    model.train()
    before = bits(model)
    assert discover(model, call) == expected
    assert bits(model) == before


def test_families_say_the_same(case: Any) -> None:
    """Where a family speaks of time-only modules at all, in the order in which they run."""
    model, _, expected = case
    backbone = describe(model)
    if backbone.family != "generic":
        assert set(backbone.temporal) == set(expected)


def test_two_runs_alone_would_claim_too_much(case: Any) -> None:
    """Equal at one timestep is not enough: what depends on nothing that changed is equal too."""
    model, call, expected = case
    still = Call(0, 0, 700.0, dict(call.inputs))
    assert discover(_Deaf(model), still) == tuple(f"model.{n}" for n in expected)


class _Deaf(nn.Module):
    """A model with a part that looks at the shape of its input alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.size = model, nn.Linear(1, 1)

    def forward(self, timestep: Any, **inputs: Any) -> Any:
        self.size(torch.tensor([float(next(iter(inputs.values())).shape[-1])]))
        return self.model(timestep=timestep, **inputs)


class _Odd(nn.Module):
    """(x, t): one module called twice with two results, one with noise of its own, one of both."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.noisy = nn.Linear(1, 4), nn.Linear(1, 4)
        self.mixed, self.pure = nn.Linear(1, 4), nn.Sequential(nn.Linear(1, 4), nn.SiLU())
        self.act = nn.SiLU()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(1, 1) / 1000
        found = self.twice(t) + self.twice(2 * t) + self.noisy(t + torch.rand(1, 1))
        return found + self.mixed(t + x.mean()) + self.act(self.pure(t)) + x


def test_what_cannot_be_known_from_the_step_is_not_claimed() -> None:
    call = Call(0, 0, 700.0, {"x": randn(B, 4), "t": torch.tensor(700)})
    assert discover(_Odd(), call) == ("pure",)
    start = Call(0, 0, 0.0, call.inputs | {"t": torch.tensor(0.0)})
    assert discover(_Odd(), start) == ("pure",)


def test_every_input_is_changed_and_stays_valid() -> None:
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 4)
    given = {
        "x": randn(2, 3), "labels": torch.tensor([0, 7]), "flags": torch.tensor([True, False]),
        "attention_mask": mask, "bias_mask": torch.tensor([[0.0, -1e4]]), "scale": 0.5,
        "nested": {"ids": torch.tensor([[1]]), "more": [torch.zeros(2)]}, "size": 8, "none": None,
        "half": randn(4).half(),
    }  # fmt: skip
    found = {k: changed(v, draw, k) for k, v in given.items()}
    assert found["labels"].tolist() == [1, 6] and found["flags"].tolist() == [True, True]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2 and bool(mask.all())
    assert torch.equal(found["bias_mask"], given["bias_mask"])
    assert found["scale"] != 0.5 and found["size"] == 8 and found["none"] is None
    assert found["nested"]["ids"].tolist() == [[0]]
    assert found["nested"]["more"][0].abs().min() > 0 and (found["x"] != given["x"]).all()
    assert found["half"].dtype is torch.half and not torch.equal(found["half"], given["half"])
