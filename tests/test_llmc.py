"""The benchmark of algorithms on a tiny encoder and a tiny denoiser: its rows, each made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import llmc
from tests.core.tiny_encoders import encoder_folder

METHODS = ("nearest", "gptq", "awq+clip")


def test_rows_of_an_encoder_are_made_once_and_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = encoder_folder(tmp_path / "tiny", "z-image"), tmp_path / "rows.jsonl"
    words = ["--encoder", str(folder), "--schemes", "w8a8", "w4a16-g32", "--rows", *METHODS]
    words += ["--prompts", "4", "--blocks", "2", "--out", str(out)]
    llmc.main(words)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    keys = [(row["key"]["scheme"], row["key"]["algorithm"]) for row in rows]
    assert keys == [
        *(("w8a8", name) for name in METHODS[:2]), *(("w4a16-g32", name) for name in METHODS)
    ]  # fmt: skip
    found = dict(zip(keys, rows, strict=True))
    assert all(row["key"]["blocks"] == 2 and row["seconds"] > 0 for row in rows)
    assert found["w4a16-g32", "gptq"]["db"] > 1 and found["w4a16-g32", "nearest"]["db"] == 0
    assert found["w8a8", "nearest"]["relative_l2"] < found["w4a16-g32", "nearest"]["relative_l2"]
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    assert "| | w8a8 | w4a16-g32 | s |" in table and "| awq+clip | " in table

    with out.open("a") as file:
        file.write('{"cut off')
    monkeypatch.setattr(llmc, "encoder_job", lambda *_, **__: pytest.fail("made again"))
    llmc.main(words)
    assert capsys.readouterr().out.strip() == table.strip()
    with pytest.raises(pytest.fail.Exception, match="made again"):
        llmc.main([*words, "--prompts", "5"])


def test_rows_of_a_denoiser(tiny_pixart_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--model", str(tiny_pixart_folder), "--schemes", "w4a16-g32", "--rows", "gptq"]
    llmc.main([*words, "--prompts", "4", "--steps", "2", "--out", str(out)])
    near, gptq = map(json.loads, out.read_text().splitlines())
    assert near["key"]["algorithm"] == "nearest" and gptq["key"]["algorithm"] == "gptq"
    assert 0 < gptq["relative_l2"] < near["relative_l2"] and gptq["db"] > 0.5


def test_chains_are_of_algorithms_for_the_part() -> None:
    w4a16, w4a8 = llmc.SCHEMES["w4a16-g32"], llmc.SCHEMES["w4a8"]
    every = llmc.rounding_names("encoder", ["*"], w4a16)
    assert every[0] == "nearest" and {"awq", "clip", "gptq", *llmc.CHAINS} <= {*every}
    assert not [n for n in llmc.rounding_names("encoder", ["*"], w4a8) if "awq" in n]
    for_denoisers = llmc.rounding_names("denoiser", ["*"], w4a16)
    assert "adaround" in for_denoisers and "clip+gptq" in for_denoisers
    assert not [name for name in for_denoisers if "awq" in name]
    assert llmc.rounding_names("denoiser", ["clip", "*+gptq"], w4a8)[:3] == [
        "nearest",
        "clip",
        "clip+gptq",
    ]
