"""The WebUI extension on the real ldm U-Net, as large a tree as SD 1.5's, with real samplers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WEBUI = Path(__file__).resolve().parents[1] / "webui"
BALANCED = "Built-in: Balanced"
CACHE = (True, BALANCED, "Off", "Uniform", 2.0, 0.0, 1.0, False, 0)
ROUTER = (True, "route.safetensors", "Off", "Router (from artifact)", 2.0, 0.0, 1.0, False, 0)
W8A8 = (True, BALANCED, "W8A8", "Off")
BOTH = (True, BALANCED, "W8A8", "Router (from artifact)", 2.0, 0.0)


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tenuto_tests_{name}", WEBUI / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unet() -> nn.Module:
    """12 / 1 / 12 blocks; ldm starts some weights at zero, with which nothing would show."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=32,
            attention_resolutions=[4, 2, 1], num_res_blocks=2, channel_mult=[1, 2, 4, 4],
            num_heads=8, use_spatial_transformer=True, transformer_depth=1, context_dim=16,
            use_checkpoint=False, legacy=False,
        )  # fmt: skip
        for p in made.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
    return made.eval().requires_grad_(False)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stub A1111 with the real U-Net and the sampling functions of k-diffusion."""
    from k_diffusion import sampling

    stubs = _load("hosts")

    monkeypatch.setattr(stubs, "_function", lambda name: getattr(sampling, f"sample_{name}"))
    found = stubs.Host("a1111", unet(), tmp_path)
    found.opts.tenuto_execution = "int8"
    for name, module in found.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found.load()
    yield found
    for name in [n for n in sys.modules if n.partition(".")[0] == "tenuto_webui"]:
        del sys.modules[name]


@pytest.fixture
def save_route(host: Any, tmp_path: Path) -> Callable[[float], Any]:
    """save_route(share): an artifact with a route that computes about so many cells."""

    def save(share: float) -> Any:
        from tenuto.artifact.artifact import Artifact
        from tenuto.artifact.host_names import canonicalized
        from tenuto.model.families import describe

        times = [999.0 - 100 * i for i in range(10)]
        branches = [b.name for b in describe(host.unet).branches]
        made = Artifact.new(host.unet, {"timesteps": times, "steps": 10, "guidance": 2.0})
        table = torch.rand(10, len(branches), generator=torch.Generator().manual_seed(3)) < share
        table[0] = True
        made.header["route"] = {"timesteps": times, "branches": branches, "policy": "table"}
        made.tensors["route/table"] = table
        (tmp_path / "tenuto").mkdir(exist_ok=True)
        canonicalized(made, host.unet).save(tmp_path / "tenuto" / "route.safetensors")
        return table

    return save


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m"])
@pytest.mark.parametrize("args", [CACHE, ROUTER, W8A8, BOTH], ids=["uniform", "router", "w8a8",
                                                                   "both"])  # fmt: skip
def test_off_on_off(host: Any, save_route: Any, sampler: str, args: Any) -> None:
    """Bit by bit; and what the blocks computed is what is told."""
    save_route(0.5)
    how = {"sampler": sampler, "steps": 10}  # runs of fewer than nine reuse nothing
    plain = host.pictures(host.p(False, **how))
    p = host.p(*args, **how)
    changed = host.pictures(p)
    assert torch.equal(host.pictures(host.p(False, **how)), plain)
    assert not any("forward" in vars(m) for m in host.unet.modules())
    assert not any(m._forward_pre_hooks for m in host.unet.modules())
    assert 0 < gap(changed, plain) < 0.5
    told = p.processed.comments
    assert ("blocks computed" in told) == (args is not W8A8)
    assert ("layers W8A8 (int8" in told) == (args in (W8A8, BOTH))


@pytest.mark.parametrize(
    "sampler,skipped",
    [("euler", 5), ("heun", 10), ("dpm_2", 5), ("dpmpp_2m", 5), ("lms", 5), ("euler_ancestral", 0),
     ("dpmpp_2s_ancestral", 0)],
)  # fmt: skip
def test_ticked_and_nothing_else_chosen(host: Any, sampler: str, skipped: int) -> None:
    """Half of the calls are skipped; or blocks are reused, where the sampler adds noise."""
    how = {"sampler": sampler, "steps": 10}
    plain = host.pictures(host.p(False, **how))
    p = host.p(True, **how)
    changed = host.pictures(p)
    told = p.processed.comments
    assert torch.equal(host.pictures(host.p(False, **how)), plain)
    assert not any("forward" in vars(m) for m in host.unet.modules())
    assert 0 < gap(changed, plain) < 0.5 and "layers W8A8 (int8" in told
    assert (f"Tenuto: {skipped} of " in told) == bool(skipped)
    assert ("so blocks are reused instead" in told) == ("blocks computed" in told) == (not skipped)
    if not skipped:
        assert gap(host.pictures(host.p(*BOTH[:4], **how)), changed) < 1e-3, "as Router"


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_all_compute_is_exact(host: Any, save_route: Any, sampler: str) -> None:
    save_route(1.1)
    plain = host.pictures(host.p(False, sampler=sampler))
    for args in (ROUTER, (True, BALANCED, "Off", "Uniform", 1.0)):
        assert torch.equal(host.pictures(host.p(*args, sampler=sampler)), plain)


def test_a_router_is_held_cell_by_cell(host: Any, save_route: Any) -> None:
    """10 steps at 1000, 900, ...: each takes the nearest calibrated row."""
    table = save_route(0.5)
    p = host.p(*ROUTER, steps=10)
    host.pictures(p)
    words = p.processed.comments.split("Tenuto: ")[1].split()
    assert (int(words[0]), int(words[2])) == (int(table.sum()), table.numel())


def test_batched_equals_split(host: Any, save_route: Any) -> None:
    save_route(0.5)
    for args, most in ((ROUTER, 1e-5), (CACHE, 1e-5), (W8A8, 2e-2)):
        whole = host.pictures(host.p(*args, steps=10))
        assert gap(host.pictures(host.p(*args, steps=10, split=True)), whole) < most


def test_w8a8_is_near_in_one_call(host: Any) -> None:
    """A call of the network, not a run: 3 % on random weights."""
    seen: list[Tensor] = []
    hook = host.unet.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    host.pictures(host.p(False, steps=2))
    host.pictures(host.p(*W8A8, steps=2))
    hook.remove()
    assert gap(seen[2], seen[0]) < 0.05


def test_a_lora_is_a_side_branch(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged by a stand-in of A1111's loader; even a faint one keeps its strength."""
    import types

    wanted: dict[str, Tensor] = {}
    for name, module in host.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.network_layer_name = name

    def apply(layer: Any) -> None:
        names = tuple(wanted)
        if getattr(layer, "network_current_names", ()) != names:
            if getattr(layer, "network_weights_backup", None) is None:
                layer.network_weights_backup = layer.weight.detach().clone()
            layer.weight.copy_(layer.network_weights_backup)
            if layer.network_layer_name in wanted:
                layer.weight.add_(wanted[layer.network_layer_name])
            layer.network_current_names = names

    networks: Any = types.ModuleType("networks")
    networks.network_apply_weights = apply
    monkeypatch.setitem(sys.modules, "networks", networks)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: (apply(m), own(m, x))[1])
    plain, quantized = host.pictures(host.p(False)), host.pictures(host.p(*W8A8))
    layers = [n for n, m in host.unet.named_modules() if n.endswith(("to_q", "to_v"))]
    draw = torch.Generator().manual_seed(2)
    for name in layers:
        weight = host.unet.get_submodule(name).weight
        up, down = (torch.randn(n, 4, generator=draw) for n in weight.shape)
        wanted[name] = up @ down.T * (3 * weight.norm() / (up @ down.T).norm())
    full = host.pictures(host.p(False))
    p = host.p(*W8A8)
    both = host.pictures(p)
    assert f"LoRA: {len(layers)} layers applied as side branch, 0 left" in p.processed.comments
    moved, moved_full = both - quantized, full - plain
    assert gap(moved, moved_full) < 0.5, "about what it does in full precision"
    wanted.clear()
    assert torch.equal(host.pictures(host.p(*W8A8)), quantized)
    assert torch.equal(host.pictures(host.p(False)), plain)
