"""What the host's LoRAs changed in a layer, kept apart from its codes: an exact side branch.

Hosts merge a LoRA into the weight, each in its own way, and keep a backup. The difference is what
the LoRA does, whatever its kind (LoRA, LoHa, LoKr, DoRA), and it is added to what the codes give:
learned rounding stays, and nothing is quantized again.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn

from tenuto.runtime import with_changes

from . import hosts


class Changes:
    """The LoRAs in one model of the host."""

    def __init__(self, sd_model: Any) -> None:
        self.patcher = hosts.patcher_of(sd_model)
        self.loader = getattr(getattr(self.patcher, "model", None), "lora_loader", None)
        self._known: dict[str, tuple[Any, Tensor | None]] = {}

    def settle(self, layer: Any) -> None:
        """A1111 merges when a layer is called, by a patch of the class that ours goes round."""
        networks = sys.modules.get("networks")
        if networks is not None and getattr(layer, "network_layer_name", None) is not None:
            networks.network_apply_weights(layer)

    def own(self, name: str, layer: Any) -> Tensor:
        """The weight of the layer `name` as the checkpoint has it."""
        backup = self._backup(name, layer)
        return layer.weight if backup is None else backup

    def effective(self, layer: Any, name: str = "weight") -> Any:
        """The weight (or the bias) that the host would compute with; None where it has none."""
        found, online = getattr(layer, name), getattr(layer, "forge_online_loras", None) or {}
        if online and (name == "weight" or name in online):
            return _online(layer, online)[name == "bias"]
        changes = getattr(layer, f"{name}_function", None) or ()
        return with_changes(found, changes) if found is not None and changes else found

    def difference(self, name: str, layer: Any) -> Tensor | None:
        """Effective less own weight, in the weight's dtype; None where they are equal."""
        backup = self._backup(name, layer)
        online = getattr(layer, "forge_online_loras", None)
        functions = getattr(layer, "weight_function", None)
        if backup is None and not online and not functions:
            self._known.pop(name, None)
            return None
        token = (
            hosts.version_of(layer.weight), self._token(layer), id(online), len(functions or ()),
            layer.weight.device,
        )  # fmt: skip
        known = self._known.get(name)
        if known is None or known[0] != token:
            weight = self.effective(layer).detach()
            own = _online(layer, {})[0] if online else self.own(name, layer)
            own = own.detach().to(weight)
            found = (weight.float() - own.float()).to(weight.dtype)
            known = self._known[name] = token, found if bool(found.any()) else None
        return known[1]

    def forget(self, name: str) -> None:
        """The layer `name` is the host's own: it needs no side branch."""
        self._known.pop(name, None)

    def count(self) -> int:
        """How many layers have a side branch."""
        return sum(found is not None for _, found in self._known.values())

    def _token(self, layer: Any) -> Any:
        """Names what is merged now: with it a change in place is seen where none is counted."""
        names = getattr(layer, "network_current_names", None)
        if names is not None:
            return names
        return getattr(self.loader, "loaded_hash", getattr(self.patcher, "patches_uuid", None))

    def _backup(self, name: str, layer: Any) -> Tensor | None:
        """The weight before anything was merged; None where nothing is."""
        if getattr(layer, "network_current_names", ()):
            return getattr(layer, "network_weights_backup", None)
        key = f"{hosts.PREFIX}{name}.weight"
        for holder in (self.loader, self.patcher):
            found = (getattr(holder, "backup", None) or {}).get(key)
            if found is not None:
                return getattr(found, "weight", found)
        return None


def _online(layer: Any, loras: Any) -> tuple[Tensor, Any]:
    """Weight and bias of `layer` as Forge computes them with these LoRAs, of copies of both."""
    twin = copy.copy(layer)
    twin.__dict__["_parameters"] = {
        name: value if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in layer._parameters.items()
    }
    twin.forge_online_loras = loras
    return sys.modules["backend.operations"].get_weight_and_bias(twin)
