"""Blocks of 32 weights as GGUF stores them: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A block lies along the inputs. W = d * (q - z) + m with d and m in fp16; what is rounded is rounded
to the grid of the fp16 values, so that a reader finds exactly what was chosen. In bytes: d, m where
there is one, four bytes of fifth bits where there are five, then the codes: one a byte of eight
bits, else element i in the low half of byte i and element i + 16 in the high half. (ggml's
`block_q4_0` and its kin.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics import QTensor

SIZE = 32  # weights of a block
SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)  # of a range: fewer clipped, or finer steps
NORMAL = 2.0**-14  # the smallest fp16 that has all its digits
PIECE = 2**16  # blocks that are searched at a time


@dataclass(frozen=True)
class Kind:
    """A type of block. number: as files name it. minimum: whether it has an m. file: of a file."""

    name: str
    number: int
    bits: int
    minimum: bool
    file: int

    @property
    def bytes(self) -> int:
        """The size of one block."""
        return 2 + 2 * self.minimum + 4 * (self.bits == 5) + (32 if self.bits == 8 else 16)

    @property
    def zero(self) -> int:
        """What is subtracted from a stored code."""
        return 0 if self.minimum or self.bits == 8 else 2 ** (self.bits - 1)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("q8_0", 8, 8, False, 7), Kind("q4_0", 2, 4, False, 2), Kind("q4_1", 3, 4, True, 3),
        Kind("q5_0", 6, 5, False, 8), Kind("q5_1", 7, 5, True, 9),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """Codes q (B, 32), whole; d and m fp16 (B, 1), m zero where the kind has none."""

    kind: Kind
    q: Tensor
    d: Tensor
    m: Tensor

    def weight(self, shape: tuple[int, ...]) -> Tensor:
        """What they stand for, fp32."""
        value = (self.q.float() - self.kind.zero) * self.d.float()
        return (value + self.m.float() if self.kind.minimum else value).view(shape)

    def packed(self) -> Tensor:
        """The bytes of a file, uint8 (B, kind.bytes)."""
        parts = [self.d.view(torch.uint8)]
        if self.kind.minimum:
            parts.append(self.m.view(torch.uint8))
        if self.kind.bits == 8:
            parts.append(self.q.to(torch.int8).view(torch.uint8))
            return torch.cat(parts, 1)
        q = self.q.to(torch.uint8)
        if self.kind.bits == 5:
            bits = (q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
            parts.append(bits.sum(2, dtype=torch.uint8))
        return torch.cat([*parts, (q[:, :16] & 15) | (q[:, 16:] << 4)], 1)


def nearest(weight: Tensor, kind: Kind) -> Blocks:
    """The blocks nearest to a weight (N, K), K a multiple of 32, by the squared error of each."""
    rows = weight.float().reshape(-1, SIZE)
    if kind.bits == 8:
        d = (rows.abs().amax(1, keepdim=True) / 127).half()
        return Blocks(kind, _rounded(rows, d, kind, torch.zeros_like(d)), d, torch.zeros_like(d))
    found = [_searched(piece, kind) for piece in rows.split(PIECE)]
    return Blocks(kind, *(torch.cat(some) for some in zip(*found, strict=True)))


def _searched(rows: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """(q, d, m) of the range that gives the least error."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(low, torch.inf)
    for share in SHRINK:
        if kind.minimum:
            d = ((high - low) * share / (2**kind.bits - 1)).half()
            m = (low + (high - low) * (1 - share) / 2).half()
        else:  # the larger end gets the code that only one side has
            d = (torch.where(-low >= high, low, high) * (-share / kind.zero)).half()
            m = torch.zeros_like(d)
        q = _rounded(rows, d, kind, m)
        value = (q - kind.zero) * d.float() + m.float()
        error = (value - rows).square().sum(1, keepdim=True)
        if best is None:
            best, least = (q, d, m), error
            continue
        better = error < least
        best = tuple(torch.where(better, n, o) for n, o in zip((q, d, m), best, strict=True))  # type: ignore[assignment]
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _rounded(rows: Tensor, d: Tensor, kind: Kind, m: Tensor) -> Tensor:
    """The nearest codes on the grid of fp16 d and m, as whole fp32."""
    step = torch.where(d == 0, torch.inf, d.float())
    q = ((rows - m.float()) / step).round() + kind.zero
    return q.clamp(-127, 127) if kind.bits == 8 else q.clamp(0, 2**kind.bits - 1)


def kept(codes: QTensor) -> Blocks | None:
    """The codes of an artifact as Q4_1, where they are of 4 bits or less and fit its blocks.

    scale * step * (code - zero) is d * code + m: the codes stay, d and m are rounded to fp16. None
    where they do not fit, or fp16 has not the digits.
    """
    rows, columns = codes.shape[0], codes.shape[1]
    fits = codes.dtype == "int" and codes.bits <= 4 and codes.channel is None
    if not fits or codes.zero_point is None or columns % SIZE or codes.group % SIZE:
        return None
    groups, scale = columns // SIZE, codes.scale[:, None]
    zero = codes.zero_point.float()
    zero = zero if codes.group else zero[:, None]
    step = scale if codes.step is None else scale * codes.step.float()
    wide = groups if not codes.group else codes.group // SIZE
    zero, step = (t.repeat_interleave(wide, 1)[:, :groups].reshape(-1, 1) for t in (zero, step))
    d = step.half()
    if bool((step < NORMAL).any()) or not bool(d.isfinite().all()):
        return None
    raw = codes.levels().float().view(rows * groups, SIZE) + zero
    return Blocks(KINDS["q4_1"], raw, d, (-zero * d.float()).half())


def unpacked(data: Tensor, kind: Kind) -> Tensor:
    """The weights (B, 32) in fp32 of the bytes of a file (B, kind.bytes): the reader."""
    d, at = data[:, :2].contiguous().view(torch.float16).float(), 2
    m = torch.zeros_like(d)
    if kind.minimum:
        m, at = data[:, 2:4].contiguous().view(torch.float16).float(), 4
    if kind.bits == 8:
        return d * data[:, at:].contiguous().view(torch.int8).float()
    high = torch.zeros(len(data), SIZE, dtype=torch.int16)
    if kind.bits == 5:
        word = data[:, at : at + 4].to(torch.int64) << torch.tensor([0, 8, 16, 24])
        high = ((word.sum(1, keepdim=True) >> torch.arange(SIZE)) & 1).to(torch.int16) * 16
        at += 4
    codes = data[:, at:].to(torch.int16)
    q = torch.cat((codes % 16, codes // 16), 1) + high
    return (q.float() - kind.zero) * d + m
