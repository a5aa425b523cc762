"""TIAR: the time-only modules as one block, against their outputs at every calibrated step.

Temporal information aware reconstruction of TFMQ-DM (arXiv 2311.16503): AdaRound on
    L = sum over outputs of |g_i(h(t)) - g^_i(h^(t))|^2, mean over the steps,
of a block (`temporal.TimePath`) that gives all outputs side by side. The rows are few, one a step,
and a layer has far more weights than that in a row, so that their roundings can cancel out:
after Adam, layer by layer, a rounding is flipped while that lowers
    |W^ x^ - W x|^2 = tr(W^ A W^T) - 2 tr(W^ B^T) + const,  A = x^T x^, B = (W x)^T x^,
where x^ comes from the layers that are done. The flips stay if they lower L too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model import tensors_in, watched
from ...numerics import Format, QTensor, Scheme
from ..bank import Bank
from ..replay import outputs
from .adaround import AdaRound, Rounding
from .nearest import weight_of


@dataclass(frozen=True)
class Tiar(AdaRound):
    """AdaRound, and then at most `flips` flips of a rounding in every row of a Linear's weight."""

    flips: int = 1000

    def __call__(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Bank,
        target: Tensor,
        *,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, QTensor]:
        """The weights of `layers`, rounded so that the block gives `target` (R, ...) on `bank`."""
        learnt = super().__call__(block, layers, bank, target, seed=seed, on_progress=on_progress)
        device = next(block.parameters()).device
        with torch.no_grad():
            found = self._flipped(block, layers, learnt, bank, device)
            errors = []
            for weights in (learnt, found):
                with _weights(block, weights):
                    answer = outputs(block, bank, device, self.batch)
                errors.append(float((answer.double() - target.double()).square().sum()))
        return found if errors[1] <= errors[0] else learnt

    def _flipped(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        learnt: dict[str, QTensor],
        bank: Bank,
        device: Any,
    ) -> dict[str, QTensor]:
        done = dict(learnt)
        for name in _order(block, layers, bank, device):
            weight = weight_of(block, name).detach().clone()
            gram, cross = 0.0, 0.0
            for index in bank.chunks(self.batch):
                rows = bank.rows(index, device)
                wanted = _seen(block, [name], {}, rows)[name] @ weight.double().t()  # (R, N)
                x = _seen(block, [name], done, rows)[name]  # (R, K)
                gram, cross = gram + x.t() @ x, cross + wanted.t() @ x
            assert isinstance(gram, Tensor) and isinstance(cross, Tensor)
            form = layers[name].weight
            done[name] = flipped(weight, form, done[name], gram, cross, self.flips)
        return done


def flipped(
    weight: Tensor, form: Format, q: QTensor, gram: Tensor, cross: Tensor, most: int
) -> QTensor:
    """`q` with roundings of `weight` (N, K) flipped, the best one of every row at a time.

    gram: x^T x (K, K) of the layer's inputs. cross: y^T x (N, K) with the outputs y (R, N) that it
    should give; both float64. A row is done when no flip lowers its error, or after `most`.
    """
    rounding = Rounding(weight, form)
    free = (rounding.floor >= rounding.low) & (rounding.floor + 1 <= rounding.high)  # not clipped
    levels, size = q.levels().to(torch.float64), rounding.size.double()
    slope = (levels * size) @ gram - cross  # half the gradient, (N, K)
    curve, active = gram.diagonal(), torch.arange(len(levels), device=levels.device)
    for _ in range(most):
        up = levels[active] - rounding.floor[active]
        step = (1 - 2 * up) * size[active]
        gain = 2 * step * slope[active] + step.square() * curve
        best, place = gain.masked_fill_(~free[active], 0).min(1)
        better = best < 0
        active, place = active[better], place[better]
        if not len(active):
            break
        change = step[better].gather(1, place[:, None])
        slope[active] += change * gram[place]
        levels[active, place] += change[:, 0].sign()
    return QTensor.of(levels.float(), rounding.grid)


def _order(block: nn.Module, names: Mapping[str, Scheme], bank: Bank, device: Any) -> list[str]:
    """The Linears among `names`, in the order in which the block runs them."""
    linear = [n for n in names if isinstance(block.get_submodule(n), nn.Linear)]
    return list(_seen(block, linear, {}, bank.rows(torch.arange(1), device)))


def _seen(
    block: nn.Module, names: Sequence[str], weights: Mapping[str, QTensor], rows: tuple[Any, Any]
) -> dict[str, Tensor]:
    """What the layers `names` get in a call of the block with `weights`: float64 (R, K)."""
    found: dict[str, Tensor] = {}

    def note(name: str, args: Any, kwargs: Any) -> None:
        x = next(tensors_in((args, kwargs))).detach().flatten(0, -2).double()
        found[name] = torch.cat((found[name], x)) if name in found else x

    with watched(block, names, before=note), _weights(block, weights):
        block(*rows[0], **rows[1])
    return found


@contextmanager
def _weights(block: nn.Module, weights: Mapping[str, QTensor]) -> Iterator[None]:
    """The block with these weights; its own are back afterwards, the very same."""
    own = {n: weight_of(block, n).data for n in weights}
    try:
        for name, q in weights.items():
            weight_of(block, name).data = q.dequantize().to(own[name])
        yield
    finally:
        for name, data in own.items():
            weight_of(block, name).data = data
