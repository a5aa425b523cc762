"""Formats, schemes, recipes: what a user writes, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tenuto.calibration.algorithms import algorithm
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.errors import SchemeError, TenutoError
from tenuto.numerics.scheme import Format, Recipe, Rule, Scheme, label, named, schemes

NAMED = [s for s in vars(schemes).values() if isinstance(s, Scheme)]


@pytest.mark.parametrize("scheme", NAMED, ids=lambda s: s.name)
def test_a_scheme_survives_json(scheme: Scheme) -> None:
    text = json.dumps(scheme.to_json())
    assert Scheme.from_json(json.loads(text)) == scheme
    assert named(scheme.name) is scheme


def test_the_names_say_what_they_are() -> None:
    assert {"w8a8", "w4a8", "w8a16", "w4a16"} <= {s.name for s in NAMED}
    assert {s.name for s in NAMED if s.weight.dtype == "e4m3"} == {"fp8", "fp8-static"}
    for scheme in NAMED:
        assert scheme.stored == scheme.name.endswith("-static")
        if scheme.weight.dtype == "e4m3":
            assert scheme.activation is not None and scheme.activation.dtype == "e4m3"
            continue
        if scheme.name in ("comfy-int8", "nvfp4"):
            continue
        name = scheme.name.removesuffix("-static").removeprefix("comfy-")
        weight, activation = name[1:].split("a")
        assert scheme.weight.bits == int(weight)
        assert (scheme.activation is None) == (activation == "16")
        if scheme.activation is not None:
            assert scheme.activation.bits == int(activation)


def test_labels() -> None:
    """Every scheme has one of its own, made of its formats."""
    found = [label(scheme) for scheme in NAMED]
    assert len(set(found)) == len(found)
    assert label(schemes.W8A8) == "W8A8: 8-bit weights and inputs"
    assert label(schemes.W4A8_STATIC) == (
        "W4A8-STATIC: 4-bit weights, 8-bit inputs, a range a step"
    )
    assert label(schemes.W4A16) == "W4A16: 4-bit weights only"
    assert label(schemes.FP8) == "FP8: 8-bit float weights and inputs"


def test_an_unknown_name_is_told_the_choices() -> None:
    with pytest.raises(SchemeError, match=r"w3a3.*w8a8.*w4a8"):
        named("w3a3")
    assert issubclass(SchemeError, TenutoError)


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(
        (
            Rule("proj_out*", None),
            Rule("*.ff.*", schemes.W4A8_STATIC, AdaRound(iterations=7, lr=0.5)),
            Rule("*", schemes.W8A16, RoundToNearest()),
            Rule("never", schemes.W4A16),
        )
    )
    text = json.dumps(recipe.to_json())
    assert Recipe.from_json(json.loads(text), algorithm) == recipe


def test_first_match_wins() -> None:
    recipe = Recipe(
        (Rule("a.*", None), Rule("a.b", schemes.W8A8), Rule("*.c", schemes.W4A8), Rule("x", None))
    )
    assert recipe.rule("a.b") is None, "an earlier rule kept it in float"
    found = recipe.rule("z.c")
    assert found is not None and found.scheme is schemes.W4A8
    assert recipe.rule("nothing.matches") is None
    turned = Recipe(recipe.rules[::-1]).rule("a.b")
    assert turned is not None and turned.scheme is schemes.W8A8


def test_patterns_are_case_sensitive_on_every_system() -> None:
    assert Recipe((Rule("Block.*", schemes.W8A8),)).rule("block.fc") is None


W8, STEP = Format(8), Format(8, symmetric=False, granularity="tensor")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Format(1),
        lambda: Format(9),
        lambda: Format(8, granularity="row"),
        lambda: Format(8, ranges="best"),
        lambda: Scheme("x", Format(8, granularity="tensor")),
        lambda: Scheme("x", Format(8, symmetric=False)),
        lambda: Scheme("x", W8, W8),
        lambda: Scheme("x", W8, Format(4, symmetric=False, granularity="tensor")),
        lambda: Scheme("x", W8, Format(8, symmetric=False, granularity="token")),
    ],
)
def test_an_impossible_format_is_refused(wrong: Any) -> None:
    """Among them what no layer computes: it must not pass silently as something else."""
    with pytest.raises(SchemeError):
        wrong()


@pytest.mark.parametrize(
    "data",
    [{}, {"name": "x"}, {"name": "x", "weight": {"bits": 99}, "activation": None},
     {"name": "x", "weight": {"bits": "8"}, "activation": None}, [], None, "w8a8",
     {"name": "x", "weight": {"bits": 8, "colour": 1}, "activation": None}],
)  # fmt: skip
def test_rubbish_is_not_a_scheme(data: Any) -> None:
    with pytest.raises(SchemeError):
        Scheme.from_json(data)


@pytest.mark.parametrize(
    "data",
    [[{}], [1], [{"pattern": "*", "scheme": None}], 5,
     [{"pattern": "*", "scheme": None, "algorithm": {"name": "Magic"}}],
     [{"pattern": "*", "scheme": None, "algorithm": {"name": "AdaRound", "speed": 1}}]],
)  # fmt: skip
def test_rubbish_is_not_a_recipe(data: Any) -> None:
    with pytest.raises(SchemeError):
        Recipe.from_json(data, algorithm)


@pytest.mark.parametrize(
    "value", [W8, schemes.W8A8, Rule("*", None), Recipe(())], ids=lambda v: type(v).__name__
)
def test_all_of_it_is_frozen(value: Any) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
