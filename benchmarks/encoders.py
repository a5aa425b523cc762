"""Text encoders in 8 and 4 bits, by each method: how far their states are, and the pictures.

    python benchmarks/encoders.py                     # both demo models, 64 prompts
    python benchmarks/encoders.py --encoder flan-t5-small   # convert_t5.py makes the folder
    python benchmarks/encoders.py --encoder nomic-embed     # convert_nomic.py does

Calibration is on the shipped list "default" and a half of "general" (for a folder on that alone, a
quarter of it held out), what is measured on "evaluation" (on the last quarter), the empty prompt
included. States: cosine to full
precision over all tokens that count, mean and least, and relative L2; the row bf16 is what half
precision does. Pictures: 20 steps, equal seeds. One JSON line a row, a table at the end.

    python benchmarks/encoders.py --encoder flan-t5-small minilm --files --out encoders.jsonl

The numbers of files that ComfyUI reads, as `tenuto text-encoder` makes them, on "captions" too: one
table of relative L2, in brackets how many dB nearer than rounded to nearest. Rows that `--out` has
are not made again. The files of W4A8 and W8A8 have two columns. A16: inputs in float, as hosts
encode a text. A8: in int8 with a range a token, as ComfyUI 0.31 to 0.33 multiplies these layers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.quality import emit, known
from benchmarks.quantization import cpu_name
from tenuto.artifact import Artifact, fingerprint
from tenuto.calibration import (
    ENCODER_METHODS,
    ENCODER_SCHEMES,
    WIDTHS,
    EncoderCodes,
    algorithms,
    encoder_job,
    fill,
)
from tenuto.measure import compare_all, states_distance
from tenuto.resume import digest
from tenuto.runtime import QLayer, encoder_layers
from tenuto.sampling import Call, calls_of
from tenuto.sampling.encoder_calls import without_cache
from tenuto.sampling.loading import defaults

MODELS = ("transformer", "unet")
ROWS = 32  # prompts in a call


def of_pipeline(name: str, count: int) -> Iterator[dict[str, Any]]:
    """The rows of a demo model: states and pictures."""
    pipe, made, seconds = tn.demo(name), {}, {}
    guidance = defaults(f"demo:{name}").guidance
    for width in WIDTHS:
        for method in algorithms.names("encoder"):
            start = time.perf_counter()
            made[f"{width} {method}"] = tn.quantize_encoder(
                pipe, width, tn.prompts("default"), method=method, guidance=guidance
            )
            seconds[f"{width} {method}"] = time.perf_counter() - start
    found, _ = compare_all(pipe, made, count=count)
    for row, one in found.items():
        pictures = {"psnr_db": one.psnr_db, "lpips": one.lpips, "floor": one.bf16_floor_psnr_db}
        yield (
            {"model": f"demo:{name}", "row": row, "seconds": seconds[row]}
            | one.encoders["text_encoder"]
            | pictures
        )


def encoder_of(folder: Path) -> tuple[Any, Callable[[list[str]], list[dict[str, Any]]]]:
    """A trained encoder in fp32, and what it is asked for some prompts, the empty one first."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel

    kind = T5EncoderModel if AutoConfig.from_pretrained(folder).model_type == "t5" else AutoModel
    encoder = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"

    def rows(some: list[str]) -> list[dict[str, Any]]:
        found = [tokenizer(line, max_length=64, truncation=True) for line in ["", *some]]
        ids = [torch.tensor([one["input_ids"]]) for one in found if one["input_ids"]]
        more = without_cache(encoder)  # blocks are called again and again
        return [{"input_ids": x, "attention_mask": torch.ones_like(x)} | more for x in ids]

    return encoder, rows


