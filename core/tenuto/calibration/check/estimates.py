"""What calibration takes in memory and time: estimates, and each says what it is made of."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from ...model import denoiser_of, device_and_dtype

COPIES = 1  # of the denoiser, in float: the one that the result is checked with
SIDES = {"cpu": 512}  # of the product that says how fast the machine is
SIDE = 4096  # of that on a GPU
SMALL, OPERATIONS = 64, 8  # what a module costs, its hooks and what quantizes it: sides, operations
BETWEEN = 1.5  # a call over its products: norms, attention and what lies between layers
RANGE = 3.0  # of an estimate: the longest over the shortest time
# Products above which a forecast is measured only where that is asked for: about a minute on two
# cores, and on a usual card. A time would decide otherwise when resumed, or beside other work.
CHEAP, CHEAP_ON_CARD = 2e12, 3e15
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


class Calls(NamedTuple):
    """Of a denoiser by one use. rows: images in all calls; made: calls, each of several images."""

    rows: int
    made: int


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


def is_cheap(model: Any, images: int, call: Mapping[str, Any], device: torch.device) -> bool:
    """Whether so many calls with one image and guidance take few products, without one of them."""
    wanted = 2 * images * products(model, denoiser_of(model), call)
    return wanted <= (CHEAP if device.type == "cpu" else CHEAP_ON_CARD)


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


@torch.no_grad()
def seconds_a_module(device: torch.device, dtype: torch.dtype) -> float:
    """What a module costs a call, however small its tensors are: some operations that wait."""
    x = torch.ones(SMALL, SMALL, device=device, dtype=dtype)

    def some() -> None:
        for _ in range(OPERATIONS):
            torch.layer_norm(x @ x, (SMALL,)).add_(x)

    return min(_timed(some, device) for _ in range(TRIES))


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
    model: Any, uses: Mapping[str, Calls], call: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """What `spread` says, nothing of it measured on the model itself.

    A call takes its products, as fast as a large one is here, and what each of its modules costs.
    """
    denoiser = denoiser_of(model)
    _, dtype = device_and_dtype(denoiser)
    if any(p.is_meta for p in denoiser.parameters()):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    row = BETWEEN * products(model, denoiser, call) / products_per_second(device, dtype)
    count = sum(1 for module in denoiser.modules() if not any(module.children()))
    each = count * seconds_a_module(device, dtype)
    how = "from the model's sizes, and what a large product and small operations take here"
    return spread(row, uses, f"{how}; --run or run=True times a call", each)


def spread(row: float, uses: Mapping[str, Calls], how: str, each: float = 0.0) -> dict[str, Any]:
    """{"how", "seconds_per_row", "seconds_per_call", "uses": {use: ...}}, a range by use.

    row: seconds that one image of a call takes; each: those that a call takes beside, however many
    images it has. By use: "calls" with one image, "seconds" of them all, and "seconds_at_most",
    `RANGE` times as many: rounding comes on top, and layers that are simulated.
    """
    found: dict[str, Any] = {"how": how, "seconds_per_row": row, "seconds_per_call": each}
    found["uses"] = {}
    for use, calls in uses.items():
        seconds = row * calls.rows + each * calls.made
        facts = {"calls": calls.rows, "seconds": seconds, "seconds_at_most": RANGE * seconds}
        found["uses"][use] = facts
    return found
