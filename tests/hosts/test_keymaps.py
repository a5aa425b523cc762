"""Key maps: one artifact and the same weights compute the same in diffusers, ComfyUI and ldm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto
from tenuto import Artifact, describe, quantize, record, schemes
from tenuto.artifact.curve_tables import with_rows
from tenuto.artifact.fingerprint import fingerprint
from tenuto.artifact.host_names import canonicalized, localized
from tenuto.calibration.presets import recipe_for
from tenuto.errors import ArtifactError, ModelError
from tenuto.model import families, watched
from tenuto.model.backbone import layers
from tenuto.runtime.layers import QLayer
from tenuto.sampling.trajectory import Trajectory

attach = partial(tenuto.attach, execution="int8")  # the artifact's own arithmetic
TIMES = (999.0, 750.0, 500.0, 250.0)
EDGE = 2e-2  # a code on an edge may fall the other way, and tiny models feel each one
OLDER = ("unet", "pixart", "sd3", "flux")
NEWER = (
    "flux2", "wan", "wan_vace", "lumina2", "chroma", "hunyuan_video", "hunyuan_video15",
    "hunyuan_image", "z_image",
)  # fmt: skip
MAPPED = [*(f"comfy {f}" for f in (*OLDER, *NEWER)), "ldm unet"]
FLOAT = ("z_image",)  # one of random weights makes 4 % of a millionth: no code may fall otherwise
RISING = ("lumina2", "z_image")  # in diffusers time goes up, in ComfyUI down
# Stored ranges in every class, and by turns codes of 4 bits or ranges on the fly. Chroma has 57
# blocks, a number that is fixed: no 4 bits.
PAIRS = [(name, "W8A8_STATIC") for name in MAPPED] + [
    (name, "W4A8" if n % 2 and name != "comfy chroma" else "W8A8") for n, name in enumerate(MAPPED)
]


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


@pytest.fixture
def host_of(in_comfy: Any, in_ldm: Any) -> Callable[[str], tuple[str, nn.Module]]:
    """host_of("comfy unet"): (family, the host's bare denoiser)."""

    def build(name: str) -> tuple[str, nn.Module]:
        host, family = name.split()
        return family, in_ldm() if host == "ldm" else in_comfy(family).model.diffusion_model

    return build


@pytest.fixture(params=MAPPED)
def case(request: pytest.FixtureRequest, host_of: Any) -> tuple[str, nn.Module]:
    """Each host and family to which an artifact can be attached."""
    return host_of(request.param)


@pytest.fixture(params=MAPPED)
def mapped(request: pytest.FixtureRequest, host_of: Any) -> tuple[str, nn.Module]:
    """Each host and family with a key map."""
    return host_of(request.param)


def test_flux_under_either_name_of_its_norms(in_comfy: Any) -> None:
    """The weight of a norm of queries and keys was `scale`, and is `weight` in newer hosts."""
    denoiser = in_comfy("flux").model.diffusion_model
    known, maps = ("scale", "weight"), []
    for end in known:
        for module in denoiser.modules():
            other = known[1 - known.index(end)]
            if other in module._parameters and type(module).__name__ == "RMSNorm":
                module._parameters[end] = module._parameters.pop(other)
        maps.append(families.key_map_of(denoiser))
        assert any(p.name.endswith(f"query_norm.{end}") for p in maps[-1].places.values())
    assert maps[0].places.keys() == maps[1].places.keys()
    assert "transformer_blocks.0.attn.norm_q.weight" in maps[0].places


def test_classes_of_one_name_are_told_apart(in_comfy: Any) -> None:
    """FLUX.1 and 2, Lumina and Z-Image, three models of Hunyuan; what is none is refused."""
    for family in ("flux", "flux2", "lumina2", "hunyuan_video", "hunyuan_video15", "hunyuan_image"):
        found = describe(in_comfy(family).model.diffusion_model)
        assert found.family == family.removesuffix("15")
    denoiser = in_comfy("flux").model.diffusion_model
    denoiser.double_stream_modulation_img = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="no canonical name"):
        families.key_map_of(denoiser)
    denoiser.__class__ = type("Longer", (type(denoiser),), {})
    assert families.key_map_of(denoiser) is None, "a model of its own"
    assert describe(denoiser).family == "generic"


