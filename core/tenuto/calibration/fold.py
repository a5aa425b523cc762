"""AWQ for files that have no scale per column: what is chosen is folded into the layer before.

Lin et al. 2023 (arXiv 2306.00978): columns that see large inputs are rounded more finely,
    W^ = Q(W diag(s)),   of inputs divided by s,   s = mean|x|^r,
where what makes the inputs gives them so: a norm's weight over s, or the rows over s of the linear
before. Hosts then need not know of s. Norms are in bf16 in a file, so s is taken as what the
rounded norm divides by: the fold is exact. See `algorithms/awq.py` for codes that have an s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Backbone, describe, device_and_dtype, layers, private_copy
from ..model.backbone import Subset
from ..numerics import Format, QTensor, fits
from ..progress import Progress
from ..resume import Work
from ..sampling import HELD_OUT, Call
from .algorithms.awq import mean_size, scale_of
from .bank import Bank
from .by_block import Values, by_block, held
from .chain import Chain
from .replay import outputs, token_error

RATIOS = 10  # how many r: 0, 0.1, ...
ROWS = 32  # of a block's recorded inputs, on which each r is tried
EXACT = 1e-3  # of a block's outputs: from there on a fold has changed what the block computes


@torch.no_grad()
def folded(
    encoder: nn.Module,
    calls: Sequence[Call],
    form: Format,
    device: Any = None,
    unread: Sequence[str] = (),
    on_progress: Progress | None = None,
    work: Work | None = None,
) -> nn.Module:
    """A copy of `encoder` that computes the same and is rounded to `form` with less error.

    In fp32 in memory; of one on disk, whose blocks are read when they are called, on disk too.
    calls: as `encoder_job` takes them; those held out are not looked at. unread: blocks that stay.
    work: has what was found for the blocks that are done.
    """
    backbone = describe(encoder)
    apart = backbone.blocks if any(p.is_meta for p in encoder.parameters()) else ()
    device = device_and_dtype(encoder)[0] if device is None else torch.device(device)
    work = Work(None, {}) if work is None else work
    whole = None if apart else private_copy(encoder).float().eval().requires_grad_(False)
    model = by_block(encoder, apart, device) if whole is None else whole
    seen = [call for call in calls if call.row != HELD_OUT]
    blocks = [name for name in backbone.blocks if name not in unread]
    chain = Chain(model, backbone.blocks, backbone.blocks, set(blocks), seen, device, None)
    scales = dict[str, Tensor]()
    for place, name in enumerate(blocks):
        if on_progress is not None:
            on_progress(place, len(blocks), name)
        found = work.load(name)
        if found is None:
            bank, _ = chain.data(name)
            with held(model.get_submodule(name)) as root:
                found = _Block(root, name, bank, form, device).fold(backbone)
            work.save(name, found)
        elif not apart:
            scaled(model, found)
        scales |= found
        chain.passed(name)
    return on_disk_too(encoder, backbone.blocks, scales) if apart else model


class _Block:
    """One block: what is folded in it, one subset after the other."""

    def __init__(self, root: nn.Module, name: str, bank: Bank, form: Format, device: Any) -> None:
        count = min(len(bank), bank.enough(ROWS))
        some = torch.arange(count) * len(bank) // count
        self.name, self.bank, self.device = name, bank.part(some), device
        self.form = replace(form, ranges="minmax")  # the search of ranges takes its time
        self.root, self.scales = root, dict[str, Tensor]()
        self.target = outputs(self.root, self.bank, device)
        self.rows = torch.arange(count)
        self.tried = private_copy(self.root)  # with rounded weights
        self.able = {n for n, layer in layers(self.root) if fits(layer.weight.shape, form)}
        for layer in self.able:
            self._round(layer)

    def fold(self, backbone: Backbone) -> dict[str, Tensor]:
        """All subsets of the block, in its order: what became of its weights, see `of_scales`."""
        for subset in backbone.subsets:
            inner = _inside(subset, self.name)
            if inner is not None and inner.fold and self.able.issuperset(inner.linears):
                self._subset(inner.linears, inner.fold)
        return {f"{self.name}.{key}": value for key, value in self.scales.items()}

    def _subset(self, linears: tuple[str, ...], place: str) -> None:
        weights = {name: _weight(self.root, name) for name in linears}
        scales = list(self._scales(linears[0]))
        if not scales or not self._folds(place, linears, scales[-1]):
            return  # whatever is found could not be folded
        best, least = None, self._error()
        for scale in scales:
            for name, weight in weights.items():
                rounded = QTensor.nearest(weight * scale, self.form).dequantize()
                _weight(self.tried, name).copy_(rounded / scale)
            wrong = self._error()
            if wrong < least:
                best, least = scale, wrong
        exact = None if best is None else self._folded(place, linears, best)
        for name in (*linears, *((place,) if exact and place in self.able else ())):
            self._round(name)
        if exact:
            self.tried.get_submodule(place).load_state_dict(
                {k: v for k, v in self.root.get_submodule(place).state_dict().items()
                 if k != "weight" or place not in self.able}, strict=False,
            )  # fmt: skip

    def _scales(self, layer: str) -> Iterator[Tensor]:
        """s (K,) for every r but 0."""
        size = mean_size(self.root, layer, self.bank, self.rows, self.device)
        if size is not None:
            yield from (scale_of(size, step / RATIOS) for step in range(1, RATIOS))

    def _folds(self, place: str, linears: tuple[str, ...], scale: Tensor) -> bool:
        """Whether such a scale can be folded into `place`; nothing is changed."""
        state = self.root.state_dict()
        touched = [key for key in state if key.rpartition(".")[0] in (place, *linears)]
        before, known = {key: state[key].clone() for key in touched}, dict(self.scales)
        exact = self._folded(place, linears, scale)
        self.root.load_state_dict(before, strict=False)
        self.scales = known
        return exact

    def _folded(self, place: str, linears: tuple[str, ...], scale: Tensor) -> bool:
        """Fold a scale into `place`; undone where the block does not compute the same after it.

        Something else may read what a norm gives, such as the gate of experts.
        """
        layer: Any = self.root.get_submodule(place)
        if getattr(layer, "bias", None) is not None and not isinstance(layer, nn.Linear):
            return False  # in bf16 it would be rounded
        touched = {
            f"{name}.{key}": tensor
            for name in (place, *linears)
            for key, tensor in self.root.get_submodule(name).state_dict().items()
        }
        before = {key: tensor.clone() for key, tensor in touched.items()}
        if isinstance(layer, nn.Linear):
            if len(layer.weight) != len(scale):
                return False
            layer.weight.div_(scale[:, None])
            if layer.bias is not None:
                layer.bias.div_(scale)
        else:
            scale = _into_norm(layer, scale)
        for name in linears:
            _weight(self.root, name).mul_(scale)
        found = outputs(self.root, self.bank, self.device)
        if float((found - self.target).norm()) > EXACT * float(self.target.norm()):
            self.root.load_state_dict(before, strict=False)
            return False
        if isinstance(layer, nn.Linear):
            self._note(f"{place}.rows", scale)
        self.scales |= {k: v.clone() for k, v in touched.items() if v.ndim == 1}
        for name in linears:
            self._note(f"{name}.columns", scale)
        return True

    def _note(self, key: str, scale: Tensor) -> None:
        self.scales[key] = self.scales[key] * scale if key in self.scales else scale.clone()

    def _round(self, name: str) -> None:
        rounded = QTensor.nearest(_weight(self.root, name), self.form).dequantize()
        _weight(self.tried, name).copy_(rounded)

    def _error(self) -> float:
        return token_error(self.tried, self.bank, self.rows, self.target, self.device)


def of_scales(name: str, value: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
    """A parameter of the folded encoder from that of the encoder.

    scales: "LAYER.columns" (K,), by which a weight is multiplied, "LAYER.rows" (N,), by which it is
    divided, and norms and biases as they are now, by their names.
    """
    layer = name.removesuffix(".weight")
    if name in scales:
        return scales[name].to(value.device)
    if f"{layer}.rows" in scales:
        value = value / scales[f"{layer}.rows"].to(value.device)[:, None]
    if f"{layer}.columns" in scales:
        value = value * scales[f"{layer}.columns"].to(value.device)
    return value


def scaled(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Put `of_scales` into a model in memory."""
    layers_of = {key.rpartition(".")[0] for key in scales}
    for layer in layers_of:
        for key, parameter in model.get_submodule(layer).named_parameters(recurse=False):
            parameter.copy_(of_scales(f"{layer}.{key}", parameter, scales))


