"""Rows of a benchmark as JSON lines in a file: one that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def resumed(
    out: Path | None,
    rows: Callable[[set[str]], Iterable[Row]],
    markdown: Callable[[list[Row]], str],
) -> None:
    """Print each row as it is made and add it to `out`; at the end all of them as a table.

    rows: of a set of keys, makes those rows whose "key" is not among them.
    """
    found: list[Row] = []
    if out is not None and out.exists():
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    for row in rows({row["key"] for row in found}):
        found.append(row)
        print(json.dumps(row), flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print("\n" + markdown(found))
