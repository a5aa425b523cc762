"""Speed of attached models on a GPU beside bf16: one denoiser call of models with random weights.

    python benchmarks/gpu_speed.py [--models dit2 dit16 sdxl klein] [--ways ...] [--out gpu.jsonl]

Every way runs in a process of its own on the same card, one after another; a row that the file has
already is not measured again. A row has the median of 20 calls with quartiles in ms, the time of
the first three calls (compile, capture, choice of kernels) and the peak memory. Weights are random:
only time and memory mean anything. "forecast" is the mean over a run of 20 steps of which half are
forecast. `--models tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))

import tenuto as tn
from tenuto.caching import Forecast, ForecastCalls
from tenuto.model import describe, override_
from tenuto.runtime.denoiser_call import Calls, CompiledBlocks
from tenuto.runtime.timing import percentile
from tenuto.sampling import Clock, Follow, OutputKernel

CALLS, STEPS = 20, 20
BASE = "bf16 eager"
TUNED = "max-autotune-no-cudagraphs"  # Triton's products of codes, what is round them fused
MODELS = ("dit2", "dit16", "sdxl", "klein")


# --- models -----------------------------------------------------------------------------------


def dit(layers: int = 28, heads: int = 16, size: int = 72) -> nn.Module:
    """DiT-XL/2 at 256."""
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=size, in_channels=4, out_channels=8,
        num_layers=layers, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip


def sdxl() -> nn.Module:
    """The U-Net of SDXL."""
    import diffusers

    config: Any = dict(  # noqa: C408
        sample_size=128, addition_embed_type="text_time", addition_time_embed_dim=256,
        attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280],
        cross_attention_dim=2048, projection_class_embeddings_input_dim=2816,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**config)


def klein() -> nn.Module:
    """FLUX.2-klein-4B."""
    import diffusers

    return diffusers.Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=7680, guidance_embeds=False,
    )  # fmt: skip


def dit_inputs(rows: int) -> dict[str, Any]:
    """Of one call: noise, a timestep and a label a row."""
    labels = torch.arange(rows) % 1000
    return {"hidden_states": torch.randn(rows, 4, 32, 32), "class_labels": labels,
            "timestep": torch.full((rows,), 500)}  # fmt: skip


def sdxl_inputs() -> dict[str, Any]:
    """Of one call at 1024 with guidance."""
    added = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.ones(2, 6) * 1024}
    return {"sample": torch.randn(2, 4, 128, 128), "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, 2048),
            "added_cond_kwargs": added}  # fmt: skip


def klein_inputs() -> dict[str, Any]:
    """Of one call at 1024: 64 x 64 patches and 512 tokens."""
    image, text = torch.zeros(1, 4096, 4), torch.zeros(1, 512, 4)
    image[0, :, 1], image[0, :, 2] = torch.arange(4096) // 64, torch.arange(4096) % 64
    text[0, :, 3] = torch.arange(512)
    return {"hidden_states": torch.randn(1, 4096, 128), "timestep": torch.full((1,), 0.5),
            "encoder_hidden_states": torch.randn(1, 512, 7680), "img_ids": image,
            "txt_ids": text}  # fmt: skip


MAKE: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "dit2": (dit, lambda: dit_inputs(2)),
    "dit16": (dit, lambda: dit_inputs(16)),
    "sdxl": (sdxl, sdxl_inputs),
    "klein": (klein, klein_inputs),
    "tiny": (lambda: dit(2, 2, 32), lambda: dit_inputs(2)),
}


def made(name: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in bf16 and the arguments of a call, on the device."""
    torch.manual_seed(0)
    model, inputs = MAKE[name]
    with torch.device(device):
        denoiser = model().to(torch.bfloat16).eval().requires_grad_(False)
    for weight in denoiser.parameters():  # zeros, as some layers start with, would be no work
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    torch.manual_seed(1)

    def moved(x: Any, name: str = "") -> Any:
        if isinstance(x, dict):
            return {key: moved(value, key) for key, value in x.items()}
        narrow = x.is_floating_point() and name != "timestep"
        return x.to(device, torch.bfloat16) if narrow else x.to(device)

    return denoiser, moved(inputs())


