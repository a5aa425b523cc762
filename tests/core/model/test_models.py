"""What is said of every model is true of it: families, and the fallback for all others."""

from __future__ import annotations

import fnmatch
import importlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import describe
from tenuto.caching.cells import apply_schedule_
from tenuto.caching.schedule import CacheSchedule
from tenuto.model import WHOLE, Swap, families, tensors_in, watched
from tenuto.model.backbone import Backbone, layers
from tenuto.runtime import TemporalTable
from tenuto.sampling import Clock

KINDS = {"attention", "cross-attention", "feed-forward", "resnet", "block"}
TIMES = (0.9, 0.7, 0.5, 0.3)


def order(case: Any, names: Iterable[str]) -> list[str]:
    """`names` in the order in which a call reaches them, each time that it does."""
    seen: list[str] = []
    with watched(case.model, names, before=lambda name, *_: seen.append(name)):
        case()
    return seen


def tensors(out: Any) -> list[Tensor]:
    return [t.clone() for t in tensors_in(out)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- blocks and branches --------------------------------------------------------------------------


def check_names(backbone: Backbone, model: nn.Module) -> None:
    subsets = [n for s in backbone.subsets for n in (*s.linears, *([s.fold] if s.fold else []))]
    for name in (*backbone.blocks, *(b.name for b in backbone.branches), *subsets):
        assert isinstance(model.get_submodule(name), nn.Module)
    for branch in backbone.branches:
        assert branch.kind in KINDS and branch.block in backbone.blocks
        assert f"{branch.name}.".startswith(f"{branch.block}.")
    every = [name for name, _ in model.named_modules()]
    for pattern in (*backbone.ends, *backbone.keep):
        assert "*" in pattern or pattern in every, pattern
    for block in backbone.blocks:
        assert not [b for b in backbone.blocks if b != block and b.startswith(f"{block}.")]


def test_names_of_a_family(known: Any) -> None:
    backbone = describe(known.model)
    assert backbone.family == known.name.split()[0]
    check_names(backbone, known.model)
    assert any(fnmatch.filter([n for n, _ in layers(known.model)], p) for p in backbone.ends)


def test_what_lies_outside_the_blocks_is_an_end(known: Any) -> None:
    """It gets 8 bits where the rest gets 4; no layer that a token passes in a block does."""
    backbone = describe(known.model)
    patterns = (*backbone.ends, *backbone.keep)
    found = {n for n, _ in layers(known.model) for p in patterns if fnmatch.fnmatchcase(n, p)}
    outside = {n for n, _ in layers(known.model) if backbone.block_of(n) is None}
    assert outside <= found | {n for n in outside if n.startswith(backbone.temporal)}
    reused = tuple(f"{b.name}." for b in backbone.branches if b.kind != "block")
    text = ("text_fusion.", "mode_blocks.image_cond.")
    inside = {n for n in found if n.startswith(reused) and not n.startswith(text)}
    assert not {n for n in inside if not n.endswith(".to_gate_logits")}


def test_names_of_the_fallback(unknown: Any) -> None:
    backbone = describe(unknown.model)
    assert backbone.family == "generic"
    check_names(backbone, unknown.model)


def test_the_order_of_a_family_is_that_of_a_call(known: Any) -> None:
    backbone = describe(known.model)
    assert order(known, backbone.blocks) == list(backbone.blocks)
    branches = [b.name for b in backbone.branches]
    assert order(known, branches) == branches


def test_the_order_of_the_fallback_is_that_of_a_call(unknown: Any) -> None:
    backbone = describe(unknown.model)
    assert order(unknown, backbone.blocks) == list(backbone.blocks)
    branches = [b.name for b in backbone.branches]
    assert order(unknown, branches) == branches


def test_the_fallback_would_do_for_a_family(known: Any) -> None:
    """Without its file a model loses detail: what is found runs, once, and is most of it."""
    generic = importlib.import_module(f"{families.__name__}.generic")
    backbone = generic.describe(known.model)
    check_names(backbone, known.model)
    absent = [n for n in backbone.blocks if "image_cond" in n]  # without such an image: not called
    for names in (backbone.blocks, [b.name for b in backbone.branches]):
        wanted = [n for n in names if not n.startswith(tuple(absent))] if absent else names
        assert Counter(order(known, names)) == Counter(wanted)
    assert {b.block for b in backbone.branches} == set(backbone.blocks)
    assert set(describe(known.model).blocks) <= set(backbone.blocks)


# --- reuse ----------------------------------------------------------------------------------------


@contextmanager
def scheduled(model: nn.Module, table: list[bool]) -> Iterator[Clock]:
    """`model` under a schedule of whole steps, and the clock that says which it is."""
    clock = Clock(TIMES)
    names = [b.name for b in describe(model).branches]
    patches = apply_schedule_(model, CacheSchedule.steps(table, TIMES, names), clock)
    try:
        yield clock
    finally:
        for patch in patches:
            patch.remove()


def check_reuse(case: Any) -> None:
    """Computed steps are exact, bit by bit; a step that reuses everything is finite and another."""
    batch = len(next(tensors_in(case.inputs())))
    plain = [tensors(case(seed=i, t=t)) for i, t in enumerate(TIMES)]
    with scheduled(case.model, [True, True, False, True]) as clock:
        found = []
        for i, t in enumerate(TIMES):
            clock.tick(t, range(batch))
            found.append(tensors(case(seed=i, t=t)))
    computed = (0, 1, 3)
    assert all(equal(found[i], plain[i]) for i in computed)
    assert all(bool(t.isfinite().all()) for t in found[2])
    assert not equal(found[2], plain[2])
    assert equal(tensors(case(seed=2, t=TIMES[2])), plain[2]), "detaching restores every bit"


def test_reuse_in_a_family(known: Any) -> None:
    check_reuse(known)


def test_reuse_in_the_fallback(unknown: Any) -> None:
    check_reuse(unknown)


def test_whole_calls_of_a_family(known: Any) -> None:
    """Computed ones are exact, a reused one is the last of the same streams, and not another's."""
    batch = len(next(tensors_in(known.inputs())))
    streams = [range(batch), range(9, 9 + batch)]  # two passes of each step
    table, times = [True, False, True], dict(enumerate(TIMES[:3]))
    plain = {(i, n): tensors(known(seed=9 * n + i, t=t)) for i, t in times.items() for n in (0, 1)}
    clock = Clock(TIMES[:3])
    schedule = CacheSchedule.steps(table, TIMES[:3], (WHOLE.name,))
    patches = apply_schedule_(known.model, schedule, clock)
    try:
        for i, t in times.items():
            for n in (0, 1):
                clock.tick(t, streams[n])
                found = tensors(known(seed=9 * n + i, t=t))
                assert equal(found, plain[i if table[i] else i - 1, n])
    finally:
        for patch in patches:
            patch.remove()
    assert equal(tensors(known(seed=0, t=TIMES[0])), plain[0, 0])


# --- time-only modules ----------------------------------------------------------------------------


def outputs(case: Any, names: Iterable[str], seed: int, t: float) -> dict[str, list[list[Tensor]]]:
    """The outputs of each call of each module."""
    found: dict[str, list[list[Tensor]]] = {}

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        found.setdefault(name, []).append(tensors(out))

    with watched(case.model, names, after=note):
        case(seed, t)
    return found


def same_rows(calls: list[list[Tensor]]) -> bool:
    """Whether all calls gave one and the same row, but for the last bits of a product."""
    pairs = [(t, row[:1]) for out in calls for t, row in zip(out, calls[0], strict=False)]
    return all(t.shape[1:] == r.shape[1:] and torch.allclose(t, r, 1e-5, 1e-6) for t, r in pairs)


def test_time_only_modules_of_a_family(known: Any) -> None:
    """Equal at equal t whatever the rest, another at another t, one row for all: and no others."""
    temporal = describe(known.model).temporal
    every = [n for n, m in known.model.named_modules() if n and list(m.parameters())]
    first, second = (outputs(known, every, seed, 0.7) for seed in (1, 2))
    third = outputs(known, every, 1, 0.3)

    def pure(name: str) -> bool:
        if name not in first or len(first[name]) != len(second.get(name, ())):
            return False
        stays = all(map(equal, first[name], second[name])) and same_rows(first[name])
        return stays and not all(map(equal, first[name], third[name]))

    assert [n for n in temporal if not pure(n)] == []
    inside = tuple(f"{n}." for n in temporal)
    weights = [n for n, _ in known.model.named_parameters() if not n.startswith(inside)]
    missed = [n for n in every if pure(n) and any(w.startswith(f"{n}.") for w in weights)]
    # FLUX.3's have a row a token: their number differs from image to image
    assert [n for n in missed if first[n][0][0].ndim == 2] == []


def test_tables_stand_in_for_time_only_modules(known: Any) -> None:
    """Some models ask such a module for its weights' dtype before they call it."""
    temporal = describe(known.model).temporal
    plain, seen = tensors(known()), outputs(known, temporal, 0, 0.7)
    clock, swaps = Clock(TIMES), []
    clock.tick(0.7, range(2))
    try:
        for name in temporal:
            rows = [t[:1].repeat(len(TIMES), *(1,) * (t.ndim - 1)) for t in seen[name][0]]
            module = known.model.get_submodule(name)
            table = TemporalTable(module, rows, len(rows) == 1, clock)
            swaps.append(Swap(known.model, name, table))
        found = tensors(known())
    finally:
        for swap in reversed(swaps):
            swap.remove()
    assert all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(found, plain, strict=True))
    assert equal(tensors(known()), plain)


