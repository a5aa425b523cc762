"""An artifact in the names of the model that it is to be attached to, and back.

In the file names are canonical: those of diffusers. `localized` checks an artifact against a host's
denoiser and gives its sections the host's names, fuses what the host has fused, turns halves, and
timesteps where the host counts them the other way;
`canonicalized` is the way back, for what was calibrated inside a host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..model import KeyMap, denoiser_of, describe, key_map_of, swapped
from .artifact import Artifact, tabled
from .compact import expanded
from .curve_tables import parts_of_table, with_rows
from .fingerprint import fingerprint
from .in_float import MARKS, check_marks
from .sizes import check_sizes

PER_LAYER = ("scale", "zero_point")  # of activations
PER_ROW = (*PER_LAYER, "step")  # of weights


def localized(
    artifact: Artifact, model: Any, tensor: Callable[[str], Tensor] | None = None
) -> Artifact:
    """`artifact` in the names of `model`, with its codes in full; ArtifactError if it is another's.

    Of one with parts, what it has of this denoiser.
    tensor: gives a parameter of the denoiser by name, where what the model holds is patched.
    """
    artifact.validate()
    denoiser = denoiser_of(model)
    keys = key_map_of(denoiser)
    if MARKS in artifact.header:
        check_marks(artifact.header, denoiser, keys, tensor)
        artifact = with_rows(artifact)
        return artifact if keys is None else in_host(artifact, keys)
    view = denoiser if keys is None else keys.view(denoiser, tensor)
    artifact = artifact.by_denoiser(view)[""]
    artifact.check(view)
    full = with_rows(expanded(artifact, view))
    check_sizes(full, view, model)
    return full if keys is None else in_host(full, keys)


def canonicalized(artifact: Artifact, model: Any) -> Artifact:
    """An artifact that was made of a host's `model`, in canonical names."""
    denoiser = denoiser_of(model)
    keys = key_map_of(denoiser)
    if keys is None:
        return artifact
    view = keys.view(denoiser)
    header: dict[str, Any] = artifact.header | {
        "family": describe(view).family,
        "model_class": keys.model_class,
        "fingerprint": fingerprint(view),
    }
    return _Split(artifact, keys, view, header).artifact()


def in_host(artifact: Artifact, keys: KeyMap) -> Artifact:
    """`artifact`, whose codes are in full, under the names that `keys` has for a host."""
    header, tensors = dict(artifact.header), {}
    for key, value in artifact.tensors.items():
        if not key.startswith(("weights/", "ranges/", "temporal/")):
            tensors[key] = value
    known = artifact.header.get("layers", {})
    layers = {}
    for host, parts in keys.layers().items():
        given = [part for part in parts if part in known]
        if given:
            _fused(artifact, keys, host, parts, tensors)
            layers[host] = _facts([known.get(part) for part in parts], host)
    _all_found(known, keys)
    if "layers" in header:
        header["layers"] = layers
    if "temporal" in header:
        header["temporal"] = _tables(artifact, keys, tensors)
    if "route" in header:
        branches = [keys.module(name)[0] for name in header["route"]["branches"]]
        header["route"] = header["route"] | {"branches": branches}
    return Artifact(_timed(header, keys), tensors)


def _timed(header: dict[str, Any], keys: KeyMap) -> dict[str, Any]:
    """`header` with every timestep as the other side counts it."""
    found = dict(header)
    for key in ("schedule", "route", "forecast"):
        if key in header:
            found[key] = header[key] | {"timesteps": keys.times(header[key]["timesteps"])}
    if "noise" in header.get("forecast", {}):
        noise = [[*keys.times([time]), *pair] for time, *pair in header["forecast"]["noise"]]
        found["forecast"] |= {"noise": noise}
    if "timestep" in header.get("check", {}):
        (step,) = keys.times([header["check"]["timestep"]])
        found["check"] = header["check"] | {"timestep": step}
    return found


def _all_found(known: dict[str, Any], keys: KeyMap) -> None:
    inside = {part for parts in keys.layers().values() for part in parts}
    stray = sorted(set(known) - inside)
    if stray:
        raise ArtifactError(f"The model has no layer {stray[0]}, which the artifact names.")


def _facts(parts: list[Any], host: str) -> dict[str, Any]:
    """What the header says of a layer that `parts` are fused in; they must be of one scheme."""
    schemes = {None if part is None else part["scheme"] for part in parts}
    if len(schemes) > 1:
        raise ArtifactError(
            f"This host has {host} in one, of which the artifact quantizes the parts differently: "
            "quantize what shares an input alike."
        )
    rows = sum(part["shape"][0] for part in parts)
    errors = [part["weight_error"] for part in parts if "weight_error" in part]
    found = {"scheme": parts[0]["scheme"], "shape": [rows, *parts[0]["shape"][1:]]}
    return found | ({"weight_error": max(errors)} if errors else {})


def _fused(
    artifact: Artifact, keys: KeyMap, host: str, parts: list[str], tensors: dict[str, Tensor]
) -> None:
    """The codes, row by row, and the one activation range of `parts`, as the layer `host`."""
    known = artifact.tensors
    for end in ("qdata", *PER_ROW):
        found = [known.get(f"weights/{part}.{end}") for part in parts]
        kept = [
            swapped(t) if keys.places[f"{part}.weight"].swapped else t
            for part, t in zip(parts, found, strict=True)
            if t is not None
        ]
        if len(kept) == len(parts):
            tensors[f"weights/{host}.{end}"] = torch.cat(kept)
    columns = [known.get(f"weights/{part}.channel") for part in parts]
    if columns[0] is not None:
        if not all(t is not None and torch.equal(t, columns[0]) for t in columns):
            raise ArtifactError(
                f"This host has {host} in one, and the scales per column of its parts differ."
            )
        tensors[f"weights/{host}.channel"] = columns[0]
    for end in PER_LAYER:
        found = [known.get(f"ranges/{part}.{end}") for part in parts]
        if found[0] is None:
            continue
        if not all(t is not None and torch.equal(t, found[0]) for t in found):
            raise ArtifactError(
                f"This host has {host} in one, and the activation ranges of its parts differ."
            )
        tensors[f"ranges/{host}.{end}"] = found[0]


