"""A thousand damaged artifacts: each is refused in one sentence, or attaches and gives numbers.

Mutations are drawn from a seed: entries of the header, tensors, single bytes. What an artifact may
have is in it: ranges per token and per step, groups of columns, floats of 8 bits, the numbers of
other programs' files, a temporal table, a text encoder, a route, compact weights, all of it again
for a second denoiser.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tenuto import Artifact, attach, schemes
from tenuto.artifact.compact import compact
from tenuto.artifact.fingerprint import fingerprint
from tenuto.artifact.header import KEY, read_header
from tenuto.artifact.parts import joined
from tenuto.artifact.summary import about
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.cli.checks import damage_told
from tenuto.errors import TenutoError
from tenuto.numerics.scheme import Format, Scheme

TIMES = [999.0, 666.0, 333.0]
E4M3 = Scheme("e4m3", Format(dtype="e4m3"), Format(granularity="token", dtype="e4m3"))
SMOOTH = Scheme("smooth", replace(schemes.W4A16.weight, smooth=True))
LONGEST, SLACK = 300, 64 * 2**20  # characters of a sentence; bytes beside twice the file

# --- a model and its artifact ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 32, 1)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 32))
        self.blocks = nn.ModuleList(Block(32) for _ in range(5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.time(t.float().view(-1, 1) / 1000)[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


PLAN = {
    "stem": schemes.W8A8_STATIC, "blocks.0.attn": schemes.W4A8, "blocks.0.mlp": schemes.W4A16,
    "blocks.1.attn": schemes.W4A8_STATIC, "blocks.1.mlp": schemes.W8A8, "blocks.2.attn": E4M3,
    "blocks.2.mlp": SMOOTH, "blocks.3.attn": schemes.COMFY_W4A8, "blocks.3.mlp": schemes.COMFY_W6A8,
    "blocks.4.attn": schemes.COMFY_INT8, "blocks.4.mlp": schemes.NVFP4,
}  # fmt: skip


class Pipe:
    """Something like a pipeline: two denoisers and a text encoder of seeded weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer, self.text_encoder = Model().eval(), Block().eval()
        self.transformer_2 = Model().eval()


def put(found: dict[str, Tensor], section: str, name: str, weight: Tensor, scheme: Scheme) -> None:
    q = RoundToNearest().weight(weight, replace(scheme.weight, smooth=False))
    found |= {f"{section}/{k}": v for k, v in q.tensors(name).items()}
    if scheme.weight.smooth:
        found[f"{section}/{name}.channel"] = torch.ones(weight.shape[1])


def artifact_of(pipe: Any, whole: bool) -> Artifact:
    """whole: everything; else what can be compact."""
    found = of_denoiser(pipe.transformer, pipe, whole)
    found.parts["transformer_2"] = of_denoiser(pipe.transformer_2, None, whole)
    return found


def of_denoiser(model: nn.Module, pipe: Any, whole: bool) -> Artifact:
    """pipe: has the text encoder that is quantized too."""
    found = Artifact.new(model, {"timesteps": TIMES, "steps": 3, "guidance": 2.0}, {"seed": 0})
    plan = PLAN if whole else {n: s for n, s in PLAN.items() if s not in (E4M3, SMOOTH)}
    for name, scheme in plan.items():
        put(found.tensors, "weights", name, model.get_submodule(name).weight, scheme)
        if scheme.activation is not None and not scheme.activation.dynamic:
            found.tensors[f"ranges/{name}.scale"] = torch.tensor([0.01, 0.02, 0.03])
            found.tensors[f"ranges/{name}.zero_point"] = torch.tensor([100.0, 128.0, 150.0])
    branches = ["blocks.0.attn", "blocks.1.mlp"]
    found.tensors["route/table"] = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    rows = model.time(torch.tensor(TIMES).view(-1, 1) / 1000).detach()
    found.tensors["temporal/time.0"] = rows.half()
    facts = {"kind": "table", "outputs": [[32]], "single": True, "cosine_error": [0.0] * 3}
    found.header |= {
        "preset": "quick", "schemes": {s.name: s.to_json() for s in plan.values()},
        "layers": {
            n: {"scheme": s.name, "shape": list(model.get_submodule(n).weight.shape)}
            for n, s in plan.items()
        },
        "temporal": {"modules": {"time": facts | {"mean": 0.0, "worst": 0.0}}},
        "route": {"policy": "router", "timesteps": TIMES, "branches": branches,
                  "reuse_ratio": 1 / 3, "scores": {"router": 0.1}},
    }  # fmt: skip
    if not whole:
        return compact(found, model)
    if pipe is None:
        return found
    encoder, scheme = pipe.text_encoder, schemes.W4A16
    put(found.tensors, "encoder", "text_encoder.attn", encoder.attn.weight, scheme)
    found.header["encoders"] = {
        "text_encoder": {
            "schemes": {"w4a16": scheme.to_json()}, "fingerprint": fingerprint(encoder),
            "layers": {"attn": {"scheme": "w4a16", "shape": [8, 8]}},
        }
    }  # fmt: skip
    return found