def of_folder(
    folder: Path, files: list[str] | None = None, out: Path | None = None, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a trained encoder without a denoiser: states alone.

    out: of rows of files. most: how many captions these are calibrated on, beside the general ones.
    """
    encoder, rows = encoder_of(folder)
    lines = tn.prompts("general")
    more = tn.prompts("captions")[:most] if files else []
    held = rows(["", *lines[1::4]])[-len(lines[1::4]) :]
    calibration = calls_of(rows([*more, *lines[::2]]), ROWS, held_out=held, by_length=True)
    unseen = calls_of(rows(lines[3::4]), ROWS)
    if files:
        about = {"model": folder.name, "prompts": 1 + len(more) + len(lines[::2])}
        yield from of_files(about, encoder, calibration, unseen, files, out)
        return
    for width in WIDTHS:
        for method in algorithms.names("encoder"):
            start = time.perf_counter()
            job = encoder_job(encoder, calibration, width, method)
            seconds = time.perf_counter() - start
            artifact = Artifact({"encoders": {}})
            fill(artifact, "text_encoder", encoder, job)
            layers = encoder_layers(encoder, artifact, "text_encoder")
            facts = states_distance(encoder, unseen, layers)
            yield {"model": folder.name, "row": f"{width} {method}", "seconds": seconds} | facts


def of_files(
    about: dict[str, Any],
    encoder: Any,
    calibration: list[Call],
    unseen: list[Call],
    rows: list[str],
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """The rows of the numbers of files, from `out` where it has them."""
    done, mark = known(out), digest(fingerprint(encoder))
    for asked in rows:
        key = about | {"weights": mark, "row": asked, "version": tn.__version__}
        key |= {"prompts": 0} if asked.endswith(" rtn") else {}
        row = done.get(json.dumps(key, sort_keys=True))
        if row is None:
            row = {"key": key, "model": key["model"], "prompts": key["prompts"], "row": asked}
            row["date"] = str(datetime.date.today())
            row |= of_file(encoder, calibration, unseen, *asked.split())
            emit(row, out)
        yield row


def of_file(
    encoder: Any, calibration: list[Call], unseen: list[Call], scheme: str, method: str
) -> dict[str, Any]:
    """What the numbers of one file come to."""
    start = time.perf_counter()
    made = EncoderCodes.of(encoder, calibration, ENCODER_SCHEMES[scheme], method)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start}
    (found,) = made.measured(unseen, None)
    one, other = found["quantized"], found["nearest"]
    row |= one | {"nearest": other["relative_l2"]}
    row["db"] = 20 * math.log10(other["relative_l2"] / max(1e-9, one["relative_l2"]))
    if ENCODER_SCHEMES[scheme].activation:
        layers = codes_in_int8(made)
        row["int8"] = states_distance(made.encoder, unseen, layers)["relative_l2"]
        row["layers"] = len(layers)
    return row


def codes_in_int8(made: EncoderCodes) -> dict[str, QLayer]:
    """Layers with such codes that round their inputs to int8; of `made.encoder`, not put in."""
    artifact = Artifact({"encoders": {}})
    fill(artifact, "text_encoder", made.encoder, made.job)
    for layer, codes in made.codes.items():  # nearest ones, where a fold gained nothing
        own = codes.tensors(layer).items()
        artifact.tensors |= {f"encoder/text_encoder.{key}": value for key, value in own}
    return encoder_layers(made.encoder, artifact, "text_encoder")


COLUMNS = {  # of the table: the file, and the number of its row
    "W4A16": ("w4a8", "relative_l2"), "W4A8": ("w4a8", "int8"), "nvfp4": ("nvfp4", "relative_l2"),
    "fp8": ("fp8", "relative_l2"), "W8A16": ("w8a8", "relative_l2"), "W8A8": ("w8a8", "int8"),
}  # fmt: skip


def markdown_of_files(rows: list[dict[str, Any]]) -> str:
    """The rows of files as one table: a line a model, method and count of prompts; per cent."""
    known = {(row["model"], *row["row"].split(), row["prompts"]): row for row in rows}
    text = [
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{datetime.date.today()}",
        "",
        f"| model | method | prompts | {' | '.join(COLUMNS)} | s |",
        "| --- " * (len(COLUMNS) + 4) + "|",
    ]
    lines = {(m, ENCODER_METHODS.index(method), -prompts) for m, _, method, prompts in known}
    for model in dict.fromkeys(row["model"] for row in rows):
        for _, place, less in sorted(line for line in lines if line[0] == model):
            line = ENCODER_METHODS[place], -less
            cells = [
                cell(known.get((model, scheme, *line)), known.get((model, scheme, "rtn", 0)), n)
                for scheme, n in COLUMNS.values()
            ]
            own = [row for key, row in known.items() if (key[0], *key[2:]) == (model, *line)]
            spent = sum(row["seconds"] for row in own) / len(own)
            count = line[1] or ""
            text.append(f"| {model} | {line[0]} | {count} | {' | '.join(cells)} | {spent:.0f} |")
    return "\n".join(text)


def cell(row: dict[str, Any] | None, plain: dict[str, Any] | None, number: str) -> str:
    """A number of a row in per cent, and how much nearer it is than `plain`'s."""
    if row is None:
        return ""
    if plain is None or row is plain:
        return f"{100 * row[number]:.2f}"
    return f"{100 * row[number]:.2f} ({20 * math.log10(plain[number] / row[number]):+.1f})"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, under what they were measured on."""
    text = [
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{datetime.date.today()}",
        "",
        "| model | row | cosine, mean (least) | relative L2 | of the empty prompt "
        "| PSNR dB, median (5th perc.) | LPIPS | s to calibrate |",
        "| --- " * 8 + "|",
    ]
    for number, row in enumerate(rows):
        if not number or rows[number - 1]["model"] != row["model"]:
            low, floor = row["bf16"], row.get("floor")
            text.append(
                f"| {row['model']} | bf16 | {low['cosine']:.5f} | {low['relative_l2']:.4f} | "
                f"| {decibels(floor)} | | |"
            )
        cosine, lpips = row["cosine"], row.get("lpips")
        text.append(
            f"| {row['model']} | {row['row']} | {cosine['mean']:.5f} ({cosine['min']:.4f}) "
            f"| {row['relative_l2']:.4f} | {row['empty']['relative_l2']:.4f} "
            f"| {decibels(row.get('psnr_db'))} | {'' if lpips is None else f'{lpips:.5f}'} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(text)


def decibels(value: dict[str, float] | None) -> str:
    """Median and 5th percentile."""
    return "" if value is None else f"{value['median']:.1f} ({value['p5']:.1f})"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="all", choices=("all", *MODELS))
    parser.add_argument(
        "--encoder", type=Path, nargs="+", help="folders with an encoder each: those alone"
    )
    parser.add_argument(
        "--files", nargs="*", metavar="ROW", help='ComfyUI\'s files: "w4a8 gptq" ..., or all'
    )
    parser.add_argument(
        "--out", type=Path, help="a file of --files' rows, which are not made again"
    )
    parser.add_argument("--captions", type=int, help="how many --files are calibrated on (all)")
    parser.add_argument("--count", type=int, default=64, help="pictures compared")
    args = parser.parse_args()
    names = MODELS if args.model == "all" else (args.model,)
    of_models = [of_pipeline(name, args.count) for name in names]
    every = [f"{s} {m}" for s in ("w4a8", "nvfp4", "fp8", "w8a8") for m in ENCODER_METHODS]
    files = None if args.encoder is None or args.files is None else args.files or every
    folders = [of_folder(f, files, args.out, args.captions) for f in args.encoder or ()]
    sources = folders or of_models
    rows = []
    for row in (row for source in sources for row in source):
        rows.append(row)
        if not files:
            print(json.dumps(row), flush=True)
    print("\n" + (markdown_of_files(rows) if files else markdown(rows)))


if __name__ == "__main__":
    main()
