"""What blocks answered: replays compute each block once a call, and get what the model gives."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from tenuto.calibration import bank_files, replay
from tenuto.calibration import chain as chain_file
from tenuto.calibration.answers import Answers, Flow, Origins, flow_of
from tenuto.calibration.bank_files import BankFiles
from tenuto.calibration.by_block import Values, by_block
from tenuto.calibration.chain import Chain
from tenuto.calibration.replay import arguments, inputs_of
from tenuto.model import describe
from tenuto.sampling.trajectory import Call

WIDTH = 8


class Block(nn.Module):
    """Two streams, as joint blocks have: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.ff, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.ff(torch.relu(x + text)), text + self.text(text)


class Joint(nn.Module):
    """A skip connection from the first block to the last one, a layer outside between them."""

    def __init__(self, depth: int, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.between = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = text.clone()
        skip, last = x, len(self.blocks) - 1
        blocks = list(self.blocks)
        if self.how == "other order":
            blocks[1], blocks[2] = blocks[2], blocks[1]
        if self.how == "twice":
            blocks.insert(1, blocks[0])
        if self.how == "left out":
            del blocks[1]
        for place, block in enumerate(blocks):
            if place == 1:
                x = self.between(x)
            if place == last:
                x = x + skip
            before = text
            x, text = block(x, text)
            if self.how == "writes":
                text = text + before
            if self.how == "adds to it":
                x += 1
            if self.how == "counts" and place == 1 and bool((x == 0).all()):
                raise ValueError("no values")
            skip = x if place == 0 else skip
        return x


class Writes(nn.Module):
    """A block that writes into what it gets, which the model uses again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        out = self.block(x, text)
        text.mul_(0.5)
        return out


def made(depth: int, how: str = "") -> tuple[nn.Module, list[str], list[Call]]:
    """A model, its blocks, and three recorded calls."""
    torch.manual_seed(0)
    model = Joint(depth, how).requires_grad_(False)
    draw = [torch.randn(2, 2, 3, WIDTH) for _ in range(3)]
    calls = [Call(0, i, float(i), {"x": x, "text": t}) for i, (x, t) in enumerate(draw)]
    return model, [f"blocks.{place}" for place in range(depth)], calls


def changed(model: nn.Module, name: str) -> None:
    """Other weights, as after quantization."""
    for p in model.get_submodule(name).parameters():
        p.data.mul_(1.02)


def computed(model: nn.Module, blocks: list[str]) -> list[str]:
    """The blocks that compute from now on, a name each time."""
    found: list[str] = []
    for name in blocks:
        inner = model.get_submodule(name)
        layer = next(m for m in inner.modules() if not list(m.children()) and list(m.parameters()))
        layer.register_forward_hook(lambda m, args, out, name=name: found.append(name))
    return found


def flow(model: nn.Module, blocks: list[str], calls: list[Call], *others: str) -> Flow | None:
    def run() -> None:
        model(**arguments(model, calls[0], "cpu"))

    return flow_of(model, blocks, [*blocks, *others], run, "cpu")


def same(chain: Chain, model: nn.Module, reference: nn.Module, block: str, calls: Any) -> None:
    """What the chain says of a block is what the whole model says."""
    bank, target = chain.data(block)
    expected = inputs_of(model, block, calls, "cpu")
    assert_close(dict(bank.tensors), dict(expected.tensors))
    if target is not None:
        plain = inputs_of(reference, block, calls, "cpu", bool(bank.calls))
        out = replay.outputs(reference.get_submodule(block), plain, "cpu")
        assert_close(target, out)


@pytest.mark.parametrize("kind", ["unet", "sd3", "flux"])
def test_what_blocks_get_is_what_the_whole_model_gives_them(
    tiny: Any, recorded: Any, kind: str
) -> None:
    """Of the quantized model and of the one in full precision, block by block."""
    model, reference, calls = tiny(kind), tiny(kind), recorded(kind).calls
    blocks = list(describe(model).blocks)
    chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", lambda: reference)
    assert not chain.linear and set(chain.answers) == {model, reference}
    for block in blocks:
        if block in (blocks[1], blocks[len(blocks) // 2], blocks[-1]):
            same(chain, model, reference, block, calls)
        else:
            chain.data(block)
        changed(model, block)
        chain.passed(block)


def test_each_block_computes_once_a_call() -> None:
    """However many blocks are behind it; without answers all of them compute for every one."""

    def most(depth: int) -> int:
        model, blocks, calls = made(depth)
        found = computed(model, blocks)
        chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", None)
        assert chain.answers
        for block in blocks:
            chain.data(block)
            chain.passed(block)
        return max(found.count(block) for block in blocks)

    assert most(4) == most(9) < 9 + 3


@pytest.mark.parametrize("kind", ["pixart", "sd3", "unet"])
def test_nothing_is_computed_where_all_is_done(tiny: Any, recorded: Any, kind: str) -> None:
    """A job that goes on may have all blocks done already: no call, no second model."""
    model, calls = tiny(kind), recorded(kind).calls
    blocks = list(describe(model).blocks)
    found = computed(model, blocks)
    chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", lambda: pytest.fail("a model"))
    for block in blocks:
        chain.passed(block)
    assert not found


@pytest.mark.parametrize("kind", ["pixart", "unet"])
def test_what_is_no_longer_needed_makes_room(tiny: Any, recorded: Any, kind: str) -> None:
    """Stored ranges are found after the last block."""
    model, calls = tiny(kind), recorded(kind).calls
    blocks = list(describe(model).blocks)
    chain = Chain(model, blocks, blocks, set(blocks[:-1]), calls, "cpu", None)
    for block in blocks[:-1]:
        chain.data(block)
        chain.passed(block)
    assert (chain.student, chain.teacher, chain.target, chain.answers) == (None, None, None, {})


def test_no_more_is_kept_than_can_be_needed() -> None:
    model, blocks, calls = made(6)
    known = flow(model, blocks, calls, "between")
    assert known is not None
    assert known.order == ("blocks.0", "between", *blocks[1:])
    assert known.last == dict(zip(blocks, (6, 3, 4, 5, 6, 6), strict=True))
    answer = 2 * calls[0].inputs["x"].nbytes
    assert known.size == 2 * answer, "of the first block and of the last one"
    chain = Chain(model, blocks, [*blocks, "between"], set(blocks), calls, "cpu", None)
    for block in blocks:
        chain.data(block)
        assert chain.answers[model].size() <= known.size * len(calls)


def test_answers_go_while_the_blocks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks a model has, what was computed of their answers lives no longer."""
    usual = Origins._add
    seen: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def noted(self: Origins, x: Tensor, names: set[str]) -> None:
        nonlocal most
        usual(self, x, names)
        storage = x.untyped_storage()
        seen.append((StorageWeakRef(storage), storage.nbytes()))
        there = {ref.cdata: size for ref, size in seen if not ref.expired()}
        most = max(most, sum(there.values()))

    monkeypatch.setattr(Origins, "_add", noted)

    def taken(depth: int) -> int:
        nonlocal most
        most = 0
        assert flow(*made(depth)) is not None
        return most

    assert taken(12) == taken(6) > 0


@pytest.mark.parametrize("how", ["other order", "twice", "left out", "writes", "counts"])
def test_models_that_are_run_as_a_whole(how: str) -> None:
    """Their blocks cannot stand still, or nothing tells; what they get is right all the same."""
    model, blocks, calls = made(4, how)
    reference = made(4, how)[0]
    if how == "writes":
        for one in (model, reference):
            one.blocks[0] = Writes(one.blocks[0])
    assert flow(model, blocks, calls) is None
    units = [b for b in blocks if how != "left out" or b != "blocks.1"]
    chain = Chain(model, blocks, units, set(units), calls, "cpu", lambda: reference)
    assert not chain.answers
    for block in units:
        same(chain, model, reference, block, calls)
        changed(model, block)
        chain.passed(block)


def test_an_answer_that_the_model_writes_into() -> None:
    """It is kept as it was."""
    model, blocks, calls = made(4, "adds to it")
    chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", None)
    assert chain.answers
    for block in blocks:
        same(chain, model, model, block, calls)


def test_a_layer_outside_of_the_blocks() -> None:
    """It is looked at where it runs, and the blocks behind it get what it gives now."""
    model, blocks, calls = made(4)
    units = ["blocks.0", "between", *blocks[1:]]
    chain = Chain(model, blocks, units, set(units), calls, "cpu", None)
    assert chain.answers
    for unit in units:
        same(chain, model, model, unit, calls)
        changed(model, unit)
        chain.passed(unit)


def test_few_blocks_with_data_are_run_to() -> None:
    model, blocks, calls = made(6)
    chain = Chain(model, blocks, blocks, {blocks[0], blocks[5]}, calls, "cpu", None)
    assert not chain.answers


def test_where_there_is_no_room(tmp_path: Path) -> None:
    """Neither in memory nor on disk: then blocks compute again."""
    model, blocks, calls = made(4)
    for room, folder, kept in ((0, None, False), (0, tmp_path, True), (2**40, None, True)):
        files = BankFiles(folder, lambda room=room: room)
        chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", None, files)
        assert bool(chain.answers) is kept and bool(files.beside) is kept


def test_several_processes_keep_a_share_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three calls in two processes each keeps the answers of two at most."""
    model, blocks, calls = made(4)
    known = flow(model, blocks, calls)
    assert known is not None
    for several, share in ((1, 3), (2, 2), (3, 1), (8, 1)):
        size = namedtuple("several", "size")(several)
        monkeypatch.setattr(chain_file, "processes", lambda size=size: size)
        for missing in (0, 1):
            files = BankFiles(None, lambda room=share * known.size - missing: room)
            chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", None, files)
            assert bool(chain.answers) is not bool(missing)


def test_all_answers_lie_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the first call too, and in each call those of a block as in the first."""
    monkeypatch.setattr(bank_files, "SMALL", 0)
    model, blocks, calls = made(4)
    files = BankFiles(tmp_path, lambda: 0)
    chain = Chain(model, blocks, blocks, set(blocks), calls, "cpu", None, files)
    for block in blocks:
        same(chain, model, model, block, calls)
        for known in chain.answers[model].kept.values():
            kept = [t for _, tensors, _ in known.values() for t in tensors if any(t.stride())]
            assert all(map(files.file_of, kept)) and bool(kept) is (block != blocks[0])
            del known, kept
        changed(model, block)
        chain.passed(block)
    assert not files.maps


def test_a_block_that_stands_still_gets_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on disk they would be read for nothing."""
    source, blocks, calls = made(5)
    model, read = by_block(source, blocks, "cpu"), list[str]()
    usual = Values.now
    monkeypatch.setattr(Values, "now", lambda self, name: read.append(name) or usual(self, name))
    known = flow(model, blocks, calls)
    assert known is not None
    answers = Answers(model, known, None)
    for place, block in enumerate(blocks):
        read.clear()
        inputs_of(model, block, calls, "cpu", by_call=True, answers=answers)
        of = {name.rpartition(".")[0].rpartition(".")[0] for name in read}
        assert of == set(blocks[:place][-1:])
