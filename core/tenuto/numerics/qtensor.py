"""`QTensor`: a quantized weight, and how its codes are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import float8, integer_codes
from .grid import Grid, check_shape, spread
from .rotation import rotated, size_for
from .scheme import LEVELS, Format


@dataclass(frozen=True)
class QTensor:
    """Codes of a weight (N, ...), K columns a row, G ranges a row; see `grid.py`.

    qdata: int8 (N, ...) for 5 to 8 bits, else two codes a byte, uint8 (N, ceil(K / 2)). Codes of a
    float are its bytes, uint8 (N, ...).
    scale: fp32 (N,). zero_point: uint8 (N,), or None where the range is symmetric.
    With groups of columns, zero_point and step are uint8 (N, G). channel: fp32 (K,), what the
    columns were multiplied by before they were rounded, or None.
    Of the dtypes in `scheme.LEVELS`, qdata is uint8 (N, bytes) and step the bytes of e4m3 numbers.
    rotation: the size of the groups of columns that were rotated before, or 0.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, ...]
    bits: int
    step: Tensor | None = None
    group: int = 0
    channel: Tensor | None = None
    dtype: str = "int"
    rotation: int = 0

    @staticmethod
    def of(levels: Tensor, grid: Grid, channel: Tensor | None = None) -> QTensor:
        """A weight from whole levels (N, ...), floating, as `Grid.nearest` gives them."""
        form, shape, zero, step = grid.form, tuple(levels.shape), None, None
        rotation = rotation_of(shape, form)
        if form.dtype in LEVELS:
            return _of_levels(levels, grid, channel)
        if form.dtype == "e4m3":
            qdata, scale = float8.bytes_of(levels), grid.scale.float()
            return QTensor(qdata, scale, None, shape, 8, channel=channel, dtype=form.dtype)
        if not form.symmetric:
            zero = grid.zero.to(torch.uint8)
        elif form.bits <= 4:  # stored unsigned
            zero = torch.full_like(grid.zero, 2 ** (form.bits - 1), dtype=torch.uint8)
        if grid.step is not None:
            step = grid.step.to(torch.uint8)
        elif zero is not None:
            zero = zero[:, 0]
        qdata = stored(levels, zero, form.bits, form.group)
        scale = grid.scale.float()
        facts = step, form.group, channel, form.dtype, rotation
        return QTensor(qdata, scale, zero, shape, form.bits, *facts)

    @staticmethod
    def nearest(weight: Tensor, form: Format) -> QTensor:
        """A weight (N, ...) at the nearest codes: no data needed, and every column's scale is 1."""
        grid = Grid.of(weight, form)
        columns = weight.shape[1:].numel()
        channel = torch.ones(columns, device=weight.device) if form.smooth else None
        return QTensor.of(grid.nearest(weight), grid, channel)

    def grid(self, form: Format) -> Grid:
        """The grid that its codes are on. form: of the weight."""
        zero, step = self.zero_point, self.step
        if form.dtype in LEVELS:
            assert step is not None
            step = float8.numbers(step)
            return Grid(self.scale, torch.zeros_like(step), step, form)
        if form.symmetric or zero is None:
            zero = torch.zeros_like(self.scale)
        zero = zero if form.group else zero[:, None]
        return Grid(self.scale, zero.float(), None if step is None else step.float(), form)

    def levels(self) -> Tensor:
        """Signed codes with the zero point taken out: int8 (or int16) of the weight's shape."""
        if self.dtype in LEVELS:
            return LEVELS[self.dtype].levels(self.qdata, self._size, self.bits).view(self.shape)
        if self.dtype == "e4m3":
            return float8.level_of(self.qdata)
        if self.zero_point is None:
            return self.qdata
        size = self._size
        rows = integer_codes.unpack_int4(self.qdata, size) if self.bits <= 4 else self.qdata
        wide = rows.to(torch.int16) - _columns(self.zero_point, self.group, size).to(torch.int16)
        return (wide.to(torch.int8) if self.bits < 8 else wide).view(self.shape)

    def codes(self) -> Tensor:
        """What `scale` multiplies, of the weight's shape: levels, times steps, int8 (or int16).

        Those of an 8-bit float in its own type, of a 4-bit one in fp32.
        """
        if self.dtype == "e4m3":
            return float8.codes_of(self.qdata)
        levels = self.levels()
        if self.dtype in LEVELS:
            steps = self.steps().view(self.shape)
            number = LEVELS[self.dtype].number(levels, steps, self.bits)
            return number if self.dtype == "e2m1" else number.to(torch.int8)
        if self.step is None:
            return levels
        rows = levels.flatten(1)
        steps = _columns(self.step, self.group, rows.shape[1])
        return (rows * steps.to(torch.int8)).view(self.shape)

    def qdata_of(self, codes: Tensor) -> Tensor:
        """`qdata` of other codes in these ranges: the inverse of `codes`."""
        if self.dtype == "e4m3":
            return float8.bits_of(codes)
        if self.dtype in LEVELS:
            kind, rows = LEVELS[self.dtype], codes.flatten(1).float()
            return kind.stored(kind.nearest(rows, self.steps(), self.bits), self.bits)
        if self.step is not None:
            rows = codes.flatten(1)
            codes = rows // _columns(self.step, self.group, rows.shape[1]).to(torch.int8)
        return stored(codes, self.zero_point, self.bits, self.group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for; of a rotated one as readers of files compute it."""
        scale = self.scale.view(-1, *[1] * (len(self.shape) - 1))
        if self.dtype in LEVELS:
            value = self._of_steps().view(self.shape)
        else:
            value = self.codes().to(scale.dtype) * scale
        value = rotated(value.flatten(1), self.rotation).view(self.shape)
        if self.channel is not None:
            value = (value.flatten(1) / self.channel).view(self.shape)
        return value.to(dtype)

    def _of_steps(self) -> Tensor:
        """`dequantize` before the rotation, (N, K), of the dtypes in `scheme.LEVELS`."""
        assert self.step is not None
        kind, found = LEVELS[self.dtype], torch.empty(self.shape, device=self.qdata.device)
        count = max(1, PIECE // max(1, self._size))
        parts = (t.split(count) for t in (self.qdata, self.step, self.scale[:, None], found))
        for codes, step, scale, out in zip(*parts, strict=True):
            out.copy_(kind.decoded(codes, step, scale, self._size, self.bits))
        return found

    def steps(self) -> Tensor:
        """The e4m3 number of every column, fp32 (N, K): of the dtypes in `scheme.LEVELS`."""
        assert self.step is not None
        found = float8.numbers(self.step)
        return spread(found, self.group, self._size)

    @property
    def _size(self) -> int:
        return math.prod(self.shape[1:])

    def to(self, device: Any) -> QTensor:
        """The same weight on another device."""
        zero, step, channel = (
            None if t is None else t.to(device) for t in (self.zero_point, self.step, self.channel)
        )
        return replace(
            self,
            qdata=self.qdata.to(device),
            scale=self.scale.to(device),
            zero_point=zero,
            step=step,
            channel=channel,
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Named tensors for a file."""
        parts = {
            "qdata": self.qdata,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "step": self.step,
            "channel": self.channel,
        }
        return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: str, shape: Any, form: Format) -> QTensor:
        """The weight of format `form` that `tensors` stored under `name`."""
        qdata, scale = tensors[f"{name}.qdata"], tensors[f"{name}.scale"]
        parts = ("zero_point", "step", "channel")
        zero, step, channel = (tensors.get(f"{name}.{part}") for part in parts)
        facts = step, form.group, channel, form.dtype, rotation_of(shape, form)
        return QTensor(qdata, scale, zero, tuple(shape), form.bits, *facts)


