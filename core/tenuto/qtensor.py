"""`QTensor`: a quantized weight. `QLinear`, `QConv2d`: layers that compute with one.

A layer executes in 8 bits where a kernel of `kernels/` can, else it simulates: the same codes, the
arithmetic in float. Weight-only layers dequantize on use.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import numerics
from .clock import Clock
from .grid import Grid, spread
from .kernels import activation, int8_conv2d, int8_linear
from .scheme import Format, Scheme


@dataclass(frozen=True)
class QTensor:
    """Codes of a weight (N, ...), K columns a row, G ranges a row; see `grid.py`.

    qdata: int8 (N, ...) for 5 to 8 bits, else two codes a byte, uint8 (N, ceil(K / 2)).
    scale: fp32 (N,). zero_point: uint8 (N,), or None where the range is symmetric.
    With groups of columns, zero_point and step are uint8 (N, G).
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, ...]
    bits: int
    step: Tensor | None = None
    group: int = 0

    @staticmethod
    def of(levels: Tensor, grid: Grid) -> QTensor:
        """A weight from whole levels (N, ...), floating, as `Grid.nearest` gives them."""
        form, shape, zero, step = grid.form, tuple(levels.shape), None, None
        if not form.symmetric:
            zero = grid.zero.to(torch.uint8)
        elif form.bits <= 4:  # stored unsigned
            zero = torch.full_like(grid.zero, 2 ** (form.bits - 1), dtype=torch.uint8)
        if grid.step is not None:
            step = grid.step.to(torch.uint8)
        elif zero is not None:
            zero = zero[:, 0]
        qdata = stored(levels, zero, form.bits, form.group)
        return QTensor(qdata, grid.scale.float(), zero, shape, form.bits, step, form.group)

    def levels(self) -> Tensor:
        """Signed codes with the zero point taken out: int8 (or int16) of the weight's shape."""
        if self.zero_point is None:
            return self.qdata
        size = int(torch.Size(self.shape[1:]).numel())
        rows = numerics.unpack_int4(self.qdata, size) if self.bits <= 4 else self.qdata
        wide = rows.to(torch.int16) - _columns(self.zero_point, self.group, size).to(torch.int16)
        return (wide.to(torch.int8) if self.bits < 8 else wide).view(self.shape)

    def codes(self) -> Tensor:
        """What `scale` multiplies, int8 (or int16) of the weight's shape: levels, times steps."""
        levels = self.levels()
        if self.step is None:
            return levels
        rows = levels.flatten(1)
        steps = _columns(self.step, self.group, rows.shape[1])
        return (rows * steps.to(torch.int8)).view(self.shape)

    def qdata_of(self, codes: Tensor) -> Tensor:
        """`qdata` of other codes in these ranges: the inverse of `codes`."""
        if self.step is not None:
            rows = codes.flatten(1)
            codes = rows // _columns(self.step, self.group, rows.shape[1]).to(torch.int8)
        return stored(codes, self.zero_point, self.bits, self.group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for."""
        scale = self.scale.view(-1, *[1] * (len(self.shape) - 1))
        return (self.codes().to(scale.dtype) * scale).to(dtype)

    def to(self, device: Any) -> QTensor:
        """The same weight on another device."""
        zero, step = (None if t is None else t.to(device) for t in (self.zero_point, self.step))
        return replace(
            self,
            qdata=self.qdata.to(device),
            scale=self.scale.to(device),
            zero_point=zero,
            step=step,
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Named tensors for a file."""
        parts = {
            "qdata": self.qdata,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "step": self.step,
        }
        return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: str, shape: Any, form: Format) -> QTensor:
        """The weight of format `form` that `tensors` stored under `name`."""
        qdata, scale = tensors[f"{name}.qdata"], tensors[f"{name}.scale"]
        zero, step = (tensors.get(f"{name}.{part}") for part in ("zero_point", "step"))
        return QTensor(qdata, scale, zero, tuple(shape), form.bits, step, form.group)


def _columns(values: Tensor, group: int, columns: int) -> Tensor:
    """Values of every range, (N,) or (N, G), as (N, K) of every column."""
    return spread(values if group else values[:, None], group, columns)


def stored(levels: Tensor, zero_point: Tensor | None, bits: int, group: int = 0) -> Tensor:
    """`QTensor.qdata` of levels (N, ...): the inverse of `QTensor.levels`."""
    if zero_point is None:
        return levels.to(torch.int8)
    rows = levels.flatten(1).to(torch.int16)
    rows = rows + _columns(zero_point, group, rows.shape[1]).to(torch.int16)
    return numerics.pack_int4(rows.to(torch.uint8)) if bits <= 4 else rows.to(torch.uint8)


