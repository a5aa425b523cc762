"""Maintenance of temporal features: TFMQ-DM and Temporal Feature Matters, row by row.

    python benchmarks/temporal.py --model demo:unet --setting w8a8 --rounding nearest --count 16
    python benchmarks/temporal.py --rounding adaround --preset thorough --device cuda --batch 64 \
        --seed 0 1 2 --out temporal.jsonl --fid 10000 --data DATA --features inception.safetensors

`nearest`: every layer by itself. `reconstructed`: the time path among the rest, by `--rounding`.
`one maximum`: to nearest, with one symmetric range a layer and step for inputs, the largest
absolute value. All others share the weights of one calibration whose time path is exact, and differ
in the time path alone: `tiar` (ranges as elsewhere), `tiar+fsc` (one range a step), `table` (fp16),
`int8`, `select 50%` and so on (of the table's bytes), and `table, one maximum` (int8 rows, a scale
for each output and step). `paper`: 4 bits with one range an output channel, first and last layers
in float, inputs with one range a layer; `alone`: W4A8 of the time path, all else in float, where
what it costs is seen without other noise. PSNR and LPIPS are to full precision at equal seeds, over
prompts of "evaluation"; error: 1 - cosine of the time path's outputs; bytes: of its codes, ranges
and tables. s: to calibrate, without recording; of rows that share weights these are counted in.
One JSON line a row; rows that `--out` has are not made again, and a table follows.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.joint import reals
from benchmarks.quality import emit, known
from benchmarks.schedules import chip
from benchmarks.temporal_rows import PARTS, SETTINGS, WHOLE, Bench, time_bytes, time_errors
from tenuto.artifact import Artifact, fingerprint
from tenuto.measure import lpips, psnr
from tenuto.resume import digest
from tenuto.runtime import Patches, percentile
from tenuto.runtime.attachment import install
from tenuto.sampling import sampler

FIRST = 10_000  # seed of the first image that is compared


class Study:
    """A bench, and its images beside those of full precision."""

    def __init__(self, name: str, setting: str, seed: int, asked: argparse.Namespace) -> None:
        given = asked.preset, asked.rounding, asked.steps, asked.device
        self.bench, self.asked = Bench(name, setting, seed, *given), asked
        bench = self.bench
        self.key: dict[str, Any] = {
            "model": name, "weights": digest(fingerprint(bench.denoiser)), "setting": setting,
            "rounding": asked.rounding, "preset": asked.preset, "seed": seed,
            "steps": bench.steps, "guidance": bench.guidance, "count": asked.count,
            "fid_images": asked.fid, "version": tn.__version__, "chip": chip(bench.pipe.device),
        }  # fmt: skip

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row that is asked for, from the file where it has it."""
        done = known(self.asked.out)
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(),
                 "date": str(datetime.date.today())}  # fmt: skip
        for name in (*WHOLE, *PARTS):
            if not any(fnmatch.fnmatchcase(name, p) for p in self.asked.rows):
                continue
            if name == "reconstructed" and self.asked.rounding == "nearest":
                continue  # nothing is reconstructed
            own = self.key | {"row": name}
            row = done.get(json.dumps(own, sort_keys=True))
            if row is None:
                row = {"key": own, **self.made(name), **about}
                emit(row, self.asked.out)
            yield row

    def made(self, name: str) -> dict[str, Any]:
        """What a row says."""
        if name in WHOLE:
            artifact, seconds = self.bench.whole(name)
            nbytes = None
        else:
            artifact, seconds, nbytes = self.bench.part(name)
        size = time_bytes(self.bench.time, artifact) if nbytes is None else nbytes
        return {"time_bytes": size, "seconds": seconds, **self.measured(artifact)}

    def measured(self, made: Artifact) -> dict[str, Any]:
        """How far an artifact's images and time path are from full precision."""
        bench, asked, full = self.bench, self.asked, self.full
        errors = time_errors(bench.time, made)
        worst = max(float(e.max()) for e in errors.values())
        mean = sum(float(e.mean()) for e in errors.values()) / len(errors)
        facts: dict[str, Any] = {"cosine_error": mean, "cosine_worst": worst}
        with install(bench.pipe, Patches(made, route=False, execution="int8")):
            found = self.images()
            if asked.fid:
                real = reals(asked.data, asked.features, asked.device, asked.fid)
                given = bench.pipe, bench.denoiser, bench.steps, bench.guidance, asked.fid_batch
                facts |= real.generated(*given)
        db = psnr(full, found).tolist()
        facts |= {"psnr": median(db), "psnr_5": percentile(db, 5), "psnr_each": db}
        return facts | {"lpips": float(lpips(full, found).mean())}

    @cached_property
    def full(self) -> Tensor:
        """Images in full precision."""
        return self.images()

    @torch.no_grad()
    def images(self) -> Tensor:
        """What the pipeline makes as it is, of prompts that nothing was calibrated on."""
        bench, size, found = self.bench, self.asked.batch, []
        lines = tuple(tn.prompts("evaluation"))
        sample = sampler(bench.pipe, lines, bench.steps, bench.guidance)
        for start in range(0, self.asked.count, size):
            some = min(size, self.asked.count - start)
            found.append(sample(bench.denoiser, FIRST + start, some).clamp(-1, 1).cpu())
        return torch.cat(found)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table a model and setting; of several seeds their means."""
    text: list[str] = []
    for model, setting in dict.fromkeys((r["key"]["model"], r["key"]["setting"]) for r in rows):
        some = [r for r in rows if (r["key"]["model"], r["key"]["setting"]) == (model, setting)]
        first = some[0]
        key, seeds = first["key"], {r["key"]["seed"] for r in some}
        text += ["", f"{model}, {setting}, {key['rounding']}, preset {key['preset']}, "
                 f"{key['count']} images, {key['steps']} steps, seeds {sorted(seeds)}; "
                 f"{key['chip']}, torch {first['torch']}, {first['date']}", "",
                 "| time path | error, mean | worst | PSNR (5th) | LPIPS | FID | KID | KiB | s |",
                 "| --- " * 9 + "|"]  # fmt: skip
        for name in dict.fromkeys(r["key"]["row"] for r in some):
            own = [r for r in some if r["key"]["row"] == name]
            text.append(f"| {name} | {' | '.join(cells(own))} |")
    return "\n".join(text)


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says of a row at all its seeds."""

    def mean(key: str) -> float | None:
        found = [r[key] for r in rows if key in r]
        return sum(found) / len(found) if found else None

    def said(key: str, form: str) -> str:
        value = mean(key)
        return "" if value is None else format(value, form)

    return [
        said("cosine_error", ".1e"), said("cosine_worst", ".1e"),
        f"{said('psnr', '.2f')} ({said('psnr_5', '.1f')})", said("lpips", ".4f"),
        said("fid", ".2f"), said("kid_x1000", ".2f"), f"{(mean('time_bytes') or 0) / 1024:.0f}",
        said("seconds", ".0f"),
    ]  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["demo:transformer", "demo:unet"])
    parser.add_argument("--setting", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rows", nargs="+", default=["*"], help="by name (fnmatch)")
    parser.add_argument("--rounding", default="gptq", help="gptq, adaround, nearest, ...")
    parser.add_argument("--preset", default="quick", help="of recording, TIAR and rounding")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of the runs (the model's own)")
    parser.add_argument("--count", type=int, default=64, help="images that are compared")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fid", type=int, default=0, help="images for FID and KID; 0: neither")
    parser.add_argument("--fid-batch", type=int, default=500)
    parser.add_argument("--data", type=Path, help="a folder with val*.npz and classes.json")
    parser.add_argument("--features", type=Path, help="what convert_inception.py made")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines here; rows there are done")
    asked = parser.parse_args(words)
    if asked.fid and None in (asked.data, asked.features):
        parser.error("FID needs --data and --features.")
    torch.backends.cudnn.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for name in asked.model:
        for setting in asked.setting:
            for seed in asked.seed:
                rows += Study(name, setting, seed, asked).rows()
    print(markdown(rows))


if __name__ == "__main__":
    main()
