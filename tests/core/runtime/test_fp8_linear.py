"""fp8 layers by `torch._scaled_mm`: as a CPU has it, whole models too, and on a GPU.

python -m pytest tests/core/runtime/test_fp8_linear.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto import schemes
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.numerics import float8
from tenuto.runtime import QLayer
from tenuto.runtime.kernels import fp8_linear
from tenuto.runtime.kernels.fp8_linear import BY_ROW, WHOLE
from tenuto.runtime.layers import QLinear
from tenuto.sampling.clock import Clock

CARD = torch.cuda.is_available() and fp8_linear.way_of(torch.device("cuda")) is not None
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not CARD, reason="no GPU with 8-bit floats")),
]
LEADS = [(1,), (17,), (2, 33), (1, 2, 16)]
FP8 = (schemes.FP8, schemes.FP8_STATIC)


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def executes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU counts as a device with products of 8-bit floats: slow, and right."""
    try:
        fp8_linear._try(torch.device("cpu"), BY_ROW)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.skip(f"this torch has no such product on a CPU: {error}")
    found = fp8_linear.way_of
    here = {"cpu": BY_ROW}
    monkeypatch.setattr(fp8_linear, "way_of", lambda device: here.get(device.type) or found(device))


# --- one product ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [BY_ROW, WHOLE])
@pytest.mark.usefixtures("executes")
def test_the_product_is_its_reference(way: str, dtype: torch.dtype, device: str) -> None:
    """In every shape, with a scale for each row or one; outputs are of their own memory."""
    draw = torch.Generator().manual_seed(0)
    limit = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    limit += 4e-3 * (device == "cuda")  # fast sums
    for lead in LEADS:
        for k, n in ((16, 32), (48, 16), (256, 64)):
            x = float8.cast(torch.randn(*lead, k, generator=draw) * 100).to(device)
            codes = float8.cast(torch.randn(n, k, generator=draw) * 100).to(device)
            w_scale = torch.rand(n, generator=draw).to(device) * 1e-3 + 1e-3
            each = torch.rand(*lead, 1, generator=draw).to(device) * 1e-2 + 1e-3
            bias = torch.randn(n, generator=draw).to(device) if n > 16 else None
            packed = fp8_linear.Float8Linear(codes, w_scale, way)
            assert torch.equal(packed.codes().float(), codes.float())
            for scale in (each, each.flatten()[:1]):
                found = fp8_linear.KERNEL.call(x, scale, 0, packed, bias, dtype)
                expected = fp8_linear.reference(x, scale, codes, w_scale, bias)
                assert found.shape == (*lead, n) and found.dtype is dtype
                assert found.is_contiguous() and gap(found, expected) < limit


