"""Peak memory of calibrating a model larger than memory: a random FLUX.2 on disk, killed, resumed.

    python benchmarks/large_model.py --size 4 --scheme w4a8 --cores 2     # klein 4B's shape
    python benchmarks/large_model.py --size 1 --scheme w8a8 --check       # equal to one run?
    python benchmarks/large_model.py --device cuda --processes 2 --check --once   # to one process?

The folder is written shard by shard, in bf16, with a tiny text encoder and autoencoder. The command
`tenuto quantize FOLDER --low-memory` runs in a process of its own, which is killed once after a
random block and started again. One JSON line: peak resident memory (ru_maxrss) and wall time of
each run, the artifact's hash. Random weights: memory and time only.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quantization import cpu_name
from tenuto.measure.environment import surroundings
from tests.core import tiny_pipelines as tiny

ROOT = Path(__file__).resolve().parent.parent
SHARD = 2**30  # bytes
SIZES = {  # billions of parameters: heads of 128, double blocks, single blocks
    "0.3": (8, 3, 12),
    "1": (16, 3, 10),
    "4": (24, 5, 20),
}
WIDTH = 2560  # of the text encoder's states, of which three layers are taken
PROMPTS = "a photo of a red bus\na dog in the snow\n"


def denoiser(size: str) -> Any:
    """The denoiser without its weights."""
    import diffusers
    from accelerate import init_empty_weights

    heads, double, single = SIZES[size]
    with init_empty_weights(include_buffers=False):
        return diffusers.Flux2Transformer2DModel(
            num_layers=double, num_single_layers=single, attention_head_dim=128,
            num_attention_heads=heads, joint_attention_dim=3 * WIDTH, guidance_embeds=False,
        )  # fmt: skip


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights in bf16, one at a time."""
    draw = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=draw)
        value *= tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1
        yield name, (value + 1 if tensor.ndim == 1 else value).to(torch.bfloat16)


def write_denoiser(folder: Path, size: str) -> int:
    """Its folder, shard by shard; returns the number of parameters."""
    model = denoiser(size)
    model.save_config(folder)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = total = 0

    def flush() -> None:
        nonlocal number
        number += 1
        name = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, value in weights(model):
        if sum(t.nbytes for t in shard.values()) + value.nbytes > SHARD and shard:
            flush()
        shard[name] = value
        total += value.numel()
    flush()
    about = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(about))
    return total


def write_pipeline(folder: Path, size: str) -> int:
    """A FLUX.2 klein in diffusers' format; returns the parameters of its denoiser."""
    import diffusers
    import transformers

    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=128, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    parts = {
        "scheduler": tiny.flow(use_dynamic_shifting=True), "tokenizer": tiny.qwen_tokenizer(),
        "text_encoder": encoder.bfloat16(), "vae": vae.bfloat16(),
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        name: [type(p).__module__.split(".")[0], type(p).__name__] for name, p in parts.items()
    }
    index |= {"transformer": ["diffusers", "Flux2Transformer2DModel"]}
    facts = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(facts | index | {"is_distilled": True}))
    return write_denoiser(folder / "transformer", size)


def command(folder: Path, out: Path, asked: argparse.Namespace, processes: int = 1) -> list[str]:
    """What a user would type."""
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPTS)
    pixels = ["--height", str(asked.pixels), "--width", str(asked.pixels)]
    device = ["--device", asked.device] if asked.device else []
    start = [sys.executable, "-m", "tenuto.cli"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        start = [sys.executable, *launcher, "-m", "tenuto.cli"]
    return [
        *start, "quantize", str(folder), "--scheme", asked.scheme,
        "--low-memory", "--prompts", str(prompts), "--steps", "2", *pixels, *device,
        "--set", "text_encoder_out_layers=[0,1,2]", "--set", "max_sequence_length=64",
        "--out", str(out),
    ]  # fmt: skip


def run(words: list[str], work: Path, after: int | None = None) -> dict[str, Any]:
    """One run: its peak memory and time. after: kill it when so many units are finished."""
    paths = os.pathsep.join([str(ROOT / "core"), str(ROOT)])
    start = time.perf_counter()
    child = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": paths})
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if after is not None and len(list(work.glob("*.safetensors"))) >= after:
            several = psutil.Process(child.pid).children()  # of a launcher; it ends the others
            os.kill(several[-1].pid if several else child.pid, signal.SIGKILL)
            after = None
        time.sleep(0.2)
    child.returncode = os.waitstatus_to_exitcode(status)
    kib = used.ru_maxrss if sys.platform != "darwin" else used.ru_maxrss / 1024
    return {
        "exit": child.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": round(kib / 2**20, 2),
    }


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """The whole: made, run, killed, resumed."""
    folder = asked.folder / f"flux2-{asked.size}"
    known = folder / "parameters.txt"
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(str(write_pipeline(folder, asked.size)))
    out = asked.folder / f"{asked.size}-{asked.scheme}.safetensors"
    words, work = command(folder, out, asked, asked.processes), out.with_suffix(".work")
    row: dict[str, Any] = {"size": asked.size, "parameters": int(known.read_text())}
    row |= {"scheme": asked.scheme, "pixels": asked.pixels, "processes": asked.processes}
    if not asked.once:
        _, double, single = SIZES[asked.size]
        row["killed_after"] = random.Random(asked.seed).randint(3, double + single - 1)
        row["killed"] = run(words, work, row["killed_after"])
    row["finished"] = run(words, work)
    row["mib"], row["sha256"] = round(out.stat().st_size / 2**20), digest(out)
    if asked.check:
        whole = out.with_name(f"whole-{out.name}")
        row["whole"] = run(command(folder, whole, asked), whole.with_suffix(".work"))
        row["equal"] = digest(whole) == row["sha256"]
    return row


def digest(file: Path) -> str:
    """The hash of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> None:
    """Run it and print one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="4", help="billions of parameters")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--pixels", type=int, default=256, help="height and width")
    parser.add_argument("--folder", type=Path, default=Path("large-model"), help="for all files")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--once", action="store_true", help="do not kill it")
    parser.add_argument("--check", action="store_true", help="compare with an uninterrupted run")
    parser.add_argument("--seed", type=int, default=0, help="of the block after which it is killed")
    asked = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.cores])
    os.environ["OMP_NUM_THREADS"] = str(asked.cores)
    torch.set_num_threads(asked.cores)
    row = measured(asked)
    machine = {"machine": cpu_name(), "cores": asked.cores, "date": str(datetime.date.today())}
    print(json.dumps(row | machine | surroundings(torch.nn.Linear(1, 1))))


if __name__ == "__main__":
    main()
