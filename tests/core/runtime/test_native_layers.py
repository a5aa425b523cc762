"""Layers in the numbers of other programs' files: computed, kept, quantized, saved, attached."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto import Artifact, attach, describe, quantize
from tenuto.artifact.compact import compact, expanded
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.presets import effort
from tenuto.errors import ArtifactError, SchemeError
from tenuto.numerics import QTensor, native
from tenuto.numerics.rotation import rotated
from tenuto.numerics.scheme import Format, Recipe, Rule, Scheme, schemes
from tenuto.runtime import default_recipe
from tenuto.runtime.kernels.input_memo import Memo
from tenuto.runtime.layers import QLinear
from tenuto.sampling.clock import Clock

W4, W6, INT8 = schemes.COMFY_W4A8, schemes.COMFY_W6A8, schemes.COMFY_INT8
EXECUTED = {scheme.name: scheme for scheme in (W4, W6, INT8)}
ALL = EXECUTED | {"nvfp4": schemes.NVFP4}


def layer(scheme: Scheme, columns: int = 96, **options: Any) -> tuple[nn.Linear, QLinear]:
    """A float layer and its quantized one; 96 columns are rotated by 16, 192 by 64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Linear(columns, 24)
    weight = RoundToNearest().weight(base.weight, scheme.weight)
    return base, QLinear(base, weight, scheme, Clock((999, 0)), None, **options)


def inputs(columns: int = 96) -> Tensor:
    x = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(1))
    x[..., 7] *= 30  # an outlier, which the rotation spreads
    return x


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [96, 192, 256])
@pytest.mark.parametrize("scheme", EXECUTED.values(), ids=list(EXECUTED))
@torch.no_grad()
def test_a_layer_rotates_its_input_and_multiplies_whole_numbers(
    scheme: Scheme, columns: int
) -> None:
    """In float64 from the codes; executed in int8, and simulated."""
    base, q = layer(scheme, columns)
    x, weight = inputs(columns), q.qtensor()
    turned = rotated(x, weight.rotation)
    scale = turned.abs().amax(-1, keepdim=True) / 127
    near = (turned / scale).round().double() * scale.double()
    v = weight.codes().double() * weight.scale.double()[:, None]
    expected = F.linear(near, v, base.bias.double())
    assert q.execution == "int8" and weight.rotation == {96: 16, 192: 64, 256: 256}[columns]
    simulated = layer(scheme, columns, simulate=True)[1]
    assert simulated.execution == "simulated"
    for out in (q(x), simulated(x)):
        assert float((out - expected).norm() / expected.norm()) < 1e-5
    far = {4: 0.1, 6: 0.03, 8: 0.02}[scheme.weight.bits]
    assert float((q(x) - base(x)).norm() / base(x).norm()) < far


@torch.no_grad()
def test_a_weight_of_4_bit_floats_is_multiplied_in_float() -> None:
    base, q = layer(schemes.NVFP4)
    x = inputs()
    assert q.execution == "weight-only"
    torch.testing.assert_close(q(x), F.linear(x, q.qtensor().dequantize(), base.bias))
    assert float((q(x) - base(x)).norm() / base(x).norm()) < 0.15


@pytest.mark.parametrize("scheme", ALL.values(), ids=list(ALL))
@torch.no_grad()
def test_what_is_packed_comes_back_byte_by_byte(scheme: Scheme) -> None:
    _, q = layer(scheme)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    out, weight = q(inputs()), q.weight.clone()
    if scheme.activation is not None:
        assert q.qdata.numel() == 0, "nothing is packed"
    torch.testing.assert_close(q.weight, weight, rtol=0, atol=0)
    after = q.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    twin = copy.deepcopy(q)
    assert torch.equal(twin(inputs()), out)
    half = copy.deepcopy(q).to(torch.bfloat16)
    assert torch.equal(half.weight_scale, q.weight_scale)
    gap = half(inputs().bfloat16()).float() - out
    assert float(gap.norm() / out.norm()) < 0.02