def layout(
    name: str, shape: tuple[int, ...], form: Format
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each of `QTensor.tensors(name)`, for a weight of `shape` in `form`."""
    size = math.prod(shape[1:])
    found = {f"{name}.scale": (torch.float32, shape[:1])}
    if form.symmetric and form.bits > 4:
        return found | {f"{name}.qdata": (torch.int8, shape)}
    columns = (size + 1) // 2 if form.bits <= 4 else size
    found[f"{name}.qdata"] = (torch.uint8, (shape[0], columns))
    if not form.group:
        return found | {f"{name}.zero_point": (torch.uint8, shape[:1])}
    facts = (torch.uint8, (shape[0], math.ceil(size / form.group)))
    return found | {f"{name}.zero_point": facts, f"{name}.step": facts}


class QLayer(nn.Module):
    """What `QLinear` and `QConv2d` share: a quantized weight, a bias, activation ranges.

    ranges: (scale, zero_point) fp32 (T,), one row per calibrated step, or None.
    """

    def __init__(
        self,
        layer: Any,
        qweight: QTensor,
        scheme: Scheme,
        clock: Clock,
        ranges: tuple[Tensor, Tensor] | None = None,
        simulate: bool = False,
        memo: activation.Memo | None = None,
    ) -> None:
        super().__init__()
        self.qdata: Tensor
        self.weight_scale: Tensor
        self.zero_point: Tensor | None
        self.step: Tensor | None
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        weight = layer.weight
        self.scheme, self.clock, self.simulate = scheme, clock, simulate
        self.memo = memo or activation.Memo()
        self.dtype, self.shape, self.bits = weight.dtype, qweight.shape, qweight.bits
        q = qweight.to(weight.device)
        self.register_buffer("qdata", q.qdata)
        self.register_buffer("weight_scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        self.register_buffer("step", q.step)
        self.bias = layer.bias
        scale, zero = (None, None) if ranges is None else (r.to(weight.device) for r in ranges)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero", zero)
        self._packed: Any = None
        self._float: Tensor | None = None
        self.train(layer.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> QLayer:
        self._unpack()
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for key, value in self.__dict__.items():
            clone.__dict__[key] = copy.deepcopy(value, memo)
        return clone

    def _apply(self, fn: Any, recurse: bool = True) -> QLayer:
        self._unpack()  # another device or dtype: pack again
        kept = self.weight_scale, self.input_scale, self.input_zero
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qdata.device)).dtype
        device = self.qdata.device
        weight_scale, self.input_scale, self.input_zero = (
            None if s is None else s.to(device) for s in kept
        )  # a cast of the model must not round the ranges
        assert weight_scale is not None
        self.weight_scale = weight_scale
        return self

    def _unpack(self) -> None:
        """Codes back into `qdata` as they were stored, caches gone."""
        if self._packed is not None:
            self.qdata = self._kept().qdata_of(self._packed.codes())
        self._packed = self._float = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()  # a cache is no state
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def qtensor(self) -> QTensor:
        """The weight; once packed, the packed codes are the only copy."""
        if self._packed is not None:
            return QTensor(self._packed.codes(), self.weight_scale, None, self.shape, 8)
        return self._kept()

    def _kept(self) -> QTensor:
        """The weight as the buffers have it; without codes once packed."""
        zero, step, group = self.zero_point, self.step, self.scheme.weight.group
        return QTensor(self.qdata, self.weight_scale, zero, self.shape, self.bits, step, group)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made on use: what loaders and dtype checks of hosts look at."""
        return self.qtensor().dequantize(self.dtype)

    @property
    def execution(self) -> str:
        """One of int8, simulated, weight-only: how this layer computes on its device."""
        if self.scheme.activation is None:
            return "weight-only"
        return "int8" if not self.simulate and self._supported() else "simulated"

    def packed_tensors(self) -> list[Tensor]:
        """What the caches keep resident beside parameters and buffers."""
        found = [] if self._packed is None else self._packed.tensors()
        return found if self._float is None else [*found, self._float]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The layer on float `x`; a `scale` argument of old diffusers versions is ignored."""
        if self.scheme.activation is None:
            return self._dense(x, self.weight.to(x.dtype), self._bias(x.dtype))
        codes, scale, zero = self._quantize(x)
        if self.execution == "simulated":
            if self._float is None:
                self._float = self.qtensor().dequantize()
            simulated = (codes.float() - zero) * scale
            return self._dense(simulated, self._float, self._bias(torch.float32)).to(x.dtype)
        if self._packed is None:
            self._packed = self._pack()
            self.qdata = self.qdata.new_empty(0)
        return self._integer(codes, scale, zero).to(x.dtype)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        if self.input_scale is None or self.input_zero is None:
            codes, scale = self.memo.per_row(x, self._dims)
            return codes, scale, activation.MIDDLE
        index = self.clock.index.to(self.input_scale.device)
        index = index if len(self.input_scale) > 1 else torch.zeros_like(index)
        scale = self.input_scale.index_select(0, index)
        zero = self.input_zero.index_select(0, index)
        return activation.per_tensor(x, scale, zero), scale, zero.to(torch.int32)

    _dims: tuple[int, ...] = (-1,)

    def _supported(self) -> bool:
        raise NotImplementedError

    def _pack(self) -> Any:
        raise NotImplementedError

    def _integer(self, codes: Tensor, scale: Tensor, zero: Any) -> Tensor:
        raise NotImplementedError

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class QLinear(QLayer):
    """A Linear with a quantized weight (N, K)."""

    def __init__(self, layer: nn.Linear, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _supported(self) -> bool:
        return int8_linear.supported(self.qdata.device, self.shape)

    def _pack(self) -> Any:
        return int8_linear.pack(self.qtensor().codes(), self.weight_scale)

    def _integer(self, codes: Tensor, scale: Tensor, zero: Any) -> Tensor:
        return int8_linear.int8_linear(codes, scale, zero, self._packed, self._bias(torch.float32))

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QConv2d(QLayer):
    """A Conv2d with a quantized weight (O, I / groups, kh, kw)."""

    _dims = (1, 2, 3)

    def __init__(self, layer: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        assert not isinstance(layer.padding, str)  # such layers stay float
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def _supported(self) -> bool:
        return int8_conv2d.supported(self.qdata.device, self.shape)

    def _pack(self) -> Any:
        return int8_conv2d.pack(self.qtensor().codes(), self.weight_scale, self.geometry)

    def _integer(self, codes: Tensor, scale: Tensor, zero: Any) -> Tensor:
        return int8_conv2d.int8_conv2d(codes, scale, zero, self._packed, self._bias(torch.float32))

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
