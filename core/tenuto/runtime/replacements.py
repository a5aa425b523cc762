"""`Replacements`: what takes the place of a denoiser's modules, in diffusers and in every host.

From an artifact: tables for time-only modules, quantized layers, the cache schedule, in this order.
From a scheme alone: layers rounded to nearest where they are, without calibration. Each is made
when it is asked for: only its host knows the weight that a layer has by then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..artifact import (
    Artifact,
    at_one,
    default_speedup,
    kernel_of,
    localized,
    schedule_of,
    tabled,
)
from ..caching import CacheSchedule, Forecast, Speedup, check_speedup
from ..errors import ArtifactError, ModelError, SchemeError
from ..model import describe, key_map_of, own_modules
from ..model import layers as layers_of
from ..numerics import QTensor, Scheme
from ..sampling import Clock, OutputKernel
from ..text import printable
from .execution import Chooser, check_execution
from .kernels.input_memo import Memo
from .layers import QConv2d, QLayer, QLinear
from .recipe import default_recipe, quantizable
from .temporal_table import TemporalTable

Policy = Any  # policy(timesteps, branches) -> CacheSchedule; or it decides at run time
Layers = Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class Patches:
    """What is to be put into a model.

    artifact: what calibration made. scheme: every layer rounded to nearest by it, in place of the
    artifact's; skip: patterns of layers that stay in full precision then, by the host's names or
    the canonical ones; convolutions: whether they are quantized too. weights: False leaves all
    layers and tables alone. route: the artifact's cache schedule; policy: another one; limit:
    what is made of it at the timesteps of a run. speedup: whole calls are forecast instead, by the
    artifact's kernel, else by `kernel`; None: as the artifact says, "auto": see `Forecast`, 1: none
    are, and nothing is reused. execution and simulate: as in `attach`.
    """

    artifact: Artifact | None = None
    scheme: Scheme | None = None
    skip: tuple[str, ...] = ()
    convolutions: bool = True
    weights: bool = True
    route: bool = True
    policy: Policy | None = None
    limit: Callable[[CacheSchedule], CacheSchedule] | None = None
    speedup: Speedup | None = None
    kernel: OutputKernel | None = None
    execution: str = "auto"
    simulate: bool = False


@dataclass(eq=False)
class Replacements:
    """Of one model, by its own names.

    schemes: of its quantized layers. codes, ranges: tensors of an artifact. tables: header facts
    of time-only modules; rows: their tensors. policy: of the cache, or None. forecast: of whole
    calls, in its place. clock: whoever puts the replacements in moves it. options: of every layer.
    """

    schemes: Mapping[str, Scheme]
    codes: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    policy: Policy | None = None
    forecast: Forecast | None = None
    clock: Clock = field(default_factory=lambda: Clock(()))
    options: Mapping[str, Any] = field(default_factory=dict)
    memo: Memo = field(default_factory=Memo)

    def layer(self, name: str, module: Any, weight: Tensor | None = None) -> QLayer:
        """The quantized layer for `module`: with the artifact's codes, or `weight` rounded.

        weight: what the layer computes with now, where that is not what the codes are of.
        """
        scheme = self.schemes[name]
        if weight is None and f"{name}.qdata" in self.codes:
            shape = tuple(module.weight.shape)
            codes = QTensor.from_tensors(self.codes, name, shape, scheme.weight)
        else:
            found = module.weight if weight is None else weight
            codes = QTensor.nearest(found.detach(), scheme.weight)
        pair = None
        if scheme.stored:
            pair = self.ranges[f"{name}.scale"], self.ranges[f"{name}.zero_point"]
        kind: Any = QConv2d if isinstance(module, nn.Conv2d) else QLinear
        return kind(module, codes, scheme, self.clock, pair, memo=self.memo, **self.options)

    def table(self, name: str, module: nn.Module) -> TemporalTable:
        """The table for a time-only module."""
        facts = self.tables[name]
        if not facts["single"] and type(module).__module__.startswith("torch.nn."):
            raise ArtifactError(f"The artifact is damaged: {printable(name)} gives one tensor.")
        rows = [self.rows[f"{name}.{number}"] for number in range(len(facts["outputs"]))]
        return TemporalTable(module, rows, bool(facts["single"]), self.clock)

    def count(self) -> dict[str, int]:
        """How many layers have which scheme."""
        return dict(sorted(Counter(s.name for s in self.schemes.values()).items()))

    def share(self, layers: Layers) -> float:
        """Share of the weights of `layers`, (name, module), that is quantized."""
        sizes = {name: math.prod(layer.weight.shape) for name, layer in layers}
        return sum(sizes[n] for n in self.schemes if n in sizes) / max(1, sum(sizes.values()))

    def __bool__(self) -> bool:
        return bool(self.schemes or self.tables)


def replacements_for(
    denoiser: nn.Module,
    patches: Patches,
    *,
    tensor: Callable[[str], Tensor] | None = None,
    layers: Layers | None = None,
    chooser: Chooser | None = None,
) -> Replacements:
    """What `patches` put in place of the modules of `denoiser`; nothing is changed.

    tensor: gives a parameter by name, where what the model holds is patched. layers: what can be
    quantized, (name, module), where a host's classes are not torch's. ArtifactError in one sentence
    if the artifact is for another model, ModelError if there is nothing to quantize.
    """
    check_execution(patches.execution)
    found = Replacements({}, policy=patches.policy)
    modules = dict(layers_of(denoiser) if layers is None else layers)
    made = None
    if patches.artifact is not None:
        made = localized(patches.artifact, denoiser, tensor)
        found = _of_artifact(denoiser, made, modules, patches)
    if patches.scheme is not None and patches.weights:
        found.schemes = _rounded(denoiser, modules, patches)
        found.codes, found.ranges, found.tables, found.rows = {}, {}, {}, {}
    found.options = {
        "wanted": patches.execution, "simulate": patches.simulate, "chooser": chooser,
    }  # fmt: skip
    speedup = _speedup(patches)
    if speedup is not None:
        found.policy, found.forecast = None, _forecast(made, patches.kernel, speedup)
    if callable(found.policy) and patches.limit is not None:
        found.policy = _limited(found.policy, patches.limit)
    return found


def schemes_in(header: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme of every layer that a header names; ArtifactError if the model has it not."""
    known = {k: Scheme.from_json(v) for k, v in header.get("schemes", {}).items()}
    for name, facts in header.get("layers", {}).items():
        layer = layers.get(name)
        if layer is None or tuple(layer.weight.shape) != tuple(facts["shape"]):
            raise ArtifactError(f"The model has no layer {name} of shape {facts['shape']}.")
    return {name: known[f["scheme"]] for name, f in header.get("layers", {}).items()}