@torch.no_grad()
def test_layers_with_one_input_rotate_and_quantize_it_once() -> None:
    memo = Memo()
    q, k = (layer(W4, memo=memo)[1] for _ in range(2))
    plain = layer(schemes.W8A8, memo=memo)[1]
    x = inputs()
    q(x)
    (kept,) = memo.seen
    k(x)
    assert memo.seen == [kept]
    base = layer(schemes.W8A8)[0]  # the same input unrotated is another
    assert float((plain(x) - base(x)).norm() / base(x).norm()) < 0.05


@torch.no_grad()
def test_a_compiled_layer_computes_the_same() -> None:
    _, q = layer(W4)
    x = inputs()
    out = q(x)
    q.ready()
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    assert float((compiled(x) - out).norm() / out.norm()) < 0.01


@torch.no_grad()
def test_a_row_that_no_group_divides_is_not_rotated() -> None:
    base, q = layer(INT8, 40)
    assert q.rotation == 0 and q.execution == "int8"
    x = inputs(40)
    assert float((q(x) - base(x)).norm() / base(x).norm()) < 0.05


# --- GPTQ -----------------------------------------------------------------------------------------


def correlated(rows: int, columns: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=draw) * 0.8 ** torch.arange(columns)
    return torch.randn(rows, columns, generator=draw) @ mix.T


FORMS = {
    **{name: scheme.weight for name, scheme in ALL.items() if scheme is not INT8},
    "w4-g32": replace(W4.weight, group=32),
    "fp8": schemes.FP8.weight,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@torch.no_grad()
def test_gptq_on_the_levels_of_a_format_beats_nearest(form: Format) -> None:
    """On other inputs than it saw; every value is one that the format has."""
    x = correlated(1200, 64)
    seen, other = x[:1000], x[1000:]
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 64, generator=draw)
    gram = (seen.T @ seen)[None]
    found = GPTQ(damping=0.01).weight(weight, form, gram)
    nearest = QTensor.nearest(weight, form)
    assert torch.equal(found.scale, nearest.scale)
    errors = [float((other @ (q.dequantize() - weight).T).square().sum()) for q in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]
    again = QTensor.from_tensors(found.tensors("x"), "x", weight.shape, form)
    assert torch.equal(again.dequantize(), found.dequantize())


@torch.no_grad()
def test_a_sweep_ends_where_no_other_code_of_a_weight_is_better() -> None:
    """All 16 codes of every weight, tried one by one, in the basis in which they are rounded."""
    form, weight = W4.weight, torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    x = correlated(200, 16)
    gram = (x.T @ x)[None]
    method = GPTQ(damping=1e-6, sweeps=30)
    q = method.weight(weight, form, gram)
    turned, v = rotated(x, 16).double(), rotated(weight, 16).double()

    def error(w: Tensor) -> Tensor:
        return (turned @ (w - v).T).square().sum(0)

    values = (q.codes().float() * q.scale[:, None]).double()
    least = error(values)
    every = native.w4a8.int8_levels.number(
        torch.arange(-8, 8.0).expand(3, 16, 16), q.steps()[..., None], 4
    )
    for column in range(16):
        for code in range(16):
            tried = values.clone()
            tried[:, column] = (every[:, column, code] * q.scale).double()
            assert bool((error(tried) >= least * (1 - 1e-4)).all())


# --- a model --------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.stem(x) + t.float().view(-1, 1, 1) / 1000
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def model() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().eval().requires_grad_(False)


def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    x = torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(seed))
    for t in (900, 500, 100):
        x = x - 0.3 * denoiser(x, torch.full((batch,), t))
    return x


@pytest.fixture(scope="module")
def trajectory() -> Any:
    from tenuto import record

    return record(model(), sample=sample, batch=4, runs=3)


def only_blocks(scheme: Scheme, algorithm: Any = None) -> Recipe:
    return Recipe((Rule("blocks.*", scheme, algorithm),))


