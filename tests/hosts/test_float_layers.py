"""Layers that "auto" leaves in float are ComfyUI's own: exact, and in memory once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from test_lora import KEY, NAME, with_lora
from test_skipped_calls import sampled as sampled_in
from torch import Tensor

from tenuto import schemes
from tenuto.runtime import DENSE, Patches, QConv2d

INT8 = "int8"


class Says:
    """A chooser whose answer is a function of the kind; it runs the float layer once."""

    def __init__(self, answer: Callable[[Any], str]) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, kind: Hashable, runs: Any) -> str:
        self.asked.append(kind)
        runs[DENSE]()
        return self.answer(kind)

    def __deepcopy__(self, memo: Any) -> Says:
        return self


def sampled(model: Any) -> Tensor:
    return sampled_in(model, steps=2)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Computed by the same operations on the same numbers: codes are a thousand times as far."""
    return float((found - wanted).norm() / wanted.norm()) < 1e-5


def installed(model: Any, answer: Callable[[Any], str], **options: Any) -> Any:
    """W8A8 under "auto", its choices by `answer`; with `says`, the chooser."""
    from comfy_nodes.adapter import ComfyUI

    made = ComfyUI().install(model, Patches(scheme=schemes.W8A8, **options))
    made.says = Says(answer)
    plan = made.parts[0].plan
    plan.options = {**plan.options, "chooser": made.says}
    return made


def test_all_in_float_is_the_plain_model(in_comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without codes or float copies; what the trials took is freed once."""
    import comfy.model_management

    freed: list[int] = []
    model = in_comfy("unet")
    plain = sampled(model)
    made = installed(model, lambda kind: DENSE)
    part = made.parts[0]
    free = lambda *args: freed.append(len(part.kept))  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", free)
    for _ in range(2):
        assert same(sampled(made.handle), plain)
        assert not part.kept and part.how == {DENSE: len(part.ran)}
        assert sorted(part.ran) == sorted(part.plan.schemes)
    assert freed == [0]
    assert made.says.asked and all("in a host" in kind for kind in made.says.asked)
    made.detach()
    assert same(sampled(model), plain)


def test_some_in_float(in_comfy: Any) -> None:
    """Codes are kept of the others alone, and no float weight of any."""
    model = in_comfy("unet")
    plain = sampled(model)
    made = installed(model, lambda kind: INT8 if "QConv2d" in kind else DENSE)
    part = made.parts[0]
    found = sampled(made.handle)
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.2
    assert part.kept and all(isinstance(layer, QConv2d) for layer in part.kept.values())
    assert all(x._float is None and x._dense_packed is None for x in part.kept.values())
    assert part.how == {"int8": len(part.kept), DENSE: len(part.ran) - len(part.kept)}
    assert same(sampled(made.handle), found)


def test_other_numbers_of_rows_and_other_executions(in_comfy: Any) -> None:
    """Codes come back where they are wanted; "float" and "int8" never compute with the weight."""
    from comfy_nodes.weights import Quantized

    model = in_comfy("unet")
    module = model.model.diffusion_model.get_submodule(NAME)
    few, many = (torch.randn(n, module.in_features) for n in (4, 300))
    calls: list[int] = []

    def original(x: Tensor) -> Tensor:
        calls.append(len(x))
        return module.forward(x)

    made = installed(model, lambda kind: INT8 if 9 in kind else DENSE)
    part, part.on = made.parts[0], True
    call = Quantized(part, NAME, True, module.in_features)
    for _ in range(2):
        assert same(call(original, module, few), module(few))
        assert not part.kept
    asked = len(calls)
    assert asked >= 3 and set(calls) == {4}, "the trial runs it too"
    out = call(original, module, many)
    assert not same(out, module(many)) and len(made.says.asked) == 2
    assert part.kept[NAME].execution == "int8 or dequantized"
    assert same(call(original, module, few), module(few))
    assert same(call(original, module, many), out) and len(made.says.asked) == 2
    part.forget()
    assert same(call(original, module, few), module(few)) and len(made.says.asked) == 3
    calls.clear()
    for execution in ("float", "int8"):
        other = installed(model, lambda kind: DENSE, execution=execution).parts[0]
        other.on = True
        coded = Quantized(other, NAME, True, module.in_features)
        assert not same(coded(original, module, few), module(few)) and not calls
        assert NAME in other.kept


def test_a_lora_is_the_hosts(in_comfy: Any) -> None:
    """Before and after one, and without it again."""
    model = in_comfy("unet")
    plain, (changed, change) = sampled(model), with_lora(model)
    full = sampled(changed)
    assert not same(full, plain)
    without = installed(model, lambda kind: DENSE)
    assert same(sampled(without.handle), plain)
    within = installed(changed, lambda kind: DENSE)
    assert same(sampled(within.handle), full)
    after = without.handle.clone()
    after.add_patches({KEY: ("diff", (change,))})
    assert same(sampled(after), full)
    assert same(sampled(without.handle), plain)
    assert same(sampled(model), plain)
