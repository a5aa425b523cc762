"""LoRAs, merged as each host does it: exact beside the codes, gone when the host takes them out."""

from __future__ import annotations

import sys
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BALANCED = "Built-in: Balanced"
W8A8 = (True, BALANCED, "W8A8", "Off")
NAMES = ("middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.0.out_layers.3")


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def updates(denoiser: nn.Module, size: float) -> dict[str, Tensor]:
    """A low-rank change of a Linear and of a convolution, `size` times as large as the weight."""
    draw, found = torch.Generator().manual_seed(2), {}
    for name in NAMES:
        weight = denoiser.get_submodule(name).weight
        up, down = (torch.randn(n, 2, generator=draw) for n in weight.flatten(1).shape)
        change = (up @ down.T).view(weight.shape)
        found[name] = change * (size * weight.norm() / change.norm())
    return found


class LoRA:
    """The host's way: `put(changes)` before a call for images, {} takes it out again."""

    def __init__(self, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.wanted = host, {}
        getattr(self, f"_{host.kind}")(monkeypatch)

    def put(self, changes: dict[str, Tensor]) -> None:
        """Wanted from now on."""
        self.wanted = changes

    def _a1111(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each layer merges when it is called, by a patch of its class, and keeps a backup."""
        for name, module in self.host.unet.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.network_layer_name = name

        def apply(layer: Any) -> None:
            names = tuple((n, float(c.sum())) for n, c in self.wanted.items())
            if getattr(layer, "network_current_names", ()) == names:
                return
            if getattr(layer, "network_weights_backup", None) is None:
                layer.network_weights_backup = layer.weight.detach().clone()
            layer.weight.data.copy_(layer.network_weights_backup)
            if layer.network_layer_name in self.wanted:
                layer.weight.data.add_(self.wanted[layer.network_layer_name])
            layer.network_current_names = names

        networks: Any = types.ModuleType("networks")
        networks.network_apply_weights = apply
        monkeypatch.setitem(sys.modules, "networks", networks)
        for kind in (nn.Linear, nn.Conv2d):
            own = kind.forward

            def forward(layer: Any, x: Tensor, own: Any = own) -> Tensor:
                if hasattr(layer, "network_layer_name"):
                    apply(layer)
                return own(layer, x)

            monkeypatch.setattr(kind, "forward", forward)

    def _forge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All merge when the model is loaded for sampling: new Parameters, the old ones kept."""
        loader = self.host.sd_model.forge_objects.unet.lora_loader

        def refresh() -> None:
            for key, value in loader.backup.items():
                self._layer(key).weight = value
            loader.backup = {}
            for name, change in self.wanted.items():
                layer = self.host.unet.get_submodule(name)
                loader.backup[f"diffusion_model.{name}.weight"] = layer.weight
                layer.weight = nn.Parameter(layer.weight + change, requires_grad=False)
            loader.loaded_hash = str(list(self.wanted))

        self.host.on_load = refresh

    def _reforge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All merge in place when the model is loaded for sampling."""
        patcher = self.host.sd_model.forge_objects.unet
        kept = namedtuple("Dimension", ["weight", "inplace_update"])

        def load() -> None:
            for key, value in patcher.backup.items():
                self._layer(key).weight.data = value.weight
            patcher.backup.clear()
            for name, change in self.wanted.items():
                layer = self.host.unet.get_submodule(name)
                patcher.backup[f"diffusion_model.{name}.weight"] = kept(layer.weight.data, False)
                layer.weight.data = layer.weight.data + change
            patcher.patches_uuid += 1

        self.host.on_load = load

    def _neo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As reForge when the model is loaded, but into new Parameters; no loader has a hash."""
        patcher = self.host.sd_model.forge_objects.unet
        kept = namedtuple("Dimension", ["weight", "inplace_update"])

        def load() -> None:
            for key, value in patcher.backup.items():
                self._layer(key).weight = value.weight
            patcher.backup.clear()
            for name, change in self.wanted.items():
                layer = self.host.unet.get_submodule(name)
                patcher.backup[f"diffusion_model.{name}.weight"] = kept(layer.weight, False)
                layer.weight = nn.Parameter(layer.weight + change, requires_grad=False)
            patcher.patches_uuid += 1

        self.host.on_load = load

    def _layer(self, key: str) -> Any:
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        return self.host.unet.get_submodule(name)


def test_functions_of_a_weight_do_not_write_into_it(host: Any) -> None:
    """A partly loaded model computes with functions of its weights; merging adds in place. Both
    ways of the hosts: a list of functions, and Forge's own that merges what is online."""
    from webui_ext.lora import Changes

    layer = host.unet.get_submodule(NAMES[0])
    change = updates(host.unet, 0.1)[NAMES[0]]
    own = layer.weight.detach().clone()
    changes = Changes(host.sd_model)
    layer.weight_function = [lambda weight: weight.add_(change)]
    found = changes.difference(NAMES[0], layer)
    assert found is not None and gap(found, change) < 1e-3
    assert torch.equal(layer.weight, own)
    layer.weight_function = []
    operations: Any = types.ModuleType("backend.operations")

    def get_weight_and_bias(layer: Any) -> tuple[Tensor, Any]:
        """As Forge: what is online is added to what the layer has; some forks scale that too."""
        loras, bias = layer.forge_online_loras, layer.bias
        weight = layer.weight.detach().mul_(2)
        if "weight" in loras:
            weight.add_(loras["weight"])
        if "bias" in loras:
            bias = bias.detach().add_(loras["bias"])
        return weight, bias

    operations.get_weight_and_bias = get_weight_and_bias
    layer.forge_online_loras = {"weight": change}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "backend.operations", operations)
        found = changes.difference(NAMES[0], layer)
    assert found is not None and gap(found, change) < 1e-3
    assert torch.equal(layer.weight, own)


@pytest.mark.parametrize("way", ["functions", "online"])
def test_a_bias_that_is_not_merged_is_seen(
    host: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a function of the bias alone, or Forge's LoRAs that are online."""
    from tenuto import schemes
    from tenuto.runtime import Replacements
    from webui_ext.adapter import Chosen
    from webui_ext.weights import Weights

    name = "time_embed.0"
    layer = host.unet.get_submodule(name)
    own = layer.bias.detach().clone()
    weights = Weights(Replacements({name: schemes.W8A8}, options={"wanted": "float"}), Chosen())
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    plain = weights.layer(name, layer, x.device)(x)
    if way == "functions":
        layer.bias_function = [lambda bias: bias.add_(1)]
    else:
        operations: Any = types.ModuleType("backend.operations")
        operations.get_weight_and_bias = lambda layer: (layer.weight, layer.bias.detach().add_(1))
        monkeypatch.setitem(sys.modules, "backend.operations", operations)
        layer.forge_online_loras = {"bias": 1}
    found = weights.layer(name, layer, x.device)(x)
    assert gap(found, plain + 1) < 1e-5
    assert torch.equal(layer.bias, own)


@pytest.fixture
def lora(host: Any, monkeypatch: pytest.MonkeyPatch) -> LoRA:
    """The host's loader."""
    return LoRA(host, monkeypatch)


@pytest.mark.parametrize("size", [0.003, 0.3])
def test_a_side_branch_is_exact(host: Any, lora: LoRA, size: float) -> None:
    """What each layer gives with a LoRA, less what it gives without, is the LoRA's own product."""
    changes = updates(host.unet, size)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in NAMES}

    def watch(name: str) -> Callable[..., None]:
        return lambda m, args, out: seen[name].append((args[0].clone(), out.clone()))

    lora.put(changes)
    hooks = [host.unet.get_submodule(n).register_forward_hook(watch(n)) for n in NAMES]
    p = host.p(*W8A8)
    host.pictures(p)
    for hook in hooks:
        hook.remove()
    session = sys.modules["tenuto_webui.session"].session
    kept = session.host._known[1].kept
    for name in NAMES:
        for x, out in seen[name]:
            x, out = x.clone(), out.clone()
            layer = kept[name][1]
            product = F.linear(x, changes[name]) if x.ndim == 3 else F.conv2d(
                x, changes[name], padding=1
            )  # fmt: skip
            assert gap(out - layer(x), product) < 2e-3  # the host's own rounding of W + dW
    assert "LoRA: 2 layers applied as side branch, 0 left in full precision" in (
        p.processed.comments
    )


def test_on_and_off_again(host: Any, lora: LoRA) -> None:
    """Strength, order and the way back: nothing is quantized again."""
    plain, quantized = host.pictures(host.p(False)), host.pictures(host.p(*W8A8))
    lora.put(updates(host.unet, 2.0))
    full, both = host.pictures(host.p(False)), host.pictures(host.p(*W8A8))
    assert gap(full, plain) > 0.01, "it does something"
    assert gap(both, full) < 0.5 * gap(both, plain)
    lora.put(updates(host.unet, 0.1))
    weaker = host.pictures(host.p(*W8A8))
    assert 0 < gap(weaker, quantized) < gap(both, quantized)
    lora.put({})
    p = host.p(*W8A8)
    assert torch.equal(host.pictures(p), quantized)
    assert "LoRA" not in p.processed.comments
    assert torch.equal(host.pictures(host.p(False)), plain)


def test_other_modes(host: Any, lora: LoRA) -> None:
    """Requantised into the codes, or such layers in full precision: said, and near."""
    lora.put(updates(host.unet, 0.3))
    full = host.pictures(host.p(False))
    for mode, words in (
        ("requantise", "LoRA: 2 layers applied requantise, 0 left"),
        ("off", "LoRA: 0 layers applied off, 2 left in full precision"),
    ):
        host.opts.tenuto_lora = mode
        p = host.p(*W8A8)
        assert gap(host.pictures(p), full) < 0.1
        assert words in p.processed.comments


def test_an_artifact_fits_while_a_lora_is_merged(
    host: Any, lora: LoRA, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint is of the checkpoint's weights, which the host keeps a copy of."""
    from tenuto.artifact import Artifact, canonicalized
    from tenuto.errors import ArtifactError

    made = Artifact.new(host.unet, {"timesteps": [999.0, 1.0], "steps": 2, "guidance": 1.0})
    canonical = canonicalized(made, host.unet)
    lora.put({n: 0.5 + c for n, c in updates(host.unet, 0.3).items()})
    host.pictures(host.p(False))
    adapter = sys.modules["tenuto_webui.adapter"]
    adapter.WebUI().install(host.sd_model, adapter.Patches(canonical)).detach()
    last = host.unet.get_submodule("out.2")
    kept = getattr(last, "network_weights_backup", None)
    with torch.no_grad():
        (last.weight if kept is None else kept).add_(1)
    with pytest.raises(ArtifactError, match="another model"):
        adapter.WebUI().install(host.sd_model, adapter.Patches(canonical))


def test_a_weight_that_is_changed_on_the_fly_counts(host: Any) -> None:
    """Low-VRAM modes of all but A1111 leave the weight and change it in each call."""
    if host.kind == "a1111":
        return
    changes = updates(host.unet, 0.3)
    for name, change in changes.items():
        layer = host.unet.get_submodule(name)
        if host.kind in ("reforge", "neo"):
            layer.weight_function = [lambda w, change=change: w + change]
        else:
            layer.forge_online_loras = {"weight": change}
    if host.kind == "forge":
        operations: Any = types.ModuleType("backend.operations")
        operations.get_weight_and_bias = lambda layer: (
            layer.weight + layer.forge_online_loras.get("weight", 0), layer.bias,
        )  # fmt: skip
        sys.modules["backend.operations"] = operations
    try:
        p = host.p(*W8A8)
        host.pictures(p)
    finally:
        sys.modules.pop("backend.operations", None)
    assert "LoRA: 2 layers applied as side branch" in p.processed.comments
