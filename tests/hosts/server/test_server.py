"""Graphs through the HTTP API of a real ComfyUI, on tiny checkpoints that its own loaders take."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
IDS = (
    "Loader", "LoadArtifact", "QuantizeModel", "SpeedUp", "ApplyCache", "Report", "Calibrate",
    "SavePrompt", "LoadPrompt", "Export",
)  # fmt: skip


def text_of(history: dict[str, Any]) -> str:
    return history["outputs"]["report"]["text"][0]


def seconds(text: str) -> list[float]:
    found = re.search(r"Seconds by step: (.*)", text)
    assert found
    return [float(s) for s in found[1].split()]


def test_the_clone_loads_beside_a_pack_with_its_own_core(server: Any, make: Any) -> None:
    """Every node, with its category and a word on each input; and the other pack has its core."""
    known = server.get("/object_info")
    for name in IDS:
        facts = known[f"Tenuto_{name}"]
        assert facts["category"] == "Tenuto" and facts["description"]
        assert facts.get("search_aliases", ["in hosts that have them"])
        inputs = facts["input"].get("required", {}) | facts["input"].get("optional", {})
        assert all(options[1].get("tooltip") for options in inputs.values())
    assert "Other_Core" in known
    graph = {"one": make.node("Other_Core"), "two": make.node("PreviewAny", source=["one", 0])}
    assert server.run(graph)["outputs"]["two"]["text"] == ["theirs"]


def test_every_node_has_a_help_page(server: Any) -> None:
    import urllib.request

    for name in IDS:
        path = f"/extensions/ComfyUI-Tenuto.dev-1.0/docs/Tenuto_{name}.md"
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as answer:
            text = answer.read().decode()
        assert text.startswith("# ") and len(text) > 400


@pytest.mark.parametrize("family", ["sd15", "sd3", "pixart", "flux"])
def test_on_and_off_again(server: Any, make: Any, family: str) -> None:
    """Plain, with Tenuto, plain: the first and the last image are equal to the bit."""
    graph = make.plain(family)
    first = server.run(graph)
    patched = make.chained(graph, make.quantize(), make.cache())
    changed = server.run(patched)
    exact = server.run(make.chained(graph, make.cache(period=1)))
    last = server.run(graph)
    assert "sampler" not in last["status"]["messages"][1][1].get("nodes", ()), "it was not run"
    latent, picture = server.latent(first), server.picture(first)
    assert torch.equal(server.latent(last), latent) and torch.isfinite(latent).all()
    assert torch.equal(server.picture(last), picture)
    assert torch.equal(server.latent(exact), latent), "a cache that computes all is exact"
    assert torch.equal(server.picture(exact), picture)
    assert not torch.equal(server.latent(changed), latent)
    text = text_of(changed)
    assert re.search(r"Quantized layers: (\d+) \(int8 \1\)", text), text
    held, total = map(int, re.findall(r"Cache: (\d+) of (\d+)", text)[0])
    assert held * 4 == total, "of four steps the third is held"
    assert "Cache: 0 of" in text_of(exact)


def test_one_slider_and_nothing_else(server: Any, make: Any) -> None:
    """Half of the calls of a model that nobody calibrated; at 1, with the node there, all."""
    graph = make.plain("sd15", steps=10)
    plain = server.latent(server.run(graph))
    made = server.run(make.chained(graph, make.node("Tenuto_SpeedUp", speedup=2.0)))
    text = text_of(made)
    assert "5 of 10 calls of the model skipped and forecast (50%), 5 computed" in text
    assert "by the forecast that ships, not measured on your model)." in text
    assert not torch.equal(server.latent(made), plain)
    off = server.run(make.chained(graph, make.node("Tenuto_SpeedUp", speedup=1.0)))
    assert torch.equal(server.latent(off), plain) and text_of(off).startswith("Off")


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_report_counts_reused_steps_and_times_each(server: Any, make: Any, family: str) -> None:
    """After two computed steps every other one is reused, in every branch: two of six."""
    graph = make.chained(make.plain(family, steps=6), make.cache(first=2, compute_last=False))
    text = text_of(server.run(graph))
    found = re.search(r"Cache: (\d+) of (\d+) branch evaluations reused \(33%\)", text)
    assert found and 3 * int(found[1]) == int(found[2]) > 0, text
    assert "Denoiser calls: 6 in 6 steps" in text
    times = seconds(text)
    assert len(times) == 6 and min(times) > 0


def test_an_interrupt_leaves_nothing(server: Any, make: Any) -> None:
    graph = make.plain("sd15", seed=5)
    ours = make.quantize(), make.cache()
    before = server.run(make.chained(graph, *ours))
    plain = server.run(graph)
    prompt = server.start(make.chained(make.plain("sd15", steps=200, seed=6), *ours))
    time.sleep(3)
    server.get("/interrupt", {})
    status = server.wait(prompt)["status"]
    assert "execution_interrupted" in [kind for kind, _ in status["messages"]]
    assert torch.equal(server.latent(server.run(graph)), server.latent(plain))
    again = server.run(make.chained(graph, *ours))
    assert torch.equal(server.latent(again), server.latent(before))


def test_what_is_wrong_is_said_in_one_sentence(server: Any, make: Any, checkpoints: Path) -> None:
    """A missing file, no artifact, none for this family; and the server goes on."""
    folder = server.base / "models" / "tenuto"
    graph = make.plain("sd15")
    plain = server.run(graph)

    def with_file(name: str, **options: Any) -> dict[str, Any]:
        found = make.chained(graph, make.quantize(scheme="from artifact", **options))
        return found | {"file": make.node("Tenuto_LoadArtifact", name=name)}

    said = server.refused(with_file("none.safetensors", artifact=["file", 0]))
    assert "There is no artifact called none.safetensors in models/tenuto." in said
    assert "There is no artifact called" in server.refused(
        with_file("../../checkpoints/tiny_sd15.safetensors", artifact=["file", 0])
    )
    save_file({"x": torch.zeros(2)}, folder / "plain.safetensors")
    said = server.failed(with_file("plain.safetensors", artifact=["file", 0]))
    assert "not a Tenuto artifact" in said and said.count("\n") <= 1
    (folder / "cut.safetensors").write_bytes((folder / "plain.safetensors").read_bytes()[:-4])
    assert "damaged" in server.failed(with_file("cut.safetensors", artifact=["file", 0]))
    shipped = "demo-transformer.w4a8-router.safetensors"
    (folder / shipped).write_bytes((ROOT / "assets" / "artifacts" / shipped).read_bytes())
    said = server.failed(with_file(shipped, artifact=["file", 0]))
    assert said.startswith("The artifact is for a PixArtTransformer2DModel"), said
    assert "Connect an artifact" in server.failed(with_file(shipped))
    mode = "route of the artifact"
    assert "Connect an artifact" in server.failed(make.chained(graph, make.cache(mode=mode)))
    said = server.failed(make.chained(graph, make.quantize(skip="*")))
    assert said.startswith("No layer of the model is left")
    assert torch.equal(
        server.latent(server.run(make.plain("sd15", seed=2) | graph)), server.latent(plain)
    )


def test_lora_before_and_after(server: Any, make: Any) -> None:
    """It is found and counts, wherever it stands in the chain, and is gone without its node."""
    draw = torch.Generator().manual_seed(0)
    name, rank = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 4
    factors = {
        f"{name}.lora_up.weight": torch.randn(320, rank, generator=draw) * 0.6,
        f"{name}.lora_down.weight": torch.randn(rank, 320, generator=draw) * 0.2,
        f"{name}.alpha": torch.tensor(float(rank)),
    }
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(factors, server.base / "models" / "loras" / "tiny.safetensors")
    lora = make.node("LoraLoaderModelOnly", lora_name="tiny.safetensors", strength_model=1.0)
    graph, ours = make.plain("sd15", seed=9), make.quantize()

    def latent(*nodes: Any) -> Any:
        return server.latent(server.run(make.chained(graph, *nodes)))

    plain, quantized = server.latent(server.run(graph)), latent(ours)
    before, after = latent(lora, ours), latent(ours, lora)
    full = chained_without_report(server, make, graph, lora)
    assert torch.equal(before, after)
    assert not torch.equal(before, quantized)
    effect, seen = (full - plain).norm(), (before - quantized).norm()
    assert 0.5 < float(seen / effect) < 2, "as strong as in full precision"
    assert torch.equal(latent(ours), quantized)
    assert torch.equal(server.latent(server.run(graph)), plain)


def chained_without_report(server: Any, make: Any, graph: Any, *nodes: Any) -> Any:
    found = make.chained(graph, *nodes)
    del found["report"]
    return server.latent(server.run(found))


def test_layers_compute_as_they_are_faster(server: Any, make: Any) -> None:
    """By default; the report counts them, and says where int8 would be slower."""
    graph = make.plain("sd15")
    default = make.quantize()
    del default["inputs"]["execution"]
    texts, latents = {}, {}
    for how, quantize in {
        "int8": make.quantize(),
        "float": make.quantize(execution="float"),
        "auto": default,
    }.items():
        history = server.run(make.chained(graph, quantize))
        texts[how], latents[how] = text_of(history), server.latent(history)
    total = int(re.findall(r"Quantized layers: (\d+)", texts["int8"])[0])
    assert f"({'int8'} {total})" in texts["int8"]
    assert f"(dequantized {total})" in texts["float"] and "slower" not in texts["float"]
    counts = dict(re.findall(r"(int8|dequantized|int8 or dequantized) (\d+)", texts["auto"]))
    assert sum(map(int, counts.values())) == total
    assert ("int8 is slower here for" in texts["auto"]) == ("dequantized" in counts)
    plain = server.latent(server.run(graph))
    for how, found in latents.items():
        gap = float((found - plain).norm() / plain.norm())
        # A layer that is left in float is the host's own: where all are, the image is the host's.
        host_alone = how == "auto" and set(counts) == {"dequantized"}
        assert gap == 0 if host_alone else 0 < gap < 0.5, how