class Folded(Mapping[str, Tensor]):
    """The parameters of a folded encoder by name, in fp32, each made anew."""

    def __init__(self, encoder: nn.Module, scales: Mapping[str, Tensor]) -> None:
        self.source, self.scales = Values(encoder, "cpu", {}), scales
        self.names = [name for name, _ in encoder.named_parameters(remove_duplicate=False)]

    def __getitem__(self, name: str) -> Tensor:
        return of_scales(name, self.source.of(name), self.scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def on_disk_too(
    encoder: nn.Module, blocks: Sequence[str], scales: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of an encoder that is on disk with these scales: its blocks are read as the other's.

    What is outside of the blocks is the encoder's own.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook

    twin, device = private_copy(encoder, empty=blocks), device_and_dtype(encoder)[0]
    known = dict(encoder.named_parameters(remove_duplicate=False))
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            parameter.data = parameter.data.float()
        else:
            owner, _, key = name.rpartition(".")
            twin.get_submodule(owner)._parameters[key] = known[name]
    values = Folded(encoder, scales)
    for block in blocks:
        attach_align_device_hook(
            twin.get_submodule(block), device, offload=True, weights_map=values, module_name=block
        )  # fmt: skip
    add_hook_to_module(twin, AlignDevicesHook(device))
    return twin.eval().requires_grad_(False)


def _into_norm(norm: Any, scale: Tensor) -> Tensor:
    """Divide a norm's factor by about `scale`, to a weight in bf16; returns what it is by exactly.

    Some norms multiply by 1 + weight: they give something with a weight of zero.
    """
    own: Tensor = norm.weight
    blank = copy.deepcopy(norm)
    blank.weight.zero_()
    probe = torch.linspace(1, 2, len(own), device=own.device)
    offset = 1.0 if bool(blank(probe[None]).any()) else 0.0
    factor = own + offset
    new = (factor / scale - offset).bfloat16().float()
    same = (factor == 0) | (new + offset == 0)
    new = torch.where(same, own, new)
    exact = torch.where(same, torch.ones_like(factor), factor / (new + offset))
    own.copy_(new)
    return exact


def _inside(subset: Subset, block: str) -> Subset | None:
    """A subset in the names of a block that has all of it; None of another block's."""
    start = f"{block}."
    if not all(name.startswith(start) for name in (*subset.linears, subset.fold or start)):
        return None
    cut = len(start)
    return Subset(tuple(n[cut:] for n in subset.linears), subset.fold and subset.fold[cut:])


def _weight(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    return layer.weight
