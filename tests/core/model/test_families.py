"""What the families say about a denoiser is true of it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import describe
from tenuto.calibration.presets import recipe_for
from tenuto.errors import ModelError
from tenuto.model import families
from tenuto.model.backbone import Backbone, layers
from tenuto.model.signature import tensors_in
from tenuto.numerics.scheme import schemes

MODEL_OF = {
    "pixart": "pixart", "dit": "dit", "unet": "unet", "sd3": "sd3", "flux": "flux",
    "generic": "home",
}  # fmt: skip
ENCODERS = {"t5", "clip", "language_model"}


@pytest.fixture(params=MODEL_OF.values())
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of denoiser in turn, those that few tests run on too."""
    return request.param


def names(backbone: Backbone) -> list[str]:
    """Every module that it names."""
    subsets = [n for s in backbone.subsets for n in (*s.linears, *([s.fold] if s.fold else []))]
    branches = [n for b in backbone.branches for n in (b.name, b.block)]
    return [*backbone.blocks, *branches, *subsets, *backbone.temporal]


def reached(denoiser: nn.Module, names: list[str], sample: Any) -> list[str]:
    """`names` in the order in which a sampling run reaches them, each time that it does."""
    seen: list[str] = []
    hooks = [
        denoiser.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: seen.append(n))
        for n in names
    ]
    with torch.no_grad():
        sample(denoiser, 0, 1)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_name_resolves(tiny: Any, kind: str) -> None:
    denoiser = tiny(kind)
    backbone = describe(denoiser)
    assert backbone.blocks and backbone.branches
    for name in names(backbone):
        assert isinstance(denoiser.get_submodule(name), nn.Module)
    assert len(set(backbone.blocks)) == len(backbone.blocks)
    assert len({b.name for b in backbone.branches}) == len(backbone.branches)


def test_the_family_is_the_one_meant(tiny: Any) -> None:
    assert {describe(tiny(kind)).family: kind for kind in MODEL_OF.values()} == MODEL_OF


def test_every_family_has_a_model_here(covered: set[str]) -> None:
    """A new family gets a tiny model in conftest.py, and all that is in test_models.py covers it.

    Text encoders have no steps: those that ship are gone through in test_encoders.py.
    """
    found = {m.name for m in pkgutil.iter_modules(families.__path__)}
    assert found == set(MODEL_OF) | ENCODERS | covered
    for name in found - {"generic"}:
        module = importlib.import_module(f"{families.__name__}.{name}")
        assert all(isinstance(c, str) for c in module.CLASSES), "names, so that nothing is imported"


def test_blocks_and_branches_come_in_execution_order(tiny: Any, kind: str, loop: Any) -> None:
    denoiser = tiny(kind)
    backbone = describe(denoiser)
    once = loop(kind, steps=1)
    assert reached(denoiser, list(backbone.blocks), once) == list(backbone.blocks)
    branches = [b.name for b in backbone.branches]
    assert reached(denoiser, branches, once) == branches, "each is called once, in this order"


def test_branches_lie_in_their_blocks_and_cover_them(tiny: Any, kind: str) -> None:
    """Whatever is heavy in a block is in a branch: a block that is reused costs next to nothing."""
    denoiser = tiny(kind)
    backbone = describe(denoiser)
    assert {b.block for b in backbone.branches} == set(backbone.blocks)
    for branch in backbone.branches:
        assert f"{branch.name}.".startswith(f"{branch.block}.")
        kinds = {"attention", "cross-attention", "feed-forward", "resnet", "block"}
        assert branch.kind in kinds
    for block in backbone.blocks:
        inside = [b.name for b in backbone.branches if b.block == block]
        weights = [
            (name, m.weight.numel())
            for name, m in layers(denoiser)
            if name.startswith(f"{block}.") and ".norm" not in name
        ]
        held = sum(n for name, n in weights if any(f"{name}.".startswith(f"{b}.") for b in inside))
        assert weights and held == sum(n for _, n in weights), block


def test_blocks_are_apart(tiny: Any, kind: str) -> None:
    """No layer belongs to two of them, and `block_of` knows where each is."""
    denoiser = tiny(kind)
    backbone = describe(denoiser)
    for name, _ in layers(denoiser):
        owners = [b for b in backbone.blocks if name == b or name.startswith(f"{b}.")]
        assert len(owners) <= 1
        assert backbone.block_of(name) == (owners[0] if owners else None)
    assert backbone.block_of("no.such.layer") is None


def test_linears_of_a_subset_share_their_input(tiny: Any, kind: str, loop: Any) -> None:
    denoiser = tiny(kind)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0])

    for subset in describe(denoiser).subsets:
        for name in subset.linears:
            denoiser.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad():
        loop(kind, steps=1)(denoiser, 0, 1)
    for subset in describe(denoiser).subsets:
        assert len(subset.linears) > 1
        assert len({id(seen[name]) for name in subset.linears}) == 1, subset


