"""Several parts of a job on one scale."""

from __future__ import annotations

from tenuto.progress import parts


def test_parts_follow_each_other_on_one_scale() -> None:
    seen: list[tuple[int, int, str]] = []
    notes = parts(lambda *note: seen.append(note), {"record": 100, "quantize": 50, "end": 0})
    notes["record"](0, 7, "run")
    notes["record"](7, 7, "run")
    notes["quantize"](0, 3, "")
    notes["quantize"](2, 3, "block 2")
    notes["quantize"](3, 3, "")
    notes["end"](0, 0, "nothing to do")
    assert seen == [
        (0, 150, "run"), (100, 150, "run"), (100, 150, ""), (133, 150, "block 2"), (150, 150, ""),
        (150, 150, "nothing to do"),
    ]  # fmt: skip


def test_parts_nest_and_say_their_names() -> None:
    seen: list[tuple[int, int, str]] = []
    whole = parts(lambda *note: seen.append(note), {"a": 10, "b": 10}, named=True)
    inner = parts(whole["b"], {"x": 1, "y": 1}, named=True)
    inner["y"](0, 1, "half")
    whole["a"](1, 1, "")
    assert seen == [(15, 20, "b y half"), (10, 20, "a")]


def test_nobody_need_listen() -> None:
    parts(None, {"a": 1})["a"](1, 1, "")
