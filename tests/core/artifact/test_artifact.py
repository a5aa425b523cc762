"""The one file: exact, whole, and refused in one sentence where it is not what it says."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import Artifact, CacheSchedule, attach, describe, quantize, schemes
from tenuto.artifact.contents import schedule_of
from tenuto.artifact.fingerprint import fingerprint, same
from tenuto.artifact.header import HEADER_LIMIT, read_header
from tenuto.artifact.summary import about
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.errors import ArtifactError, ModelError, TenutoError
from tenuto.numerics.scheme import Recipe, Rule

OLD = Path(__file__).parents[2] / "data" / "v1.safetensors"

# How tests/data/v1.safetensors was made, once and for all: with version 0.1.0, torch 2.13.0,
#     old_artifact(old_model()).save(OLD)
# Later versions load it for ever; do not make it anew.


class OldBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class OldModel(nn.Module):
    """A denoiser that no library can change under us: weights by formula, not by a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.blocks = nn.ModuleList(OldBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) * (1 + t.float().mean() / 1000)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens + labels.float().view(-1, 1, 1)


def old_model() -> OldModel:
    model = OldModel().eval()
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            values = torch.arange(p.numel(), dtype=torch.float64) * 0.7 + place
            p.copy_((values.sin() * 0.4).float().view(p.shape))
    return model


def old_inputs(row: int) -> dict[str, Tensor]:
    x = (torch.arange(2 * 2 * 9, dtype=torch.float64) * 1.3 + row).cos().float().view(2, 2, 3, 3)
    return {"x": x, "t": torch.tensor([999 - 333 * row]), "labels": torch.tensor([1, 2])}


def old_artifact(model: nn.Module) -> Artifact:
    """Everything that version 1 has: 8 and 4 bits, ranges per step, a route."""
    times = [999.0, 666.0, 333.0]
    schedule = {"timesteps": times, "steps": 3, "guidance": None}
    found = Artifact.new(model, schedule, {"seed": 0})
    plan = {
        "stem": schemes.W8A8_STATIC, "blocks.0.attn": schemes.W4A8, "blocks.0.mlp": schemes.W4A16,
        "blocks.1.attn": schemes.W4A8_STATIC, "blocks.1.mlp": schemes.W8A8,
    }  # fmt: skip
    plan = {n: replace(s, weight=replace(s.weight, group=0)) for n, s in plan.items()}
    for name, scheme in plan.items():
        weight: Any = model.get_submodule(name).weight
        q = RoundToNearest().weight(weight, scheme.weight)
        found.tensors |= {f"weights/{k}": v for k, v in q.tensors(name).items()}
        if scheme.activation is not None and not scheme.activation.dynamic:
            found.tensors[f"ranges/{name}.scale"] = torch.tensor([0.01, 0.02, 0.03])
            found.tensors[f"ranges/{name}.zero_point"] = torch.tensor([100.0, 128.0, 150.0])
    branches = ["blocks.0.attn", "blocks.1.mlp"]
    found.tensors["route/table"] = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    found.header |= {
        "schemes": {s.name: s.to_json() for s in plan.values()},
        "recipe": Recipe((Rule("*", schemes.W8A8, RoundToNearest()),)).to_json(),
        "preset": "quick",
        "layers": {
            n: {"scheme": s.name, "shape": list(model.get_submodule(n).weight.shape)}  # type: ignore
            for n, s in plan.items()
        },
        "route": {
            "policy": "router", "timesteps": times, "branches": branches,
            "reuse_ratio": 1 / 3, "scores": {},
        },
    }  # fmt: skip
    return found


# --- a file of version 1 --------------------------------------------------------------------------


def test_a_file_of_version_1_loads_for_ever() -> None:
    found, expected = Artifact.load(OLD), old_artifact(old_model())
    assert found.header["format_version"] == "1.0"
    assert found.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[key], tensor), key
    assert found.header["layers"] == expected.header["layers"]
    assert same(found.header["fingerprint"], fingerprint(old_model()))