@pytest.fixture(scope="module")
def run(call_as: Any, prompts: Any) -> Callable[..., Tensor]:
    """run(family, denoiser): a few Euler steps with guidance; every answer, (calls, ...)."""
    size = {"pixart": 36}
    channels = {"unet": 4, "pixart": 4}

    def go(family: str, denoiser: nn.Module, seed: int = 0, batch: int = 1) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        side = size.get(family, 8)
        x = torch.randn(batch, channels.get(family, 16), side, side, generator=draw)
        text = torch.cat([prompts([-1] * batch), prompts(list(range(batch)))])
        seen = []
        for t in TIMES:
            step = torch.full((2 * batch,), t)
            out = call_as(family, denoiser, torch.cat([x, x]), step, text)
            empty, full = out.chunk(2)
            x = x - 0.2 * (empty + 2 * (full - empty))
            seen.append(out)
        return torch.stack(seen)

    return go


@pytest.fixture(scope="module")
def trajectory(original: Any, run: Any) -> Callable[[str], Trajectory]:
    known: dict[str, Trajectory] = {}

    def build(family: str) -> Trajectory:
        def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
            return run(family, denoiser, seed, batch)[-1, :batch, :3].clamp(-1, 1)

        if family not in known:
            known[family] = record(original(family), sample=sample, batch=2, runs=1)
        return known[family]

    return build


@pytest.fixture(scope="module")
def artifact(original: Any, trajectory: Any) -> Callable[..., Artifact]:
    """artifact(family, scheme, temporal): codes, ranges or tables, and a route; made once."""
    known: dict[Any, Artifact] = {}

    def build(family: str, scheme: str = "W8A8_STATIC", temporal: str = "table") -> Artifact:
        if (family, scheme, temporal) not in known:
            model, seen = original(family), trajectory(family)
            how: Any = getattr(schemes, scheme)
            if family != "unet":  # a recipe: which layers are better left in float is not asked
                how = recipe_for(how, describe(model))
            made = quantize(model, how, seen, temporal=temporal)
            branches = [b.name for b in describe(model).branches]
            draw = torch.Generator().manual_seed(1)
            table = torch.rand(len(TIMES), len(branches), generator=draw) < 0.6
            table[0] = True
            route = Artifact.new(model, seen.schedule())
            route.header["route"] = {"timesteps": list(seen.timesteps), "branches": branches}
            route.tensors["route/table"] = table
            known[family, scheme, temporal] = made | route
        return known[family, scheme, temporal]

    return build


def test_the_same_weights_compute_the_same(mapped: Any, original: Any, run: Any) -> None:
    family, host = mapped
    assert gap(run(family, host), run(family, original(family))) < 1e-5