# --- mutations ------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 0.5, -2.5, 1e30, -1e308, 10**18, 10**400, math.inf, -math.inf,
    math.nan, "", "x", "w8a8", "9" * 1000, "\x1b[2J\x07\u202e", "\ud800", "a/b.c", [], {}, [[]],
    [0], [10**12, 10**12], [-1], [math.nan] * 3, {"": 0}, {"scheme": "w8a8", "shape": [8, 8]},
    list(range(5000)), [[[[[[]]]]]],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in plain data."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def in_header(draw: random.Random, header: dict[str, Any], _: dict[str, Tensor]) -> None:
    """One entry is replaced, removed, added, renamed, doubled or swapped with another."""
    every = list(places(header))
    holder, key = draw.choice(every)
    kind = draw.randrange(8)
    if kind < 4:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[draw.choice(["\x1b[31m\n", "x" * 10**5, "stem", "blocks.0", ""])] = holder.pop(key)
    elif kind == 6 and isinstance(holder[key], int | float):
        holder[key] *= draw.choice([-1, 1e-30, 0.1, 10, 1e6, 1e30])
    else:
        other, where = draw.choice(every)
        holder[key], other[where] = copy.deepcopy(other[where]), copy.deepcopy(holder[key])


NUMBERS = (0.0, -1.0, 1e-45, 1e-30, 1e6, 3e38, -3e38, math.inf, -math.inf, math.nan, 255.0, 1e9)
DTYPES = (
    torch.float32, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
    torch.bfloat16, torch.float8_e4m3fn,
)  # fmt: skip


