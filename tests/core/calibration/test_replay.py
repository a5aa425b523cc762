"""Block by block: what each block saw, and what it answered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import describe, record
from tenuto.calibration.bank import Bank, Rows, on_device
from tenuto.calibration.chain import Chain, is_chain
from tenuto.calibration.replay import in_order, inputs_of, outputs, run_to
from tenuto.errors import ModelError
from tenuto.model.signature import tensors_in
from tenuto.sampling.trajectory import Call


def watched(denoiser: nn.Module, block: str, calls: list[Call]) -> tuple[Tensor, Tensor]:
    """(first input, output) of `block` in whole calls of the denoiser, by an ordinary hook."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.append((next(tensors_in((args, kwargs))), next(tensors_in(out))))

    hook = denoiser.get_submodule(block).register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        for call in calls:
            denoiser(**call.inputs)
    hook.remove()
    first, out = zip(*seen, strict=True)
    return torch.cat(first), torch.cat(out)


def changed(denoiser: nn.Module, block: str) -> None:
    """Other weights in `block`, as after quantization."""
    with torch.no_grad():
        for p in denoiser.get_submodule(block).parameters():
            p.mul_(1.02)


def test_inputs_and_outputs_are_those_of_the_model(tiny: Any, recorded: Any, kind: str) -> None:
    """For every block, all of what it gets: replayed alone it answers as it did in the model."""
    denoiser, calls = tiny(kind), recorded(kind).calls
    for block in describe(denoiser).blocks:
        bank = inputs_of(denoiser, block, calls, "cpu")
        first, out = watched(denoiser, block, calls)
        assert len(bank) == len(first) == 4 * len(calls)
        assert torch.equal(bank.tensors[0], first)
        found = outputs(denoiser.get_submodule(block), bank, "cpu", size=7)
        assert torch.allclose(found, out, atol=1e-4, rtol=1e-4), block


def test_every_row_knows_its_step(tiny: Any, recorded: Any, kind: str) -> None:
    block = describe(tiny(kind)).blocks[-1]
    bank = inputs_of(tiny(kind), block, recorded(kind).calls, "cpu")
    assert bank.steps.tolist() == [r for _ in range(2) for r in range(4) for _ in range(4)]


def test_rows_of_several_steps_in_one_batch(tiny: Any, recorded: Any, kind: str) -> None:
    """Training mixes them: each row must come with its own timestep, whatever shape that has."""
    denoiser, calls = tiny(kind), recorded(kind).calls
    block = describe(denoiser).blocks[0]
    bank = inputs_of(denoiser, block, calls, "cpu")
    _, out = watched(denoiser, block, calls)
    index = torch.tensor([0, len(bank) - 1, 5, 9])
    args, kwargs = bank.rows(index, "cpu")
    with torch.no_grad():
        found = next(tensors_in(denoiser.get_submodule(block)(*args, **kwargs)))
    assert torch.allclose(found, out[index], atol=1e-4, rtol=1e-4)


def test_a_timestep_of_one_element_is_given_to_every_row(tiny: Any, conditions: Any) -> None:
    """DiT's blocks embed the timestep themselves; a loop may well pass it with one row for all."""
    denoiser = tiny("dit")

    def sample(module: nn.Module, seed: int, batch: int) -> Tensor:
        x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        labels = conditions("dit", list(range(batch)))["labels"]
        for t in (900, 100):
            x = x - 0.1 * module(x, timestep=torch.tensor([t]), class_labels=labels).sample
        return x

    calls = record(denoiser, sample=sample, batch=3, runs=1).calls
    for block in describe(denoiser).blocks:
        bank = inputs_of(denoiser, block, calls, "cpu")
        _, out = watched(denoiser, block, calls)
        assert torch.allclose(outputs(denoiser.get_submodule(block), bank, "cpu"), out, atol=1e-4)


class ByNumber(nn.Module):
    """Blocks that get the step as a plain number, or as a tensor without a row."""

    def __init__(self, tensor: bool) -> None:
        super().__init__()
        self.tensor = tensor
        self.layers = nn.ModuleList(ScaledBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, t.reshape(()) if self.tensor else float(t))
        return x


class ScaledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(4, 4)

    def forward(self, x: Tensor, level: Any) -> Tensor:
        return x + self.ff(x) * level


@pytest.mark.parametrize("tensor", [True, False])
def test_what_has_no_rows_and_changes_is_replayed_call_by_call(tensor: bool) -> None:
    """Taken from the first call, it would be wrong for all others and nobody would know."""
    calls = [Call(0, i, float(i), {"x": torch.ones(2, 4), "t": torch.tensor(i)}) for i in (1, 2)]
    denoiser = ByNumber(tensor)
    bank = inputs_of(denoiser, "layers.0", calls, "cpu")
    found = outputs(denoiser.get_submodule("layers.0"), bank, "cpu")
    assert len(bank) == 2 and bank.steps.tolist() == [1, 2] and bank.enough(5) == 2
    assert torch.equal(found.flatten(0, 1), watched(denoiser, "layers.0", calls)[1])
    assert len(inputs_of(denoiser, "layers.0", [calls[0], calls[0]], "cpu")) == 4


def test_calls_of_another_shape_are_left_out(tiny: Any, call_as: Any, caplog: Any) -> None:
    denoiser = tiny("pixart")
    calls = []
    for size, text in ((8, 5), (8, 5), (8, 9)):
        inputs = {
            "hidden_states": torch.randn(2, 4, size, size), "timestep": torch.tensor([5, 5]),
            "encoder_hidden_states": torch.randn(2, text, 24),
        }  # fmt: skip
        calls.append(Call(0, 0, 5.0, inputs))
    bank = inputs_of(denoiser, "transformer_blocks.1", calls, "cpu")
    assert len(bank) == 4
    assert "1 of 3 calls" in caplog.text


def test_batches_of_several_sizes(tiny: Any, call_as: Any, loop: Any) -> None:
    """A last batch may be smaller; one row for all is then no row of its own."""
    for kind in ("pixart", "home"):
        denoiser = tiny(kind)
        calls = record(denoiser, sample=loop(kind, steps=2), batch=2, runs=1).calls
        calls = [*calls, *record(denoiser, sample=loop(kind, steps=2), batch=1, runs=1).calls]
        block = describe(denoiser).blocks[1]
        bank = inputs_of(denoiser, block, calls, "cpu")
        _, out = watched(denoiser, block, calls)
        found = outputs(denoiser.get_submodule(block), bank, "cpu")
        assert len(bank) == 12 and torch.allclose(found, out, atol=1e-4)


def test_half_precision_recordings_replay_in_full(tiny: Any, loop: Any) -> None:
    """A pipeline in bf16 is calibrated in fp32."""
    denoiser = tiny("pixart").to(torch.bfloat16)
    run = loop("pixart", steps=2)

    def sample(module: nn.Module, seed: int, batch: int) -> Tensor:
        x = run.noise(seed, batch).bfloat16()
        text = torch.ones(batch, 5, 24, dtype=torch.bfloat16)
        for t in run.times():
            x = module(x, encoder_hidden_states=text, timestep=t.expand(batch)).sample
        return x

    calls = record(denoiser, sample=sample, batch=2, runs=1).calls
    assert calls[0].inputs["hidden_states"].dtype is torch.bfloat16
    wide = copy.deepcopy(denoiser).float()
    bank = inputs_of(wide, "transformer_blocks.2", calls, "cpu")
    assert bank.tensors[0].dtype is torch.float32
    low = inputs_of(denoiser, "transformer_blocks.2", calls, "cpu")
    assert low.tensors[0].dtype is torch.bfloat16


def test_the_model_is_not_changed(tiny: Any, recorded: Any, kind: str, bits: Any) -> None:
    denoiser, calls = tiny(kind), recorded(kind).calls
    denoiser.spare = nn.Linear(1, 1)
    before, blocks = bits(denoiser), list(describe(denoiser).blocks)
    inputs_of(denoiser, blocks[0], calls, "cpu")
    is_chain(denoiser, blocks, calls[0], "cpu")
    in_order(denoiser, blocks, calls[0], "cpu")
    with pytest.raises(ModelError, match="did not call"):
        run_to(denoiser, "spare", calls[0], "cpu")
    assert bits(denoiser) == before


# --- one after another ----------------------------------------------------------------------------


