"""What tables of time-only modules save, and why they are made at the steps of a run.

    python benchmarks/temporal_tables.py

Prints one JSON line a row. `size`: Qwen-Image at its released size, built without memory, as an
artifact of W4A8 with tables of 50 steps, in bytes and shares of the model in 16 bits. `grid`: how
many rows over all timesteps a table would need to be interpolated between them, and how many
directions the inputs of a time-only layer have: the largest relative error of its output at 1,500
timesteps in between, of the demo models (trained) and of Qwen-Image's embedding at its released
width (random weights).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tenuto as tn
from tenuto.calibration.check.file_size import file_size

NODES = (50, 200, 1000, 2000, 4000)
RANKS = (16, 64, 128, 256, 512)
Curve = Callable[[Tensor], Tensor]  # timesteps in 0..1 -> inputs of a layer, (T, K)


def size() -> dict[str, Any]:
    """Of Qwen-Image; steps: of the tables."""
    import diffusers

    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel()
    inputs = {
        "hidden_states": torch.zeros(1, 16, 64), "encoder_hidden_states": torch.zeros(1, 7, 3584),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.int64),
        "timestep": torch.ones(1), "img_shapes": [[(1, 4, 4)]],
    }  # fmt: skip
    found = file_size(model, tn.schemes.W4A8, 50, inputs)
    parts = {f"codes of {bits} bits": n for bits, n in found.codes.items()}
    parts |= {"tables": found.tables, "not in the artifact": found.left}
    return {
        "size": "Qwen-Image", "model": found.model, "artifact": found.artifact,
        "share": round(found.share, 4), "bytes": parts,
        "shares": {name: round(n / found.model, 5) for name, n in parts.items()},
        "weights": {str(name): n for name, n in found.weights.items()},
    }  # fmt: skip


def curves() -> Iterator[tuple[str, nn.Linear, Curve]]:
    """(what, a layer, its inputs by timestep)."""
    from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

    transformer, unet = tn.demo("transformer").transformer, tn.demo("unet").unet
    single = transformer.adaln_single

    def of_transformer(t: Tensor) -> Tensor:
        return F.silu(single.emb.timestep_embedder(single.emb.time_proj(999 * t)))

    def of_unet(t: Tensor) -> Tensor:
        return F.silu(unet.time_embedding(unet.time_proj(999 * t)))

    yield "demo transformer", single.linear, of_transformer
    layer = unet.get_submodule("down_blocks.1.resnets.0.time_emb_proj")
    yield "demo unet", layer, of_unet  # type: ignore[misc]
    torch.manual_seed(0)
    embedding = QwenTimestepProjEmbeddings(3072)
    yield "Qwen-Image, random", nn.Linear(3072, 6144), lambda t: F.silu(embedding(t, t))


@torch.no_grad()
def grid(what: str, layer: nn.Linear, curve: Curve) -> dict[str, Any]:
    """The errors of one layer."""
    layer = layer.double()
    times = torch.rand(1500, generator=torch.Generator().manual_seed(0))
    inputs = curve(times).double()
    wanted = layer(inputs)

    def error(found: Tensor) -> float:
        return float(f"{((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max():.1e}")

    rows: dict[str, Any] = {"grid": what, "columns": layer.in_features, "linear": {}, "cubic": {}}
    for count in NODES:
        values = layer(curve(torch.linspace(0, 1, count + 1)).double())
        rows["linear"][count] = error(between(values, times.double() * count, 2))
        rows["cubic"][count] = error(between(values, times.double() * count, 4))
    some = curve(torch.linspace(0, 1, 2000)).double()
    basis = torch.linalg.svd(some / some.norm(dim=1, keepdim=True), full_matrices=False)[2]
    rows["directions"] = {
        n: error(layer(inputs @ basis[:n].t() @ basis[:n])) for n in RANKS if n < len(basis)
    }
    return rows


def between(values: Tensor, place: Tensor, points: int) -> Tensor:
    """`values` (nodes, N) at the places (T,) between them, by Lagrange through 2 or 4 nodes."""
    first = (place.floor().long() - (points // 2 - 1)).clamp(0, len(values) - points)
    found = torch.zeros(len(place), values.shape[1], dtype=values.dtype)
    for i in range(points):
        weight = torch.ones_like(place)
        for j in range(points):
            if j != i:
                weight = weight * (place - first - j) / (i - j)
        found += weight[:, None] * values[first + i]
    return found


def main() -> None:
    """Every row."""
    warnings.simplefilter("ignore")
    print(json.dumps(size()), flush=True)
    for what, layer, curve in curves():
        print(json.dumps(grid(what, layer, curve)), flush=True)


if __name__ == "__main__":
    main()