def test_a_file_of_version_1_still_does_what_it_did() -> None:
    """Attached, step by step: the numbers were written down when the file was."""
    model, sums = old_model(), []
    plain = [float(model(**old_inputs(row)).detach().sum()) for row in range(3)]
    with attach(model, Artifact.load(OLD)) as attached, torch.no_grad():
        for row in range(3):
            sums.append(float(model(**old_inputs(row)).sum()))
        assert attached.counts() == {"blocks.0.attn": [2, 1], "blocks.1.mlp": [2, 1]}
    assert sums == pytest.approx(OLD_SUMS, rel=1e-4)
    assert sums != pytest.approx(plain, rel=1e-4), "quantization does not show"


OLD_SUMS = [179.25897, 175.67874, 173.16052]


# --- exact ----------------------------------------------------------------------------------------


@pytest.fixture
def made(rounded: Any) -> Callable[..., Artifact]:
    """made(kind, scheme): `rounded`, with stored ranges unless a scheme is named."""
    return lambda kind, scheme="W8A8_STATIC": rounded(kind, scheme)


def routed(model: nn.Module, times: tuple[float, ...] = (999, 749, 500, 250)) -> Artifact:
    """An artifact with a route alone."""
    branches = [b.name for b in describe(model).branches]
    table = torch.rand(len(times), len(branches), generator=torch.Generator().manual_seed(1)) > 0.4
    table[0] = True
    schedule = {"timesteps": list(times), "steps": len(times), "guidance": 2.0}
    found = Artifact.new(model, schedule)
    found.header["route"] = {"policy": "x", "timesteps": list(times), "branches": branches}
    found.tensors["route/table"] = table
    return found


def equal(one: Artifact, other: Artifact) -> bool:
    return (
        one.header == other.header
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(v, other.tensors[k]) and v.dtype is other.tensors[k].dtype
            for k, v in one.tensors.items()
        )
    )


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8_STATIC", "W4A16"])
def test_save_and_load_are_exact(made: Any, tmp_path: Path, scheme: str) -> None:
    artifact = made("dit", scheme)
    artifact.save(tmp_path / "a.safetensors")
    again = Artifact.load(str(tmp_path / "a.safetensors"))
    assert equal(again, artifact)
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_equal_artifacts_give_equal_bytes(made: Any, tmp_path: Path) -> None:
    """In whatever order they were put together."""
    artifact = made("dit")
    turned = Artifact(
        dict(reversed(artifact.header.items())), dict(reversed(artifact.tensors.items()))
    )
    artifact.save(tmp_path / "a")
    turned.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    turned.header["preset"] = "thorough"
    turned.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_merge_is_exact_in_any_order(made: Any, tiny: Any, tmp_path: Path) -> None:
    weights, route = made("dit"), routed(tiny("dit"))
    both = weights | route
    assert both.tensors.keys() == weights.tensors.keys() | route.tensors.keys()
    assert all(torch.equal(both.tensors[k], v) for k, v in weights.tensors.items())
    assert both.header["route"] == route.header["route"]
    assert both.header["layers"] == weights.header["layers"]
    assert equal(both, route | weights) or both.header["made"] != (route | weights).header["made"]
    both.save(tmp_path / "a")
    assert equal(Artifact.load(tmp_path / "a"), both)
    assert not weights.header.get("route") and "route/table" not in weights.tensors, "unchanged"


def test_merge_replaces_whole_sections(made: Any) -> None:
    """The right one wins: no range of the left one may be left for weights of the right one."""
    both = made("dit", "W8A8_STATIC") | made("dit", "W8A8")
    assert equal(both, made("dit", "W8A8"))
    assert equal(made("dit", "W8A8") | made("dit", "W8A8_STATIC"), made("dit", "W8A8_STATIC"))
    assert equal(made("dit") | made("dit"), made("dit"))