def made(
    scheme: tn.Scheme, dtype: torch.dtype = torch.bfloat16, k: int = 64, **options: Any
) -> Any:
    """A layer with weights of seed 0 and ranges of ±4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Linear(k, 48).to(dtype)
    pair = (torch.tensor([4.0, 8.0]) / 448, torch.zeros(2)) if scheme.stored else None
    weight = RoundToNearest().weight(base.weight.float(), scheme.weight)
    return QLinear(base, weight, scheme, Clock((999, 0)), pair, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", FP8, ids=lambda s: s.name)
@pytest.mark.usefixtures("executes")
def test_a_layer_executes_what_it_simulates(
    scheme: tn.Scheme, dtype: torch.dtype, device: str
) -> None:
    """At every step; packing keeps one copy of the codes and leaves the state as it was."""
    executed, simulated = made(scheme, dtype).to(device), made(scheme, dtype, simulate=True)
    assert executed.execution == "fp8" and simulated.execution == "simulated"
    x, before = torch.randn(5, 7, 64).to(dtype), executed.qdata.clone()
    with torch.no_grad():
        for time in (999, 0):
            for layer in (executed, simulated):
                layer.clock.tick(time, (0,), layer.qdata.device)
            found, expected = executed(x.to(device)).cpu(), simulated(x)
            assert found.dtype is dtype
            limit = 4e-3 if dtype is torch.bfloat16 else 1e-4
            assert gap(found, expected) < limit + 4e-3 * (device == "cuda")  # fast sums
    assert executed.qdata.numel() == 0 and len(executed.packed_tensors()) == 3
    assert executed.packed_tensors()[0].element_size() == 1
    assert torch.equal(executed.qtensor().qdata, before)
    twin = copy.deepcopy(executed)
    assert torch.equal(twin.qdata, before) and torch.equal(twin.weight, executed.weight)


@pytest.mark.usefixtures("executes")
def test_what_the_product_does_not_take_is_simulated() -> None:
    """Rows of a weight that are no multiple of 16."""
    assert made(schemes.FP8, k=40).execution == "simulated"
    assert made(schemes.FP8, k=40, wanted="float").execution == "dequantized"
    assert made(schemes.FP8, k=48).execution == "fp8"


# --- which cards and versions ---------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """card(capability, error): a GPU of CUDA as torch describes it."""

    def pretend(capability: tuple[int, int], fails: tuple[str, ...], error: Exception) -> Any:
        def product(device: torch.device, way: str) -> None:
            if way in fails:
                raise error

        fp8_linear._tried.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(fp8_linear, "_try", product)
        return fp8_linear.way_of(torch.device("cuda", 5))

    yield pretend
    fp8_linear._tried.cache_clear()


def test_what_a_card_can_do_is_tried(card: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Scales of rows in the product, or after it; a torch without either says one sentence."""
    if torch.version.hip is not None:
        pytest.skip("ROCm has other 8-bit floats")
    wrong = RuntimeError("Only bf16\nand more")
    assert card((8, 0), (), wrong) is None and card((9, 0), (), wrong) == BY_ROW
    assert card((8, 9), (BY_ROW,), wrong) == WHOLE
    assert not caplog.records, "nothing is wrong with these"
    old = TypeError("_scaled_mm() got an unexpected keyword")  # torch 2.1
    assert card((9, 0), (BY_ROW, WHOLE), old) is None
    (line,) = caplog.messages
    assert "fp8 layers are simulated" in line and "unexpected keyword" in line


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices_have_none(device: str) -> None:
    assert fp8_linear.way_of(torch.device(device)) is None


# --- a model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    """A transformer in bf16 all of whose widths are multiples of 16, and the inputs of a call."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero", norm_elementwise_affine=False,
            activation_fn="gelu-approximate", attention_bias=True,
        ).to(torch.bfloat16).eval().requires_grad_(False)  # fmt: skip
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        x = torch.randn(2, 4, 8, 8).bfloat16()
    labels = torch.tensor([1, 2])
    return model, {"hidden_states": x, "timestep": torch.tensor([500, 500]), "class_labels": labels}


def run(model: Any, inputs: dict[str, Any], device: str = "cpu") -> Tensor:
    given = {k: v.to(device) for k, v in inputs.items()}
    with torch.no_grad():
        return model(**given, return_dict=False)[0].cpu()


@pytest.mark.usefixtures("executes")
def test_a_model_executes_and_comes_back(model: Any) -> None:
    denoiser, inputs = model
    before, plain = copy.deepcopy(denoiser.state_dict()), run(*model)
    with tn.attach(denoiser, "fp8", simulate=True):
        expected = run(*model)
    with tn.attach(denoiser, "fp8", execution="int8") as attached:
        found, report = run(*model), attached.execution()
        whole = sum(isinstance(m, QLayer) for m in denoiser.modules())
        assert attached.int8_weight_share() > 0.5
    assert report["layers"]["fp8"] == whole > 8 and set(report["layers"]) <= {"fp8", "float"}
    assert gap(found, expected) < 0.03 and 0.002 < gap(found, plain) < 0.2
    after = denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)
    assert torch.equal(run(denoiser, inputs), plain)


