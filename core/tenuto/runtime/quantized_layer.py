"""`QLayer`: what every layer that computes with a quantized weight has, whatever its operation.

A layer executes in 8 bits where a kernel of `kernels/` takes its case, else it simulates: the same
codes, in float. "auto" and "float" may use the dequantized weight; weight-only layers always do.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Replacement, outside_graphs
from ..numerics import QTensor, Scheme
from ..numerics.rotation import rotated
from ..sampling import Clock
from . import execution
from .execution import DENSE, Chooser
from .kernels import Case, Kernel, candidates, input_memo, packed_bf16, quantize_input
from .kernels.quantize_input import compiling


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
        memo: input_memo.Memo | None = None,
        wanted: str = "int8",
        chooser: Chooser | None = None,
    ) -> None:
        nn.Module.__init__(self)  # no weight of torch's own is made
        self.qdata: Tensor
        self.weight_scale: Tensor
        self.zero_point: Tensor | None
        self.step: Tensor | None
        self.channel: Tensor | None
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        weight = layer.weight
        self.scheme, self.clock, self.simulate, self.dtype = scheme, clock, simulate, weight.dtype
        self.memo = memo or input_memo.Memo()
        self.wanted, self.chooser = wanted, chooser or execution.process
        self.choices: dict[tuple[int, torch.dtype], Kernel | None] = {}  # by highest bit of rows
        self.latest: tuple[Kernel | None, ...] = ()  # the last one: what compiled code goes by
        self.packings = 0  # how often the memory of the weight changed
        self.siblings: tuple[QLayer, ...] = ()  # with it: what is chosen together
        self.whole = False  # whether compiled code keeps the quantization of rows as one operation
        self.shape, self.bits, self.rotation = qweight.shape, qweight.bits, qweight.rotation
        self.own: Any = None  # while `InFloat` computes: the host's forward
        self.place: tuple[str, ...] = ()  # then too: what this costs depends on
        self.bias, q = layer.bias, qweight.to(weight.device)
        scale, zero = (None, None) if ranges is None else (r.to(weight.device) for r in ranges)
        buffers = {
            "qdata": q.qdata, "weight_scale": q.scale, "zero_point": q.zero_point, "step": q.step,
            "channel": q.channel, "input_scale": scale, "input_zero": zero,
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._packed: dict[str, Any] = {}  # by kernel
        self._dense_packed: Any = None
        self._float: Tensor | None = None
        self._able: dict[torch.dtype, tuple[Kernel, ...]] = {}
        self.geometry = self._geometry(layer)
        self.train(layer.training)
        self._candidates(self.dtype)  # found before a graph is made

    def __deepcopy__(self, memo: dict[int, Any]) -> QLayer:
        self._unpack()
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for key, value in self.__dict__.items():
            clone.__dict__[key] = copy.deepcopy(value, memo)
        return clone

    def _apply(self, fn: Any, recurse: bool = True) -> QLayer:
        self._unpack()  # another device or dtype: pack and choose again
        self.choices, self.latest, self._able = {}, (), {}
        kept = self.weight_scale, self.input_scale, self.input_zero, self.channel
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qdata.device)).dtype
        device = self.qdata.device
        weight_scale, self.input_scale, self.input_zero, self.channel = (
            None if s is None else s.to(device) for s in kept
        )  # a cast of the model must not round the ranges
        assert weight_scale is not None
        self.weight_scale = weight_scale
        self._candidates(self.dtype)
        return self

    def _unpack(self) -> None:
        """Codes back into `qdata` as they were stored, caches gone."""
        self.qdata = self._stored().qdata
        self._packed, self._float, self._dense_packed = {}, None, None
        self.packings += 1

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()  # a cache is no state
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore
        if any(prefix + name in state_dict for name in self._buffers):  # not where it is a LoRA's
            self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def qtensor(self) -> QTensor:
        """The weight; once packed, the packed codes are the only copy."""
        if not self._packed or self.scheme.weight.dtype not in ("int", "int8_levels"):
            return self._stored()
        codes = next(iter(self._packed.values())).codes()
        return QTensor(codes, self.weight_scale, None, self.shape, 8, rotation=self.rotation)

    def _stored(self) -> QTensor:
        """The weight in the form that a file has it."""
        form, parts = self.scheme.weight, (self.qdata, self.weight_scale, self.zero_point)
        facts = self.shape, self.bits, self.step, form.group, self.channel, form.dtype
        kept = QTensor(*parts, *facts, self.rotation)
        if not self._packed:
            return kept
        return replace(kept, qdata=kept.qdata_of(next(iter(self._packed.values())).codes()))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made on use: what loaders and dtype checks of hosts look at."""
        return self.qtensor().dequantize(self.dtype).to(memory_format=self.order)

    @property
    def execution(self) -> str:
        """How this layer computes on its device: int8, simulated, dequantized or weight-only.

        Another kernel has another word. "auto" is not decided yet; "int8 or dequantized" depends on
        the number of rows.
        """
        if self.scheme.activation is None:
            return "weight-only"
        if self.simulate:
            return "simulated"
        able = self._candidates(self.dtype)
        if self.wanted == "int8":
            return able[0].word if able else "simulated"
        if self.wanted == "float" or not able:
            return DENSE
        words = {execution.word(kernel) for kernel in self.choices.values()}
        return " or ".join(sorted(words, reverse=True)) or "auto"

    def packed_tensors(self) -> list[Tensor]:
        """What the caches keep resident beside parameters and buffers."""
        wide = self._dense_packed and self._dense_packed.weight
        found = [t for packed in self._packed.values() for t in packed.tensors()]
        return [*found, *(t for t in (self._float, wide) if t is not None)]

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """The layer on a float input; a `scale` argument of old diffusers versions is ignored."""
        if self.scheme.activation is None:
            return self._dense(input, self.weight.to(input.dtype), self._bias(input.dtype))
        if self.simulate:
            return self._simulated(input)
        kernel = self._kernel(input)
        if kernel is None and self.wanted == "int8":
            return self._simulated(input)
        return self.by(kernel, input)

    def _candidates(self, dtype: torch.dtype) -> tuple[Kernel, ...]:
        """The kernels that take this layer where it is, the one to be preferred first."""
        found = self._able.get(dtype)
        if found is None:
            forms, device = (self.scheme.weight, self.scheme.activation), self.qdata.device
            case = Case(self.operation, *forms, device, dtype, self.shape, self.geometry)
            self._able[dtype] = found = candidates(case)
        return found

    def _kernel(self, x: Tensor) -> Kernel | None:
        """What computes `x`; None: no kernel, or float.

        Under "auto" what was decided for about so many rows of this dtype, or is now.
        """
        able = () if self.wanted == "float" else self._candidates(x.dtype)
        if not able or self.wanted == "int8":
            return able[0] if able else None
        if compiling():
            return self.latest[0] if self.latest else able[0]
        key = execution.rows_of(x, self.shape[1])
        if key not in self.choices and execution.may_measure(x):
            execution.decide(self, able, key, x)
        return self.choices.get(key, able[0])

    def by(self, kernel: Kernel | None, x: Tensor) -> Tensor:
        """The layer on `x` by a kernel, or in float."""
        return (self.own or self._dequantized)(x) if kernel is None else self._executed(kernel, x)

    def take(self, key: tuple[int, torch.dtype], kernel: Kernel | None) -> None:
        """Compute so from now on for about so many rows of this dtype."""
        self.choices[key], self.latest = kernel, (kernel,)
        self._forget()

    def choose_by(self, chooser: Any) -> None:
        """Decide anew, at the next calls, by another chooser."""
        self.chooser, self.choices, self.latest = chooser, {}, ()
        self.packings += 1

    def kind(self) -> tuple[Any, ...]:
        """Equal for layers that cost the same."""
        grouped = self.step is not None  # wider codes than 4 bits: two passes on some processors
        facts = self.shape, self.bits, grouped, self.input_scale is None
        turned = (self.rotation,) if self.rotation else ()  # kept choices of others stay as named
        return (type(self).__name__, *facts, *turned, *self.place)

    def _forget(self) -> None:
        """Drop the caches that no choice so far has a use for."""
        made = set(self.choices.values())
        self.packings += 1
        used = {k.name: self._packed[k.name] for k in made if k and k.name in self._packed}
        if not used:
            self.qdata = self._stored().qdata
        self._packed = used
        if None not in made:
            self._float = self._dense_packed = None

    def _dequantized(self, x: Tensor) -> Tensor:
        bias = self._bias(x.dtype)
        if self.small or not packed_bf16.supported(x):
            return self._dense(x, self._weight_in(x.dtype), bias)
        if self._dense_packed is None:
            self._float, weight = None, self.qtensor().dequantize(x.dtype)
            self._dense_packed = packed_bf16.pack(weight, x, self.geometry)
        return self._dense_packed(x, bias)

    def _simulated(self, x: Tensor) -> Tensor:
        codes, scale, zero = self._quantize(x)
        near = rotated((quantize_input.counted(codes) - zero) * scale, self.rotation)
        weight, bias = self._weight_in(torch.float32), self._bias(torch.float32)
        return self._dense(near, weight, bias).to(x.dtype)

    def _executed(self, kernel: Kernel, x: Tensor) -> Tensor:
        codes, scale, zero = self._quantize(x)
        if kernel.name not in self._packed:
            self._pack(kernel)
        packed = self._packed[kernel.name]
        bias = self.bias if kernel.any_bias else self._bias(torch.float32)
        with torch.no_grad():
            return kernel.call(codes, scale, zero, packed, bias, x.dtype)

    @outside_graphs
    def _pack(self, kernel: Kernel) -> None:
        self._packed[kernel.name] = kernel.pack(self._stored(), self.geometry)
        self.qdata = self.qdata.new_empty(0)
        self.packings += 1

    def ready(self) -> None:
        """Make what compiled code reads, which it cannot make itself."""
        if self.latest == (None,):
            self._dense_packed = None
            self._weight_in(self.dtype)

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, kept."""
        if self._float is None or self._float.dtype is not dtype:
            self._float = self.qtensor().dequantize(dtype).to(memory_format=self.order)
            self.packings += 1
        return self._float

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    @torch.no_grad()
    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        assert self.scheme.activation is not None
        dtype = self.scheme.activation.dtype
        if self.input_scale is None or self.input_zero is None:
            found = self.memo.per_row(x, self._dims, dtype, self.whole, self.rotation)
            return *found, quantize_input.ZERO[dtype]
        index = self.clock.index.to(self.input_scale.device)
        index = index if len(self.input_scale) > 1 else torch.zeros_like(index)
        return quantize_input.stored_at(x, self.input_scale, self.input_zero, index, dtype)

    operation: str
    _dims: tuple[int, ...] = (-1,)
    order = torch.preserve_format  # of a float weight in memory
    small = False  # gains nothing from a packed weight in float

    def _geometry(self, layer: Any) -> Any:
        """Of a convolution: stride, padding, dilation, groups."""

    @abstractmethod
    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation in float."""
