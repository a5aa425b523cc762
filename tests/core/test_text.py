"""Words of a file or a model are shown on one line, and no terminal obeys them."""

from __future__ import annotations

import pytest

from tenuto.errors import ArtifactError
from tenuto.text import lines_of, printable, prompts_of


@pytest.mark.parametrize("words", ["transformer_blocks.0.attn1", "Ein Bär, ein Hund", "犬と猫", ""])
def test_plain_words_stay(words: str) -> None:
    assert printable(words) == words


@pytest.mark.parametrize(
    "words, shown",
    [("\x1b[2J", r"\x1b[2J"), ("a\nb\tc", r"a\nb\tc"), ("\x9b31m", r"\x9b31m"),
     ("\u202eab\u2028", r"\u202eab\u2028"), ("\udc80", r"\udc80"), (3, "3")],
)  # fmt: skip
def test_commands_are_escaped(words: object, shown: str) -> None:
    assert printable(words) == shown


@pytest.mark.parametrize("words", ["x" * 10**6, "\x1b" * 10**6, "x" * 51, "\n" * 26])
def test_long_words_are_cut(words: str) -> None:
    shown = printable(words, 50)
    assert len(shown) == 50 and shown.endswith("...")


def test_words_at_the_limit_are_whole() -> None:
    assert printable("x" * 50, 50) == "x" * 50
    assert printable("\n" * 25, 50) == r"\n" * 25


def test_an_artifact_error_is_one_line() -> None:
    text = str(ArtifactError("a\nb\x1b[2J" + "c" * 10**6))
    assert text.startswith(r"a\nb\x1b[2Jccc") and len(text) <= 1000


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # lines end at these for `str.splitlines`


def test_a_line_ends_at_a_line_end_alone() -> None:
    text = f"one{SEPARATORS}more\r\ntwo\rthree\n\n four "
    assert lines_of(text) == [f"one{SEPARATORS}more\r\n", "two\r", "three\n", "\n", " four "]
    assert "".join(lines_of(text)) == text
    assert prompts_of(text) == [f"one{SEPARATORS}more", "two", "three", "four"]
    assert lines_of("") == prompts_of("\n \r\n") == []