def test_qwen_image_has_the_same_names() -> None:
    """ComfyUI's class is called alike and has the same parts: no key map."""
    from comfy import ops
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel as Host
    from diffusers import QwenImageTransformer2DModel as Own

    facts = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 4,
        "num_layers": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    torch.manual_seed(0)
    own = Own(**facts).eval()
    made = {"operations": ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
    host = Host(**facts, **made).eval()
    host.load_state_dict(own.state_dict())
    assert families.key_map_of(host) is None and describe(host) == describe(own)
    assert {n for n, _ in layers(host)} == {n for n, _ in layers(own)}
    x, t, text = torch.randn(2, 4, 1, 8, 8), torch.full((2,), 0.7), torch.randn(2, 5, 24)
    tokens = nn.functional.pixel_unshuffle(x[:, :, 0], 2).flatten(2).transpose(1, 2)
    out = own(
        tokens, encoder_hidden_states=text, encoder_hidden_states_mask=torch.ones(2, 5).long(),
        timestep=t, img_shapes=[[(1, 4, 4)]] * 2,
    ).sample.transpose(1, 2)  # fmt: skip
    seen: list[str] = []
    names = [b.name for b in describe(host).branches]
    with watched(host, names, before=lambda name, *_: seen.append(name)):
        found = host(x, t, text)
    assert gap(found[:, :, 0], nn.functional.pixel_shuffle(out.unflatten(2, (4, 4)), 2)) < 1e-5
    assert seen == names, "each branch is called, in this order"


def test_hidream_has_the_same_names() -> None:
    """As Qwen-Image; what ComfyUI's answers has the other sign."""
    from comfy import ops
    from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel as Host
    from diffusers import HiDreamImageTransformer2DModel as Own

    facts = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 1,
        "caption_channels": [24, 24], "text_emb_dim": 24, "llama_layers": [0, 1],
        "axes_dims_rope": (64, 32, 32), "max_resolution": (16, 16),
    }  # fmt: skip
    torch.manual_seed(0)
    own = Own(**facts).eval()
    for p in own.parameters():  # what begins as zero too
        p.data = torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    made = {"operations": ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
    host = Host(**facts, **made).eval()
    host.load_state_dict(own.state_dict())
    assert families.key_map_of(host) is None and describe(host) == describe(own)
    assert families.names_in_host(host) is not None
    assert {n for n, _ in layers(host)} == {n for n, _ in layers(own)}
    x, t, text = torch.randn(2, 4, 8, 8), torch.full((2,), 700.0), torch.randn(2, 5, 24)
    llama, pooled = torch.randn(2, 2, 5, 24), torch.randn(2, 24)  # two layers of two prompts
    out = own(
        x, timesteps=t, encoder_hidden_states_t5=text, encoder_hidden_states_llama3=llama,
        pooled_embeds=pooled,
    ).sample  # fmt: skip
    seen: list[str] = []
    names = [b.name for b in describe(host).branches]
    with watched(host, names, before=lambda name, *_: seen.append(name)):
        found = host(x, t, pooled, text, encoder_hidden_states_llama3=llama.movedim(0, 1))
    assert gap(-found, out) < 1e-5
    assert sorted(seen) == sorted(names), "each branch is called once"


def test_names_are_those_of_comfyui(in_comfy: Any) -> None:
    """Its own conversion, which is not ours: every canonical parameter goes to the same place."""
    from comfy import utils

    makers = {
        "unet": utils.unet_to_diffusers, "pixart": utils.pixart_to_diffusers,
        "sd3": utils.mmdit_to_diffusers, "flux": utils.flux_to_diffusers,
    }  # fmt: skip
    for family, maker in makers.items():
        model = in_comfy(family).model
        keys = families.key_map_of(model.diffusion_model)
        theirs = maker(dict(model.model_config.unet_config))
        for name, place in keys.places.items():
            wanted = theirs[name]
            if isinstance(wanted, str):
                assert (place.name, place.swapped) == (wanted, False), name
            else:
                assert place.name == wanted[0] and place.swapped == (len(wanted) > 2), name
                if wanted[1] is not None:
                    assert place.rows == (wanted[1][1], sum(wanted[1][1:])), name


def test_fingerprint_and_description_are_the_same(mapped: Any, original: Any) -> None:
    family, host = mapped
    model, keys = original(family), families.key_map_of(host)
    view = keys.view(host)
    assert fingerprint(view) == fingerprint(model)
    own, theirs, seen = describe(host), describe(model), describe(view)
    assert seen == replace(theirs, temporal=seen.temporal)
    assert set(seen.temporal) == set(theirs.temporal)
    assert own.family == theirs.family and len(own.branches) == len(theirs.branches)
    for name in (*own.blocks, *(b.name for b in own.branches), *own.temporal):
        assert isinstance(host.get_submodule(name), nn.Module)
    assert [keys.canonical(n) for n in own.blocks] == list(theirs.blocks)


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_one_artifact_everywhere(
    host_of: Any, name: str, original: Any, run: Any, artifact: Any, scheme: str
) -> None:
    family, host = host_of(name)
    model, made, keys = original(family), artifact(family, scheme), families.key_map_of(host)
    plain, before = run(family, model), run(family, host)
    how = "float" if family in FLOAT else "auto"
    with attach(model, made, execution=how) as one, attach(host, made, execution=how) as other:
        expected, found = run(family, model), run(family, host)
        assert one.counts() == other.counts()
        assert sum(held for _, held in other.counts().values()) > 0
        inside = {n for n, m in host.named_modules() if isinstance(m, QLayer)}
        parts = {part for n in inside for part in keys.layers()[n]}
        assert parts == {n for n, m in model.named_modules() if isinstance(m, QLayer)}
    assert gap(found, expected) < EDGE
    assert gap(found, plain) > 10 * gap(found, expected), "it was not even on"
    assert torch.equal(run(family, host), before)


def test_temporal_tables_are_used(case: Any, original: Any, run: Any, artifact: Any) -> None:
    """As tables, and as layers with a range a step: the same in both."""
    family, host = case
    for temporal in ("table", "int8", "tiar"):
        made, model = artifact(family, "W8A8_STATIC", temporal), original(family)
        how = "float" if family in FLOAT else "auto"
        with attach(model, made, execution=how), attach(host, made, execution=how):
            assert gap(run(family, host), run(family, model)) < EDGE
            kinds = {type(m).__name__ for m in host.modules()}
            assert ("TemporalTable" in kinds) == (temporal != "tiar")


def test_there_and_back(case: Any, artifact: Any) -> None:
    """What was fused is taken apart again: every tensor, every fact."""
    family, host = case
    made = artifact(family)
    back = canonicalized(localized(made, host), host)
    assert back.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(back.tensors[k], v) for k, v in made.tensors.items())
    inside, times = localized(made, host).header, made.header["schedule"]["timesteps"]
    turned = times[0] < times[-1]
    assert turned == (family in RISING)
    for key in ("schedule", "route"):
        assert inside[key]["timesteps"] == [1 - t if turned else t for t in times]
    for key in ("family", "model_class", "fingerprint", "route", "schedule", "check"):
        assert back.header[key] == made.header[key]
    assert back.header["temporal"]["modules"] == made.header["temporal"]["modules"]
    assert {n: f["shape"] for n, f in back.header["layers"].items()} == {
        n: f["shape"] for n, f in made.header["layers"].items()
    }
    back.validate()


