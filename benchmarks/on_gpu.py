"""All tables that need a GPU, one after another, the most wanted first, on a card of yours.

    python benchmarks/on_gpu.py --out results [--minutes 25] [--only tests speed-sdxl]
    python benchmarks/on_gpu.py --out results --data DATA --features inception.safetensors \
        --comfy COMFYUI --comfy-python COMFYUI/venv/bin/python
    python benchmarks/on_gpu.py --out results --list        # what it would run, and no more

Each job is a script of this folder as its own first lines describe it, in a process of its own; OUT
has its rows (NAME.jsonl or .json) and what it printed (NAME.log). Scripts keep the rows that their
file has, so the same command goes on where it was cut off: by Ctrl-C, by `--minutes`, or by the
machine. A job whose data, features or ComfyUI is not given is left out, and said so.

With several GPUs (`--devices 0 1`, all by default) what is timed runs on the first alone, one job
at a time; the others take what is not timed, and so does the first at the end. A job has half of
its share of the processors: beside one that took all, calls that wait for Python took half as long
again. Rows of an untimed job that follow from another's (`flow-runs`) want that one first.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FID = ("--fid", "10000", "--data", "{data}", "--features", "{features}")
CUDA = ("--device", "cuda")
# What is installed beside a card warns of other things than the versions of constraints.txt.
OTHER_VERSIONS = "-p", "no:cacheprovider", "-o", "filterwarnings=default"
FLOW = "denoiser", "--flow", "--autoencoder", "assets/demo-transformer/vae", "--seconds", "400"
TESTS = tuple(f"tests/core/runtime/test_{name}.py" for name in ("cuda", "fused_gate", "fused_rows"))


@dataclass(frozen=True)
class Job:
    """A name, the arguments to Python, and whether its times are what it is for."""

    name: str
    arguments: tuple[str, ...]
    timed: bool = False

    def command(self, given: dict[str, str]) -> list[str]:
        """The command line, from the repository's root. KeyError names what is not given."""
        return [sys.executable, *(word.format_map(given) for word in self.arguments)]


def script(name: str, file: str, *arguments: str, timed: bool = False) -> Job:
    """A job of benchmarks/FILE.py whose rows are OUT/NAME.jsonl."""
    words = (f"benchmarks/{file}.py", *arguments, "--out", f"{{out}}/{name}.jsonl")
    return Job(name, words, timed)


def speed(model: str) -> Job:
    """The rows of `gpu_speed.py` for one model."""
    out = ("--out", f"{{out}}/speed-{model}.json")
    return Job(f"speed-{model}", ("benchmarks/gpu_speed.py", "--models", model, *out), timed=True)


JOBS = (
    Job("tests", ("-m", "pytest", "-q", *OTHER_VERSIONS, *TESTS), timed=True),
    script("comfy", "comfy_gpu", "{comfy}", "--python", "{comfy_python}", timed=True),
    speed("sdxl"),
    speed("dit2"),
    speed("klein"),
    speed("dit16"),
    script("schedules", "schedules", *CUDA, *FID, "--work", "{out}/schedules"),
    script("temporal", "temporal", *CUDA, *FID, "--setting", "paper", "--batch", "64"),
    Job("flow", ("assets/train.py", *FLOW, "--data", "{data}", "--out", "{out}/flow")),
    script(
        "flow-runs",
        "forecast_runs",
        *CUDA,
        "--model",
        "trained flow",
        "--flow",
        "{out}/flow/demo-transformer",
        "--count",
        "128",
        "--batch",
        "32",
    ),
    script("runs", "forecast_runs", *CUDA, "--count", "128", "--batch", "32"),
    script("formats", "native_formats", *CUDA, *FID, "--count", "64", "--batch", "32"),
    script("formats-unet", "native_formats", "--model", "demo:unet", *CUDA, *FID, "--batch", "32"),
    script("attention", "int8_attention", *CUDA, "--batch", "32", timed=True),
    script("calibration", "calibration_time", *CUDA, "--batch", "16", timed=True),
    script("kernels", "check_kernels", timed=True),
    script("fused", "fused_kernels", timed=True),
    script("joint", "joint", *CUDA, *FID, "--count", "64", "--batch", "32"),
    script("steps", "other_steps", *CUDA, "--images", "64", "--batch", "32"),
)


