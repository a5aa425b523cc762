"""Time, peak memory and file size of quantizing a text encoder larger than memory: random shards.

    python benchmarks/large_encoder.py t5-xxl --blocks 2 4     # how both grow with depth
    python benchmarks/large_encoder.py qwen3-4b --method gptq --cores 2

The shapes are the real ones, the weights random in bf16, written shard by shard and deleted
afterwards (`--keep` leaves them). `tenuto text-encoder FOLDER` runs in a process of its own, kept
to `--memory` GiB; one JSON line a run: wall time, peak resident memory (ru_maxrss), bytes of the
file, seconds and GiB a block. A line that `--rows FILE` has is not run again, and a run that was
stopped goes on after its last block. The tokenizer is made of the shipped prompts (pieces of five
characters, about as long as sentencepiece's). Random weights: time and memory alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.large_model import run
from benchmarks.quantization import cpu_name
from tenuto.measure.environment import surroundings
from tenuto.resources import prompts

SHARD = 2**30  # bytes
GIB = 2**30
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
}  # fmt: skip
QWEN = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
GEMMA = {
    "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 1024,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], str, str, int]] = {
    # config, model, its sizes, what counts its blocks, who reads it, GiB that it may take
    "t5-xxl": ("T5Config", "T5EncoderModel", T5, "num_layers", "pixart", 12),
    "qwen3-4b": ("Qwen3Config", "Qwen3Model", QWEN, "num_hidden_layers", "z-image", 12),
    "gemma-3-12b": ("Gemma3TextConfig", "Gemma3TextModel", GEMMA, "num_hidden_layers", "ltx2", 24),
}


def empty_model(name: str, blocks: int | None) -> Any:
    """An encoder of these sizes without values."""
    import transformers
    from accelerate import init_empty_weights

    config, kind, sizes, count, _, _ = MODELS[name]
    sizes = sizes | ({} if blocks is None else {count: blocks})
    with init_empty_weights(include_buffers=False):
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Random values in bf16, one tensor at a time; a tensor that is another's is left out."""
    draw, seen = torch.Generator().manual_seed(0), set[int]()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = torch.randn(tensor.shape, generator=draw, dtype=torch.float32)
        quiet = 0.1 if name.endswith((".q.weight", ".k.weight")) else 1.0  # T5 has no 1 / sqrt(d)
        value *= quiet * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1
        yield name, (value + 1 if tensor.ndim == 1 else value).bfloat16()


def write_folder(folder: Path, name: str, blocks: int | None) -> None:
    """A folder of transformers with the shards, a config and a tokenizer."""
    model = empty_model(name, blocks)
    model.config.torch_dtype = "bfloat16"
    model.config.save_pretrained(folder)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    sizes = [0]

    def flush() -> None:
        file = f"model-{len(sizes):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        sizes.append(sum(t.nbytes for t in shard.values()))
        shard.clear()

    for key, value in weights(model):
        if sum(t.nbytes for t in shard.values()) + value.nbytes > SHARD and shard:
            flush()
        shard[key] = value
    flush()
    about = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    tokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(bytes(200))  # what Gemma's hosts would open


def tokenizer() -> Any:
    """Pieces of at most five characters of the shipped prompts' words."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    cut = Split(Regex(r"\w{1,5}|[^\w\s]"), "removed", invert=True)
    known = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for line in (*prompts("captions"), *prompts("general")):
        for piece, _ in cut.pre_tokenize_str(line):
            known.setdefault(piece, len(known))
    made = Tokenizer(WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = cut
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def command(folder: Path, out: Path, asked: argparse.Namespace) -> list[str]:
    """What a user would type."""
    start = [sys.executable, "-m", "tenuto.cli", "text-encoder", str(folder), "--out", str(out)]
    how = ["--scheme", asked.scheme, "--method", asked.method, "--for", MODELS[asked.model][4]]
    return [*start, *how, "--max-memory", f"{asked.memory}GiB", *asked.more]


def measured(asked: argparse.Namespace, blocks: int | None) -> dict[str, Any]:
    """One run, in a folder of its own."""
    model = empty_model(asked.model, blocks)
    count = len(model.encoder.block if hasattr(model, "encoder") else model.layers)
    row: dict[str, Any] = {
        "model": asked.model, "blocks": count, "scheme": asked.scheme, "method": asked.method,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    del model
    folder = asked.folder / f"{asked.model}-{count}"
    if not (folder / "model.safetensors.index.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, asked.model, count)
    out = asked.folder / f"{asked.model}-{count}-{asked.scheme}-{asked.method}.safetensors"
    row |= run(command(folder, out, asked), out.with_suffix(".work"))
    if not row["exit"]:
        row |= {"bytes": out.stat().st_size, "bf16_bytes": 2 * row["parameters"]}
        row["seconds_a_block"] = round(row["seconds"] / count, 1)
        out.unlink()
        if not asked.keep:
            shutil.rmtree(folder)
    return row


def main() -> None:
    """Run them and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--blocks", type=int, nargs="*", help="not all of them: so many, in turn")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--memory", type=float, help="GiB that it is kept to")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("large-encoder"), help="for all files")
    parser.add_argument("--rows", type=Path, help="a file of lines: what it has is not run again")
    parser.add_argument("--keep", action="store_true", help="leave the shards")
    parser.add_argument("--more", nargs="*", default=[], help="further words of the command")
    asked = parser.parse_args()
    asked.memory = asked.memory or MODELS[asked.model][5]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.cores])
    os.environ["OMP_NUM_THREADS"] = str(asked.cores)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # where other work shares the cores
    machine = {"machine": cpu_name(), "cores": asked.cores, "date": str(datetime.date.today())}
    whole = {"memory_gib": asked.memory} | machine | surroundings(torch.nn.Linear(1, 1))
    for blocks in asked.blocks or [None]:
        if _known(asked, blocks):
            continue
        line = json.dumps(measured(asked, blocks) | whole)
        print(line, flush=True)
        if asked.rows:
            with asked.rows.open("a") as file:
                file.write(f"{line}\n")


def _known(asked: argparse.Namespace, blocks: int | None) -> bool:
    """Whether the file of lines has this run, finished."""
    if asked.rows is None or not asked.rows.is_file():
        return False
    sizes = MODELS[asked.model]
    wanted = [asked.model, blocks or sizes[2][sizes[3]], asked.scheme, asked.method, 0]
    rows = map(json.loads, asked.rows.read_text().splitlines())
    keys = ("model", "blocks", "scheme", "method", "exit")
    return any([row.get(key) for key in keys] == wanted for row in rows)


if __name__ == "__main__":
    main()
