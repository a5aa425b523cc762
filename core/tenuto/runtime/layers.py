"""`QLinear`, `QConv2d`: layers that compute with a quantized weight.

A layer executes in 8 bits where a kernel of `kernels/` can, else it simulates: the same codes, the
arithmetic in float. "auto" and "float" may compute with the dequantized weight and the input as it
is. Weight-only layers dequantize on use.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import Replacement
from ..numerics import QTensor, Scheme
from ..sampling import Clock
from . import execution
from .execution import DENSE, INT8, Chooser
from .kernels import int8_conv2d, int8_linear, packed_bf16, quantize_input


class QLayer(Replacement):
    """What `QLinear` and `QConv2d` share: a quantized weight, a bias, activation ranges.

    ranges: (scale, zero_point) fp32 (T,), one row per calibrated step, or None. wanted: "int8",
    "float", or "auto": then `chooser` decides, at the first call for about so many rows.
    """

    def __init__(
        self,
        layer: Any,
        qweight: QTensor,
        scheme: Scheme,
        clock: Clock,
        ranges: tuple[Tensor, Tensor] | None = None,
        simulate: bool = False,
        memo: quantize_input.Memo | None = None,
        wanted: str = "int8",
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__()
        self.qdata: Tensor
        self.weight_scale: Tensor
        self.zero_point: Tensor | None
        self.step: Tensor | None
        self.channel: Tensor | None
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        weight = layer.weight
        self.scheme, self.clock, self.simulate = scheme, clock, simulate
        self.memo = memo or quantize_input.Memo()
        self.wanted, self.chooser = wanted, chooser or execution.process
        self.choices: dict[tuple[int, torch.dtype], str] = {}  # by highest bit of rows, and dtype
        self.dtype, self.shape, self.bits = weight.dtype, qweight.shape, qweight.bits
        q = qweight.to(weight.device)
        self.register_buffer("qdata", q.qdata)
        self.register_buffer("weight_scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        self.register_buffer("step", q.step)
        self.register_buffer("channel", q.channel)
        self.bias = layer.bias
        scale, zero = (None, None) if ranges is None else (r.to(weight.device) for r in ranges)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero", zero)
        self._packed: Any = None
        self._dense_packed: Any = None
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
        self._unpack()  # another device or dtype: pack and choose again
        self.choices = {}
        kept = self.weight_scale, self.input_scale, self.input_zero, self.channel
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qdata.device)).dtype
        device = self.qdata.device
        weight_scale, self.input_scale, self.input_zero, self.channel = (
            None if s is None else s.to(device) for s in kept
        )  # a cast of the model must not round the ranges
        assert weight_scale is not None
        self.weight_scale = weight_scale
        return self

    def _unpack(self) -> None:
        """Codes back into `qdata` as they were stored, caches gone."""
        if self._packed is not None:
            self.qdata = self._kept().qdata_of(self._packed.codes())
        self._packed = self._float = self._dense_packed = None

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
        facts = self.shape, self.bits, step, group, self.channel
        return QTensor(self.qdata, self.weight_scale, zero, *facts)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made on use: what loaders and dtype checks of hosts look at."""
        return self.qtensor().dequantize(self.dtype)

    @property
    def execution(self) -> str:
        """How this layer computes on its device: int8, simulated, dequantized or weight-only.

        "auto" is not decided yet; "int8 or dequantized" depends on the number of rows.
        """
        if self.scheme.activation is None:
            return "weight-only"
        if self.simulate:
            return "simulated"
        able = self._supported()
        if self.wanted == "int8":
            return INT8 if able else "simulated"
        if self.wanted == "float" or not able:
            return DENSE
        return " or ".join(sorted(set(self.choices.values()), reverse=True)) or "auto"

    def packed_tensors(self) -> list[Tensor]:
        """What the caches keep resident beside parameters and buffers."""
        wide = self._dense_packed and self._dense_packed.weight
        found = [] if self._packed is None else self._packed.tensors()
        return [*found, *(t for t in (self._float, wide) if t is not None)]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The layer on float `x`; a `scale` argument of old diffusers versions is ignored."""
        if self.scheme.activation is None:
            return self._dense(x, self.weight.to(x.dtype), self._bias(x.dtype))
        how = self._chosen(x) if self.wanted == "auto" else self.execution
        if how == DENSE:
            return self._dequantized(x)
        return self._int8(x) if how == INT8 else self._simulated(x)

    def _chosen(self, x: Tensor) -> str:
        """What was decided for about so many rows of this dtype, or is decided now."""
        key = (x.numel() // self.shape[1]).bit_length(), x.dtype
        known = self.choices.get(key)
        if known is None and (self.simulate or not self._supported()):
            return self.execution
        if known is None and execution.may_measure(x):
            kind = (*self._kind(), *key, str(x.device), torch.get_num_threads())
            with torch.no_grad():  # a new tensor each time: the memo knows none of them
                known = self.chooser(
                    kind, lambda: self._int8(x.detach()), lambda: self._dequantized(x.detach())
                )
            self.choices[key] = known
            self._forget()
        return known or INT8

    def _kind(self) -> tuple[Any, ...]:
        """Equal for layers that cost the same."""
        grouped = self.step is not None  # wider codes than 4 bits: two passes on some processors
        return type(self).__name__, self.shape, self.bits, grouped, self.input_scale is None

    def _forget(self) -> None:
        """Drop the caches that no choice so far has a use for."""
        made = set(self.choices.values())
        if INT8 not in made and self._packed is not None:
            kept = self._float, self._dense_packed
            self._unpack()
            self._float, self._dense_packed = kept
        if DENSE not in made:
            self._float = self._dense_packed = None

    def _dequantized(self, x: Tensor) -> Tensor:
        bias = self._bias(x.dtype)
        if self.small or not packed_bf16.supported(x):
            return self._dense(x, self._weight_in(x.dtype), bias)
        if self._dense_packed is None:
            self._float = None
            weight = self.qtensor().dequantize(x.dtype)
            self._dense_packed = packed_bf16.pack(weight, x, self.geometry)
        return self._dense_packed(x, bias)

    def _simulated(self, x: Tensor) -> Tensor:
        codes, scale, zero = self._quantize(x)
        near = (codes.float() - zero) * scale
        weight, bias = self._weight_in(torch.float32), self._bias(torch.float32)
        return self._dense(near, weight, bias).to(x.dtype)

    def _int8(self, x: Tensor) -> Tensor:
        codes, scale, zero = self._quantize(x)
        if self._packed is None:
            self._packed = self._pack()
            self.qdata = self.qdata.new_empty(0)
        with torch.no_grad():
            return self._integer(codes, scale, zero, x.dtype)

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, kept."""
        if self._float is None or self._float.dtype is not dtype:
            self._float = self.qtensor().dequantize(dtype)
        return self._float

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        if self.input_scale is None or self.input_zero is None:
            codes, scale = self.memo.per_row(x, self._dims)
            return codes, scale, quantize_input.MIDDLE
        index = self.clock.index.to(self.input_scale.device)
        index = index if len(self.input_scale) > 1 else torch.zeros_like(index)
        scale = self.input_scale.index_select(0, index)
        zero = self.input_zero.index_select(0, index)
        return quantize_input.per_tensor(x, scale, zero), scale, zero.to(torch.int32)

    _dims: tuple[int, ...] = (-1,)
    geometry: Any = None  # of a convolution: stride, padding, dilation, groups
    small = False  # gains nothing from a packed weight in float

    def _supported(self) -> bool:
        raise NotImplementedError

    def _pack(self) -> Any:
        raise NotImplementedError

    def _integer(self, codes: Tensor, scale: Tensor, zero: Any, dtype: torch.dtype) -> Tensor:
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

    def _integer(self, codes: Tensor, scale: Tensor, zero: Any, dtype: torch.dtype) -> Tensor:
        bias = self._bias(torch.float32)
        return int8_linear.int8_linear(codes, scale, zero, self._packed, bias, dtype)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QConv2d(QLayer):
    """A Conv2d with a quantized weight (O, I / groups, kh, kw)."""

    _dims = (1, 2, 3)

    def __init__(self, layer: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        assert not isinstance(layer.padding, str)  # such layers stay float
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.small = self.shape[2] * self.shape[3] == 1

    def _supported(self) -> bool:
        return int8_conv2d.supported(self.qdata.device, self.shape, self.geometry[-1])

    def _pack(self) -> Any:
        return int8_conv2d.pack(self.qtensor().codes(), self.weight_scale, self.geometry)

    def _integer(self, codes: Tensor, scale: Tensor, zero: Any, dtype: torch.dtype) -> Tensor:
        bias = self._bias(torch.float32)
        return int8_conv2d.int8_conv2d(codes, scale, zero, self._packed, bias, dtype)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def _kind(self) -> tuple[Any, ...]:
        return *super()._kind(), str(self.geometry)


def follow(layer: QLayer, bias: Tensor | None, device: torch.device) -> None:
    """Move `layer` to where its input is, and give it the host's bias there.

    Hosts exchange a bias when a LoRA changes it, and keep what they offload on the CPU.
    """
    if layer.weight_scale.device != device:
        layer.to(device)
    if bias is not None and (bias.device != device or not isinstance(bias, nn.Parameter)):
        bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    if layer.bias is not bias:
        layer.bias = bias