def test_ranges_keep_the_steps_they_were_found_at(made: Any, tiny: Any, loop: Any) -> None:
    """A route trained at other steps is mapped to them, whichever side it comes from."""
    model, weights = tiny("dit"), made("dit")
    route = routed(model, (999, 800, 600, 400, 200, 100))
    for both in (weights | route, route | weights):
        assert both.header["schedule"] == weights.header["schedule"]
        assert both.header["route"]["timesteps"] == route.header["route"]["timesteps"]
        with attach(model, both) as attached, torch.no_grad():
            loop("dit", steps=6)(model, 0, 2)
            loop("dit", steps=3)(model, 0, 2)
            assert sum(held for _, held in attached.counts().values()) > 0


def test_merge_refuses_another_model(made: Any, tiny: Any) -> None:
    other = tiny("dit")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    with pytest.raises(ArtifactError, match="different models"):
        _ = made("dit") | routed(other)
    with pytest.raises(ArtifactError, match="different models"):
        _ = made("dit") | made("pixart")


def test_a_failed_save_leaves_the_old_file(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    broken = made("dit")
    broken.header["made"] = {"x": object()}
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ArtifactError, match="Cannot write"):
        made("dit").save(path / "inside" / "a.safetensors")


# --- whose it is ----------------------------------------------------------------------------------


def test_check_knows_its_model(made: Any, tiny: Any, kind: str) -> None:
    artifact = made(kind)
    artifact.check(tiny(kind))
    artifact.check(tiny(kind).to(torch.bfloat16))
    artifact.check(tiny(kind).half())
    for other in ("pixart", "dit", "unet", "home"):
        if other != kind:
            with pytest.raises(ArtifactError, match=r"^The artifact is for a \w+, and the model"):
                artifact.check(tiny(other))


def test_one_changed_weight_in_a_sampled_place_is_seen(made: Any, tiny: Any) -> None:
    model = tiny("dit")
    with torch.no_grad():
        model.proj_out_2.bias[0] += 0.1
    with pytest.raises(ArtifactError, match="weights differ"):
        made("dit").check(model)


def test_a_quantized_model_is_not_quantized_again(made: Any, tiny: Any) -> None:
    model = tiny("dit")
    with attach(model, made("dit")), pytest.raises(ModelError, match="attached to the model"):
        attach(model, made("dit"))


def test_fingerprints_differ_where_tensors_do(tiny: Any) -> None:
    prints = [fingerprint(tiny(kind)) for kind in ("pixart", "dit", "unet", "home")]
    for one, other in itertools.combinations(prints, 2):
        assert not same(one, other)
    assert all(same(p, json.loads(json.dumps(p))) for p in prints)
    short = {"parameters": prints[0]["parameters"], "values": prints[0]["values"][:-3]}
    assert not same(prints[0], short)
    with pytest.raises(ArtifactError):
        fingerprint(nn.ReLU())


# --- bad files ------------------------------------------------------------------------------------