# --- subsets --------------------------------------------------------------------------------------


def test_linears_of_a_subset_share_their_input(known: Any) -> None:
    """Of equal values; one expert of several may see no token at all."""
    subsets = describe(known.model).subsets
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, args: Any, kwargs: Any) -> None:
        seen[name] = tensors(args[:1])

    with watched(known.model, {n for s in subsets for n in s.linears}, before=note):
        known()
    assert subsets and seen
    for subset in subsets:
        inputs = [seen.get(name) for name in subset.linears]
        if inputs[0] is None:
            assert ".experts." in subset.linears[0] and not any(inputs)
        else:
            assert all(x is not None and equal(x, inputs[0]) for x in inputs), subset
    attention = [n for n, _ in layers(known.model) if n.endswith(".to_k")]
    blocks = describe(known.model).blocks
    alone = [
        n for n in attention if n.startswith(blocks) and not any(n in s.linears for s in subsets)
    ]
    assert not alone


# --- released sizes -------------------------------------------------------------------------------

KLEIN = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
WAN_5B = {
    "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48,
    "out_channels": 48,
}  # fmt: skip
HIDREAM = {
    "patch_size": 2, "in_channels": 16, "num_layers": 16, "num_single_layers": 32,
    "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096],
    "text_emb_dim": 2048, "num_routed_experts": 4, "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128),
    "llama_layers": [*range(32), *(31,) * 16],
}  # fmt: skip
MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384,
}  # fmt: skip
XL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "projection_class_embeddings_input_dim": 2816, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "use_linear_projection": True,
}  # fmt: skip
RELEASED: list[tuple[str, dict[str, Any]]] = [
    ("QwenImageTransformer2DModel", {}), ("QwenImage21Transformer2DModel", {}),
    ("ZImageTransformer2DModel", {}), ("Flux2Transformer2DModel", {}),
    ("Flux2Transformer2DModel", KLEIN), ("Flux3Transformer2DModel", {}),
    ("WanTransformer3DModel", {}), ("WanTransformer3DModel", WAN_5B),
    ("Krea2Transformer2DModel", {}), ("LTX2VideoTransformer3DModel", {}),
    ("ChromaTransformer2DModel", {}), ("HunyuanVideoTransformer3DModel", {}),
    ("HunyuanVideo15Transformer3DModel", {}), ("HunyuanImageTransformer2DModel", {}),
    ("Lumina2Transformer2DModel", {}), ("SanaTransformer2DModel", {}),
    ("HiDreamImageTransformer2DModel", HIDREAM), ("MiniMaxH3Transformer3DModel", {}),
    ("CosmosTransformer3DModel", {}), ("SD3Transformer2DModel", MEDIUM),
    ("FluxTransformer2DModel", {}), ("PixArtTransformer2DModel", {}),
    ("UNet2DConditionModel", {}), ("UNet2DConditionModel", XL),
    ("UNet2DModel", {}), ("UNetMotionModel", {}), ("UNetSpatioTemporalConditionModel", {}),
    ("Kandinsky3UNet", {}), ("CogVideoXTransformer3DModel", {}), ("AuraFlowTransformer2DModel", {}),
    ("LTXVideoTransformer3DModel", {}), ("MochiTransformer3DModel", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), RELEASED)