def test_stored_ranges_need_an_artifact(model: Any) -> None:
    with pytest.raises(tn.TenutoError, match="fp8-static"):
        tn.attach(model[0], "fp8-static")


@pytest.mark.parametrize("scheme", FP8, ids=lambda s: s.name)
@pytest.mark.usefixtures("executes")
def test_in_a_compiled_graph_it_is_plain_operations(scheme: tn.Scheme) -> None:
    """One graph, which has the quantization and the product apart: Inductor fuses the former."""
    torch._dynamo.reset()
    layer, graphs = made(scheme), []
    x = torch.randn(40, 64).bfloat16()

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def block(x: Tensor) -> Tensor:
        return layer(nn.functional.silu(x))

    with torch.no_grad():
        layer.clock.tick(999, (0,), torch.device("cpu"))
        expected = block(x)
        found = torch.compile(block, backend=keep, fullgraph=True)
        assert gap(found(x), expected) < 0.01
        with torch._dynamo.config.patch(error_on_recompile=True):
            layer.clock.tick(0, (0,), torch.device("cpu"))
            assert gap(found(x), block(x)) < 0.01
    assert len(graphs) == 1 and "_scaled_mm" in graphs[0] and "tenuto" not in graphs[0]
    torch._dynamo.reset()


@pytest.mark.skipif(not CARD, reason="no GPU with products of 8-bit floats")
@pytest.mark.parametrize("execution", ["int8", "auto"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_on_a_card(model: Any, compile: bool, execution: str, tmp_path: Any) -> None:
    """Eager, compiled, captured: near the simulation; what is chosen is kept on disk."""
    from tenuto.runtime.execution import Chooser
    from tenuto.runtime.kept_choices import KeptChoices
    from tenuto.runtime.mode import Mode

    torch._dynamo.reset()
    denoiser, inputs = copy.deepcopy(model[0]).to("cuda"), model[1]
    with tn.attach(denoiser, "fp8", simulate=True):
        expected = run(denoiser, inputs, "cuda")
    kept = KeptChoices(tmp_path / "choices.json")
    for graphs in (False, True):
        chooser = Chooser(mode=Mode(compile, graphs), kept=kept)
        options = {"compile": compile, "graphs": graphs, "chooser": chooser}
        with tn.attach(denoiser, "fp8", execution=execution, **options) as attached:
            found = [run(denoiser, inputs, "cuda") for _ in range(5)][-1]
            words = set(attached.execution()["layers"])
        assert words <= {"fp8", "dequantized", "float"}
        assert execution == "auto" or "dequantized" not in words
        assert gap(found, expected) < (0.03 if words <= {"fp8", "float"} else 0.2)
    torch._dynamo.reset()


@pytest.mark.skipif(not CARD, reason="no GPU with products of 8-bit floats")
@pytest.mark.parametrize("scheme", FP8, ids=lambda s: s.name)
def test_inductor_fuses_the_quantization(scheme: tn.Scheme) -> None:
    """Activation, range and codes are one kernel; a stored scale may take one more."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    layer = made(scheme).to("cuda")
    x = torch.randn(40, 64, device="cuda").bfloat16()

    def block(x: Tensor) -> Tensor:
        return layer(nn.functional.silu(x))

    with torch.no_grad():
        layer.clock.tick(999, (0,), torch.device("cuda"))
        expected, unrounded = block(x), layer(nn.functional.silu(x.float()))
        found, code = run_and_get_code(torch.compile(block, fullgraph=True), x)
    text = "".join(code)
    # Fused, the activation is not rounded to bf16 in between: that alone makes 0.005 to 0.016.
    assert min(gap(found, expected), gap(found, unrounded)) < 0.01
    assert "_scaled_mm" in text and 1 <= text.count("@triton.jit") <= 2
    torch._dynamo.reset()
