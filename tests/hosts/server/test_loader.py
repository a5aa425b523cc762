"""Tenuto Loader through the HTTP API: an artifact, and a model that Tenuto Export wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

NOTHING = {"skip": "nothing", "speedup": 2.0, "execution": "float"}
BRINGS = "none or file's own"


@pytest.fixture(scope="module")
def artifact(server: Any, checkpoints: Path, coded_artifact: Any) -> Iterator[str]:
    """The name of one with codes of the tiny SD 3, rounded to nearest."""
    from comfy import sd

    with torch.no_grad():
        path = str(checkpoints / "checkpoints" / "tiny_sd3.safetensors")
        found = sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)
        made = coded_artifact(found[0].model.diffusion_model)
    file = server.base / "models" / "tenuto" / "sd3-codes.safetensors"
    made.save(file)
    yield file.name
    file.unlink()


def by_loader(make: Any, family: str, **given: Any) -> Any:
    """The graph with our loader in the place of the host's."""
    graph = make.plain(family)
    graph["model"] = make.node("Tenuto_Loader", **(NOTHING | given))
    graph["report"] = make.node("Tenuto_Report", model=["model", 0], samples=["sampler", 0])
    return graph


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_an_artifact_without_the_float_weights(server: Any, make: Any, artifact: str) -> None:
    """A checkpoint with its encoders and VAE; the latents are those of the three nodes.

    With calls skipped too, and with the float weights kept.
    """
    sd3 = {"model": "checkpoints/tiny_sd3.safetensors", "artifact": artifact}
    quantize = make.quantize(scheme="from artifact", execution="float", artifact=["file", 0])
    three = make.chained(make.plain("sd3"), quantize) | {
        "file": make.node("Tenuto_LoadArtifact", name=artifact)
    }
    wanted = server.latent(server.run(three))
    history = server.run(by_loader(make, "sd3", **sd3))
    assert gap(server.latent(history), wanted) < 1e-5
    (text,) = history["outputs"]["model"]["text"]
    assert "layers w8a16" in text and "GiB, in float" in text and "Skips nothing." in text
    (text,) = history["outputs"]["report"]["text"]
    assert f"Loaded: {sd3['model']} with {artifact}. Its weights take" in text
    kept = server.run(by_loader(make, "sd3", **sd3, weights="codes and float weights"))
    assert gap(server.latent(kept), wanted) < 1e-5
    graph = by_loader(make, "sd3", **sd3 | {"skip": "by speedup"})
    graph["sampler"]["inputs"]["steps"] = 10
    (text,) = server.run(graph)["outputs"]["report"]["text"]
    assert "Cache: 5 of 10 calls of the model skipped" in text and "Quantized layers: " in text


def test_a_model_that_was_exported(server: Any, make: Any, request: pytest.FixtureRequest) -> None:
    """As the host's own loader has it."""
    graph, exported = make.plain("flux"), server.base / "output" / "diffusion_models"
    export = make.node("Tenuto_Export", model=["model", 0], name="loader-fp8", scheme="comfy: fp8")
    server.run({"model": graph["model"], "export": export})
    request.addfinalizer(lambda: [p.unlink() for p in exported.glob("loader-fp8.*")])
    name = "diffusion_models/loader-fp8.safetensors"
    history = server.run(by_loader(make, "flux", model=name, artifact=BRINGS))
    (text,) = history["outputs"]["model"]["text"]
    assert "exported as comfy" in text and "layers in float8_e4m3fn" in text
    graph["model"]["inputs"]["unet_name"] = "loader-fp8.safetensors"
    assert gap(server.latent(history), server.latent(server.run(graph))) < 1e-5


def test_what_is_wrong_is_said_in_one_sentence(server: Any, make: Any, artifact: str) -> None:
    flux, sd3 = "diffusion_models/tiny_flux.safetensors", "checkpoints/tiny_sd3.safetensors"
    said = server.failed(by_loader(make, "flux", model=flux, artifact=artifact))
    assert "The artifact is for a SD3Transformer2DModel" in said and said.count("\n") <= 1
    said = server.refused(
        by_loader(make, "sd3", model="checkpoints/x.safetensors", artifact=BRINGS)
    )
    assert "There is no model called checkpoints/x.safetensors" in said
    said = server.refused(by_loader(make, "sd3", model=sd3, artifact="x.safetensors"))
    assert "There is no artifact called x.safetensors" in said
