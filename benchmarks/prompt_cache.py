"""What a prompt cache saves: time and peak memory of `tenuto generate` with and without it.

    python benchmarks/prompt_cache.py [--layers 24] [--runs 3]

The model is PixArt of the demo's size with a T5 encoder of random weights and the shape of T5 v1.1
large, or of as many layers as are asked for; each run is a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tenuto as tn
from tenuto.measure.environment import surroundings

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 1024


def model(folder: Path, layers: int) -> float:
    """Write the pipeline; returns the GiB of its text encoder."""
    from diffusers import PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    pipe = tn.demo("transformer")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=WIDTH, d_kv=64, d_ff=2816, num_layers=layers, num_heads=16,
        feed_forward_proj="gated-gelu", use_cache=False, is_encoder_decoder=False,
    )  # fmt: skip
    wanted = dict(pipe.transformer.config) | {"caption_channels": WIDTH}
    pipe.register_modules(
        text_encoder=T5EncoderModel(config).eval(),
        transformer=PixArtTransformer2DModel.from_config(wanted),
    )
    pipe.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in pipe.text_encoder.parameters()) / 2**30


def run(folder: Path, out: Path, *more: str) -> tuple[float, float]:
    """(seconds, peak GiB) of one process that generates one image."""
    command = [sys.executable, "-W", "ignore", "-m", "tenuto.cli", "generate", str(folder)]
    command += ["--prompt", "a golden retriever", "--steps", "4", "--out", str(out), *more]
    given = os.environ | {"PYTHONPATH": str(ROOT / "core"), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=given
    ) as job:
        _, status, usage = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
    assert job.returncode == 0, "the command failed"
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    """Print one line a way: the median time and the largest peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make is not None:  # apart: a child's peak begins with what its parent has
        size = model(given.make, given.layers)
        print(f"T5 encoder of {size:.2f} GiB; {surroundings(tn.demo('transformer').transformer)}")
        return
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        making = [sys.executable, "-W", "ignore", __file__, "--layers", str(given.layers)]
        subprocess.run([*making, "--make", str(here / "model")], check=True)
        cache = "--prompt-cache", str(here / "prompts.safetensors")
        ways = {"without": (), "first run": cache, "known prompt": cache}
        images = {}
        for name, more in ways.items():
            count = 1 if name == "first run" else given.runs
            found = [run(here / "model", here / "image.png", *more) for _ in range(count)]
            images[name] = (here / "image.png").read_bytes()
            seconds = sorted(s for s, _ in found)[count // 2]
            print(f"{name}: {seconds:.1f} s, peak {max(p for _, p in found):.2f} GiB")
        print(f"file: {(here / 'prompts.safetensors').stat().st_size / 2**20:.1f} MiB")
        print(f"equal images: {len(set(images.values())) == 1}")


if __name__ == "__main__":
    main()
