"""Key maps of Forge Neo's classes: one to one, and the same weights compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import forge_neo
import pytest
import torch
from torch import nn

from tenuto.artifact.fingerprint import fingerprint
from tenuto.model import describe, families, layers, names_in_host
from webui_ext import hosts


@pytest.fixture(params=forge_neo.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of Neo's families in turn."""
    return request.param


def test_every_weight_has_one_name(family: str, in_neo: Any, original: Any) -> None:
    """One to one: each row of each of the host's parameters is under one canonical name."""
    host, own = hosts.denoiser_of(in_neo(family)), original(family)
    keys = names_in_host(host)
    assert keys is not None and keys.places.keys() == dict(own.named_parameters()).keys()
    assert keys.model_class == type(own).__name__
    rows: dict[str, list[tuple[int, int]]] = {}
    for place in keys.places.values():
        rows.setdefault(place.name, []).append(place.rows)
    for name, parameter in host.named_parameters():
        if not name.startswith("norm_final"):  # of a NextDiT, which its forward does not call
            ends = [0, *(end for _, end in sorted(rows[name]))]
            assert [start for start, _ in sorted(rows[name])] == ends[:-1], name
            assert ends[-1] == (len(parameter) if parameter.ndim else 1), name


def test_it_computes_what_diffusers_does(
    family: str, in_neo: Any, original: Any, call_as: Any, prompts: Any
) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4 if family in ("unet", "sdxl") else 16, 8, 8, generator=draw)
    text, t = prompts([1, 2]), torch.full((2,), 600.0)
    found = forge_neo.call(family, hosts.denoiser_of(in_neo(family)), x.clone(), t, text)
    wanted = call_as(family, original(family), x, t, text)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_it_is_described_alike(family: str, in_neo: Any, original: Any) -> None:
    host, own = hosts.denoiser_of(in_neo(family)), original(family)
    keys, theirs = names_in_host(host), describe(own)
    assert keys is not None
    view = keys.view(host)
    seen, found = describe(view), describe(host)
    assert fingerprint(view) == fingerprint(own)
    assert seen == replace(theirs, temporal=seen.temporal)
    assert len(found.branches) == len(theirs.branches)
    for name in (*found.blocks, *(b.name for b in found.branches)):
        assert isinstance(host.get_submodule(name), nn.Module)
    assert {n for n, _ in hosts.layers(host)} == {n for n, _ in layers(host)} != set()


def test_what_it_predicts_is_known(family: str, in_neo: Any) -> None:
    """The forecast that ships is found by it."""
    from tenuto.runtime import host_kernel

    kernel = host_kernel(hosts.sampling_of(in_neo(family)))
    assert kernel.prediction == ("eps" if family in ("unet", "sdxl") else "flow")


def test_names_that_only_look_alike_are_told_apart(in_neo: Any) -> None:
    for name in ("flux", "flux2", "lumina2", "z_image"):
        assert families.describe(hosts.denoiser_of(in_neo(name))).family == name
