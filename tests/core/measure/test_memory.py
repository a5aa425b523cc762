"""Times, memory, bytes and multiply-adds; and the bf16 copy."""

from __future__ import annotations

import mmap
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.measure.bf16 import NATIVE, WIDE, bf16_arithmetic, bf16_copy
from tenuto.measure.memory import PeakMemory, resident_weight_bytes
from tenuto.model.operations import multiply_adds
from tenuto.runtime.timing import Latency, latency, timed

MIB = 2**20


class FakeTime:
    """A clock that only moves when told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


# --- time ---------------------------------------------------------------------------------------


def test_runs_are_interleaved_and_turned_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = FakeTime(), []
    monkeypatch.setattr("tenuto.runtime.timing.time", clock)

    def run(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds * (1 + len(order))  # a machine that gets slower and slower

    fns = {"a": lambda: run("a", 2.0), "b": lambda: run("b", 1.0)}
    found = latency(fns, repeats=4, warmup=1)
    assert "".join(order) == "ab" + "abba" * 2
    assert found["a"].seconds == tuple(2.0 * n for n in (4, 7, 8, 11))
    assert found["b"].seconds == tuple(1.0 * n for n in (5, 6, 9, 10))
    assert found["a"].median == 15 and found["b"].median == 7.5
    ratio = found["a"].over(found["b"])
    assert ratio.seconds == pytest.approx((8 / 5, 14 / 6, 16 / 9, 22 / 10))
    assert ratio.median == pytest.approx((16 / 9 + 22 / 10) / 2)


def test_latency_has_median_and_quartiles() -> None:
    found = Latency((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (found.median, found.quartiles) == (3.0, (2.0, 4.0))


def test_a_result_comes_with_its_time() -> None:
    result, seconds = timed(lambda: "done")
    assert result == "done" and 0 <= seconds < 5


# --- memory -------------------------------------------------------------------------------------


def test_peak_memory_sees_what_was_freed_and_starts_afresh() -> None:
    size = 96 * MIB
    with PeakMemory() as large, mmap.mmap(-1, size) as pages:  # malloc may reuse what it kept
        for start in range(0, size, MIB):
            pages[start : start + MIB] = b"1" * MIB
    with PeakMemory() as small:
        pass
    assert large.bytes is not None and small.bytes is not None
    assert large.source == small.source and large.source in ("VmHWM", "ru_maxrss")
    assert large.bytes > size
    if large.source == "VmHWM":  # else nothing can be reset, and the two are equal
        assert large.bytes - small.bytes > 64 * MIB


def test_peak_memory_without_a_resettable_mark(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("tenuto.measure.memory.CLEAR", tmp_path / "none" / "clear_refs")
    with PeakMemory() as peak:
        pass
    assert peak.source == "ru_maxrss" and peak.bytes is not None and peak.bytes > 32 * MIB


def test_each_storage_counts_once() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4), nn.BatchNorm1d(4))
    own = 4 * (8 * 4 + 4)
    norm = 4 * 4 * 4 + 8  # weight, bias, mean, variance; the count of batches is int64
    assert resident_weight_bytes(net) == 2 * own + norm
    net[1].weight = net[0].weight  # tied
    assert resident_weight_bytes(net) == 2 * own + norm - 4 * 8 * 4
    net[1].register_buffer("view", net[0].weight.detach()[1:])
    assert resident_weight_bytes(net) == 2 * own + norm - 4 * 8 * 4
    vars(net[1])["table"] = torch.zeros(10)  # neither parameter nor buffer
    assert resident_weight_bytes(net) == 2 * own + norm - 4 * 8 * 4 + 40


def test_packed_weights_count() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(6, dtype=torch.int8))

        def packed_tensors(self) -> list[Tensor]:
            return [self.get_buffer("codes"), torch.zeros(5), torch.zeros(16, 16).to_mkldnn()]

    assert resident_weight_bytes(nn.ModuleList([Packed()])) == 6 + 20 + 4 * 256


# --- multiply-adds ------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2) * scale
        for block in self.blocks:
            y = y + block(y)
        return y


def test_multiply_adds_of_linear_convolution_and_attention() -> None:
    tokens, attention = 6 * 5, 2 * 30 * 16 * 48 + 2 * 2 * 30 * 30 * 16
    found = multiply_adds(Net(), (torch.zeros(2, 3, 6, 5),), {"scale": 2.0}, ["blocks.1", "conv"])
    assert found["conv"] == 2 * tokens * 16 * 3 * 9
    assert found["blocks.1"] == attention
    assert found[""] == found["conv"] + 2 * attention


# --- bf16 ---------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Convolution, norm and linear; says what it was given and answers with nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 3)
        self.seen: list[object] = []

    def forward(self, x: Tensor, timestep: Tensor, extra: dict[str, Tensor]) -> object:
        self.seen[:] = [x.dtype, timestep.dtype, float(timestep[0]), extra["ids"].dtype]
        y = self.out(self.norm(self.conv(x + extra["shift"]).movedim(1, -1)))
        return OrderedDict(sample=y, rest=(y.mean(), [extra["ids"]]))


def call(net: nn.Module) -> OrderedDict:
    torch.manual_seed(1)
    extra = {"shift": torch.randn(2, 3, 1, 1), "ids": torch.arange(4).view(2, 2)}
    return net(torch.randn(2, 3, 9, 9), timestep=torch.tensor([999.0, 999.0]), extra=extra)


@pytest.mark.parametrize("arithmetic", [NATIVE, WIDE])
def test_the_bf16_copy_computes_in_bf16_and_is_called_like_the_original(arithmetic: str) -> None:
    torch.manual_seed(0)
    net = Denoiser()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    full = call(net)
    twin = bf16_copy(net, arithmetic)
    low = call(twin)
    assert twin.seen == [torch.bfloat16, torch.float32, 999.0, torch.int64]  # 999 is not a bf16
    assert type(low) is OrderedDict and low["sample"].dtype is torch.float32
    assert low["rest"][0].dtype is torch.float32 and low["rest"][1][0].dtype is torch.int64
    error = (low["sample"] - full["sample"]).norm() / full["sample"].norm()
    assert 1e-4 < error < 3e-2
    assert torch.equal(low["sample"], low["sample"].bfloat16().float())
    # the original is as it was
    assert "forward" not in vars(net) and "forward" not in vars(net.conv)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(call(net)["sample"], full["sample"])


def test_wide_arithmetic_is_bf16_with_products_in_fp32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    x = torch.randn(5, 64)
    exact = x.bfloat16().double() @ layer.weight.bfloat16().double().T
    exact = (exact + layer.bias.bfloat16().double()).bfloat16().float()
    wide = bf16_copy(layer, WIDE)(x)
    assert (wide != exact).float().mean() < 0.05  # but for ties that fp32 rounds the other way
    assert torch.allclose(wide, exact, rtol=2**-7)


def test_how_bf16_is_computed_is_known() -> None:
    assert bf16_arithmetic(torch.device("cpu")) in (NATIVE, WIDE)
    assert bf16_arithmetic(torch.device("cuda")) == NATIVE