# --- ways -------------------------------------------------------------------------------------


def attached(
    scheme: str, execution: str, compile: bool, graphs: bool, mode: str | None = None
) -> Any:
    """`attach` with these options. mode: of torch.compile."""

    def way(denoiser: nn.Module) -> nn.Module:
        on = graphs and torch.cuda.is_available()
        found = tn.attach(denoiser, scheme, execution=execution, compile=compile, graphs=on)
        for patch in found.patches:
            if isinstance(patch, CompiledBlocks) and mode:
                patch.options = {"mode": mode}
        return denoiser

    return way


def stored(compile: bool, graphs: bool) -> Any:
    """fp8 with one stored range a layer; any one takes the same time."""

    def way(denoiser: nn.Module) -> nn.Module:
        attached("fp8", "int8", compile, graphs)(denoiser)
        for layer in (m for m in denoiser.modules() if isinstance(m, tn.runtime.QLayer)):
            layer.scheme = tn.schemes.FP8_STATIC
            layer.input_scale = torch.full((1,), 8 / 448, device=layer.qdata.device)
            layer.input_zero = torch.zeros_like(layer.input_scale)
        return denoiser

    return way


def plain(compile: bool, graphs: bool, forecast: bool = False) -> Any:
    """The bf16 model itself, with what `attach` does round its calls."""

    def way(denoiser: nn.Module) -> nn.Module:
        calls = Calls(compile, graphs and torch.cuda.is_available()).of(denoiser, False)
        vars(denoiser)["calls"] = calls[0]
        if forecast:
            clock = Clock(times())
            Follow(denoiser, clock)
            override_(denoiser, ForecastCalls(clock, half(), denoiser))
        return denoiser

    return way


def times() -> tuple[float, ...]:
    """20 steps from 999 down."""
    return tuple(float(t) for t in torch.linspace(999, 1, STEPS).round())


def half() -> Forecast:
    """Half of the calls skipped, by a kernel of smooth outputs."""
    sigma = torch.linspace(0.99, 0.05, STEPS, dtype=torch.float64)
    values = torch.exp(-((sigma[:, None] - sigma[None, :]) ** 2) / 0.1)
    alpha = (1 - sigma**2).sqrt()
    kernel = OutputKernel(values, times(), tuple(alpha.tolist()), tuple(sigma.tolist()), "eps")
    return Forecast(kernel, 2.0)


def compiled(mode: str | None) -> Any:
    """torch.compile of the whole model."""

    def way(denoiser: nn.Module) -> nn.Module:
        denoiser.compile(mode=mode)
        return denoiser

    return way


WAYS: dict[str, Any] = {
    BASE: lambda denoiser: denoiser,
    "bf16 compile": compiled(None),
    "bf16 reduce-overhead": compiled("reduce-overhead"),
    "bf16 graph": plain(False, True),
    "bf16 blocks": plain(True, False),
    "bf16 blocks, graph": plain(True, True),
    "w8a8 int8": attached("w8a8", "int8", False, False),
    "w8a8 auto": attached("w8a8", "auto", False, False),
    "w8a8 int8 graph": attached("w8a8", "int8", False, True),
    "w8a8 int8 blocks": attached("w8a8", "int8", True, False),
    "w8a8 int8 blocks, graph": attached("w8a8", "int8", True, True),
    "w8a8 int8 tuned blocks, graph": attached("w8a8", "int8", True, True, TUNED),
    "w8a8 auto blocks, graph": attached("w8a8", "auto", True, True),
    "fp8": attached("fp8", "int8", False, False),
    "fp8 auto": attached("fp8", "auto", False, False),
    "fp8 graph": attached("fp8", "int8", False, True),
    "fp8 blocks": attached("fp8", "int8", True, False),
    "fp8 blocks, graph": attached("fp8", "int8", True, True),
    "fp8 auto blocks, graph": attached("fp8", "auto", True, True),
    "fp8-static blocks": stored(True, False),
    "fp8-static blocks, graph": stored(True, True),
    "forecast": plain(False, False, True),
    "forecast, blocks, graph": plain(True, True, True),
}