def test_most_of_a_released_model_is_in_branches_and_layers(
    kind: str, config: dict[str, Any]
) -> None:
    """Of what a token passes through: modulations are one row an image, and some stay in float."""
    import diffusers

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = getattr(diffusers, kind)(**config)
    reused, rest, kept = shares(model)
    assert reused >= 0.9 * (1 - rest - kept), (reused, rest, kept)
    found = sum(layer.weight.numel() for _, layer in layers(model))
    every = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert found >= 0.95 * sum(layer.weight.numel() for layer in every)


def shares(model: nn.Module) -> tuple[float, float, float]:
    """Of all weights those in branches; of the others modulations, and those that stay in float."""
    backbone = describe(model)
    reused = tuple(f"{b.name}." for b in backbone.branches)
    time = tuple(f"{name}." for name in backbone.temporal)
    count: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        owner = name.rpartition(".")[0]
        inside = backbone.block_of(name)
        mixes = inside and any(p in name[len(inside) :] for p in (".norm", "ada", "mod", "emb"))
        if name.startswith(reused):
            count["reused"] += weight.numel()
        elif name.startswith(time) or mixes:
            count["modulation"] += weight.numel()
        elif any(fnmatch.fnmatchcase(owner, p) for p in (*backbone.keep, "*.image_cond*")):
            count["kept"] += weight.numel()
        else:
            count["else"] += weight.numel()
    total = sum(count.values())
    return tuple(count[key] / total for key in ("reused", "modulation", "kept"))  # type: ignore
