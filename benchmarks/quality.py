"""Quality and cost of both models in full precision, quantized and routed, as a stranger would.

    python benchmarks/quality.py --model all --device cuda --data DATA \\
        --features inception.safetensors --out quality.jsonl --picture quality.png
    python benchmarks/quality.py --pictures 0 --count 8         # without FID, on a CPU

One JSON line a row as it goes, a Markdown table at the end. FID and KID x 1000 are of `--pictures`
pictures (captions: the validation set's class names) against the 10,000 validation pictures in DATA
(`val*.npz`, `classes.json`); `--features` is what convert_inception.py makes. PSNR, SSIM and LPIPS
are distances to full precision at equal seeds over `--count` evaluation prompts; times are of the
same batches side by side. Full precision is IEEE fp32 there; the pictures of FID and KID are drawn
with TF32 products on a GPU (`--no-tf32`: without). A row that OUT already has is not made again,
and artifacts are kept in WORK: an interrupted run goes on where it was. On a GPU the artifacts of
both models are made side by side first (`--calibrate`: that and no more), then all is measured, one
model after the other, with the card to itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.quality_pictures import Real, tf32
from benchmarks.quality_rows import AUTOENCODER, BF16, FULL, Bench, Kept, Row, note
from benchmarks.quality_table import markdown, sheet_lines
from tenuto.calibration import PRESETS
from tenuto.cli.demo import CAPTIONS
from tenuto.measure import (
    NATIVE,
    bf16_arithmetic,
    bf16_copy,
    compare,
    compare_all,
    lpips,
    resident_weight_bytes,
    ssim,
)
from tenuto.measure.sheet import Row as SheetRow
from tenuto.measure.sheet import sheet
from tenuto.model import device_and_dtype
from tenuto.sampling import sampler
from tenuto.sampling.images import save_png, to_images

MODELS = ("transformer", "unet")
SEED = 10_000  # of the first compared picture


class Quality:
    """The rows of one model."""

    def __init__(self, args: argparse.Namespace, model: str, real: Real | None) -> None:
        self.args, self.real = args, real
        self.bench = Bench(model, args.device, args.preset, args.seed, args.work)
        self.done = known(args.out)
        self.samples: list[tuple[dict[str, Any], tn.Artifact | None]] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every wanted row: as it stands in OUT, or measured now and written there."""
        for row in self.bench.rows():
            if not row.wanted(self.args.rows):
                continue
            if row.name == AUTOENCODER and self.real is None:
                continue
            kept = None
            if row.make is not None or row.file is not None:
                kept = self.bench.kept(row)
                if kept is None:
                    continue
            key = self.key(row, kept)
            facts = self.done.get(json.dumps(key, sort_keys=True))
            if facts is None:
                note(f"{self.bench.model}: measuring {row.name}")
                facts = {"key": key, "row": row.name} | self.measured(row, kept) | self.made(kept)
                emit(facts, self.args.out)
            if row.name != AUTOENCODER:
                self.samples.append((facts, kept and kept.artifact))
            yield facts

    def calibrate(self) -> None:
        """Make the artifacts of the wanted rows that WORK lacks, and keep them there."""
        for row in self.bench.rows():
            if row.make is not None and row.wanted(self.args.rows):
                self.bench.kept(row)

    def key(self, row: Row, kept: Kept | None) -> dict[str, Any]:
        """What decides a row: another key is another row."""
        args, bench = self.args, self.bench
        return {
            "model": bench.model, "weights": bench.marks, "row": row.name,
            "artifact": kept and kept.sha256, "preset": args.preset, "seed": args.seed,
            "pictures": args.pictures, "count": args.count, "batch": args.batch,
            "steps": bench.steps, "guidance": bench.guidance, "device": chip(bench.denoiser),
            "tf32": args.tf32,
        }  # fmt: skip

    def made(self, kept: Kept | None) -> dict[str, Any]:
        """When and with what; how far the time path is off, 1 - cosine over steps and modules."""
        modules = kept.artifact.header.get("temporal", {}).get("modules", {}) if kept else {}
        errors = [facts["cosine_error"] for facts in modules.values()]
        steps = [value for some in errors for value in some]
        return {
            "temporal_error": {"mean": fmean(steps), "worst": max(steps)} if steps else None,
            "model": self.bench.model,
            "chip": chip(self.bench.denoiser),
            "date": str(datetime.date.today()),
            "pictures": self.args.pictures,
            "calibration_seconds": kept and kept.seconds,
        }

    def measured(self, row: Row, kept: Kept | None) -> dict[str, Any]:
        """The numbers of one row."""
        if row.name == AUTOENCODER:
            assert self.real is not None
            facts = {k: self.full[k] for k in ("device", "versions", "threads")}
            return facts | self.real.rebuilt(self.bench.pipe.vae)
        if row.name == BF16:
            return self.bf16 | self.distance(self.twin)
        if kept is None:
            return self.full | self.distance(self.bench.denoiser)
        found = compare(
            self.bench.pipe, kept.artifact, count=self.args.count, steps=self.bench.steps,
            guidance=self.bench.guidance, seed=SEED, batch=self.args.batch,
        )  # fmt: skip
        with tn.attach(self.bench.pipe, kept.artifact, execution="int8"):
            return found.to_json() | self.distance(self.bench.denoiser)

    def distance(self, denoiser: nn.Module) -> dict[str, Any]:
        """FID and KID of what `denoiser` draws, where they are asked for."""
        if self.real is None:
            return {}
        bench = self.bench
        return self.real.generated(
            bench.pipe, denoiser, bench.steps, bench.guidance, self.args.fid_batch
        )

    @cached_property
    def twin(self) -> nn.Module:
        """The denoiser in bf16."""
        denoiser = self.bench.denoiser
        return bf16_copy(denoiser, bf16_arithmetic(device_and_dtype(denoiser)[0]))

    @property
    def full(self) -> dict[str, Any]:
        """Full precision beside itself."""
        return self.plain[0]

    @property
    def bf16(self) -> dict[str, Any]:
        """bf16 beside full precision."""
        return self.plain[1]

    @cached_property
    def plain(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rows of full precision and of bf16: an artifact that holds nothing is compared."""
        bench, args = self.bench, self.args
        schedule = {"timesteps": [0.0], "steps": bench.steps, "guidance": bench.guidance}
        nothing = {FULL: tn.Artifact.new(bench.pipe, schedule)}
        found, drawn = compare_all(
            bench.pipe, nothing, count=args.count, seed=SEED, batch=args.batch
        )
        full: dict[str, Any] = found[FULL].to_json()
        a, b = (torch.cat(drawn[name].batches) for name in ("full precision", "bf16"))
        native = full["bf16_arithmetic"] == NATIVE
        gain = drawn["full precision"].latency.over(drawn["bf16"].latency)
        seconds: dict[str, Any] = full["seconds_per_picture"]
        size: dict[str, Any] = full["resident_weight_bytes"]
        low: dict[str, Any] = full | {
            "psnr_db": full["bf16_floor_psnr_db"],
            "ssim": float(ssim(b, a).mean()),
            "lpips": float(lpips(b, a).mean()),
            "identical_pictures": 0,
            "speedup": gain.median if native else None,
            "speedup_quartiles": gain.quartiles if native else None,
            "seconds_per_picture": seconds | {"artifact": seconds["bf16"]},
            "resident_weight_bytes": size | {"artifact": resident_weight_bytes(self.twin)},
            "execution": {"mode": full["bf16_arithmetic"], "layers": {}},
        }
        return full, low

    def picture(self, path: Path) -> None:
        """A sheet of the same prompts and seeds in every row."""
        bench, rows = self.bench, []
        sample = sampler(bench.pipe, CAPTIONS, bench.steps, bench.guidance)
        for facts, artifact in self.samples:
            denoiser = self.twin if facts["row"] == BF16 else bench.denoiser
            with attached(bench.pipe, artifact):
                pictures = to_images(sample(denoiser, SEED, len(CAPTIONS)).float().cpu())
            rows.append(SheetRow(facts["row"], sheet_lines(facts), pictures))
        title = f"{bench.model}: {bench.steps} steps, guidance {bench.guidance}, equal seeds"
        about = {"model": bench.model, "prompts": list(CAPTIONS), "seed": SEED}
        save_png(sheet(title, rows, CAPTIONS, enlarge=2), path, about)


def chip(denoiser: nn.Module) -> str:
    """The card, or what kind of CPU."""
    device = device_and_dtype(denoiser)[0]
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()


def attached(pipe: Any, artifact: tn.Artifact | None) -> Any:
    """A context in which `artifact`, if there is one, computes in its own arithmetic."""
    return nullcontext() if artifact is None else tn.attach(pipe, artifact, execution="int8")


def known(path: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of a file by their keys; a line that was cut off is no row."""
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            found[json.dumps(row["key"], sort_keys=True)] = row
        except (ValueError, KeyError, TypeError):
            note("a line of the file is damaged and is made again")
    return found


def emit(facts: dict[str, Any], path: Path | None) -> None:
    """Print a row, and append it to the file."""
    line = json.dumps(facts)
    print(line, flush=True)
    if path is not None:
        before = path.read_bytes()[-1:] if path.exists() else b""
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" if before in (b"", b"\n") else f"\n{line}\n")


def calibrated(names: tuple[str, ...]) -> None:
    """Make the artifacts of several models, a process each; CalledProcessError if one fails."""
    command = [sys.executable, *sys.argv, "--calibrate", "--model"]
    with ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen([*command, name])) for name in names]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="all", choices=("all", *MODELS))
    parser.add_argument("--pictures", type=int, default=10_000, help="for FID and KID; 0: neither")
    parser.add_argument("--count", type=int, default=64, help="prompts of PSNR, SSIM and LPIPS")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once there, and timed")
    parser.add_argument("--fid-batch", type=int, default=500, help="pictures at once for FID")
    parser.add_argument("--preset", default="standard", choices=list(PRESETS))
    parser.add_argument("--seed", type=int, default=0, help="of calibration")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--data", type=Path, help="a folder with val*.npz and classes.json")
    parser.add_argument("--features", type=Path, help="what convert_inception.py made")
    parser.add_argument(
        "--rows",
        nargs="*",
        default=["*"],
        help="names of rows to make (fnmatch); some only by name",
    )
    parser.add_argument("--work", type=Path, default=Path("quality.work"), help="keeps artifacts")
    parser.add_argument("--calibrate", action="store_true", help="make the artifacts and stop")
    parser.add_argument("--out", type=Path, help="append the JSON lines here; rows there are done")
    parser.add_argument("--picture", type=Path, help="a PNG of samples side by side")
    args = parser.parse_args()
    if args.pictures and not args.calibrate and (args.data is None or args.features is None):
        parser.error("FID needs --data and --features; --pictures 0 goes without.")
    return args


def main() -> None:
    """Measure, print the table, draw the sheet."""
    args = parsed()
    fast = bool(args.device and args.device.startswith("cuda"))
    if fast:
        torch.cuda.set_device(args.device if ":" in args.device else 0)
    args.tf32 = args.tf32 and fast
    names, rows = MODELS if args.model == "all" else (args.model,), []
    if fast and len(names) > 1:
        calibrated(names)
    real = None
    if args.pictures and not args.calibrate:
        note("features of the real pictures")
        real = Real(args.data, args.features, args.device, args.pictures, args.tf32)
    with tf32(False):
        for name in names:
            try:
                model = Quality(args, f"demo:{name}", real)
            except tn.ModelError as error:
                note(f"{name} is left out: {error}")
                continue
            if args.calibrate:
                model.calibrate()
                continue
            rows += list(model.rows())
            if args.picture and model.samples:
                path = args.picture
                model.picture(path if len(names) == 1 else path.with_stem(f"{path.stem}-{name}"))
    if rows:
        print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
