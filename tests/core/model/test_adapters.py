"""LoRAs of PEFT beside an attached artifact: in any order, several at once, scaled, taken off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import attach, schemes
from tenuto.artifact import fingerprint
from tenuto.model import (
    adapted,
    denoiser_of,
    layers,
    own_modules,
    own_parameters,
    tensors_in,
)
from tenuto.runtime import QLayer
from tests.core.family_pipelines import MODELS


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second adapter
        yield


def outputs(case: Any, model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = tensors_in(model(**case.inputs(), return_dict=False))
        return torch.cat([t.flatten() for t in found])


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def add(model: nn.Module, name: str, seed: int, targets: list[str]) -> None:
    """A LoRA with both factors random, as a loaded one has them."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name=name)


def scale(model: nn.Module, weights: dict[str, float]) -> None:
    """Both adapters on, each as strong as asked."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(list(weights))
            for name, weight in weights.items():
                module.set_scale(name, weight)  # pyright: ignore[reportCallIssue]


def unload(model: nn.Module) -> None:
    """As diffusers does."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)


def names_of(model: nn.Module) -> list[str]:
    """Some layers of every kind, first, middle and last."""
    found = [name for name, m in layers(model) if isinstance(m, nn.Linear)]
    convolutions = [n for n, m in layers(model) if isinstance(m, nn.Conv2d) and m.groups == 1]
    return sorted({*found[:: max(1, len(found) // 7)], *convolutions[1::5]})


class Sdxl:
    """The U-Net of a small SDXL pipeline, and one call of it."""

    def __init__(self) -> None:
        self.model: Any = denoiser_of(MODELS["SDXL"]().model)

    def inputs(self) -> dict[str, Any]:
        config, draw = self.model.config, torch.Generator().manual_seed(0)
        wide = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, wide, generator=draw), "time_ids": torch.ones(2, 6)}
        return {
            "sample": torch.randn(2, config.in_channels, 8, 8, generator=draw),
            "timestep": torch.tensor(300),
            "encoder_hidden_states": torch.randn(2, 5, config.cross_attention_dim, generator=draw),
            "added_cond_kwargs": added,
        }


def test_equal_to_the_lora_on_the_dequantized_model(known: Any) -> None:
    check(known)


def test_the_same_of_sdxl() -> None:
    check(Sdxl())


def check(known: Any) -> None:
    """Before or after attaching, two at once, scaled, and gone again; off is off."""
    model = copy.deepcopy(known.model)
    plain, targets = outputs(known, model), names_of(model)
    reference = copy.deepcopy(model)
    with attach(model, schemes.W8A16):
        quantized = outputs(known, model)
        for name, layer in own_modules(model):
            if isinstance(layer, QLayer):
                reference.get_submodule(name).weight.data.copy_(layer.weight)
        add(model, "one", 1, targets)
        one = outputs(known, model)
        add(model, "two", 2, targets)
        scale(model, {"one": 0.5, "two": 2.0})
        both = outputs(known, model)
    assert gap(outputs(known, reference), quantized) < 1e-5
    add(reference, "one", 1, targets)
    assert gap(one, outputs(known, reference)) < 1e-5
    add(reference, "two", 2, targets)
    scale(reference, {"one": 0.5, "two": 2.0})
    assert gap(both, outputs(known, reference)) < 1e-5
    assert gap(both, quantized) > 1e-4, "the LoRAs do nothing"

    with attach(model, schemes.W8A16):  # they are there before
        assert gap(outputs(known, model), both) < 1e-5
        unload(model)
        assert gap(outputs(known, model), quantized) < 1e-5
        add(model, "one", 1, targets)  # and one that comes meanwhile goes meanwhile
        assert gap(outputs(known, model), one) < 1e-5
        unload(model)
        assert gap(outputs(known, model), quantized) < 1e-5
    assert torch.equal(outputs(known, model), plain)
    assert not adapted(model)


def test_what_is_the_models_own_keeps_its_name(known: Any) -> None:
    model = copy.deepcopy(known.model)
    mark, own = fingerprint(model), [name for name, _ in own_parameters(model)]
    assert own == [name for name, _ in model.named_parameters()]
    found = [(name, layer) for name, layer in layers(model)]
    add(model, "one", 1, names_of(model))
    assert adapted(model) and fingerprint(model) == mark
    assert [name for name, _ in own_parameters(model)] == own
    assert [(name, layer) for name, layer in layers(model)] == found
