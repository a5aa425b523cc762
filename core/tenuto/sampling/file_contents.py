"""What is in a checkpoint in a single file, as its header says: no other file is needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .single_file import PLACES, T5, header, hub_id, is_checkpoint, size_of

DENOISER, UNUSED = "denoiser", "not used"
PARTS = {
    **dict.fromkeys(PLACES["vae"], "autoencoder"),
    **dict.fromkeys((*PLACES["text_encoder"], *PLACES["text_encoder_2"], *T5), "text encoders"),
    "model_ema.": UNUSED,  # averages of training
}
NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class Contents:
    """kind: the hub's id of a model of the same kind, "" if diffusers knows none.

    sizes: bytes by part. types: that of most of a part's values.
    """

    kind: str
    sizes: dict[str, int]
    types: dict[str, str]


def contents(file: Path) -> Contents | None:
    """What a file has; None where it has no denoiser. ModelError if it cannot be read."""
    if not is_checkpoint(file):
        return None
    sizes, types = Counter[str](), dict[str, Counter[str]]()
    for name, (dtype, shape) in header(file).items():
        part = next((part for start, part in PARTS.items() if name.startswith(start)), DENOISER)
        size = prod(shape) * size_of(dtype)
        sizes[part] += size
        types.setdefault(part, Counter())[dtype] += size
    most = {part: found.most_common(1)[0][0] for part, found in types.items()}
    said = {part: NAMES.get(dtype, dtype) for part, dtype in most.items()}
    return Contents(hub_id(file) or "", dict(sizes), said)
