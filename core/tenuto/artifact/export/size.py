"""Why a file is no smaller than the model in bf16, where it is not: what its bytes are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..summary import mib
from .gguf_file import read_gguf
from .report import Report

WORDS = {
    "low": "are weights of 8 bits or fewer",
    "16 bits": "are in 16 bits",
    "32 bits": "in 32 (biases, norms, ranges, small tensors)",
    "rest": "are names and settings",
}
GGUF = {0: "32 bits", 1: "16 bits"}  # ggml's types; all others are blocks of low bits
SAFETENSORS = {"F64": "32 bits", "I64": "32 bits", "F32": "32 bits", "I32": "32 bits",
               "F16": "16 bits", "BF16": "16 bits"}  # fmt: skip


def size_note(report: Report) -> str:
    """One sentence where what was exported takes no less than bf16, else nothing.

    It has the bytes by what they are: few layers of low bits, in a model that is small, outweigh
    neither what stays in 32 bits nor the names.
    """
    if report.after < report.before:
        return ""
    files = [file for file in report.files if file.suffix != ".json"]
    sizes = dict.fromkeys(WORDS, 0)
    for kind, size in (pair for file in files for pair in _tensors(file)):
        sizes[kind] += size
    sizes["rest"] = report.after - sum(sizes.values())
    said = ", ".join(f"{mib(size)} {WORDS[kind]}" for kind, size in sizes.items() if size > 0)
    return f"It is no smaller than in bf16, as happens with very small models: {said}."


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """(kind, bytes) of each tensor in a file."""
    if file.suffix == ".gguf":
        for entry in read_gguf(file)[1].values():
            yield GGUF.get(entry.type, "low"), entry.bytes
        return
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    for name, facts in header.items():
        if name != "__metadata__":
            begin, end = facts["data_offsets"]
            yield SAFETENSORS.get(facts["dtype"], "low"), end - begin
