"""What calibration takes in memory and time: estimates, and each says what it is made of."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ...model import denoiser_of, device_and_dtype

COPIES = 1  # of the denoiser, in float: the one that the result is checked with
SIDES = {"cpu": 512}  # of the product that says how fast the machine is
SIDE = 4096  # of that on a GPU
LONG = 2.0  # seconds of a call that is not repeated
TRIES = 9  # of which the fastest counts
EIGHTH = 8  # pixels a latent has on each side, where no autoencoder says it
PACKED = 2  # latents on each side that a transformer takes as one token
LEVELS = 12  # of a U-Net: its weights see about a twelfth of the latent's places, on average
FRAMES = 4  # of a video that are one in the latent
SIZES = ("height", "width", "num_frames")
USUAL = 1024  # pixels on each side where nothing says it
MEMORY = Path("/proc/meminfo")
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def memory(model: Any, device: torch.device, stored: Mapping[str, int] | None) -> dict[str, Any]:
    """{"needed", "free", "on"}: bytes that quantizing takes at the least, beside what runs need.

    stored: bytes of each part of a model that is not loaded yet; those come on top, in the type
    that it is loaded in. free: None where it cannot be told.
    """
    denoiser = denoiser_of(model)
    count = sum(p.numel() for p in denoiser.parameters())
    needed = 4 * COPIES * count
    if stored is not None:
        width = 4 if device.type == "cpu" else 2
        had = stored.get(_name_of(model, denoiser)) or width * count
        needed += int((sum(stored.values()) or had) * width * count / had)
    return {"needed": needed, "free": free_memory(device), "on": str(device)}


def _name_of(model: Any, denoiser: nn.Module) -> str:
    return next((name for name, part in vars(model).items() if part is denoiser), "")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, as far as the system says: within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = MEMORY.read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, ValueError, StopIteration):
        free = _by_psutil()
    try:
        left = int(LIMIT.read_text("ascii")) - int(USED.read_text("ascii"))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return left if free is None else min(free, left)


def _by_psutil() -> int | None:
    """Where the system is no Linux; accelerate brings psutil."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def tokens(model: Any, denoiser: nn.Module, call: Mapping[str, Any]) -> float:
    """About how many places of an image the weights of a denoiser are applied to.

    The size is that of the call, else of the pipeline's own defaults or of the configuration.
    """
    own = inspect.signature(type(model).__call__).parameters
    given = {name: own[name].default for name in SIZES if name in own} | dict(call)
    height, width, frames = (_number(given.get(name)) for name in SIZES)
    config: Any = getattr(denoiser, "config", None) or {}
    latent = _number(config.get("sample_size")) or USUAL / EIGHTH
    places = latent**2 if height is None or width is None else height * width / EIGHTH**2
    places *= 1 if frames is None else (frames - 1) // FRAMES + 1
    return places / (LEVELS if "down_block_types" in config else PACKED**2)


def products(model: Any, denoiser: nn.Module, call: Mapping[str, Any]) -> float:
    """About how many multiply-adds a denoiser takes for one image, by its sizes alone."""
    return sum(p.numel() for p in denoiser.parameters()) * tokens(model, denoiser, call)


def _number(value: Any) -> float | None:
    value = value[-1] if isinstance(value, list | tuple) and value else value
    return float(value) if isinstance(value, int | float) and value > 0 else None


@torch.no_grad()
def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of one large product: what a denoiser reaches at best."""
    side = SIDES.get(device.type, SIDE)
    x = torch.ones(side, side, device=device, dtype=dtype)
    seconds = [_timed(lambda: x @ x, device) for _ in range(TRIES)]
    return side**3 / max(min(seconds[1:]), 1e-6)


def seconds_of(denoiser: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> float:
    """What one call of a denoiser takes: the median of three after the first; a long one counts."""
    with torch.no_grad():
        first = _timed(lambda: denoiser(**inputs), device)
        if first > LONG:
            return first
        return median(_timed(lambda: denoiser(**inputs), device) for _ in range(3))


def _timed(work: Any, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_of(
    model: Any, calls: Mapping[str, int], call: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """{"how", "seconds a row", "uses": {use: {"calls", "seconds"}}}, nothing of it measured.

    calls: of the denoiser with one image, by use.
    """
    denoiser = denoiser_of(model)
    _, dtype = device_and_dtype(denoiser)
    if any(p.is_meta for p in denoiser.parameters()):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    row = products(model, denoiser, call) / products_per_second(device, dtype)
    how = "from parameters x places of the image, and the speed of a large product here"
    return spread(row, calls, f"{how}; --run or run=True times a call")


def spread(row: float, calls: Mapping[str, int], how: str) -> dict[str, Any]:
    """`time_of`, from the seconds that one row of a call takes."""
    uses = {use: {"calls": count, "seconds": row * count} for use, count in calls.items()}
    return {"how": how, "seconds_per_row": row, "uses": uses}
