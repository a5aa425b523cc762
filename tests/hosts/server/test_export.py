"""Tenuto Export through the HTTP API: its file is in the host's own list, and makes an image."""

from __future__ import annotations

import json
from typing import Any

import torch


def test_a_file_that_the_host_loads_by_itself(server: Any, make: Any) -> None:
    """Written to output/diffusion_models in fp8; the loader of the host has it, without our nodes.

    Its latents are near those of the model itself, and not equal.
    """
    graph = make.plain("flux")
    plain = server.latent(server.run(graph))
    export = make.node(
        "Tenuto_Export", model=["model", 0], name="tiny-fp8", scheme="comfy: fp8"
    )  # fmt: skip
    history = server.run({"model": graph["model"], "export": export})
    text = history["outputs"]["export"]["text"][0]
    assert text.startswith("tiny-fp8.safetensors: ") and "float8_e4m3fn" in text
    place = server.base / "output" / "diffusion_models"
    assert {p.name for p in place.iterdir()} == {
        "tiny-fp8.safetensors", "tiny-fp8.safetensors.tenuto.json",
    }  # fmt: skip
    listed = json.dumps(server.get("/object_info/UNETLoader"))
    assert "tiny-fp8.safetensors" in listed
    again = json.loads(json.dumps(graph))
    again["model"]["inputs"]["unet_name"] = "tiny-fp8.safetensors"
    found = server.latent(server.run(again))
    gap = float((found - plain).norm() / plain.norm())
    assert 0 < gap < 0.3, gap
    assert torch.isfinite(found).all()


def test_what_is_wrong_is_said_in_one_sentence(server: Any, make: Any) -> None:
    model = make.plain("sd15")["model"]

    def graph(**more: Any) -> Any:
        given = {"model": ["model", 0], "name": "x", "scheme": "comfy: from artifact"} | more
        return {"model": model, "export": make.node("Tenuto_Export", **given)}

    assert "Connect an artifact" in server.failed(graph())
    said = server.failed(graph(scheme="comfy: w8a8"))
    assert "convolutions wrongly" in said and said.count("\n") <= 1
    assert "letters, digits, dots, hyphens" in server.refused(graph(name="../x"))
    assert not list(server.base.glob("output/diffusion_models/x*"))
