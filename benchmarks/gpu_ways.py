"""The ways to run a model that `gpu_speed.py` measures: bf16, attached, and other libraries'."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from gpu_runs import STEPS
from torch import nn

import tenuto as tn
from tenuto.runtime import Calls
from tenuto.runtime.denoiser_call import CompiledBlocks

BASE = "bf16 eager"
COMPILED = ("bf16 compile", "bf16 reduce-overhead")
TUNED = "max-autotune-no-cudagraphs"  # Triton's products of codes, what is round them fused
WHOLE_ROWS = {"triton.multi_kernel": 1}  # reductions of long rows are tried in one pass, too
Way = Callable[[nn.Module], nn.Module]


def attached(scheme: str, execution: str, compile: bool, graphs: bool, **options: Any) -> Any:
    """`attach` with these arguments. options: of torch.compile, in place of its own."""

    def way(denoiser: nn.Module) -> nn.Module:
        on = graphs and torch.cuda.is_available()
        found = tn.attach(denoiser, scheme, execution=execution, compile=compile, graphs=on)
        _compile_by(found.patches, options)
        return denoiser

    return way


def _compile_by(patches: Iterable[Any], options: dict[str, Any]) -> None:
    for patch in patches:
        if isinstance(patch, CompiledBlocks) and options:
            patch.options = options


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


def plain(compile: bool, graphs: bool, **options: Any) -> Any:
    """The bf16 model itself, with what `attach` does round its calls."""

    def way(denoiser: nn.Module) -> nn.Module:
        calls = Calls(compile, graphs and torch.cuda.is_available())
        _compile_by(calls.of(denoiser, False)[1], options)
        return denoiser

    return way


def forecast(artifact: str | None = None, compile: bool = False, graphs: bool = False) -> Any:
    """A loop with half of its calls skipped, by the kernel that ships, as `attach` does it."""

    def way(loop: Any) -> None:
        on = graphs and torch.cuda.is_available()
        tn.attach(loop, artifact, speedup=2.0, compile=compile, graphs=on)

    return way


def of_denoiser(then: Way) -> Any:
    """What is done to the denoiser of a loop."""

    def way(loop: Any) -> None:
        then(loop.denoiser)

    return way


def fused(then: Way) -> Way:
    """Query, key and value of an attention by one layer, as diffusers does it, and then `then`."""

    def way(denoiser: nn.Module) -> nn.Module:
        from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

        kind: Any = FusedAttnProcessor2_0
        found = [m for m in denoiser.modules() if isinstance(m, Attention)]
        for module in found:
            module.fuse_projections()
            module.set_processor(kind())
            module.fused_projections = False  # `attach` refuses it: an artifact knows them apart
            for name in ("to_q", "to_k", "to_v"):  # they would be quantized, and never be called
                if hasattr(module, "to_qkv") or (name != "to_q" and hasattr(module, "to_kv")):
                    delattr(module, name)
        if not found:
            fuse: Any = denoiser.fuse_qkv_projections
            fuse()
        return then(denoiser)

    return way


class _Widened(nn.Module):
    """A model in fp32, called with what bf16 has."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser.float()

    def forward(self, **kwargs: Any) -> Any:
        """The call."""
        return self.denoiser(**{name: _wide(x) for name, x in kwargs.items()})


def _wide(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _wide(value) for name, value in x.items()}
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def in_fp32(tf32: bool) -> Way:
    """The model in fp32; its products in TF32 or not."""

    def way(denoiser: nn.Module) -> nn.Module:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        return _Widened(denoiser)

    return way


def channels_last(then: Way) -> Way:
    """Convolutions' weights with channels last, as cuDNN's kernels want them, and then `then`."""

    def way(denoiser: nn.Module) -> nn.Module:
        move: Any = denoiser.to
        return then(move(memory_format=torch.channels_last))

    return way


def compiled(mode: str | None) -> Any:
    """torch.compile of the whole model."""

    def way(denoiser: nn.Module) -> nn.Module:
        denoiser.compile(mode=mode)
        return denoiser

    return way


def torchao(kind: str, then: Way | None = None) -> Way:
    """Linears by torchao, per row; kind: "fp8" or "int8". then: what is done afterwards."""

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(n % 16 for n in module.weight.shape)

    def way(denoiser: nn.Module) -> nn.Module:
        from torchao import quantization as q  # pyright: ignore[reportMissingImports]

        if kind == "fp8":
            config = q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow())
        else:
            config = q.Int8DynamicActivationInt8WeightConfig()
        q.quantize_(denoiser, config, filter_fn=fits)
        return then(denoiser) if then else denoiser

    return way


def sdnq(kind: str, then: Way | None = None) -> Way:
    """Linears and convolutions by SDNQ, products in low precision; kind: "int8" or "fp8"."""

    def way(denoiser: nn.Module) -> nn.Module:
        from sdnq.quantizer import sdnq_post_load_quant  # pyright: ignore[reportMissingImports]

        word = {"int8": "int8", "fp8": "float8_e4m3fn"}[kind]
        made = sdnq_post_load_quant(
            denoiser, weights_dtype=word, use_quantized_matmul=True, torch_dtype=torch.bfloat16
        )
        return then(made) if then else made

    return way


