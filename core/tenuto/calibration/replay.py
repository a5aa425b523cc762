"""Replay a recorded trajectory block by block: what each block saw, and what it answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..model import Leave, device_and_dtype, tensors_in, watched
from ..sampling import Call, processes, to_device
from .answers import Answers
from .bank import Bank, Seen, banked, banked_by_call, cut_out, fits, whole
from .bank_files import BankFiles, Columns
from .by_block import held
from .lengths import widened

log = logging.getLogger("tenuto")


def arguments(denoiser: nn.Module, call: Call, device: Any) -> dict[str, Any]:
    """What `call` passed, on `device`; half precision as the denoiser's own dtype."""
    _, dtype = device_and_dtype(denoiser)
    return to_device(call.inputs, device, dtype)


def run_to(denoiser: nn.Module, block: str, call: Call, device: Any) -> tuple[Any, Any]:
    """(args, kwargs) that `block` gets when `denoiser` is called as recorded; stops there."""
    seen: list[tuple[Any, Any]] = []

    def stop(name: str, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise Leave

    with watched(denoiser, [block], before=stop, first=True), suppress(Leave):
        denoiser(**arguments(denoiser, call, device))
    if not seen:
        raise ModelError(f"The model was recorded, but did not call {block}.")
    return seen[0]


@torch.no_grad()
def inputs_of(
    denoiser: nn.Module,
    block: str,
    calls: Sequence[Call],
    device: Any,
    by_call: bool | None = None,
    files: BankFiles | None = None,
    answers: Answers | None = None,
) -> Bank:
    """What `block` gets in `calls` of `denoiser`, kept on the CPU, or in `files` as they choose.

    The first tensor says how many rows a call has. What all rows share, such as the embedding of
    a timestep, is given to each where it changes from call to call. Where a call cannot be taken
    apart into rows, see `_by_row`, the bank has whole calls; by_call: it has, or has not.
    Calls whose shapes differ from the most frequent ones are left out, with a word in the log.
    answers: of the blocks before it, which then do not compute again.
    """

    def seen(number: int) -> Any:
        known = nullcontext() if answers is None else answers.before(block, number, device)
        with known:
            args, kwargs = run_to(denoiser, block, calls[number], device)
        return whole(cut_out((tuple(args), dict(kwargs)), calls[number].row))

    taken, found = processes().each(range(len(calls)), seen), list[Seen]()
    columns: Columns | None = None
    for given, call in zip(taken, calls, strict=True):
        form, cut, row = cut_out(given, call.row)
        if files is not None and not found:
            files.choose(sum(t.nbytes for t in cut) * len(calls))
            columns = Columns(files, len(calls)) if files.used else None
        found.append((form, cut if columns is None else columns.put(cut), row))
        del given
    files = None if columns is None else files
    module = denoiser.get_submodule(block)
    known = [call.counted for call in calls]
    rows = [t for t in known if t is not None]
    texts = len(rows) == len(known)
    given = module, block, found, device, by_call is None
    bank = None if by_call else _by_row(*given, files, texts)
    bank = bank or banked_by_call(found, files)
    bank.weights = _weights(bank.steps, calls)
    if texts and sum(map(len, rows)) == len(bank):  # and no call was left out
        most = max(t.shape[1] for t in rows)
        bank.counted = torch.cat([widened(t, (1,), most) for t in rows])
    return bank


def _weights(steps: Tensor, calls: Sequence[Call]) -> Tensor | None:
    """What the errors of rows of these steps count, (R,), 1 in the mean; None: all the same."""
    known = {call.row: call.weight for call in calls}
    found = torch.tensor([known[step] for step in steps.tolist()])
    return None if bool((found == found[:1]).all()) else found / found.mean()


def _by_row(
    module: nn.Module,
    block: str,
    found: Sequence[Seen],
    device: Any,
    sure: bool,
    files: BankFiles | None,
    texts: bool,
) -> Bank | None:
    """The bank of rows; None where the block answers otherwise to rows than to whole calls.

    The first dimension is not always the batch: video models fold frames into it, others have a
    second time for the rows that stay clean. sure: the first and the last row are tried together.
    """
    try:
        bank = banked(block, found, files, texts)
    except ModelError:
        return None
    if not sure or len(bank) < 2:
        return bank
    if bank.lengths is None:
        first, *_, last = [f for f in found if fits(f, bank)] * 2
        index = torch.tensor([0, len(bank) - 1])
    else:  # of one length
        first = last = found[0]
        index = torch.tensor([0, len(found[0][1][0]) - 1])
    answers = [outputs(module, banked_by_call([call]), device)[0] for call in (first, last)]
    args, kwargs = bank.rows(index, device)
    try:
        rows = first_tensor(module(*args, **kwargs)).cpu()
    except (RuntimeError, ValueError, LookupError, AssertionError):
        return None  # they do not even fit
    ends = torch.stack((answers[0][0], answers[1][-1]))
    if rows.shape != ends.shape:
        return None
    slack = 1e-3 if rows.dtype in (torch.float32, torch.float64) else 3e-2
    gap = (rows.double() - ends.double()).flatten(1).norm(dim=1)
    return bank if bool((gap <= slack * ends.double().flatten(1).norm(dim=1)).all()) else None


@torch.no_grad()
def outputs(block: nn.Module, bank: Bank, device: Any, size: int = 32) -> Tensor:
    """The outputs of `block` on every row of `bank`, (R, ...), kept where that is."""
    found, start = torch.empty(0), 0

    def answer(index: Tensor) -> Tensor:
        args, kwargs = bank.rows(index, device)
        return first_tensor(block(*args, **kwargs)).cpu()

    with held(block):
        for out in processes().each(bank.chunks(size), answer):
            rows = out[None] if bank.calls else out
            rows = rows if bank.lengths is None else bank.lengths.widened(rows)
            if not start:
                found = bank.empty((len(bank), *rows.shape[1:]), rows.dtype)
            found[start : start + len(rows)] = rows
            start += len(rows)
            bank.forget()
    return found[:start]


@torch.no_grad()
def token_error(
    block: nn.Module, bank: Bank, rows: Tensor, target: Tensor, device: Any, size: int = 32
) -> float:
    """Squared distance of the block's outputs from `target`, relative and token by token.

    The sum over the `rows` of the bank (int64) and their tokens that count.
    """
    parts = bank.parts(rows, size)
    return sum(float(token_gaps(block, bank, index, target, device).sum()) for index in parts)


def token_gaps(block: nn.Module, bank: Bank, index: Tensor, target: Tensor, device: Any) -> Tensor:
    """`token_error` of each token of one of `bank.parts`: 0 where it does not count."""
    args, kwargs = bank.rows(index, device)
    wanted = bank.answers(target, index).to(device)
    gap = first_tensor(block(*args, **kwargs)) - wanted
    share = gap.square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    if bank.counted is None:
        return share
    return share * bank.counted[index][:, : share.shape[-1]].to(share)


def first_tensor(out: Any) -> Tensor:
    """The main output of a block: the tensor itself or the first one of a tuple."""
    return next(tensors_in(out))


def in_order(denoiser: nn.Module, names: Sequence[str], call: Call, device: Any) -> list[str]:
    """`names` of submodules in the order in which `call` first reaches them, others last."""
    seen: dict[str, None] = {}

    def note(name: str, args: Any, kwargs: Any) -> None:
        seen.setdefault(name)

    with torch.no_grad(), watched(denoiser, names, before=note):
        denoiser(**arguments(denoiser, call, device))
    return [*seen, *(n for n in names if n not in seen)]