def _of_artifact(
    denoiser: nn.Module, made: Artifact, layers: Mapping[str, Any], patches: Patches
) -> Replacements:
    """Of an artifact in the names of `denoiser`."""
    modules = dict(own_modules(denoiser))
    schedule = schedule_of(made) if patches.route else None
    stray = next((n for n in (schedule.branches if schedule else ()) if n not in modules), None)
    if stray is not None:
        raise ArtifactError(f"The model has no branch {stray}, which the route names.")
    found = Replacements(
        {}, policy=patches.policy or schedule, clock=Clock(made.header["schedule"]["timesteps"])
    )
    if patches.weights:
        found.schemes = schemes_in(made.header, layers)
        found.codes, found.ranges = made.section("weights"), made.section("ranges")
        found.tables, found.rows = tabled(made.header), made.section("temporal")
        stray = next((name for name in found.tables if name not in modules), None)
        if stray is not None:
            raise ArtifactError(f"The model has no module {stray}, which the temporal table names.")
    return found


def _rounded(denoiser: nn.Module, layers: Mapping[str, Any], patches: Patches) -> dict[str, Scheme]:
    """The scheme of every layer that is rounded where it is.

    First and last layers stay as they are: they hold few weights and would cost the most, 4 dB of
    the demo transformer. Those inside blocks (modulations) hold many: they get 8 bits.
    """
    scheme, keys = patches.scheme, key_map_of(denoiser)
    assert scheme is not None
    if scheme.stored:
        raise SchemeError(f"The ranges of {scheme.name} are found by calibration: use an artifact.")
    backbone = describe(denoiser)
    recipe, chosen = default_recipe(scheme, backbone), {}
    inside = keys.layers() if keys is not None else {}
    for name, layer in layers.items():
        rule, names = recipe.rule(name), (name, *inside.get(name, ()))
        ends = backbone.ends if backbone.block_of(name) is None else ()
        skipped = any(fnmatchcase(n, p) for n in names for p in (*patches.skip, *ends))
        wanted = patches.convolutions or not isinstance(layer, nn.Conv2d)
        if rule is None or rule.scheme is None or skipped or not wanted:
            continue
        if not quantizable(layer, rule.scheme):
            continue
        if not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
            raise ModelError("The model's weights are quantized already.")
        chosen[name] = rule.scheme
    if not chosen:
        raise ModelError("No layer of the model is left to quantize.")
    return chosen


def _speedup(patches: Patches) -> Speedup | None:
    """What is asked, else the artifact's own where nothing else is to be applied."""
    if patches.speedup is not None:
        return check_speedup(patches.speedup)
    if patches.artifact is None or patches.policy is not None or not patches.route:
        return None
    return default_speedup(patches.artifact)


def _forecast(
    made: Artifact | None, shipped: OutputKernel | None, speedup: Speedup
) -> Forecast | None:
    """What skips whole calls; ArtifactError where there is no kernel to plan it from.

    made: in the host's own timesteps.
    """
    own = None if made is None else kernel_of(made)
    if made is not None and own is not None:
        return Forecast(own, speedup, at_one(made.header["forecast"]))
    if shipped is not None:
        return Forecast(shipped, speedup)
    if speedup == 1:
        return None
    raise ArtifactError(
        "A speedup needs an artifact with a forecast, or a pipeline of diffusers: calibrate again "
        "with a pipeline whose sampler adds no noise of its own."
    )


def _limited(policy: Policy, limit: Callable[[CacheSchedule], CacheSchedule]) -> Policy:
    def made(timesteps: Any, branches: Any) -> CacheSchedule:
        return limit(policy(timesteps, branches))

    return made
