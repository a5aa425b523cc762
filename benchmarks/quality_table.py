"""How `quality.py` shows its rows: a Markdown table, and the words beside the pictures."""

from __future__ import annotations

from typing import Any

from benchmarks.quality_rows import AUTOENCODER


def number(value: Any, digits: int = 2) -> str:
    """A number for the table, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def decibels(facts: dict[str, Any]) -> str:
    """Median and 5th percentile of PSNR; None where the pictures are equal."""
    if "psnr_mean_db" in facts:
        return f"{facts['psnr_mean_db']} to the real ones"
    value = facts["psnr_db"]
    return (
        "equal" if value["median"] is None else f"{value['median']:.1f} ({number(value['p5'], 1)})"
    )


def sheet_lines(facts: dict[str, Any]) -> list[str]:
    """What stands beside a row of the sheet."""
    first = [] if facts.get("fid") is None else [f"FID {facts['fid']:.1f}"]
    weights = facts["resident_weight_bytes"]["artifact"] / 2**20
    return [
        ", ".join([*first, f"PSNR {decibels(facts)}"]),
        f"{weights:.1f} MiB of weights",
        f"{facts['execution']['mode']}, {facts['reuse_ratio'] or 0:.0%} held",
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, under what they were measured on."""
    first = rows[0]
    count = first["key"]["count"]
    text = [
        f"{first['chip']}, {first['threads']} threads, "
        + ", ".join(f"{k} {v}" for k, v in first["versions"].items())
        + f"; {first['date']}; FID and KID of {first['pictures']} pictures, the rest of {count}.",
        "",
        "| model | row | FID | KID × 1000 | PSNR dB, median (5th perc.) | SSIM | LPIPS "
        "| held: calls, work | weights MiB | int8 | s a picture: fp32, this | executed as |",
        "| --- " * 12 + "|",
    ]
    return "\n".join([*text, *(table_line(row) for row in rows)])


def table_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"| {row['model']} | {row['row']} | {number(row.get('fid'))} "
    start += f"| {number(row.get('kid_x1000'))} | {decibels(row)} "
    if row["row"] == AUTOENCODER:
        return start + "| - " * 7 + "|"
    seconds, share = row["seconds_per_picture"], row["int8_weight_share"]
    layers = ", ".join(f"{n} {kind}" for kind, n in row["execution"]["layers"].items() if n)
    return (
        f"{start}| {number(row['ssim'], 4)} | {number(row['lpips'], 4)} "
        f"| {row['reuse_ratio'] or 0:.0%}, {row['reuse_flops'] or 0:.0%} "
        f"| {row['resident_weight_bytes']['artifact'] / 2**20:.1f} | {share or 0:.0%} "
        f"| {number(seconds['float'], 4)}, {number(seconds['artifact'], 4)} "
        f"| {row['execution']['mode']}{f' ({layers})' if layers else ''} |"
    )