def test_which_models_are_chains(tiny: Any, recorded: Any, kind: str) -> None:
    denoiser = tiny(kind)
    found = is_chain(denoiser, describe(denoiser).blocks, recorded(kind).calls[0], "cpu")
    assert found == (kind != "unet")


def test_a_skip_connection_breaks_a_chain(tiny: Any, recorded: Any) -> None:
    blocks = describe(tiny("pixart")).blocks
    call = recorded("pixart").calls[0]
    assert not is_chain(tiny("pixart"), blocks[::2], call, "cpu"), "one is left out"
    denoiser = tiny("pixart")
    first = denoiser.transformer_blocks[0]
    inner = first.forward
    first.forward = lambda x, **kwargs: inner(x, **kwargs) * 1.0
    assert is_chain(denoiser, blocks, call, "cpu")
    second = denoiser.transformer_blocks[1]
    second.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    assert not is_chain(denoiser, blocks, call, "cpu")


@pytest.mark.parametrize("needy", ["all", "last", "first"])
def test_handing_on_equals_replaying(tiny: Any, recorded: Any, kind: str, needy: str) -> None:
    """Every block quantized in turn: inputs of the quantized prefix, targets in full precision."""
    denoiser, calls = tiny(kind), recorded(kind).calls
    blocks = list(describe(denoiser).blocks)
    if kind == "unet":
        blocks = blocks[:4]  # the rest is alike
    wanted = {"all": blocks, "last": blocks[-1:], "first": blocks[:1]}[needy]
    reference = tiny(kind)
    whole = describe(denoiser).blocks
    chain = Chain(denoiser, whole, blocks, set(wanted), calls, "cpu", lambda: reference)
    assert chain.linear == (kind != "unet" and needy != "first")
    for block in blocks:
        if block in wanted:
            bank, target = chain.data(block)
            expected = inputs_of(denoiser, block, calls, "cpu")
            assert bank.tensors.keys() == expected.tensors.keys()
            for key, tensor in expected.tensors.items():
                assert torch.allclose(bank.tensors[key], tensor, atol=2e-4, rtol=1e-3), (block, key)
            _, out = watched(reference, block, calls)
            assert target is not None
            assert torch.allclose(target, out, atol=2e-4, rtol=1e-3), block
        changed(denoiser, block)
        chain.passed(block)


def test_a_block_that_stays_float_does_not_mislead(tiny: Any, recorded: Any) -> None:
    """The chain goes through all blocks, also those that are not quantized."""
    denoiser, calls = tiny("pixart"), recorded("pixart").calls
    blocks = list(describe(denoiser).blocks)
    units = [blocks[0], blocks[2]]
    chain = Chain(denoiser, blocks, units, set(units), calls, "cpu", None)
    assert chain.data(blocks[0])[1] is None
    changed(denoiser, blocks[0])
    chain.passed(blocks[0])
    bank, _ = chain.data(blocks[2])
    expected = inputs_of(denoiser, blocks[2], calls, "cpu")
    assert torch.allclose(bank.tensors[0], expected.tensors[0], atol=1e-4, rtol=1e-3)


def test_layers_in_the_order_in_which_they_run(tiny: Any, recorded: Any) -> None:
    names = ["proj_out", "transformer_blocks.1", "caption_projection.linear_1"]
    found = in_order(tiny("pixart"), names, recorded("pixart").calls[0], "cpu")
    assert found == names[::-1]


def test_a_bank_goes_to_a_gpu_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice its size: half of what is free is left to the block. Elsewhere it stays."""
    bank = Bank(((Rows(0),), {}), {0: torch.zeros(4, 256)}, {}, torch.zeros(4, dtype=torch.int64))
    target = torch.zeros(4, 256)
    size = 2 * 4 * 256 * 4 + 4 * 8
    gpu = torch.device("cuda")
    for free in (2 * size - 1, 10):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert on_device(bank, target, gpu) == (bank, target)
    assert on_device(bank, target, torch.device("cpu")) == (bank, target)
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size, 2 * size))
    monkeypatch.setattr(Tensor, "to", lambda self, device: asked.append(device) or self)
    on_device(bank, target, gpu)
    assert asked == [gpu] * 3
