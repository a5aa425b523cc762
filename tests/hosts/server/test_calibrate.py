"""Calibration in a graph: the file it makes, the next graph that uses it, Cancel and resuming."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from tenuto import Artifact

HOW = {
    "scheme": "W8A8", "preset": "quick", "temporal": "table", "runs": 1, "seed": 1, "steps": 4,
    "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple",
}  # fmt: skip


def calibrating(make: Any, family: str, name: str, **options: Any) -> Any:
    """The graph of `family` up to its conditioning, and the node in the place of the sampler."""
    graph = make.plain(family)
    for gone in ("sampler", "latent", "decode", "picture", "vae"):
        graph.pop(gone, None)
    cfg = {"cfg": 1.0} if family == "flux" else {}
    return graph | {
        "calibrate": make.node(
            "Tenuto_Calibrate", model=["model", 0], positive=["positive", 0],
            negative=["negative", 0], latent=["empty", 0], name=name, **(HOW | cfg | options),
        )
    }  # fmt: skip


def using(make: Any, family: str, name: str) -> Any:
    ours = make.quantize(scheme="from artifact", artifact=["file", 0])
    graph = make.chained(make.plain(family), ours)
    return graph | {"file": make.node("Tenuto_LoadArtifact", name=f"{name}.safetensors")}


@pytest.mark.parametrize(
    ("family", "scheme"),
    [*((f, "W8A8, a range a step") for f in ("sd15", "sd3", "pixart")), ("sd3", "W4A8")],
)
def test_the_next_graph_uses_it(server: Any, make: Any, family: str, scheme: str) -> None:
    name = f"{family}-{scheme[:4]}"
    plain = server.latent(server.run(make.plain(family)))
    made = server.run(calibrating(make, family, name, scheme=scheme))
    text = made["outputs"]["calibrate"]["text"][0]
    path = server.base / "models" / "tenuto" / f"{name}.safetensors"
    assert text.startswith(f"{name}.safetensors: ") and path.is_file()
    assert not path.with_suffix(".work").exists()
    used = server.run(using(make, family, name))
    found = server.latent(used)
    gap = float((found - plain).norm() / plain.norm())
    assert 0 < gap < 1, gap
    artifact = Artifact.load(path)
    assert artifact.header["layers"] and artifact.section("temporal")
    assert "prediction_type" in artifact.header
    assert (
        f"Quantized layers: {used['outputs']['report']['text'][0].split()[2]} (int8"
        in (used["outputs"]["report"]["text"][0])
    )
    command = [sys.executable, "-W", "ignore", "-m", "tenuto.cli", "inspect", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and artifact.header["family"] in told.stdout


def test_cancel_and_go_on(server: Any, make: Any) -> None:
    """Stopped in the fit of the blocks, it goes on there, and ends in the same bytes."""
    folder = server.base / "models" / "tenuto"
    how = {"scheme": "W4A8", "preset": "standard", "runs": 2, "seed": 3}
    graph = calibrating(make, "sd3", "stopped", **how)
    prompt = server.start(graph)
    for _ in range(600):
        if len(list(folder.glob("stopped.work/*.safetensors"))) >= 2:
            break
        time.sleep(0.05)
    server.get("/interrupt", {})
    status = server.wait(prompt)["status"]
    assert "execution_interrupted" in [kind for kind, _ in status["messages"]]
    done = len(list(folder.glob("stopped.work/*.safetensors")))
    assert done >= 2 and not (folder / "stopped.safetensors").exists()
    plain = server.latent(server.run(make.plain("sd15", seed=8)))
    server.run(graph)
    whole = calibrating(make, "sd3", "whole", **how)
    server.run(whole)
    assert (folder / "stopped.safetensors").read_bytes() == (
        folder / "whole.safetensors"
    ).read_bytes()
    again = server.run(make.plain("sd15", seed=8) | {"x": make.node("Other_Core")})
    assert torch.equal(server.latent(again), plain)


def test_what_cannot_be_calibrated(server: Any, make: Any) -> None:
    said = server.refused(calibrating(make, "sd15", "../out"))
    assert "letters, digits" in said
    graph = calibrating(make, "sd15", "twice") | {"ours": make.quantize()}
    graph["ours"]["inputs"]["model"] = ["model", 0]
    graph["calibrate"]["inputs"]["model"] = ["ours", 0]
    assert server.failed(graph).startswith("Calibrate the model itself")