def test_curves_that_a_host_made_are_read_everywhere(
    case: Any, original: Any, run: Any, artifact: Any, tmp_path: Path
) -> None:
    """Calibrated in the host: a file in canonical names, in int8, and back to the very rows."""
    family, host = case

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        return run(family, denoiser, seed, batch)[-1, :batch, :3].clamp(-1, 1)

    seen = record(host, sample=sample, batch=2, runs=1)
    made = quantize(host, schemes.W8A8_STATIC, seen, temporal="int8", measure=False)
    canonicalized(made, host).save(tmp_path / "curves")
    kept = Artifact.load(tmp_path / "curves")
    assert kept.header["format_version"] == "1.4"
    coded = [k for k, t in kept.tensors.items() if k.startswith("temporal/") and t.ndim > 1]
    coded = [k for k in coded if not k.endswith(".mix")]
    assert coded and all(kept.tensors[k].dtype is torch.int8 for k in coded)
    wanted, found = with_rows(made).tensors, localized(kept, host).tensors
    tables = {k for k in wanted if k.startswith("temporal/")}
    assert tables == {k for k in found if k.startswith("temporal/")} and len(tables) == len(coded)
    for key in tables:
        assert torch.equal(found[key], wanted[key]), key
    own = artifact(family, "W8A8_STATIC", "int8").tensors
    if {k: kept.tensors[k].shape[1:] for k in coded} != {k: own[k].shape[1:] for k in coded}:
        return  # the host's module answers in another shape than the original: it is for hosts
    model = original(family)
    with attach(model, kept, execution="float"), attach(host, kept, execution="float"):
        assert gap(run(family, host), run(family, model)) < EDGE


def test_curves_of_a_file_are_rows_in_a_host(case: Any, artifact: Any) -> None:
    """There and back they are rows, value for value: what is localized has no curves."""
    family, host = case
    made = artifact(family, "W8A8_STATIC", "int8")
    back, wanted = canonicalized(localized(made, host), host), with_rows(made).tensors
    assert back.tensors.keys() == wanted.keys()
    assert all(torch.equal(back.tensors[k], v) for k, v in wanted.items())
    assert not any("curves" in f for f in back.header["temporal"]["modules"].values())
    back.validate()


def test_another_family_is_refused(in_comfy: Any, artifact: Any) -> None:
    host = in_comfy("unet").model.diffusion_model
    with pytest.raises(ArtifactError, match="artifact is for a PixArtTransformer2DModel"):
        attach(host, artifact("pixart"))
    for parameter in host.parameters():
        parameter.mul_(1.1)
    with pytest.raises(ArtifactError, match="weights differ"):
        attach(host, artifact("unet"))


def test_parts_with_ranges_of_their_own_cannot_be_fused(in_comfy: Any, artifact: Any) -> None:
    host, made = in_comfy("sd3").model.diffusion_model, artifact("sd3")
    tensors = dict(made.tensors)
    name = "ranges/transformer_blocks.0.attn.to_k.scale"
    tensors[name] = tensors[name] * 2
    with pytest.raises(ArtifactError, match="ranges of its parts differ"):
        attach(host, Artifact(made.header, tensors))
    assert sum(1 for _ in layers(host)) > 0 and not [
        m for m in host.modules() if isinstance(m, QLayer)
    ]
