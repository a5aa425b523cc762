"""The artifact: one safetensors file with a JSON header. Data, not patches.

Tensors are called "section/canonical.name.part"; the sections are weights, ranges, temporal, route,
encoder and forecast. A pipeline's further denoisers are parts, with such sections of their own.
Everything is checked before anything is allocated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, SchemeError
from ..files import write_tensors
from ..model import check_weights, describe, key_map_of, parts_of
from ..numerics import Format, Scheme, layout
from ..sampling import OutputKernel
from ..text import printable
from .curve_tables import parts_needed
from .fingerprint import fingerprint, same, versions
from .float_codes import PARTS, in_file, in_memory
from .forecast import joined_forecast, kernel_of
from .forms import check_forms, wanted
from .header import ALONE, KEY, WRONG, check_fingerprint, opened
from .in_float import MARKS, check_marks
from .parts import apart, joined
from .values import WORDS, check_floats, check_values

SECTIONS = ("weights", "ranges", "temporal", "route", "encoder", "forecast")
STEPWISE = ("ranges/", "temporal/")
OF_WEIGHTS = ("temporal", "compact", "check", "left_in_float", "kept_in_float")  # header keys


@dataclass
class Artifact:
    """What calibration found out about one model. header: plain data. tensors: by section/name.

    parts: the same of the denoisers beside the main one, by their names in the pipeline.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Artifact] = field(default_factory=dict)

    @staticmethod
    def new(
        model: Any, schedule: dict[str, Any], made: dict[str, Any] | None = None, part: str = ""
    ) -> Artifact:
        """An empty artifact of `model`, or of a denoiser of it; part: as `parts_of` names it.

        schedule: {"timesteps", "steps", "guidance"}.
        """
        denoiser = parts_of(model)[part]
        check_weights(denoiser, hooked=True)
        header = {
            "format_version": ALONE,
            "family": describe(denoiser).family,
            "model_class": type(denoiser).__name__,
            "prediction_type": _prediction(model),
            "fingerprint": fingerprint(denoiser),
            "schedule": schedule,
            "made": versions() | (made or {}),
        }
        return Artifact(header)

    @staticmethod
    def of(given: Artifact | str | Path) -> Artifact:
        """`given`, or the artifact in the file of that name; ArtifactError if it is neither."""
        if isinstance(given, Artifact):
            return given
        if isinstance(given, str | Path):
            return Artifact.load(given)
        raise ArtifactError(f"An artifact or its file is expected, not {type(given).__name__}.")

    def add_forecast(self, kernel: OutputKernel | None) -> Artifact:
        """This with the section that says which calls may be skipped, where there is a kernel."""
        if kernel is not None:
            self.header["forecast"] = kernel.about()
            self.tensors["forecast/kernel"] = kernel.stored
        return self

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors of one section, without its name in front."""
        return {k.split("/", 1)[1]: v for k, v in self.tensors.items() if k.startswith(name + "/")}

    def __or__(self, other: Artifact) -> Artifact:
        """Both artifacts in one; the right one's sections win. They must be of the same model.

        So it is with each part.
        """
        if not same(self.header["fingerprint"], other.header["fingerprint"]):
            raise ArtifactError("The two artifacts belong to different models.")
        taken = {key.split("/", 1)[0] for key in other.tensors}
        whole = bool(taken & {"weights", "temporal"})  # one quantization: they belong together
        taken |= {"weights", "ranges", "temporal"} if whole else set()
        kept = {k: v for k, v in self.tensors.items() if k.split("/", 1)[0] not in taken}
        header = self.header | other.header
        facts, kernel = joined_forecast(self, other)
        header |= facts
        header["made"] = self.header["made"] | other.header["made"]
        header.pop(MARKS, None)
        for key in OF_WEIGHTS:
            if whole and key not in other.header:
                header.pop(key, None)
        bound = any(k.startswith(STEPWISE) for k in kept)  # to the steps they were found at
        if bound or taken == {"encoder"}:
            header["schedule"] = self.header["schedule"]
        parts = self.parts | other.parts
        parts |= {n: self.parts[n] | other.parts[n] for n in self.parts.keys() & other.parts.keys()}
        return Artifact(header, kept | other.tensors | kernel, parts)

    def alone(self) -> Artifact:
        """What it has of the main denoiser."""
        return replace(self, parts={})

    def by_denoiser(self, model: Any) -> dict[str, Artifact]:
        """What it has of each denoiser of `model`, named as in `parts_of`, without parts.

        A denoiser by itself, as hosts load them, gets what its weights fit.
        """
        own, found = {"": self.alone(), **self.parts}, parts_of(model)
        if len(found) > 1 or not self.parts:
            return {name: own[name] for name in found if name in own}
        check_weights(found[""])
        mark = fingerprint(found[""])
        fits = (part for part in own.values() if same(part.header["fingerprint"], mark))
        return {"": next(fits, own[""])}

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Equal artifacts give equal bytes."""
        parts = {n: (p.header, in_file(p.header, p.tensors)) for n, p in self.parts.items()}
        header, tensors = joined(self.header, in_file(self.header, self.tensors), parts)
        text = json.dumps(header, sort_keys=True, separators=(",", ":"))
        try:
            write_tensors(Path(path), tensors, {KEY: text})
        except OSError as error:
            raise ArtifactError(f"Cannot write {path}: {error.strerror or error}.") from error

    @staticmethod
    def load(path: str | Path) -> Artifact:
        """Read a file; ArtifactError says in one sentence what is wrong with it."""
        with opened(path) as (header, file):
            try:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except AttributeError as error:
                said = f"{path} has tensors of a type that this torch does not know"
                raise ArtifactError(f"{said}: {printable(error)}.") from error
        own, parts = apart(header, in_memory(tensors))
        found = Artifact(*own, {name: Artifact(*part) for name, part in parts.items()})
        found.validate(str(path))
        return found

    def validate(self, name: str = "The artifact") -> None:
        """Check that header and tensors fit each other, and those of each part."""
        for part, own in self.parts.items():
            own.validate(f"{name} ({printable(part, WORDS)})")
        stray = {key.split("/", 1)[0] for key in self.tensors} - set(SECTIONS)
        if stray:
            said = printable(", ".join(sorted(stray)), WORDS)
            raise ArtifactError(f"{name} has unknown sections: {said}.")
        try:
            check_forms(self.header)
            schemes = {k: Scheme.from_json(v) for k, v in self.header.get("schemes", {}).items()}
            for layer, facts in self.header.get("layers", {}).items():
                self._check_layer(layer, tuple(facts["shape"]), schemes[facts["scheme"]], name)
            for encoder, facts in self.header.get("encoders", {}).items():
                self._check_encoder(encoder, facts, name)
            kernel_of(self)
            for module, facts in tabled(self.header).items():
                if wanted(bool, facts["single"]) and len(facts["outputs"]) != 1:
                    raise ValueError("a single tensor is one")
                self._check_table(module, [tuple(shape) for shape in facts["outputs"]], name)
        except (*WRONG, SchemeError) as error:
            raise ArtifactError(
                f"{name} is damaged: its header does not fit its tensors."
            ) from error

    def _check_encoder(self, encoder: str, facts: dict[str, Any], name: str) -> None:
        """The codes of a text encoder; its weights alone are quantized."""
        schemes = {k: Scheme.from_json(v) for k, v in facts["schemes"].items()}
        if any(scheme.activation is not None for scheme in schemes.values()):
            said = f"the inputs of {printable(encoder, WORDS)} have a format"
            raise ArtifactError(f"{name} is damaged: {said}.")
        check_fingerprint(facts["fingerprint"])
        for layer, about in facts["layers"].items():
            form = schemes[about["scheme"]].weight
            needed = layout(f"{encoder}.{layer}", tuple(about["shape"]), form)
            self._check_tensors({f"encoder/{k}": v for k, v in needed.items()}, name)
            self._check_floats(f"encoder/{encoder}.{layer}", form, name)

    def _check_table(self, module: str, outputs: list[tuple[int, ...]], name: str) -> None:
        """The features of one module, a row for every step; none of its layers beside them."""
        steps = self._steps()
        for number, shape in enumerate(outputs):
            key = f"temporal/{module}.{number}"
            found = self.tensors.get(key)
            if found is None:
                raise ArtifactError(f"{name} lacks {printable(key, WORDS)}.")
            if found.dtype is torch.int8:
                self._check_tensors(parts_needed(key, found, steps, shape), name)
                continue
            fits = tuple(found.shape) == (steps, *shape)
            if not fits or found.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise ArtifactError(f"{name} is damaged: {printable(key, WORDS)} does not fit.")
            check_values(key, found, name)
        if not outputs or any(
            f"{n}.".startswith(f"{module}.") for n in self.header.get("layers", {})
        ):
            raise ArtifactError(f"{name} is damaged: {printable(module, WORDS)} is no table.")

    def _check_layer(self, layer: str, shape: tuple[int, ...], scheme: Scheme, name: str) -> None:
        """What `attach` will read, of the shape and type that it will need."""
        parts = layout(layer, shape, scheme.weight)
        if "compact" in self.header:  # see compact.py
            facts, stream = self.header["compact"][layer], self.tensors[f"weights/{layer}.delta"]
            if not (0 <= facts["most"] <= 127 and 0 <= facts["crc32"] < 2**32):
                raise ValueError("no such differences")
            parts[f"{layer}.delta"] = (torch.uint8, (stream.numel(),))
            del parts[f"{layer}.qdata"]
        needed = {f"weights/{k}": v for k, v in parts.items()}
        if scheme.activation is not None and scheme.stored:
            steps = self._steps() if scheme.activation.per_step else 1
            fact = (torch.float32, (steps,))
            needed |= {f"ranges/{layer}.scale": fact, f"ranges/{layer}.zero_point": fact}
        self._check_tensors(needed, name)
        self._check_floats(f"weights/{layer}", scheme.weight, name)

    def _check_floats(self, layer: str, form: Format, name: str) -> None:
        """Codes or steps of a layer that are 8-bit floats."""
        key = f"{layer}.{PARTS.get(form.dtype)}"
        if key in self.tensors:
            check_floats(key, self.tensors[key], name)

    def _steps(self) -> int:
        """How many steps it was calibrated at; ValueError where there are none."""
        steps = len(self.header["schedule"]["timesteps"])
        if not steps:
            raise ValueError("nothing can be of no step")
        return steps

    def _check_tensors(self, needed: dict[str, Any], name: str) -> None:
        for key, (dtype, size) in needed.items():
            found = self.tensors.get(key)
            if found is None:
                raise ArtifactError(f"{name} lacks {printable(key, WORDS)}.")
            if found.dtype is not dtype or tuple(found.shape) != size:
                raise ArtifactError(
                    f"{name} is damaged: {printable(key, WORDS)} does not fit its layer."
                )
            check_values(key, found, name)

    def check(self, model: Any) -> None:
        """Raise ArtifactError unless this artifact was made for the weights of `model`."""
        denoisers = parts_of(model)
        for name, own in self.by_denoiser(model).items():
            own._check(denoisers[name], name)

    def _check(self, denoiser: nn.Module, part: str) -> None:
        check_weights(denoiser, hooked=True)
        if MARKS in self.header:
            return check_marks(self.header, denoiser, key_map_of(denoiser))
        kind = self.header["model_class"]
        if type(denoiser).__name__ != kind and describe(denoiser).family != self.header["family"]:
            raise ArtifactError(
                f"The artifact is for a {printable(kind, WORDS)}, and the model is a "
                f"{type(denoiser).__name__}."
            )
        if not same(self.header["fingerprint"], fingerprint(denoiser)):
            said = f"those of {part} differ" if part else "the weights differ"
            raise ArtifactError(f"The artifact was made for another model: {said}.")


def tabled(header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a header says of each module that is a table: {"outputs": shapes, "single": ...}."""
    modules = header.get("temporal", {}).get("modules", {})
    return {name: facts for name, facts in modules.items() if facts["kind"] == "table"}


def _prediction(model: Any) -> str | None:
    config = getattr(getattr(model, "scheduler", None), "config", None)
    return config.get("prediction_type") if config is not None else None