@dataclass
class Queue:
    """The jobs that are left, given to one card after another; `ended` says how each went."""

    left: list[Job]
    given: dict[str, str]
    end: float
    ended: dict[str, str] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    threads: int = 4  # of a job: calls that are timed wait for Python, which wants a free processor
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, first: bool) -> Job | None:
        """The next job for the first card, or for another one; None if there is none."""
        with self.lock:
            fitting = [job for job in self.left if first or not job.timed]
            if first:
                fitting.sort(key=lambda job: not job.timed)  # stable: the order stays
            if not fitting or time.monotonic() >= self.end:
                return None
            self.left.remove(fitting[0])
            return fitting[0]

    def run(self, device: str, first: bool) -> None:
        """Work on `device` until nothing is left for it."""
        while (job := self.next(first)) is not None:
            started = time.monotonic()
            print(f"{job.name} on {device}", flush=True)
            state = self.one(job, device)
            self.ended[job.name] = f"{state}, {time.monotonic() - started:.0f} s"
            print(f"{job.name}: {self.ended[job.name]}", flush=True)

    def stop(self) -> None:
        """Begin nothing more, and end what runs, with all that it has started."""
        self.end = 0.0
        for process in list(self.running):
            os.killpg(process, signal.SIGTERM)

    def one(self, job: Job, device: str) -> str:
        """Run a job, at most until the end; says how it went."""
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": device, "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT / "core"), str(ROOT), os.environ.get("PYTHONPATH")])
            ),
        }  # fmt: skip
        with (Path(self.given["out"]) / f"{job.name}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                job.command(self.given), cwd=ROOT, env=environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.running.add(process.pid)
            try:
                code = process.wait(
                    max(1.0, min(self.end - time.monotonic(), threading.TIMEOUT_MAX))
                )
            except subprocess.TimeoutExpired:
                self.stop()
                process.wait()
                return "cut off"
            finally:
                self.running.discard(process.pid)
        if code and not self.end:
            return "cut off"
        return f"failed with {code}: see {job.name}.log" if code else "done"


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for rows and logs")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="NAME")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--devices", nargs="+", help="numbers of GPUs (all of them)")
    parser.add_argument("--data", type=Path, help="a folder with val*.npz and classes.json")
    parser.add_argument("--features", type=Path, help="what convert_inception.py made")
    parser.add_argument("--comfy", type=Path, help="the folder of a ComfyUI")
    parser.add_argument("--comfy-python", type=Path, help="the Python that starts it")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    names = ("out", "data", "features", "comfy", "comfy_python")
    given = {name: str(getattr(args, name).absolute()) for name in names if getattr(args, name)}
    jobs = []
    for job in JOBS:
        if args.only and job.name not in args.only:
            continue
        try:
            command = job.command(given)
        except KeyError as error:
            option = str(error.args[0]).replace("_", "-")
            print(f"{job.name}: left out, --{option} is not given")
            continue
        jobs.append(job)
        if args.list:
            print(f"{job.name}: python {' '.join(command[1:])}")
    if args.list:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    queue = Queue(jobs, given, time.monotonic() + 60.0 * args.minutes)
    devices = args.devices or [str(n) for n in range(_cards())]
    queue.threads = max(1, (os.cpu_count() or 1) // (2 * len(devices)))
    workers = [
        threading.Thread(target=queue.run, args=(device, n == 0), daemon=True)
        for n, device in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        queue.stop()
    for job in queue.left:
        print(f"{job.name}: not begun")


def _cards() -> int:
    import torch

    return torch.cuda.device_count() or sys.exit("No GPU of CUDA is here.")


if __name__ == "__main__":
    main()