def _tables(artifact: Artifact, keys: KeyMap, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The temporal section: a module with several outputs may be several modules in the host."""
    facts, values = artifact.header["temporal"], artifact.section("temporal")
    tables = tabled(artifact.header)
    modules: dict[str, Any] = {}
    for name, about in facts["modules"].items():
        hosts = keys.module(name)
        if name not in tables:
            modules[hosts[0]] = about
            continue
        rows = [values[f"{name}.{number}"] for number in range(len(about["outputs"]))]
        if _is_swapped(keys, name):
            rows = [_swapped_last(t) for t in rows]
        if len(hosts) == 1:
            groups = [(hosts[0], rows, about["outputs"], about["single"])]
        else:
            each = zip(hosts, rows, about["outputs"], strict=True)
            groups = [(host, [row], [shape], True) for host, row, shape in each]
        for host, some, shapes, single in groups:
            modules[host] = about | {"outputs": shapes, "single": single}
            tensors |= {f"temporal/{host}.{n}": t for n, t in enumerate(some)}
    return facts | {"modules": modules}


def _is_swapped(keys: KeyMap, name: str) -> bool:
    """Whether a module is a layer whose outputs have changed places in the host."""
    place = keys.places.get(f"{name}.weight")
    return place is not None and place.swapped


def _swapped_last(table: Tensor) -> Tensor:
    """The outputs (T, ..., C) of such a layer, or their codes, with the halves in other order."""
    return swapped(table.movedim(-1, 0)).movedim(0, -1).contiguous()


class _Split:
    """The way back: layers of a host taken apart."""

    def __init__(
        self, made: Artifact, keys: KeyMap, view: nn.Module, header: dict[str, Any]
    ) -> None:
        self.made, self.keys, self.view, self.header = made, keys, view, header
        self.tensors: dict[str, Tensor] = {}

    def artifact(self) -> Artifact:
        """The whole."""
        for key, value in self.made.tensors.items():
            if not key.startswith(("weights/", "ranges/", "temporal/")):
                self.tensors[key] = value
        known, layers = self.made.header.get("layers", {}), {}
        for host, parts in self.keys.layers().items():
            if host in known:
                layers |= {part: self._layer(host, part, known[host]) for part in parts}
        if "layers" in self.header:
            self.header["layers"] = layers
        if "temporal" in self.header:
            self._temporal()
        if "route" in self.header:
            route = self.header["route"]
            branches = [self.keys.canonical(name) for name in route["branches"]]
            self.header["route"] = route | {"branches": branches}
        return Artifact(_timed(self.header, self.keys), self.tensors)

    def _layer(self, host: str, part: str, facts: dict[str, Any]) -> dict[str, Any]:
        place = self.keys.places[f"{part}.weight"]
        for end in ("qdata", *PER_ROW):
            rows = self.made.tensors.get(f"weights/{host}.{end}")
            if rows is not None:
                some = rows[slice(*place.rows)]
                self.tensors[f"weights/{part}.{end}"] = swapped(some) if place.swapped else some
            whole = self.made.tensors.get(f"ranges/{host}.{end}")
            if whole is not None:
                self.tensors[f"ranges/{part}.{end}"] = whole
        columns = self.made.tensors.get(f"weights/{host}.channel")
        if columns is not None:
            self.tensors[f"weights/{part}.channel"] = columns
        return facts | {"shape": [place.rows[1] - place.rows[0], *facts["shape"][1:]]}

    def _temporal(self) -> None:
        """Tables of modules that are one in diffusers join again; what has no name stays out."""
        facts = self.header["temporal"]
        values, modules, known = self.made.section("temporal"), {}, dict(facts["modules"])
        for name, hosts in self.keys.modules.items():
            if not all(h in known for h in hosts) or self._inside(name, modules):
                continue
            about = [known[h] for h in hosts]
            if len({f["kind"] for f in about}) > 1:
                continue  # a table of one half alone
            if about[0]["kind"] != "table":
                modules[name] = about[0]
                continue
            given = [f"{h}.{n}" for h in hosts for n in range(len(known[h]["outputs"]))]
            shapes = [shape for f in about for shape in f["outputs"]]
            modules[name] = about[0] | {"outputs": shapes, "single": len(hosts) == 1}
            for n, source in enumerate(given):
                for end, t in parts_of_table(values, source).items():
                    self.tensors[f"temporal/{name}.{n}{end}"] = t
        for host, about in known.items():  # layers by themselves: a residual block's embedding
            name = self.keys.canonical(host)
            if host not in {h for hosts in self.keys.modules.values() for h in hosts}:
                modules[name] = about
                for n in range(len(about.get("outputs", ()))):
                    for end, t in parts_of_table(values, f"{host}.{n}").items():
                        if not end and _is_swapped(self.keys, name):
                            t = _swapped_last(t)
                        self.tensors[f"temporal/{name}.{n}{end}"] = t
        self.header["temporal"] = facts | {"modules": modules}

    @staticmethod
    def _inside(name: str, modules: dict[str, Any]) -> bool:
        return any(name.startswith(f"{other}.") for other in modules)