def cache_dit(then: Way | None = None) -> Way:
    """DBCache: the first block is computed at every step, the others at every second."""

    def way(denoiser: nn.Module) -> nn.Module:
        import cache_dit as peer  # pyright: ignore[reportMissingImports]

        config = peer.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=STEPS,
            steps_computation_mask=[1, 0] * (STEPS // 2), steps_computation_policy="static",
        )  # fmt: skip
        peer.enable_cache(denoiser, cache_config=config)
        return then(denoiser) if then else denoiser

    return way


WAYS: dict[str, Way] = {
    BASE: lambda denoiser: denoiser,
    "fp32 eager": in_fp32(False),
    "tf32 eager": in_fp32(True),
    "bf16 compile": compiled(None),
    "bf16 reduce-overhead": compiled("reduce-overhead"),
    "bf16 graph": plain(False, True),
    "bf16 blocks": plain(True, False),
    "bf16 blocks, graph": plain(True, True),
    "bf16 whole rows, graph": plain(True, True, options=WHOLE_ROWS),
    "w8a8 int8": attached("w8a8", "int8", False, False),
    "w8a8 auto": attached("w8a8", "auto", False, False),
    "w8a8 int8 graph": attached("w8a8", "int8", False, True),
    "w8a8 int8 blocks": attached("w8a8", "int8", True, False),
    "w8a8 int8 blocks, graph": attached("w8a8", "int8", True, True),
    "w8a8 int8 whole rows, graph": attached("w8a8", "int8", True, True, options=WHOLE_ROWS),
    "w8a8 int8 tuned blocks, graph": attached("w8a8", "int8", True, True, mode=TUNED),
    "w8a8 auto blocks, graph": attached("w8a8", "auto", True, True),
    "fp8": attached("fp8", "int8", False, False),
    "fp8 graph": attached("fp8", "int8", False, True),
    "fp8 blocks": attached("fp8", "int8", True, False),
    "fp8 blocks, graph": attached("fp8", "int8", True, True),
    "fp8 whole rows, graph": attached("fp8", "int8", True, True, options=WHOLE_ROWS),
    "fused: bf16 blocks, graph": fused(plain(True, True)),
    "fused: w8a8 int8 blocks, graph": fused(attached("w8a8", "int8", True, True)),
    "fused: fp8 blocks, graph": fused(attached("fp8", "int8", True, True)),
    "fused: fp8-static blocks, graph": fused(stored(True, True)),
    "fp8 auto blocks, graph": attached("fp8", "auto", True, True),
    "fp8-static blocks": stored(True, False),
    "fp8-static blocks, graph": stored(True, True),
    "channels last: bf16 reduce-overhead": channels_last(compiled("reduce-overhead")),
    "channels last: bf16 blocks, graph": channels_last(plain(True, True)),
    "channels last: fp8 auto blocks, graph": channels_last(attached("fp8", "auto", True, True)),
    "channels last: w8a8 auto blocks, graph": channels_last(attached("w8a8", "auto", True, True)),
    "torchao fp8 compile": torchao("fp8", compiled(None)),
    "torchao fp8 blocks, graph": torchao("fp8", plain(True, True)),
    "torchao int8 compile": torchao("int8", compiled(None)),
    "torchao int8 blocks, graph": torchao("int8", plain(True, True)),
    "sdnq int8 compile": sdnq("int8", compiled(None)),
    "sdnq fp8 compile": sdnq("fp8", compiled(None)),
}
RUNS: dict[str, Any] = {
    f"run: {BASE}": of_denoiser(lambda denoiser: denoiser),
    "run: bf16 compile": of_denoiser(compiled(None)),
    "run: bf16 reduce-overhead": of_denoiser(compiled("reduce-overhead")),
    "run: bf16 blocks, graph": of_denoiser(plain(True, True)),
    "run: forecast": forecast(),
    "run: forecast, graph": forecast(graphs=True),
    "run: forecast, blocks, graph": forecast(compile=True, graphs=True),
    "run: w8a8, forecast, blocks, graph": forecast("w8a8", True, True),
    "run: fp8, forecast, blocks, graph": forecast("fp8", True, True),
    "run: cache-dit": of_denoiser(cache_dit()),
    "run: cache-dit compile": of_denoiser(cache_dit(compiled(None))),
    "run: cache-dit, torchao fp8 compile": of_denoiser(torchao("fp8", cache_dit(compiled(None)))),
}
PEERS = {"torchao": "torchao", "sdnq": "sdnq", "cache-dit": "cache_dit"}


def missing(way: str) -> list[str]:
    """The packages that a way needs and that are not there."""
    return [name for name, module in PEERS.items() if name in way and find_spec(module) is None]
