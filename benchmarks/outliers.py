"""A text encoder with outliers in int8, weights and inputs: what the ranges of the inputs cost.

    python benchmarks/convert_t5.py --out flan-t5-small
    python benchmarks/outliers.py --encoder flan-t5-small

Naive: a scale a row of each weight, and one range a tensor for the inputs of each Linear: the
largest size over the calibration prompts (static), or in the call (dynamic). `wo` in float: the
same for all others, as those do it who know of the outliers. A range a token, as it is and in
rotated columns, is what the file of `--scheme w8a8` gets in hosts that multiply in int8; its codes
are to nearest or by GPTQ. Relative L2 of the last state, by list of prompts: over all tokens that
count, in brackets the mean of that of each token. A prompt a call. Calibration is on every second
prompt of "captions" and of "general", and what is measured are prompts that were not in it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.encoders import ROWS, codes_in_int8, encoder_of
from benchmarks.quantization import cpu_name
from tenuto.calibration import ENCODER_SCHEMES, EncoderCodes
from tenuto.model import Swap, watched
from tenuto.sampling import calls_of

LISTS = ("general", "captions", "default", "evaluation")
Range = Callable[[str, Tensor], Tensor]  # of a layer and its inputs: the size that is 127


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, required=True, help="a folder with an encoder")
    encoder, rows = encoder_of(parser.parse_args().encoder)
    lines = tn.prompts("general")
    seen = rows([*tn.prompts("captions")[::2], *lines[::2]])
    asked = {name: rows(unseen(name)) for name in LISTS}
    full = {name: states(encoder, calls) for name, calls in asked.items()}
    linears = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    most = sizes(encoder, linears, seen)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{datetime.date.today()}\n")  # fmt: skip
    for name in sorted(most, key=lambda n: -float(most[n].max()))[:6]:
        print(f"inputs of {name}: {float(most[name].max()):.0f} at most, "
              f"of the median column {float(most[name].median()):.2g}")  # fmt: skip
    print(
        f"\n| inputs | Linears in int8 | {' | '.join(asked)} |\n"
        + "| --- " * (len(asked) + 2)
        + "|"
    )

    def row(what: str, count: int, found: Mapping[str, list[Tensor]]) -> None:
        cells = [distance(full[name], found[name]) for name in asked]
        print(f"| {what} | {count} of {len(linears)} | {' | '.join(cells)} |", flush=True)

    some = {n: m for n, m in linears.items() if not n.endswith(".wo")}
    static: Range = lambda name, _: most[name].max()  # noqa: E731
    ways: list[tuple[str, dict[str, Any], Range]] = [
        ("naive, static", linears, static),
        ("naive, dynamic", linears, lambda _, x: x.abs().amax()),
        ("static, `wo` in float", some, static),
        ("a range a token", linears, lambda _, x: x.abs().amax(-1, keepdim=True)),
    ]
    for what, layers, size in ways:
        with put_in(encoder, {n: Rounded(n, m, size) for n, m in layers.items()}):
            row(what, len(layers), {name: states(encoder, calls) for name, calls in asked.items()})
    held = rows(["", *lines[1::4]])[-len(lines[1::4]) :]
    calibration = calls_of(seen, ROWS, held_out=held, by_length=True)
    for method in ("rtn", "gptq"):
        made = EncoderCodes.of(encoder, calibration, ENCODER_SCHEMES["w8a8"], method)
        layers = codes_in_int8(made)
        with put_in(encoder, layers):
            found = {name: states(encoder, calls) for name, calls in asked.items()}
        row(f"the file of `w8a8`, {method}", len(layers), found)


def unseen(name: str) -> list[str]:
    """Prompts of a list that nothing here is calibrated on."""
    lines = tn.prompts(name)
    return list({"general": lines[3::4], "captions": lines[1::2][:32]}.get(name, lines[:32]))


@torch.no_grad()
def states(encoder: nn.Module, calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The last state of each call, (tokens, K) in fp64."""
    return [encoder(**call).last_hidden_state[0].double() for call in calls]


@torch.no_grad()
def sizes(
    encoder: nn.Module, linears: Mapping[str, nn.Module], calls: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    """By layer: the largest size of each column of its inputs, (K,)."""
    found: dict[str, Tensor] = {}

    def note(name: str, given: tuple[Any, ...], _: dict[str, Any]) -> None:
        size = given[0].flatten(0, -2).abs().amax(0)
        found[name] = torch.maximum(found[name], size) if name in found else size

    with watched(encoder, linears, before=note):
        for call in calls:
            encoder(**call)
    return found


class Rounded(nn.Module):
    """A Linear without a bias whose weight and inputs lie on grids of 8 bits."""

    def __init__(self, name: str, layer: nn.Linear, size: Range) -> None:
        super().__init__()
        self.name, self.size, weight = name, size, layer.weight.data
        self.weight = nn.Parameter(self.rounded(weight, weight.abs().amax(1, keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return nn.functional.linear(self.rounded(x, self.size(self.name, x)), self.weight)

    @staticmethod
    def rounded(x: Tensor, most: Tensor) -> Tensor:
        """On the grid whose level 127 is `most`."""
        step = (most / 127).clamp_min(1e-12)
        return (x / step).round().clamp(-127, 127) * step


@contextmanager
def put_in(encoder: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, `encoder` has these layers in place of its own."""
    swaps = [Swap(encoder, *pair) for pair in layers.items()]
    try:
        yield
    finally:
        for swap in reversed(swaps):
            swap.remove()


def distance(full: list[Tensor], low: list[Tensor]) -> str:
    """Relative L2 over all tokens, and its mean over them, in per cent."""
    a, b = torch.cat(full), torch.cat(low)
    each = (a - b).norm(dim=1) / a.norm(dim=1)
    return f"{100 * float((a - b).norm() / a.norm()):.1f} % ({100 * float(each.mean()):.1f} %)"


if __name__ == "__main__":
    main()