@pytest.mark.parametrize("scheme", ALL.values(), ids=list(ALL))
def test_a_model_is_quantized_saved_loaded_attached(
    scheme: Scheme, trajectory: Any, tmp_path: Path
) -> None:
    denoiser, path = model(), tmp_path / "a.safetensors"
    rounding = None if scheme is INT8 else GPTQ()
    artifact = quantize(denoiser, only_blocks(scheme, rounding), trajectory, measure=False)
    artifact.save(path)
    loaded = Artifact.load(path)
    assert loaded.header == artifact.header
    assert all(torch.equal(loaded.tensors[k], v) for k, v in artifact.tensors.items())
    with safe_open(str(path), "pt") as file:
        types = {file.get_slice(k).get_dtype() for k in file.keys() if k.endswith(".step")}  # noqa: SIM118
    assert types == (set() if scheme is INT8 else {"F8_E4M3"})
    x, t = torch.randn(2, 6, 8), torch.tensor([500, 500])
    with torch.no_grad():
        plain = denoiser(x, t)
        with attach(denoiser, loaded, execution="int8"):
            out = denoiser(x, t)
            made = [m for m in denoiser.modules() if isinstance(m, QLinear)]
            words = {q.execution for q in made}
        assert torch.equal(denoiser(x, t), plain)
    assert len(made) == 4
    assert words == {"weight-only" if scheme is schemes.NVFP4 else "int8"}
    limit = 0.02 if scheme is INT8 else 0.12
    assert 0 < float((out - plain).norm() / plain.norm()) < limit
    small = compact(loaded, denoiser)
    whole = expanded(small, denoiser)
    assert all(torch.equal(whole.tensors[k], v) for k, v in loaded.tensors.items())
    assert not any(k.endswith(".qdata") for k in small.tensors)


def test_gptq_of_a_block_halves_its_error(trajectory: Any) -> None:
    denoiser = model()
    errors = {}
    for name, rounding in (("nearest", RoundToNearest()), ("gptq", GPTQ())):
        found = quantize(denoiser, only_blocks(W4, rounding), trajectory, measure=False)
        errors[name] = found.header["check"]["relative_error"]
    assert errors["gptq"] < 0.8 * errors["nearest"]


def test_first_last_and_odd_layers_stay_in_float(trajectory: Any) -> None:
    """8 columns have no groups of 16; what others leave in 16 bits is left."""
    denoiser = model()
    found = quantize(denoiser, Recipe((Rule("*", W4, RoundToNearest()),)), trajectory)
    assert "stem" not in found.header["layers"] and "head" in found.header["layers"]
    backbone = replace(describe(denoiser), ends=("head",), temporal=("stem",))
    recipe = default_recipe(W4, backbone)
    assert [recipe.rule(n) is None for n in ("stem", "head", "blocks.0.up")] == [True, True, False]


def test_only_what_can_round_unequal_steps_is_let_to() -> None:
    thorough = effort("thorough")
    assert thorough.rounding().name == "adaround"
    assert thorough.rounding(None, W4).name == "gptq"
    assert thorough.rounding("nearest", W4).name == "nearest"
    with pytest.raises(SchemeError, match="by GPTQ, not by adaround"):
        thorough.rounding("adaround", W4)
    for scheme in (W4, INT8):
        with pytest.raises(SchemeError, match="GPTQ"):
            AdaRound()(nn.Linear(16, 4), {"": scheme}, None, torch.zeros(1))  # type: ignore[arg-type]


def test_old_headers_are_as_they_were() -> None:
    for scheme in (schemes.W8A8, schemes.W4A8, schemes.W4A8_STATIC, schemes.FP8):
        assert "rotate" not in json.dumps(scheme.to_json())
    assert Scheme.from_json(json.loads(json.dumps(W4.to_json()))) == W4


@pytest.mark.parametrize("value", [0, 127, 128, 200, 255])
def test_steps_that_are_no_number_or_not_above_0_are_refused(
    value: int, trajectory: Any, tmp_path: Path
) -> None:
    denoiser = model()
    artifact = quantize(denoiser, only_blocks(W4, RoundToNearest()), trajectory, measure=False)
    key = "weights/blocks.0.up.step"
    artifact.tensors[key][3, 1] = value
    artifact.save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=r"blocks\.0\.up\.step"):
        Artifact.load(tmp_path / "a.safetensors")