def _of_levels(levels: Tensor, grid: Grid, channel: Tensor | None) -> QTensor:
    """`QTensor.of` of a dtype in `scheme.LEVELS`: of several codes of one number, always the same.

    So a weight that is kept as numbers gets its own bytes back.
    """
    form, shape, kind = grid.form, tuple(levels.shape), LEVELS[grid.form.dtype]
    assert grid.step is not None
    groups = levels.flatten(1).unflatten(1, (-1, form.group))
    rows = torch.cat([
        kind.nearest(kind.number(level, step, form.bits), step, form.bits).flatten(1)
        for level, step in zip(groups.split(ROWS), grid.step[..., None].split(ROWS), strict=True)
    ])  # fmt: skip
    bits = float8.bytes_of(float8.levels(grid.step))
    facts = bits, form.group, channel, form.dtype, rotation_of(shape, form)
    return QTensor(kind.stored(rows, form.bits), grid.scale.float(), None, shape, form.bits, *facts)


ROWS = 256  # of a weight at a time
PIECE = 2**17  # numbers at a time: what a cache holds


def rotation_of(shape: Any, form: Format) -> int:
    """The size of the groups of columns that are rotated of a weight of `shape`; 0: none are."""
    return size_for(math.prod(shape[1:])) if form.rotate else 0


def _columns(values: Tensor, group: int, columns: int) -> Tensor:
    """Values of every range, (N,) or (N, G), as (N, K) of every column."""
    return spread(values if group else values[:, None], group, columns)


def stored(levels: Tensor, zero_point: Tensor | None, bits: int, group: int = 0) -> Tensor:
    """`QTensor.qdata` of levels (N, ...): the inverse of `QTensor.levels`."""
    if zero_point is None:
        return levels.to(torch.int8)
    rows = levels.flatten(1).to(torch.int16)
    rows = rows + _columns(zero_point, group, rows.shape[1]).to(torch.int16)
    return integer_codes.pack_int4(rows.to(torch.uint8)) if bits <= 4 else rows.to(torch.uint8)


def layout(
    name: str, shape: tuple[int, ...], form: Format
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each of `QTensor.tensors(name)`, for a weight of `shape` in `form`."""
    check_shape(shape, form)
    size = math.prod(shape[1:])
    found = {f"{name}.scale": (torch.float32, shape[:1])}
    if form.smooth:
        found[f"{name}.channel"] = (torch.float32, (size,))
    if form.dtype == "e4m3":
        return found | {f"{name}.qdata": (torch.uint8, shape)}
    if form.dtype in LEVELS:
        width = LEVELS[form.dtype].width(size, form.bits)
        found[f"{name}.qdata"] = (torch.uint8, (shape[0], width))
        return found | {f"{name}.step": (torch.uint8, (shape[0], size // form.group))}
    if form.symmetric and form.bits > 4:
        return found | {f"{name}.qdata": (torch.int8, shape)}
    columns = (size + 1) // 2 if form.bits <= 4 else size
    found[f"{name}.qdata"] = (torch.uint8, (shape[0], columns))
    if not form.group:
        return found | {f"{name}.zero_point": (torch.uint8, shape[:1])}
    facts = (torch.uint8, (shape[0], math.ceil(size / form.group)))
    return found | {f"{name}.zero_point": facts, f"{name}.step": facts}
