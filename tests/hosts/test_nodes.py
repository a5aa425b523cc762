"""What the nodes are made of, in this process: rules of the cache, patterns, what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tenuto import Artifact, schemes
from tenuto.caching import CacheSchedule
from tenuto.caching.interval import LateInterval
from tenuto.errors import ModelError, TenutoError
from tenuto.runtime import Host, InPlace, Patches

TIMES, BRANCHES = tuple(range(1000, 0, -100)), ("a", "b")


def computed(schedule: CacheSchedule) -> list[bool]:
    return schedule.table[:, 0].tolist()


def rounded(model: Any, scheme: Any, *skip: str, **options: Any) -> Any:
    """A model with every layer rounded to nearest, as the node makes it."""
    from comfy_nodes.adapter import ComfyUI

    return ComfyUI().install(model, Patches(scheme=scheme, skip=skip, **options))


def test_a_rule_within_its_bounds() -> None:
    from comfy_nodes.nodes import bounded

    rule = LateInterval(1, 100)(TIMES, BRANCHES)
    assert computed(bounded(0.0, 1.0, False)(rule)) == [True, True] + [False] * 8
    assert computed(bounded(0.4, 1.0, False)(rule)) == [True] * 4 + [False] * 6
    assert computed(bounded(0.0, 0.75, False)(rule)) == [True, True] + [False] * 6 + [True] * 2
    assert computed(bounded(0.0, 1.0, True)(rule)) == [True, True] + [False] * 7 + [True]
    assert all(computed(bounded(0.9, 0.1, True)(rule)))


def test_skipping_by_either_name(in_comfy: Any) -> None:
    model = in_comfy("sd3")

    def chosen(*skip: str, **options: Any) -> set[str]:
        return set(rounded(model, schemes.W8A8, *skip, **options).parts[0].plan.schemes)

    every = chosen()
    ours = chosen("*.attn.to_q")
    theirs = chosen("*.x_block.attn.qkv")
    assert ours == theirs == {n for n in every if not n.endswith("x_block.attn.qkv")} != every
    linear = chosen(convolutions=False)
    assert every == linear, "its one convolution is the first layer, which stays as it is"
    with pytest.raises(ModelError, match="No layer"):
        rounded(model, schemes.W8A8, "*")


def test_what_is_quantized_already_is_refused(in_comfy: Any) -> None:
    model = in_comfy("sd3")
    model.model.diffusion_model.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="already"):
        rounded(model, schemes.W8A8)


def test_a_cache_wants_a_model_that_it_knows() -> None:
    from comfy_nodes.cache import Cache

    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ModelError, match="Sequential"):
        Cache(model, LateInterval(1, 2))


def test_a_route_is_wanted(in_comfy: Any, original: Any) -> None:
    from comfy_nodes.nodes import ROUTE, ApplyCache, info

    schedule = {"timesteps": [999.0, 500.0], "steps": 2, "guidance": 1.0}
    made = Artifact.new(original("sd3"), schedule)
    with pytest.raises(TenutoError, match="no cache schedule"):
        ApplyCache.execute(in_comfy("sd3"), ROUTE, 1, 2, 0.0, 1.0, True, made)
    assert info(made, "x") == "x: sd3 (SD3Transformer2DModel)"


def test_the_map_of_the_last_run_shows_what_was_reused() -> None:
    """Without matplotlib, which ComfyUI has not, the cells alone: branches down, steps across."""
    from comfy_nodes.report import SIDE, heat_map
    from tenuto.artifact.panels import COLOURS, REUSED

    held = torch.tensor([[0, 0], [2, 0], [0, 2]])
    run: Any = SimpleNamespace(
        computed=2 - held, reused=held, timesteps=(9.0, 5.0, 1.0), names=("b.0.attn1", "b.0.ff"),
        seconds=[0.1] * 3, calls=6,
    )  # fmt: skip
    size = SIDE // 3
    picture = heat_map(run)
    assert picture.shape == (1, 2 * size, 3 * size, 3) and picture.dtype is torch.float32
    kinds = (COLOURS["attention"], COLOURS["feed-forward"])
    for branch, kind in enumerate(kinds):
        for step in range(3):
            wanted = torch.tensor(list(bytes.fromhex((REUSED if held[step, branch] else kind)[1:])))
            cell = picture[0, branch * size : (branch + 1) * size, step * size : (step + 1) * size]
            assert torch.equal((cell * 255).round(), wanted.float().expand_as(cell))


def test_a_second_node_of_a_kind_takes_the_first_ones_place(in_comfy: Any) -> None:
    made = rounded(in_comfy("sd3"), schemes.W8A8)
    first, once = made.parts[0], made.handle
    twice = rounded(once, schemes.W8A16).handle
    assert len(twice.get_injections(first.key)) == 1
    assert twice.get_attachment(first.key) is not first is once.get_attachment(first.key)


def test_both_adapters_have_the_protocol() -> None:
    from comfy_nodes.adapter import ComfyUI

    hosts: list[Host] = [InPlace(), ComfyUI()]
    assert all(callable(getattr(h, n)) for h in hosts for n in vars(Host) if n[0] != "_")


def test_no_file_of_the_pack_imports_what_comfyui_has_not() -> None:
    """torch, safetensors, numpy, and ComfyUI itself."""
    import ast
    from pathlib import Path

    allowed = {"torch", "numpy", "safetensors", "comfy", "comfy_api", "folder_paths",
               "latent_preview", "tenuto"}  # fmt: skip
    standard = {"__future__", "collections", "contextlib", "dataclasses", "fnmatch", "functools",
                "itertools", "logging", "math", "pathlib", "re", "time",
                "typing", "weakref"}  # fmt: skip
    for path in (Path(__file__).parents[2] / "comfy_nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module or ""]
            assert {name.split(".")[0] for name in found} <= allowed | standard, path


def test_what_is_calibrated_here_is_used_in_diffusers(
    in_comfy: Any, original: Any, family: str, prompts: Any, call_as: Any, tmp_path: Any
) -> None:
    """In the graph's own loops, every family; the artifact quantizes the same there as here."""
    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.calibration import Sampling, calibrated, recorded
    from tenuto import attach

    model, unet = in_comfy(family), original(family)
    text = prompts([1])
    cond = [[text, {"pooled_output": text[:, 0]}]]
    side, channels = (36 if family == "pixart" else 8), 16 if family in ("sd3", "flux") else 4
    latent = torch.zeros(1, channels, side, side)
    how = Sampling(0, 3, 2.0, "euler", "simple", cond, cond, latent)
    seen = recorded(model, how, 1)
    made = calibrated(model, seen, schemes.W8A8_STATIC, "quick", "table", 0, tmp_path / "work")
    made.save(tmp_path / "one.safetensors")
    made = Artifact.load(tmp_path / "one.safetensors")
    assert made.header["model_class"] == type(unet).__name__ and made.section("ranges")

    scale = 1000 if family == "flux" else 1
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([made.header["schedule"]["timesteps"][1] * scale])
    plain = call_as(family, unet, x, t, text)
    with attach(unet, made, execution="int8"):
        found = call_as(family, unet, x, t, text)
    denoiser = model.model.diffusion_model
    with attach(denoiser, made, execution="int8"):
        here = call_as(family, denoiser, x, t, text)
    assert float((here - found).norm() / found.norm()) < 2e-2
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.3
    attached = ComfyUI().install(model, Patches(made))
    assert attached.parts[0].plan.schemes
    attached.detach()