def test_first_and_last_layers_are_among_the_ends(tiny: Any, kind: str, loop: Any) -> None:
    """They get 8 bits where the rest gets 4: the first and the last layer that run, at least."""
    denoiser = tiny(kind)
    every = [name for name, _ in layers(denoiser)]
    recipe = recipe_for(schemes.W4A8, describe(denoiser))
    bits = {n: rule.scheme.weight.bits for n in every if (rule := recipe.rule(n)) and rule.scheme}
    assert bits.keys() == set(every), "every layer has a rule"
    order = reached(denoiser, every, loop(kind, steps=1))
    assert bits[order[-1]] == 8
    takes_sample = [n for n in order if "time" not in n and "emb" not in n and "adaln" not in n]
    first = {"flux": "x_embedder"} | dict.fromkeys(("pixart", "dit", "sd3"), "pos_embed.proj")
    assert bits[first.get(kind, takes_sample[0])] == 8
    inner = [n for n in every if describe(denoiser).block_of(n) and ".norm" not in n]
    assert {bits[n] for n in inner if "time_emb_proj" not in n} == {4}


# --- what depends on the timestep alone -----------------------------------------------------------


def outputs_at(
    denoiser: nn.Module, names: list[str], call_as: Any, kind: str, t: int, given: Any, seed: int
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: found.__setitem__(name, list(tensors_in(out)))

    hooks = [denoiser.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    channels = 3 if kind in ("dit", "home") else 4
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        call_as(kind, denoiser, x, torch.tensor(t), given)
    for hook in hooks:
        hook.remove()
    return found


def test_temporal_modules_are_time_only(
    tiny: Any, kind: str, call_as: Any, conditions: Any
) -> None:
    """Two calls at one t with everything else changed, one at another t (design, section 3)."""
    denoiser = tiny(kind)
    temporal = list(describe(denoiser).temporal)
    assert temporal or kind == "home"
    one, other = conditions(kind, [1, 2]), conditions(kind, [4, 8])
    first = outputs_at(denoiser, temporal, call_as, kind, 700, one, seed=1)
    second = outputs_at(denoiser, temporal, call_as, kind, 700, other, seed=2)
    third = outputs_at(denoiser, temporal, call_as, kind, 200, one, seed=1)
    for name in temporal:
        pairs = list(zip(first[name], second[name], strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), f"{name} depends on more than t"
        moved = zip(first[name], third[name], strict=True)
        assert all(not torch.equal(a, b) for a, b in moved), f"{name} does not depend on t"


def test_the_check_of_time_only_would_notice(tiny: Any, call_as: Any, conditions: Any) -> None:
    """DiT's modulation has the label in it: two runs at equal labels would call it time-only."""
    denoiser, name = tiny("dit"), "transformer_blocks.0.norm1.emb"
    one, other = conditions("dit", [1, 2]), conditions("dit", [4, 8])
    first = outputs_at(denoiser, [name], call_as, "dit", 700, one, seed=1)[name]
    second = outputs_at(denoiser, [name], call_as, "dit", 700, other, seed=2)[name]
    assert not torch.equal(first[0], second[0])


def test_sizes_and_labels_make_the_modulation_impure() -> None:
    """PixArt with size embeddings, U-Nets with labels: fewer modules are time-only."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    sized = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_size=8, caption_channels=8, use_additional_conditions=True,
    )  # fmt: skip
    assert describe(sized).temporal == ("adaln_single.emb.timestep_embedder",)
    for extra in ({"num_class_embeds": 5}, {"time_cond_proj_dim": 4}):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
            attention_head_dim=2, **extra,
        )  # fmt: skip
        backbone = describe(unet)
        assert not [n for n in backbone.temporal if n.endswith("time_emb_proj")]
        assert ("time_embedding" in backbone.temporal) == ("num_class_embeds" in extra)


def test_a_unet_with_resnet_samplers(loop: Any) -> None:
    """Their blocks are no `resnets.N`: they run last in their level."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=24,
        attention_head_dim=4,
    ).eval()  # fmt: skip
    blocks = list(describe(unet).blocks)
    assert any("samplers" in b for b in blocks)
    assert reached(unet, blocks, loop("unet", steps=1)) == blocks


# --- models that no family knows ------------------------------------------------------------------


def test_a_subclass_belongs_to_its_family(tiny: Any) -> None:
    """Hosts derive from the classes of diffusers."""
    denoiser = tiny("pixart")
    denoiser.__class__ = type("TheirTransformer", (type(denoiser),), {})
    assert describe(denoiser).family == "pixart"


def test_nothing_to_work_on_is_said() -> None:
    with pytest.raises(ModelError, match="Sequential"):
        describe(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_generic_kinds_of_branches(tiny: Any) -> None:
    backbone = describe(tiny("home"))
    assert backbone.blocks == ("layers.0", "layers.1", "layers.2")
    assert [(b.name, b.kind) for b in backbone.branches[:2]] == [
        ("layers.0.attn", "attention"),
        ("layers.0.mlp", "feed-forward"),
    ]
    assert set(backbone.ends) == {"stem", "step", "head"}