def run(denoiser: nn.Module, inputs: dict[str, Any], way: str) -> Callable[[], Tensor]:
    """What is timed: a call, or of a forecast a whole run of `STEPS`."""
    if not way.startswith("forecast"):
        return lambda: denoiser(**inputs, return_dict=False)[0]

    steps = [torch.full_like(inputs["timestep"], t) for t in times()]
    sample = next(iter(inputs))

    def whole() -> Tensor:
        x = torch.randn_like(inputs[sample])  # another one is another run
        for step in steps:
            out = denoiser(**inputs | {sample: x, "timestep": step}, return_dict=False)[0]
            x = x - 0.01 * out[:, : x.shape[1]]
        return x

    return whole


def row(model: str, way: str, device: str) -> dict[str, Any]:
    """One row, measured in this process."""
    denoiser, inputs = made(model, device)
    cuda = device == "cuda"
    denoiser = WAYS[way](denoiser)
    call = run(denoiser, inputs, way)
    share = STEPS if way.startswith("forecast") else 1

    def timed() -> float:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        first = [timed() for _ in range(5 if share == 1 else 3)]
        found = [timed() * 1e3 / share for _ in range(CALLS if share == 1 else 6)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    card = torch.cuda.get_device_name() if cuda else "cpu"
    middle = {f"q{q}": round(percentile(found, q), 3) for q in (25, 50, 75)}
    return {
        "model": model, "way": way, **middle, "first_s": round(sum(first), 1),
        "GiB": round(peak, 2), "card": card, "torch": torch.__version__, **facts(denoiser),
    }  # fmt: skip


def facts(denoiser: nn.Module) -> dict[str, Any]:
    """What was executed: how many graphs, why none, how the layers compute."""
    found: dict[str, Any] = {"blocks": len(describe(denoiser).blocks)}
    around = vars(denoiser).get("calls")
    around = around or getattr(vars(denoiser).get("forward"), "call", None)
    graphs = getattr(around, "graphs", None)
    if graphs is not None:
        found |= {"graphs": len(graphs.known), "why": graphs.reason}
    layers = [m for m in denoiser.modules() if isinstance(m, tn.runtime.QLayer)]
    words = [layer.execution for layer in layers]
    return found | {"layers": {word: words.count(word) for word in sorted(set(words))}}


# --- the table --------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a way, beside bf16 eager and the best compiled bf16 of the same model."""
    lines = ["| model | way | ms (quartiles) | x eager | x best compile | first s | GiB |"]
    lines.append("| --- " * 7 + "|")
    for r in rows:
        same = [o for o in rows if o["model"] == r["model"] and "q50" in o]
        base = [o["q50"] for o in same if o["way"] == BASE]
        best = [o["q50"] for o in same if o["way"] in ("bf16 compile", "bf16 reduce-overhead")]
        if "q50" not in r:
            lines.append(f"| {r['model']} | {r['way']} | failed: {r['error'][:60]} | | | | |")
            continue
        ratios = [f"{min(b) / r['q50']:.2f}" if b else "" for b in (base, best)]
        middle = f"{r['q50']:.2f} ({r['q25']:.2f}-{r['q75']:.2f})"
        facts = middle, *ratios, str(r["first_s"]), str(r["GiB"])
        lines.append(f"| {r['model']} | {r['way']} | {' | '.join(facts)} |")
    return "\n".join(lines)


def child(model: str, way: str, device: str, limit: float) -> dict[str, Any]:
    """One row, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", model, way, "--device", device]
    fresh = os.environ | {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}  # first calls compile every time
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=fresh)
    except subprocess.TimeoutExpired:
        return {"model": model, "way": way, "error": f"took more than {limit:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
        sys.stderr.write(done.stderr[-3000:])
        return {"model": model, "way": way, "error": tail[0]}
    return json.loads(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MAKE))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("gpu_speed.jsonl"))
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a row")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        model, way = args.one
        print(json.dumps(row(model, way, args.device)))
        return
    rows = [json.loads(s) for s in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(r["model"], r["way"]) for r in rows}
    for model in args.models:
        for way in args.ways:
            if (model, way) in known:
                continue
            rows.append(child(model, way, args.device, args.limit))
            print(json.dumps(rows[-1]), flush=True)
            with args.out.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
