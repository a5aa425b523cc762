"""W8A8 on a CPU at the sizes of real models, beside bf16, fp32 and OpenVINO: one denoiser call.

    python benchmarks/cpu_speed.py [--models "dit blocks" sd15] [--ways ...] [--repeats 7]

Models with random weights of real shapes, so that only time means anything: four of DiT-XL/2's 28
blocks at 256, and the U-Net of Stable Diffusion 1.5 at 512, both with guidance (two rows). All ways
take turns, every other time backwards; a row has the median seconds with quartiles, and how many
times as fast as bf16 eager and fp32 eager it is, the median of ratios turn by turn. W8A8 has a
range per token. OpenVINO and NNCF's 8 bits are measured where both are installed; the model is
given to them as it is, at these shapes, and the calibration of NNCF sees four calls.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_models import made

import tenuto as tn
from benchmarks.quantization import cpu_name
from tenuto.runtime import Latency, QLayer, latency

MODELS = ("dit blocks", "sd15")
FLOAT, BASE = "fp32 eager", "bf16 eager"
Call = Callable[[], Any]


def of_torch(dtype: torch.dtype, compiled: bool = False, **attached: Any) -> Any:
    """A model of torch's in `dtype`. attached: of `attach`, with W8A8."""

    def way(model: str) -> tuple[Call, str]:
        denoiser, inputs = made(model, "cpu", dtype)
        if attached:
            tn.attach(denoiser, "w8a8", **attached)
        if compiled:
            denoiser.compile()
        call = lambda: denoiser(**inputs, return_dict=False)[0]  # noqa: E731
        call()
        layers = [m.execution for m in denoiser.modules() if isinstance(m, QLayer)]
        return call, ", ".join(f"{layers.count(w)} {w}" for w in sorted(set(layers)))

    return way


class Positional(nn.Module):
    """A denoiser as a tracer takes it: tensors in, a tensor out."""

    def __init__(self, denoiser: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        return self.denoiser(**given, return_dict=False)[0]


def openvino(quantized: bool = False, precision: str = "bf16") -> Any:
    """OpenVINO at fixed shapes, which computes in `precision`; quantized: by NNCF, in 8 bits."""

    def way(model: str) -> tuple[Call, str]:
        import openvino as ov  # pyright: ignore[reportMissingImports]

        denoiser, inputs = made(model, "cpu", torch.float32)
        names, tensors = list(inputs), tuple(inputs.values())
        shapes = [list(t.shape) for t in tensors]
        graph = ov.convert_model(Positional(denoiser, names), example_input=tensors, input=shapes)
        if quantized:
            import nncf  # pyright: ignore[reportMissingImports]

            first = [torch.randn_like(tensors[0]).numpy() for _ in range(4)]
            rest = [t.numpy() for t in tensors[1:]]
            data = nncf.Dataset([[x, *rest] for x in first])
            kind = nncf.ModelType.TRANSFORMER
            graph = nncf.quantize(graph, data, model_type=kind, subset_size=4)
        hint = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
        request = ov.compile_model(graph, "CPU", hint).create_infer_request()
        arrays = [t.numpy() for t in tensors]
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True), ""

    return way


HALF = torch.bfloat16
WAYS: dict[str, Any] = {
    FLOAT: of_torch(torch.float32),
    BASE: of_torch(HALF),
    "bf16 compiled": of_torch(HALF, True),
    "W8A8 in bf16, int8": of_torch(HALF, execution="int8"),
    "W8A8 in bf16, auto": of_torch(HALF, execution="auto"),
    "W8A8 in bf16, int8, compiled": of_torch(HALF, execution="int8", compile=True),
    "W8A8 in fp32, int8": of_torch(torch.float32, execution="int8"),
    "OpenVINO, bf16": openvino(),
    "OpenVINO, NNCF int8, else bf16": openvino(True),
    "OpenVINO, NNCF int8, else fp32": openvino(True, "f32"),
}


def missing(way: str) -> list[str]:
    """What a way needs and is not there."""
    names = ["openvino", "nncf"] if "OpenVINO" in way else []
    return [name for name in names if find_spec(name) is None]


def rows(model: str, asked: list[str], repeats: int) -> list[str]:
    """The table's lines of one model."""
    calls: dict[str, Call] = {}
    words: dict[str, str] = {}
    for way in asked:
        gone = missing(way)
        if gone:
            words[way] = f"not installed: {', '.join(gone)}"
            continue
        try:
            calls[way], words[way] = WAYS[way](model)
        except Exception as error:  # of a peer's converter: the other rows are still to be seen
            words[way] = f"fails: {str(error).strip().splitlines()[0][:80]}"
        print(f"{model}, {way}: {words[way] or 'ready'}", file=sys.stderr, flush=True)
    found = latency(calls, repeats, warmup=2)
    return [line(model, way, words[way], found) for way in asked]


def line(model: str, way: str, word: str, found: dict[str, Latency]) -> str:
    """One line: milliseconds, and ratios turn by turn."""
    if way not in found:
        return f"| {model} | {way} | {word} | | |"
    low, high = (f"{1e3 * q:.0f}" for q in found[way].quartiles)
    cells = [f"{1e3 * found[way].median:.0f} ({low}-{high})"]
    for base in (BASE, FLOAT):
        ratio = found[base].over(found[way]) if base in found else None
        cells.append("" if ratio is None else f"{ratio.median:.2f}")
    return f"| {model} | {way} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with torch.no_grad():
        lines = [one for m in args.models for one in rows(m, args.ways, args.repeats)]
    print(f"\n{cpu_name()}, {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, {datetime.date.today()}\n")
    print("| model | way | ms (quartiles) | x bf16 eager | x fp32 eager |\n" + "| --- " * 5 + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