def in_tensors(draw: random.Random, _: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One tensor gets another value, all other values, another type, shape, name or place."""
    name = draw.choice(sorted(tensors))
    x, kind = tensors[name], draw.randrange(9)
    if kind < 3 and x.numel():
        flat = x.clone().reshape(-1)
        where = slice(None) if kind == 0 else draw.randrange(len(flat))
        value = draw.choice(NUMBERS)
        whole = not x.is_floating_point()
        flat[where] = draw.randrange(2 if x.dtype is torch.bool else 128) if whole else value
        tensors[name] = flat.view(x.shape)
    elif kind == 3:
        tensors[name] = x.to(draw.choice(DTYPES))
    elif kind == 4:
        flat = x.reshape(-1)
        others = [flat[:0], flat[:-1], flat, x[None], torch.cat([flat, flat]), torch.zeros(())]
        tensors[name] = draw.choice([*others, x.mT] if x.ndim > 1 else others)
    elif kind == 5:
        names = ["x", "weights/x.qdata", "ranges/stem.step", "\x1b[2J/x", "y" * 999]
        tensors[draw.choice(names)] = tensors.pop(name)
    elif kind == 6:
        del tensors[name]
    elif kind == 7:
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        noise = torch.frombuffer(bytearray(draw.randbytes(max(1, x.nbytes))), dtype=torch.uint8)
        if x.dtype is not torch.bool and x.numel():
            tensors[name] = noise.view(x.dtype).view(x.shape)


def in_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes are changed, left out or doubled; the ends most often."""
    found = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        near = draw.choice([16, 400, len(found)])
        found[draw.randrange(min(near, len(found)))] = draw.randrange(256)
    if draw.random() < 0.3:
        cut = draw.randrange(len(found))
        found = found[:cut] if draw.random() < 0.5 else found + found[cut:]
    return bytes(found)


def mutated(draw: random.Random, artifact: Artifact) -> bytes:
    """The file of a damaged copy."""
    parts = {name: (part.header, part.tensors) for name, part in artifact.parts.items()}
    header, tensors = joined(artifact.header, dict(artifact.tensors), parts)
    header = copy.deepcopy(header)
    kind = draw.choice(["header"] * 5 + ["tensors"] * 4 + ["bytes"])
    change: Callable[..., None] = in_header if kind == "header" else in_tensors
    for _ in range(0 if kind == "bytes" else draw.choice([1, 1, 1, 2, 3])):
        if header and tensors:
            change(draw, header, tensors)
    content = save({k: v.contiguous().clone() for k, v in tensors.items()})
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    table["__metadata__"] = {KEY: json.dumps(header)}
    text = json.dumps(table).encode()
    made = struct.pack("<Q", len(text)) + text + content[8 + length :]
    return in_bytes(draw, made) if kind == "bytes" else made


# --- what becomes of them -------------------------------------------------------------------------


def held(word: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux); 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(word)), 0)


def watched_from_here() -> int:
    """Resident memory now, from which the peak is counted anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return held("VmRSS")


def used(pipe: Any, path: Path) -> str:
    """The sentence with which it is refused, or nothing: then it was attached, and gave numbers."""
    try:
        read_header(path)
        artifact = Artifact.load(path)
        with damage_told(Path(path.name)):
            about(path.name, artifact, 1)
        x = torch.linspace(-1, 1, 36).view(2, 2, 3, 3)
        with attach(pipe, artifact), torch.no_grad():
            for t in TIMES:
                for denoiser in (pipe.transformer, pipe.transformer_2):
                    out = denoiser(x, torch.tensor([t]))
                    assert bool(out.isfinite().all()), "the output is not finite"
            assert bool(pipe.text_encoder(torch.ones(1, 2, 8)).isfinite().all())
    except TenutoError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_damaged_artifacts(part: int, tmp_path: Path, record_property: Any) -> None:
    pipe, path = Pipe(), tmp_path / "a.safetensors"
    models = nn.ModuleList([pipe.transformer, pipe.transformer_2])
    bits = [p.clone() for p in models.parameters()]
    good = [artifact_of(pipe, True), artifact_of(pipe, False)]
    for artifact in good:
        artifact.save(path)
        assert used(pipe, path) == ""
    wrong, slowest, most, refused = [], 0.0, 0, 0
    for number in range(250):
        draw = random.Random(f"{part} {number}")
        path.write_bytes(mutated(draw, good[number % 2]))
        before, began = watched_from_here(), time.perf_counter()
        try:
            said = used(pipe, path)
        except Exception as error:
            wrong.append(f"{part} {number}: {type(error).__name__}: {error}"[:300])
            continue
        slowest = max(slowest, time.perf_counter() - began)
        most = max(most, held("VmHWM") - before - 2 * path.stat().st_size if before else 0)
        refused += bool(said)
        told = (
            len(said) <= LONGEST and said.isprintable() and said.endswith(".") and said[:1] != "'"
        )
        if said and not told:
            wrong.append(f"{part} {number}: {said[:400]!r}")
    assert all(torch.equal(a, b) for a, b in zip(bits, models.parameters(), strict=True))
    record_property("mutations", f"{refused} of 250 refused, {slowest:.2f} s the slowest, "
                                 f"{most / 2**20:.1f} MiB the most")  # fmt: skip
    print(f"{refused} of 250 refused, {slowest:.2f} s the slowest, {most / 2**20:.1f} MiB the most")
    assert not wrong, "\n".join(wrong)
    assert most < SLACK
