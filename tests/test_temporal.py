"""The benchmark of the time path on a tiny denoiser: its rows, each made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import temporal


def test_rows_are_made_once_and_make_a_table(
    tiny_pixart_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--model", str(tiny_pixart_folder), "--setting", "w4a8", "--steps", "8"]
    words += ["--rounding", "nearest", "--count", "2", "--batch", "2", "--out", str(out), "--rows"]
    words += ["nearest", "reconstructed", "tiar*", "table*", "int8", "select*"]
    temporal.main(words)
    rows = {r["key"]["row"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert [*rows] == ["nearest", *temporal.PARTS], "nothing is reconstructed"
    full = rows["table"]["time_bytes"]
    assert 0.5 * full < rows["int8"]["time_bytes"] < full  # too narrow for a half: 32 columns
    for share in (50, 25):
        assert rows[f"select {share}%"]["time_bytes"] <= share / 100 * full
    errors = {name: row["cosine_error"] for name, row in rows.items()}
    assert errors["table"] < errors["int8"] < errors["tiar+fsc"] < errors["nearest"]
    assert errors["select 50%"] < errors["select 25%"]
    assert errors["table"] < errors["table, one maximum"]
    assert all(len(row["psnr_each"]) == 2 and row["lpips"] >= 0 for row in rows.values())
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    assert "| table, one maximum | " in table and ", seeds [0]; " in table
    monkeypatch.setattr(temporal.Bench, "quantized", lambda *_: pytest.fail("made again"))
    temporal.main(words)
    assert capsys.readouterr().out.strip() == table.strip()
    with pytest.raises(pytest.fail.Exception, match="made again"):
        temporal.main([*words[:-6], "nearest", "--seed", "1"])


def test_the_setting_of_the_papers(tiny_pixart_folder: Path, tmp_path: Path) -> None:
    """First and last layers in float, one range a layer; a range a step where it is maintained."""
    bench = temporal.Bench(str(tiny_pixart_folder), "paper", 0, "quick", "nearest", 2, None)
    made, _ = bench.whole("nearest")
    layers, schemes = made.header["layers"], made.header["schemes"]
    assert {*schemes} == {"w4a8-paper"} and "proj_out" not in layers
    assert all(len(t) == 1 for k, t in made.tensors.items() if k.startswith("ranges/"))
    largest, _ = bench.whole("one maximum")
    zeros = [t for k, t in largest.section("ranges").items() if k.endswith("zero_point")]
    assert zeros and all(len(t) == 2 and bool((t == 128).all()) for t in zeros)
    for row, count in (("tiar", 1), ("tiar+fsc", 2)):
        found, _, _ = bench.part(row)
        name = next(iter(bench.time.schemes))
        assert len(found.tensors[f"ranges/{name}.scale"]) == count