def file_of(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


GOOD = OLD.read_bytes() if OLD.exists() else b""
TABLE, DATA = parts(GOOD) if GOOD else ({}, b"")


def forged(**changes: Any) -> bytes:
    """The good file with other entries in its own header; None takes one out."""
    header = json.loads(TABLE["__metadata__"]["tenuto"]) | changes
    header = {k: v for k, v in header.items() if v is not None}
    return file_of(TABLE | {"__metadata__": {"tenuto": json.dumps(header)}}, DATA)


def offsets(change: Callable[[list[int]], Any]) -> bytes:
    """The good file with the offsets of its first tensor changed."""
    table = copy.deepcopy(TABLE)
    row = table[next(k for k in table if k != "__metadata__")]
    row["data_offsets"] = change(row["data_offsets"])
    return file_of(table, DATA)


def first(**changes: Any) -> bytes:
    table = copy.deepcopy(TABLE)
    table[next(k for k in table if k != "__metadata__")] |= changes
    return file_of(table, DATA)


def exact(key: str, text: str) -> bytes:
    """The good file with `text` in the place of the number at `key`, as JSON allows it."""
    changed = re.sub(rf'("{key}": ?)\d+', rf"\g<1>{text}", TABLE["__metadata__"]["tenuto"])
    return file_of(TABLE | {"__metadata__": {"tenuto": changed}}, DATA)


HUGE = 5 * 10**9
STEPS = {"timesteps": [999.0, 666.0, 333.0], "steps": 3}
SCHEMES = json.loads(TABLE["__metadata__"]["tenuto"])["schemes"]
MARK = json.loads(TABLE["__metadata__"]["tenuto"])["fingerprint"]
BAD: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "zero header": struct.pack("<Q", 0),
    "header of 5 GB": struct.pack("<Q", HUGE) + GOOD[8:],
    "header of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + GOOD[8:],
    "header longer than the file": struct.pack("<Q", len(GOOD)) + GOOD[8:],
    "random": bytes(range(256)) * 9,
    "text": b"this is not a safetensors file at all, is it?",
    "zip": b"PK\x03\x04" + bytes(200),
    "pickle": b"\x80\x04\x95" + bytes(200),
    "truncated tensors": GOOD[:-1],
    "half": GOOD[: len(GOOD) // 2],
    "header alone": GOOD[: len(GOOD) - len(DATA)],
    "trailing bytes": GOOD + b"x",
    "not JSON": file_of(b"{" + b"a" * 30),
    "not UTF-8": file_of(b'{"\xff\xfe": 1}'),
    "nested": file_of(b"[" * 100_000),
    "nested inside": file_of({"__metadata__": {"tenuto": "[" * 100_000}}),
    "a list": file_of([1, 2]),
    "a number": file_of(b"12"),
    "no metadata": file_of({k: v for k, v in TABLE.items() if k != "__metadata__"}, DATA),
    "other metadata": file_of(TABLE | {"__metadata__": {"format": "pt"}}, DATA),
    "metadata is no object": file_of(TABLE | {"__metadata__": ["tenuto"]}, DATA),
    "our header is no JSON": file_of(TABLE | {"__metadata__": {"tenuto": "{"}}, DATA),
    "our header is a list": file_of(TABLE | {"__metadata__": {"tenuto": "[]"}}, DATA),
    "offset beyond the end": offsets(lambda o: [o[0], o[1] + 10**12]),
    "offset far beyond": offsets(lambda o: [10**15, 2 * 10**15]),
    "negative offset": offsets(lambda o: [-4, o[1]]),
    "offsets turned": offsets(lambda o: [o[1], o[0]]),
    "offset is text": offsets(lambda o: ["0", str(o[1])]),
    "offsets missing": offsets(lambda o: []),
    "offsets are none": offsets(lambda o: None),
    "offset is half": offsets(lambda o: [0.5, o[1]]),
    "huge shape": first(shape=[2**40, 2**20]),
    "negative shape": first(shape=[-1]),
    "shape of other size": first(shape=[5]),
    "unknown type": first(dtype="F4"),
    "next major version": forged(format_version="2.0"),
    "much later version": forged(format_version="17.3-beta", fingerprint=None, layers="new"),
    "no version": forged(format_version=None),
    "no fingerprint": forged(fingerprint=None),
    "odd fingerprint": forged(fingerprint={"parameters": "many", "values": []}),
    "fingerprint of text": forged(fingerprint={"parameters": 3, "values": ["a"]}),
    "no schedule": forged(schedule=None),
    "odd schedule": forged(schedule={"timesteps": "soon"}),
    "no made": forged(made=None),
    "layers are a list": forged(layers=["stem"]),
    "layers are text": forged(layers="all"),
    "a layer without shape": forged(layers={"stem": {"scheme": "w8a8"}}),
    "a layer without weight": forged(
        layers={"nothing": {"scheme": "w8a8", "shape": [2, 2]}}
    ),
    "a layer of another shape": forged(layers={"stem": {"scheme": "w8a8", "shape": [6, 3, 1, 1]}}),
    "a layer of a huge shape": forged(
        layers={"blocks.0.attn": {"scheme": "w4a8", "shape": [6, 2**50]}}
    ),
    "a layer of another scheme": forged(
        layers={"stem": {"scheme": "w4a8", "shape": [6, 2, 1, 1]}}
    ),
    "an unknown scheme": forged(layers={"stem": {"scheme": "w1", "shape": [6, 2, 1, 1]}}),
    "an impossible scheme": forged(schemes={"w8a8": {"name": "w8a8", "weight": {"bits": 77}}}),
    "fewer steps than ranges": forged(schedule={"timesteps": [999.0], "steps": 1}),
    "an infinite fingerprint": forged(fingerprint=MARK | {"values": [math.inf] * 30}),
    "a fingerprint of no weights": forged(fingerprint={"parameters": 0, "values": []}),
    "a fingerprint that is not a number": forged(fingerprint=MARK | {"values": [math.nan] * 30}),
    "a fingerprint of 400 digits": forged(fingerprint=MARK | {"parameters": 10**400}),
    "a fingerprint of 5000 digits": exact("parameters", "9" * 5000),
    "an infinite timestep": forged(schedule={"timesteps": [math.inf, 666.0, 333.0], "steps": 3}),
    "a timestep of 400 digits": forged(schedule={"timesteps": [10**400, 666.0, 333.0]}),
    "a timestep as text": forged(schedule={"timesteps": ["999", "666", "333"], "steps": 3}),
    "infinite guidance": forged(schedule=STEPS | {"guidance": math.inf}),
    "steps of 30 digits": forged(schedule=STEPS | {"steps": 10**30}),
    "a shape of 400 digits": forged(layers={"stem": {"scheme": "w8a8", "shape": [10**400]}}),
    "an encoder of an infinite fingerprint": forged(
        encoders={"e": {"schemes": {}, "layers": {}, "fingerprint": MARK | {"values": [math.inf]}}}
    ),
    "a scheme with a group of no whole number": forged(
        schemes=SCHEMES | {"w4a8": SCHEMES["w4a8"] | {
            "weight": SCHEMES["w4a8"]["weight"] | {"group": 8.0}}}
    ),
    "a scheme of truths": forged(
        schemes=SCHEMES | {"w8a8": SCHEMES["w8a8"] | {
            "weight": SCHEMES["w8a8"]["weight"] | {"bits": True}}}
    ),
    "a shape of lists": forged(layers={"stem": {"scheme": "w8a8", "shape": [6, 2, 1, [1] * 999]}}),
    "branches that are numbers": forged(
        route={"policy": "x", "timesteps": [999.0, 666.0, 333.0], "branches": [1, 10**17]}
    ),
    "escapes in a version": forged(format_version="9\x1b[2J\x9b31m\n\u202e"),
    "a version of 1 MB": forged(format_version="9" * 2**20),
    "escapes in a layer": forged(layers={"\x1b]0;x\x07\n": {"scheme": "w8a8", "shape": [2, 2]}}),
    "a layer with a name of 100 kB": forged(layers={"x" * 10**5: {"scheme": "w8a8", "shape": [1]}}),
    "escapes in an offset": file_of(
        {"\x1b[2J\n" * 99: {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[name])
    tracemalloc.start()
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23, "something was allocated for it"
    text = str(caught.value)
    assert text.endswith(".") and text.isprintable() and str(path) in text and len(text) <= 300
    assert "Traceback" not in text and text[0] != "'"
    assert path.read_bytes() == BAD[name]


def test_the_good_file_is_good(tmp_path: Path) -> None:
    """What the forgeries start from, put together by the same hands."""
    for content in (GOOD, file_of(TABLE, DATA), forged(), forged(format_version="1.9", more=[1])):
        (tmp_path / "good").write_bytes(content)
        assert Artifact.load(tmp_path / "good").tensors


def test_the_next_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(BAD["much later version"])
    with pytest.raises(ArtifactError, match=r"17\.3-beta.*reads 1\.4"):
        Artifact.load(tmp_path / "new")


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_never_do_worse_than_an_error(tmp_path: Path, seed: int) -> None:
    """Any byte of the header: it loads, or it is refused; no other exception, whatever it says."""
    draw = torch.Generator().manual_seed(seed)
    content = bytearray(GOOD)
    for _ in range(1 + seed % 4):
        place = int(torch.randint(0, len(GOOD) - len(DATA), (1,), generator=draw))
        content[place] = int(torch.randint(0, 256, (1,), generator=draw))
    (tmp_path / "a").write_bytes(content)
    try:
        found = Artifact.load(tmp_path / "a")
        attach(old_model(), found).detach()
    except TenutoError:
        pass


@pytest.mark.parametrize("value", [0.0, -0.01, math.inf, math.nan])
@pytest.mark.parametrize(
    "key", ["weights/stem.scale", "ranges/stem.scale", "ranges/stem.zero_point"]
)
def test_scales_are_finite_and_positive(tmp_path: Path, key: str, value: float) -> None:
    """Zero points are finite."""
    artifact = Artifact.load(OLD)
    artifact.tensors[key][-1] = value
    artifact.save(tmp_path / "a")
    if key.endswith("zero_point") and math.isfinite(value):
        Artifact.load(tmp_path / "a")
        return
    with pytest.raises(ArtifactError, match=rf"{key} has values that are not"):
        Artifact.load(tmp_path / "a")


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_codes_that_do_not_fit_the_models_weights_are_refused(factor: float) -> None:
    """Before anything is changed; what rounding makes of a weight is never so far from it."""
    model, artifact = old_model(), Artifact.load(OLD)
    artifact.tensors["weights/blocks.0.mlp.scale"] *= factor
    before = [(id(p), p.clone()) for p in model.parameters()]
    with pytest.raises(ArtifactError, match=r"the scale of blocks\.0\.mlp does not fit"):
        attach(model, artifact)
    for p, (which, value) in zip(model.parameters(), before, strict=True):
        assert id(p) == which and torch.equal(p, value)
    artifact.tensors["weights/blocks.0.mlp.scale"] /= factor
    attach(model, artifact).detach()


def test_weights_of_zero_may_be_quantized(tiny: Any, recorded: Any) -> None:
    """Many a model is trained from layers of zeros, and keeps some."""
    model = tiny("dit")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight") and p.ndim == 2 and "attn1" in name:
                p.zero_()
    for scheme in (schemes.W8A8, schemes.W4A8):
        artifact = quantize(model, Recipe((Rule("*", scheme, RoundToNearest()),)), recorded("dit"))
        attach(model, artifact).detach()


def test_an_eight_bit_float_that_is_no_number_is_refused(tmp_path: Path) -> None:
    form = {"bits": 8, "dtype": "e4m3", "granularity": "channel"}
    artifact = Artifact.load(OLD)
    artifact.header["schemes"]["e4m3"] = {"name": "e4m3", "weight": form, "activation": None}
    artifact.header["layers"]["blocks.1.mlp"]["scheme"] = "e4m3"
    key = "weights/blocks.1.mlp.qdata"
    artifact.tensors[key] = artifact.tensors[key].view(torch.uint8) & 0x3F
    artifact.validate()
    artifact.tensors[key][-1, -1] = 0xFF
    with pytest.raises(ArtifactError, match=r"blocks\.1\.mlp\.qdata has codes of no number"):
        artifact.validate()


def test_a_table_says_whether_its_module_returns_a_single_tensor(tmp_path: Path) -> None:
    artifact = Artifact.load(OLD)
    facts = {"kind": "table", "outputs": [[2]], "single": True}
    artifact.tensors["temporal/time.0"] = torch.ones(3, 2)
    artifact.header["temporal"] = {"modules": {"time": facts}}
    artifact.save(tmp_path / "a")
    assert Artifact.load(tmp_path / "a").section("temporal").keys() == {"time.0"}
    del facts["single"]
    artifact.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="does not fit its tensors"):
        Artifact.load(tmp_path / "a")
    facts["single"] = True
    artifact.tensors["temporal/time.0"][1, 1] = math.inf
    artifact.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"temporal/time\.0 has values that are not finite"):
        Artifact.load(tmp_path / "a")


def test_an_infinite_fingerprint_fits_no_model() -> None:
    """Nor does that of a model whose weights are not finite."""
    mark = {"parameters": 3, "values": [0.5, -1.0]}
    assert same(mark, mark)
    for value in (math.inf, -math.inf, math.nan):
        broken = mark | {"values": [0.5, value]}
        assert not same(mark, broken) and not same(broken, mark) and not same(broken, broken)


def test_words_of_a_header_are_shown_on_one_line_without_commands(tmp_path: Path) -> None:
    """Terminals obey the control characters of both ranges; marks of direction hide words."""
    header = {"family": "\x1b[31m", "model_class": "\x9b2J" * 10**5, "preset": "a\nb\u202e"}
    artifact = Artifact.load(OLD)
    layers = {"\x1b" + n: f for n, f in artifact.header["layers"].items()}
    artifact.header |= header | {"layers": layers | artifact.header["layers"]}
    artifact.header["route"]["branches"] = ["\x1b]0;a\x07", "b" * 10**6]
    artifact.header["route"]["scores"] = {"\x1bc": "\x1b" * 10**6}
    text = about("a.safetensors", artifact, 1)
    assert all(line.isprintable() and len(line) < 600 for line in text.split("\n"))
    assert r"\x1b[31m" in text and r"a\nb\u202e" in text


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ArtifactError, match="Cannot read"):
            Artifact.load(path)


def test_the_header_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where safetensors takes the file: what is inside is not parsed."""
    assert HEADER_LIMIT < 2**28
    text = TABLE["__metadata__"]["tenuto"]
    monkeypatch.setattr("tenuto.artifact.header.HEADER_LIMIT", len(text) - 1)
    with pytest.raises(ArtifactError, match="too long"):
        Artifact.load(OLD)


def test_a_sparse_file_of_5_gb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HUGE))
        os.truncate(file.fileno(), HUGE + 8)
    with pytest.raises(ArtifactError, match=r"(?i)header ?too ?large"):
        read_header(path)


def test_a_route_that_does_not_fit_is_refused_before_anything_is_changed(
    tiny: Any, bits: Any
) -> None:
    model = tiny("dit")
    before = bits(model)
    for change in (
        {"branches": ["no.such.branch"] * 6}, {"branches": []}, {"timesteps": [1.0]},
        {"timesteps": None}, {"branches": None},
    ):  # fmt: skip
        artifact = routed(model)
        artifact.header["route"] |= change
        with pytest.raises(TenutoError):
            attach(model, artifact)
        assert bits(model) == before
    artifact = routed(model)
    artifact.tensors["route/table"][0, 0] = False
    with pytest.raises(TenutoError, match="first step"):
        attach(model, artifact)
    assert bits(model) == before


def test_a_route_comes_back_as_a_schedule(tiny: Any) -> None:
    artifact = routed(tiny("dit"))
    schedule = schedule_of(artifact)
    assert isinstance(schedule, CacheSchedule)
    assert torch.equal(schedule.table, artifact.tensors["route/table"])
    assert schedule.timesteps == (999, 749, 500, 250)
    assert schedule_of(Artifact(artifact.header, {})) is None


def test_the_header_says_how_it_was_made(made: Any) -> None:
    header = json.loads(json.dumps(made("dit").header))
    assert {"tenuto", "torch", "python", "seed", "device", "calibration"} <= header["made"].keys()
    assert header["family"] == "dit" and header["schedule"]["steps"] == 4
    text = json.dumps(header)
    assert not any(word in text for word in (str(Path.home()), "/tmp", os.uname().nodename))
