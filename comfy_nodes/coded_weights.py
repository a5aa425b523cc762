"""The float weights of a MODEL given up: what stands in their place are the artifact's codes.

Nothing computes with the weight of a layer that Tenuto has quantized. A `CodedWeight` has its
shape, type and device, and is decoded when someone looks: a LoRA that the host merges, a layer that
computes outside of a run. The codes are the memory of the artifact itself, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tenuto.errors import ModelError
from tenuto.model import key_map_of, own_modules
from tenuto.numerics import QTensor
from tenuto.runtime import Replacements

aten = torch.ops.aten


class Content:
    """What a weight stands for: codes, and the values that tell which model they are of.

    places, values: int64 and float (P,) of the flat weight. kept: it is a layer's own, which nobody
    writes through a view of it. plain: float, once someone has written to it.
    """

    def __init__(self, codes: QTensor, places: Tensor, values: Tensor, kept: bool = False) -> None:
        self.codes, self.places, self.values, self.kept = codes, places, values, kept
        self.plain: Tensor | None = None

    def copy(self) -> Content:
        """The same codes, for one who may write."""
        found = Content(self.codes, self.places, self.values)
        found.plain = None if self.plain is None else self.plain.clone()
        return found

    def decoded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight in float, with the values of the model's own where they are known."""
        if self.plain is not None:
            return self.plain.to(device, dtype)
        weight = self.codes.to(device).dequantize(dtype).contiguous()
        weight.view(-1)[self.places.to(device)] = self.values.to(device, dtype)
        return weight

    def written(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The float weight to write to; from then on it is what this stands for."""
        self.plain = self.decoded(dtype, device)
        return self.plain

    def known(self) -> Tensor:
        """As the weight, with the values that are known and zeros: takes no memory until read."""
        if self.plain is not None:
            return self.plain
        found = torch.zeros(self.codes.shape)
        found.view(-1)[self.places] = self.values.float()
        return found

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        if self.plain is not None:
            return self.plain.nbytes
        return sum(v.nbytes for v in vars(self.codes).values() if isinstance(v, Tensor))


class CodedWeight(Tensor):
    """A weight (N, ...) of any float type that is decoded when an operation wants it."""

    content: Content

    @staticmethod
    def __new__(cls, content: Content, dtype: torch.dtype, device: Any) -> CodedWeight:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, content.codes.shape, dtype=dtype, device=device, requires_grad=False
        )
        found.content = content
        return found

    def __init__(self, content: Content, dtype: torch.dtype, device: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CodedWeight({tuple(self.shape)}, {self.dtype}, device={str(self.device)!r})"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of the codes: newer hosts add these up."""
        return self.content.nbytes

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # of every operation of torch that gets one
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], CodedWeight) else None
        if first is not None and func in (aten.detach.default, aten.alias.default):
            with torch.inference_mode(first.is_inference()):  # as torch expects of an alias
                return CodedWeight(first.content, first.dtype, first.device)
        if first is not None and func in (aten._to_copy.default, aten.clone.default):
            dtype = kwargs.get("dtype") or first.dtype
            device = kwargs.get("device") or first.device
            if dtype is first.dtype:
                return CodedWeight(first.content.copy(), dtype, device)
            return first.content.decoded(dtype, torch.device(device)).clone()
        return _plainly(func, args, kwargs)


def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on float weights; what is written to, or seen through a view, stays so."""
    schema = func._schema
    writes = schema.is_mutable
    views = not writes and any(out.alias_info is not None for out in schema.returns)

    def plain(value: Any) -> Any:
        if not isinstance(value, CodedWeight):
            return value
        content = value.content
        keeps = writes or (views and not content.kept)
        if keeps and content.plain is None:
            return content.written(value.dtype, value.device)
        return content.decoded(value.dtype, value.device)

    found = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    given = args[0] if args else None
    return given if writes and isinstance(given, CodedWeight) else found


def give_up_(denoiser: nn.Module, plan: Replacements) -> None:
    """Put codes in the place of every weight of `denoiser` that `plan` has codes of."""
    places = _places(denoiser)
    with torch.inference_mode(False), torch.no_grad():
        for name, scheme in plan.schemes.items():
            if f"{name}.qdata" not in plan.codes:
                continue
            module = denoiser.get_submodule(name)
            weight: Tensor = module.weight  # type: ignore[assignment]
            shape = tuple(weight.shape)
            codes = QTensor.from_tensors(plan.codes, name, shape, scheme.weight)
            known = places(f"{name}.weight", shape)
            values = weight.detach().reshape(-1)[known.to(weight.device)].cpu().clone()
            content = Content(codes, known, values, kept=True)
            coded = CodedWeight(content, weight.dtype, weight.device)
            module.weight = nn.Parameter(coded, requires_grad=False)


def _places(denoiser: nn.Module) -> Any:
    """places(name, shape): flat indices of the first, middle and last value of each part."""
    keys, rows = key_map_of(denoiser), {}
    for place in keys.places.values() if keys is not None else ():
        rows.setdefault(place.name, []).append(place.rows)

    def places(name: str, shape: tuple[int, ...]) -> Tensor:
        width, found = torch.Size(shape[1:]).numel(), set()
        for part in rows.get(name, [(0, shape[0])]):
            start, end, _ = slice(*part).indices(shape[0])
            first, size = start * width, (end - start) * width
            half = (end - start) // 2 * width  # of parts whose halves a map exchanges
            inner = {0, size // 2, half, half - 1, half // 2, half + (size - half) // 2, size - 1}
            found |= {first + i for i in inner if 0 <= i < size}
        return torch.tensor(sorted(found), dtype=torch.int64)

    return places


def coded(denoiser: nn.Module) -> Iterator[tuple[str, CodedWeight]]:
    """(layer, weight) of those that are given up."""
    for name, module in own_modules(denoiser):
        weight = getattr(module, "weight", None)
        if isinstance(weight, CodedWeight):
            yield name, weight


def check_float(denoiser: nn.Module) -> None:
    """ModelError where float weights are wanted, and some were given up."""
    if next(coded(denoiser), None) is not None:
        raise ModelError(
            "The model is already quantized, by Tenuto Loader, which keeps no float weights: load "
            "it without an artifact for this, or choose to keep them there."
        )


def known(weight: Tensor) -> Tensor:
    """What tells a model by a weight: all of it, or the values that are known of one given up."""
    return weight.content.known() if isinstance(weight, CodedWeight) else weight


def memory_of(denoiser: nn.Module) -> tuple[int, int]:
    """(bytes that its weights take, bytes in float: of what the host quantized in 16 bits)."""
    taken = wide = 0
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        own = getattr(tensor, "_qdata", None)  # of a tensor that the host itself quantized
        wide += tensor.numel() * (tensor.element_size() if own is None else 2)
        taken += tensor.nbytes if own is None else own.nbytes
    return taken, wide
