"""`DenoiserCall`: what is done round a denoiser's call, so that its inside can be compiled.

Compiled code and CUDA graphs cannot ask which step it is. Before the call every branch gets what it
reuses, after it what was computed is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..caching import CachedBranch
from ..errors import TenutoError
from ..model import Override, describe, outside_graphs, tensors_in
from .compiler import backend
from .execution import chooser_for
from .graphs import Graphs
from .kernels.quantize_input import compiling
from .layers import has_last
from .mode import Mode
from .quantized_layer import QLayer
from .side_by_side import lay_side_by_side, make_siblings

LIMIT = 64  # versions of a block's code: one for each pattern of its branches, dtype and size


class Around(Override):
    """Lies beneath whatever is put round the forward later, offloading say: it keeps no order."""

    def remove(self) -> None:
        """Take it out, or switch it off beneath what lies on it; its graphs free their memory."""
        if isinstance(self.call, DenoiserCall) and self.call.graphs is not None:
            self.call.graphs.forget()
        if self.off or not self.lies_on_top():
            self.off = True
        else:
            super().remove()


@dataclass(frozen=True)
class Calls:
    """How denoisers are called. compile: their blocks by torch.compile. graphs: as CUDA graphs.

    choose: only those that are faster, and that the card has the memory for.
    """

    compile: bool = False
    graphs: bool = False
    choose: bool = False

    @classmethod
    def asked(cls, compile: bool, graphs: bool | str) -> Calls:
        """As the options of `attach` say."""
        return cls(compile, captured(graphs), graphs == "auto")

    def of(self, denoiser: nn.Module, cells: bool) -> tuple[DenoiserCall, list[Any]]:
        """What is done round the calls of one, and the patches of it. cells: whether it has any."""
        blocks = CompiledBlocks(denoiser) if self.compile else None
        graphs = Graphs(denoiser, choose=self.choose) if self.graphs else None
        call = DenoiserCall(graphs, blocks, denoiser)
        if not (self.compile or self.graphs or cells):
            return call, []
        around = Around(denoiser, call)
        around.put()
        return call, [around, *([blocks] if blocks else [])]


def captured(graphs: bool | str) -> bool:
    """Whether calls on CUDA are captured; TenutoError if they are to be and there is no CUDA."""
    if graphs not in (True, False, "auto"):
        raise TenutoError(f"Unknown graphs={graphs!r}: choose True, False or 'auto'.")
    if graphs is True and not torch.cuda.is_available():
        raise TenutoError("CUDA graphs need a GPU of CUDA, and there is none: use graphs='auto'.")
    if graphs == "auto" and torch.version.hip is not None:
        return False  # nobody has tried them there
    return bool(graphs) and torch.cuda.is_available()


class DenoiserCall:
    """The forward of a denoiser with its branches' cells prepared, captured if `graphs` are.

    blocks: are compiled after the first call, in which layers pack their weights and choose.
    denoiser: whose layers choose anew where its calls are not captured after all.
    """

    def __init__(
        self,
        graphs: Graphs | None = None,
        blocks: CompiledBlocks | None = None,
        denoiser: nn.Module | None = None,
    ) -> None:
        self.graphs, self.blocks, self.denoiser = graphs, blocks, denoiser
        self.captured = True  # as far as layers know
        self.cells: list[CachedBranch] = []

    def prepare(self, calls: Sequence[Any]) -> None:
        """Take care of these forwards of branches; one that decides as it runs forbids graphs."""
        self.cells = [call for call in calls if isinstance(call, CachedBranch)]
        for cell in self.cells:
            cell.prepared = True
        if self.graphs is not None:
            self.graphs.cells = self.cells
            if len(self.cells) < len(calls):
                self.graphs.off("its cache policy decides while it runs")

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if compiling() and not self.cells and self.blocks is None:
            return original(*args, **kwargs)  # the user compiles it all: nothing breaks the graph
        case = self._before(args, kwargs)
        if self.blocks is not None and not compiling() and self.blocks.unpacked():
            original = self.blocks.as_they_are(original)
        if case is None:
            out = original(*args, **kwargs)
        else:
            assert self.graphs is not None
            out = self.graphs.run(case, original, args, kwargs)
        self._after(args, kwargs)
        return out

    @outside_graphs
    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The case of the call if it may be captured; the cells get what they reuse."""
        case = None if self.graphs is None else self.graphs.case(args, kwargs)
        if self.cells:
            shape = _shape(args, kwargs)
            for cell in self.cells:
                cell.handed = case is not None or self.blocks is not None
                cell.before(shape)
        return case

    @outside_graphs
    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.cells:
            shape = _shape(args, kwargs)
            for cell in self.cells:
                cell.after(shape)
        if self.graphs is not None and self.captured != (self.graphs.reason is None):
            self._choose_anew(self.graphs.reason is None)
        if self.blocks is not None and not self.blocks.on:
            self.blocks.compile()

    def _choose_anew(self, captured: bool) -> None:
        """Let layers choose for calls as they are from now on, or for graphs again."""
        before, now = (
            chooser_for(Mode(self.blocks is not None, how)) for how in (self.captured, captured)
        )
        self.captured = captured
        layers = () if self.denoiser is None else self.denoiser.modules()
        for layer in layers:
            if isinstance(layer, QLayer) and layer.chooser is before and layer.wanted == "auto":
                layer.choose_by(now)


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call must share with an earlier one: shapes without rows, dtypes, devices."""
    found = tensors_in((args, kwargs))
    return ("call", *((tuple(x.shape[1:]), x.dtype, x.device) for x in found))


class CompiledBlocks:
    """The repeated blocks of a denoiser under torch.compile: one compilation serves equal ones."""

    def __init__(self, denoiser: nn.Module, **options: Any) -> None:
        self.denoiser, self.backbone = denoiser, describe(denoiser)
        self.blocks = [denoiser.get_submodule(name) for name in self.backbone.blocks]
        self.blocks += _norms_beside(denoiser, self.backbone.blocks)
        self.options, self.on, self._packings = options, False, 0
        self._before: list[Any] = []
        self._layers: list[QLayer] = []
        self._limit: tuple[str, int] | None = None
        for layer in self._quantized():
            layer.whole = True
        make_siblings(denoiser, self.backbone)

    def compile(self) -> None:
        """From the next call on; what the user compiled is left out until `remove`."""
        import torch._dynamo.config as config

        self.on = True
        name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        self._limit = name, getattr(config, name)
        setattr(config, name, max(LIMIT, self._limit[1]))
        self._ready()
        rest = dict(self.options)
        if self._layers or _normed(self.blocks):
            own = {name: rest.pop(name) for name in ("mode", "options", "backend") if name in rest}
            rest["backend"] = backend(**own)
        for block in self.blocks:
            self._before.append(vars(block).get("_compiled_call_impl"))
            block.compile(**rest)

    def unpacked(self) -> bool:
        """Whether a move of the model has undone what compiled code reads of a layer."""
        return self.on and sum([layer.packings for layer in self._layers]) != self._packings

    def as_they_are(self, call: Any) -> Any:
        """A call of the denoiser with blocks that are not compiled: layers pack and choose."""

        def once(*args: Any, **kwargs: Any) -> Any:
            impl = [vars(block).pop("_compiled_call_impl", None) for block in self.blocks]
            try:
                return call(*args, **kwargs)
            finally:
                for block, compiled in zip(self.blocks, impl, strict=True):
                    vars(block)["_compiled_call_impl"] = compiled
                self._ready()

        return once

    def _quantized(self) -> list[QLayer]:
        modules = (m for block in self.blocks for m in block.modules())
        return [m for m in modules if isinstance(m, QLayer)]

    def _ready(self) -> None:
        self._layers = self._quantized()
        for layer in self._layers:
            layer.ready()
        lay_side_by_side(self.denoiser, self.backbone)
        self._packings = sum([layer.packings for layer in self._layers])

    def remove(self) -> None:
        """Leave the blocks as they were."""
        for block, before in zip(self.blocks, self._before, strict=False):
            if before is None:
                vars(block).pop("_compiled_call_impl", None)
            else:
                vars(block)["_compiled_call_impl"] = before
        if self._limit is not None:
            import torch._dynamo.config as config

            setattr(config, *self._limit)
        for layer in self._quantized():
            layer.whole = False
        make_siblings(self.denoiser, self.backbone, False)
        self._before, self._limit, self._layers, self._packings = [], None, [], 0
        self.on = True  # a call that comes later compiles nothing


def _normed(blocks: Sequence[nn.Module]) -> bool:
    return any(isinstance(m, nn.GroupNorm) for block in blocks for m in block.modules())


def _norms_beside(denoiser: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """Group norms outside of the blocks, where images have channels last: torch's own ones would
    turn them over and back."""
    if not any(has_last(m) for m in denoiser.modules() if isinstance(m, nn.Conv2d)):
        return []
    inside = {id(m) for name in blocks for m in denoiser.get_submodule(name).modules()}
    norms = (m for m in denoiser.modules() if isinstance(m, nn.GroupNorm))
    return [m for m in norms if id(m) not in inside]
