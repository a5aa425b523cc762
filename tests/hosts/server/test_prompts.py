"""Save Prompt and Load Prompt through the HTTP API: the second graph has no CLIP at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch


def without_clip(make: Any, graph: Any, name: str) -> Any:
    """`graph` with the conditioning of a file in place of its text encoder."""
    found = json.loads(json.dumps(graph))
    for gone in ("clip", "positive", "negative"):
        found.pop(gone, None)
    found["prompt"] = make.node("Tenuto_LoadPrompt", name=f"{name}.safetensors")
    found["sampler"]["inputs"] |= {"positive": ["prompt", 0], "negative": ["prompt", 1]}
    found["info"] = make.node("PreviewAny", source=["prompt", 2])
    return found


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_the_same_image_without_a_text_encoder(server: Any, make: Any, family: str) -> None:
    graph = make.plain(family)
    saving = graph | {
        "save": make.node(
            "Tenuto_SavePrompt", positive=["positive", 0], negative=["negative", 0],
            name=f"bus-{family}", text="a red bus",
        )
    }  # fmt: skip
    history = server.run(saving)
    assert "a red bus" in history["outputs"]["save"]["text"][0]
    folder = server.base / "models" / "tenuto_prompts"
    assert [p.name for p in folder.glob(f"*{family}*")] == [f"bus-{family}.safetensors"]
    again = server.run(without_clip(make, graph, f"bus-{family}"))
    assert "a red bus" in again["outputs"]["info"]["text"][0]
    assert torch.equal(server.latent(again), server.latent(history))
    assert torch.equal(server.picture(again), server.picture(history))
    assert f"bus-{family}.safetensors" in json.dumps(server.get("/object_info/Tenuto_LoadPrompt"))


def test_what_is_wrong_is_said_in_one_sentence(server: Any, make: Any) -> None:
    graph = make.plain("pixart")
    assert "There is no prompt called none.safetensors" in server.refused(
        without_clip(make, graph, "none")
    )
    assert "There is no prompt called" in server.refused(
        without_clip(make, graph, "../checkpoints/tiny_sd15")
    )
    bad = {name: graph[name] for name in ("clip", "positive")}
    bad["save"] = make.node("Tenuto_SavePrompt", positive=["positive", 0], name="../x")
    assert "letters, digits, dots, hyphens and underscores" in server.refused(bad)
