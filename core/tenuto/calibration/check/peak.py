"""How much of the host's memory quantizing takes at its peak: the whole model, or block by block.

Estimates on the safe side. What they are made of: the program itself, weights in fp32, the codes,
the inputs and outputs of a block for all recorded calls, one call of a block, rounding a layer.
Those inputs and outputs go to disk where memory has no room for them, see `room_for_banks`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import TenutoError
from ...model import Backbone, denoisers_of, encoders_of
from ...sampling import processes
from ...sampling.low_memory import LARGE
from ..bank_files import COPIES
from ..moments import CHUNK
from .estimates import LEVELS, free_memory, tokens

GIB = 2**30
PROGRAM = 1.25 * GIB  # Python, torch, diffusers and transformers, and what allocators keep
STATES = ("joint_attention_dim", "cross_attention_dim", "caption_channels", "text_dim")
TEXT = 512  # tokens of a prompt where the call does not say
BANKS = COPIES + 2  # that, and what the blocks before answered in two models
SHARE = 0.75  # of the free memory that a block's recorded inputs may take, and the work on them
HELD = 3  # copies of a block in fp32: of two models, and the one that is rounded
WIDE = 4  # tensors of a call as large as its widest layer
FACTOR, SOLVED = (24, 12), (12, 58)  # bytes a second moment and a weight of the layer that is
# rounded: while its inputs' factor is made, and while its columns are rounded
NEAREST = 20  # bytes a weight of a layer that is rounded to nearest
CHECKED = 7  # bytes a weight of the copy that is checked: in fp32, its codes and a layer's making


def peaks(
    pipe: Any,
    denoiser: nn.Module,
    backbone: Backbone,
    call: Mapping[str, Any],
    rows: int,
    stored: Mapping[str, int] | None,
    device: torch.device,
    *,
    rounds: bool,
    encoders: bool,
) -> dict[str, int]:
    """{"whole", "by block"}: bytes of memory at the peak, of the denoiser all loaded or on disk.

    "recorded inputs": bytes of these, and of outputs, that are on disk where memory has no room for
    them; "whole without recorded inputs" and "by block without recorded inputs": the peaks then.
    rows: of all recorded calls. stored: bytes of each part that is not loaded yet. rounds: whether
    layers are rounded on what they see. encoders: whether text encoders are quantized too.
    Codes that are rounded so block by block are in the work folder until all are there.
    """
    inside = _blocks(denoiser, backbone)
    whole, on_cpu = _count(denoiser), device.type == "cpu"
    outside = whole - sum(inside)
    copies = 8 * outside if on_cpu else 0
    count = {name: _count(part) for name, part in denoisers_of(pipe).items()}
    own = sum(count.values()) or whole
    texts = {name: 4 * _count(part) for name, part in encoders_of(pipe).items()}
    other = sum(stored.values()) if stored else 0
    other = max(0, other - sum((stored or {}).get(name, 0) for name in (*count, *texts)))
    held = {n: size for n, size in texts.items() if encoders or size <= 2 * LARGE}
    made = PROGRAM + 2 * other + (2 * sum(texts.values()) if encoders else 0)
    banks, step = _data(pipe, denoiser, call, rows, rounds)
    work = copies + step + _beside(denoiser, backbone, device, rounds)

    def beside(work: int) -> int:
        return max(work, own) if rounds else work + own

    def peak(work: int) -> tuple[int, int]:
        return (
            int(made + sum(texts.values()) + 5 * own + max(work, CHECKED * whole)),
            int(made + sum(held.values()) + 4 * outside * max(1, len(count)) + beside(work)),
        )

    found = dict(zip(("whole", "by block"), peak(work + banks), strict=True))
    least = {f"{how} without recorded inputs": n for how, n in zip(found, peak(work), strict=True)}
    return found | least | {"recorded inputs": banks}


def room_for_banks(
    denoiser: nn.Module, backbone: Backbone, device: torch.device, most: int | None
) -> int:
    """Bytes of memory that the recorded inputs of a block may take now, beside the work on it.

    most: of memory that quantizing may take, in all processes together; None: what is free.
    """
    several = processes().size
    free = free_memory(torch.device("cpu"))
    rooms = [] if free is None else [SHARE * free / several]
    if most is not None:
        rooms.append(most / several - _taken())
    if not rooms:
        return sys.maxsize
    return int(min(rooms)) - _beside(denoiser, backbone, device, True)


def _taken() -> int:
    """Bytes of memory of this process; 0 where nothing tells."""
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def kept_to(found: Mapping[str, Any], most: int, low_memory: bool | None) -> bool:
    """Whether the denoiser stays on disk so that quantizing takes at most `most` bytes of memory.

    Recorded inputs can lie there too. found: of `peaks`. TenutoError says what it takes at the
    least, where that is more.
    """
    whole, blocks = (found[f"{how} without recorded inputs"] for how in ("whole", "by block"))
    if not low_memory and whole <= most:
        return False
    if low_memory is not False and blocks <= most:
        return True
    takes = whole if low_memory is False else blocks
    how = " with the whole model in memory" if low_memory is False else ", block by block,"
    raise TenutoError(
        f"Quantizing this takes about {takes / GIB:.1f} GiB of memory{how} and --max-memory allows "
        f"{most / GIB:.1f}: fewer prompts or steps, smaller images or w8a8 take less."
    )


def _count(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def _blocks(denoiser: nn.Module, backbone: Backbone) -> list[int]:
    return [_count(denoiser.get_submodule(name)) for name in backbone.blocks]


def _beside(denoiser: nn.Module, backbone: Backbone, device: torch.device, rounds: bool) -> int:
    """Copies of a block, and what rounding its largest layer takes."""
    if device.type != "cpu":
        return 0
    block = max(_blocks(denoiser, backbone), default=0)
    return 4 * HELD * block + _rounding(denoiser, rounds)


def _sizes(denoiser: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of the weight of every Linear and Conv2d."""
    found = (m.weight for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [(len(w), w.shape[1:].numel()) for w in found]


def _rounding(denoiser: nn.Module, rounds: bool) -> int:
    """Of the largest layer."""
    each = (rounding_of(n, k) if rounds else NEAREST * n * k for n, k in _sizes(denoiser))
    return max(each, default=0)


def rounding_of(rows: int, columns: int) -> int:
    """Bytes that GPTQ takes for a weight (N, K) beside the weight itself."""
    square, flat = columns * columns, rows * columns
    return max(a * square + b * flat for a, b in (FACTOR, SOLVED))


def _data(
    pipe: Any, denoiser: nn.Module, call: Mapping[str, Any], rows: int, rounds: bool
) -> tuple[int, int]:
    """Of recorded calls a block's inputs and outputs; the prompts, and one call of it."""
    config: Any = getattr(denoiser, "config", None) or {}
    levels = "down_block_types" in config  # a U-Net, with its skip connections
    places = tokens(pipe, denoiser, call) * (LEVELS if levels else 1)
    text = int(call.get("max_sequence_length") or TEXT)
    sizes = [(n, k) for n, k in _sizes(denoiser) if k > 1]
    width = Counter(k for _, k in sizes).most_common(1)[0][0] if sizes else 1
    if levels:
        width = 3 * int((config.get("block_out_channels") or (width,))[0])
    widest = max((max(n, k) for n, k in sizes), default=1)
    states = max(int(config.get(name) or 0) for name in STATES)
    banks = BANKS * (places + text) * width if rounds else 0
    one = WIDE * min(rows, CHUNK if rounds else 1) * (places / (LEVELS if levels else 1) + text)
    return int(4 * rows * banks), int(4 * (rows * text * states + one * widest))
