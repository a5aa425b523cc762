"""The nodes that use an artifact: load it, quantize a MODEL, apply a cache to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from tenuto.artifact import Artifact, kernel_of, schedule_of, tabled
from tenuto.caching import CacheSchedule, LateInterval, made, rules
from tenuto.errors import TenutoError
from tenuto.model import layers as layers_of
from tenuto.numerics import Scheme, known, named
from tenuto.runtime import EXECUTIONS, Patches, Replacements
from tenuto.text import printable

from .adapter import ComfyUI
from .api import ArtifactType, found_by, io
from .artifacts import loaded, missing, names, path_of
from .files import fingerprint, is_there
from .speed import cached, faster, speedup_input


def title(scheme: Scheme) -> str:
    """What a scheme is called in the nodes; workflows have it."""
    if scheme.activation is None:
        name = scheme.name.upper() if scheme.of_files else f"W{scheme.weight.bits}"
        return f"{name} (weights only)"
    name = scheme.name.removesuffix("-static").upper()
    return f"{name}, a range a step" if scheme.stored else name


SCHEMES = {title(s): name for name, s in known().items() if not s.stored}  # without an artifact
FROM_ARTIFACT = "from artifact"
ROUTE, SETTINGS = "route of the artifact", ("first", "period")  # of a policy: what the node asks


class LoadArtifact(io.ComfyNode):
    """A file of models/tenuto, checked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One file in, the artifact and what is in it out."""
        return io.Schema(
            node_id="Tenuto_LoadArtifact",
            **found_by("artifact", "calibration", "load quantization"),
            display_name="Load Tenuto Artifact",
            category="Tenuto",
            description="Reads what calibration found out about one model, from models/tenuto.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=names(),
                    tooltip="A .safetensors file of models/tenuto, made by `tenuto quantize`, by "
                    "`tenuto train-router` or by the node Tenuto Calibrate; or an exported model, "
                    "for the cache schedule and the forecast that it brings.",
                )
            ],
            outputs=[
                ArtifactType.Output(
                    "artifact", "artifact", tooltip="For Quantize Model and Apply Cache."
                ),
                io.String.Output("info", "info", tooltip="What is in the file, in a few lines."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A sentence where the file is not there."""
        return is_there(name, path_of, missing)

    @classmethod
    def fingerprint_inputs(cls, name: str) -> Any:
        """Another file of the same name is another artifact."""
        return fingerprint(name, path_of)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Raises TenutoError in one sentence if it is no artifact."""
        found, lines = loaded(name)
        return io.NodeOutput(found, "\n".join([info(found, name), *lines]))


def info(artifact: Artifact, name: str) -> str:
    """What is in an artifact, in a few lines, and in each part: a MODEL gets the one of its own."""
    header = artifact.header
    schemes = Counter(f["scheme"] for f in header.get("layers", {}).values())
    lines = [f"{name}: {printable(header['family'])} ({printable(header['model_class'])})"]
    lines += [f"{count} layers {printable(scheme)}" for scheme, count in sorted(schemes.items())]
    lines += [f"{len(tabled(header))} temporal tables"] if tabled(header) else []
    route = schedule_of(artifact)
    if route is not None:
        lines.append(
            f"cache schedule: {route.reuse_ratio:.0%} of {len(route.timesteps)} steps x "
            f"{len(route.branches)} branches reused"
        )
    kernel = kernel_of(artifact)
    if kernel is not None:
        lines.append(f"forecast: from {len(kernel.timesteps)} steps of {kernel.images} images")
    lines += [info(part, printable(inner)) for inner, part in artifact.parts.items()]
    return "\n".join(lines)


class QuantizeModel(io.ComfyNode):
    """Quantized layers in a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """MODEL to MODEL."""
        return io.Schema(
            node_id="Tenuto_QuantizeModel",
            **found_by("quantize", "int8", "int4", "w8a8", "less memory"),
            display_name="Tenuto Quantize Model",
            category="Tenuto",
            description="Computes the model's layers from 8- or 4-bit codes: those of an artifact, "
            "or rounded on the fly without calibration. LoRA loaders may come before or after it.",
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is."),
                io.Combo.Input(
                    "scheme",
                    options=[FROM_ARTIFACT, *SCHEMES],
                    default="W8A8",
                    tooltip="What to compute with. W8A8 quantizes weights and activations, the "
                    "others weights alone; 4-bit weights want an artifact.",
                ),
                io.Boolean.Input(
                    "convolutions", default=True, tooltip="On the fly: convolutions too."
                ),
                io.String.Input(
                    "skip",
                    default="",
                    tooltip="On the fly: patterns of layers that stay in full precision, with "
                    "commas between them, such as *.attn2.*, proj_out",
                ),
                ArtifactType.Input(
                    "artifact", optional=True, tooltip="Codes, ranges and tables for this model."
                ),
                io.Combo.Input(
                    "execution",
                    options=[*EXECUTIONS],
                    default="auto",
                    optional=True,
                    tooltip="auto: each layer times int8 and float when it is first used and "
                    "leaves int8 where that is slower. int8: a seed gives the same image in "
                    "every process. float: the codes' values, inputs as they are.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The quantized model."),
                io.String.Output(
                    "report", "report", tooltip="How many layers, how much of the model."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, scheme: str, convolutions: bool, skip: str, artifact: Any = None,
        execution: str = "auto",
    ) -> io.NodeOutput:  # fmt: skip
        """Raises TenutoError in one sentence if the artifact is for another model."""
        if scheme == FROM_ARTIFACT:
            if artifact is None:
                raise TenutoError("Connect an artifact, or choose a scheme to round on the fly.")
            if not artifact.header.get("layers"):
                raise TenutoError("The artifact has no quantized weights.")
            patches = Patches(artifact, route=False, execution=execution)
        else:
            patterns = tuple(p.strip() for p in skip.split(",") if p.strip())
            patches = Patches(
                scheme=named(SCHEMES[scheme]), skip=patterns, convolutions=convolutions,
                execution=execution,
            )  # fmt: skip
        made = ComfyUI().install(model, patches)
        return io.NodeOutput(made.handle, about(made.parts[0].plan, model))


def about(plan: Replacements, model: Any) -> str:
    """How many layers are quantized and how much of the model that is."""
    share = plan.share(layers_of(model.model.diffusion_model))
    layers = ", ".join(f"{n} layers {name}" for name, n in plan.count().items())
    tables = len(plan.tables)
    more = f", {tables} temporal tables" if tables else ""
    return f"{layers}: {share:.0%} of the weights of its layers{more}"


class ApplyCache(io.ComfyNode):
    """Branches of a MODEL reused from step to step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """MODEL to MODEL."""
        return io.Schema(
            node_id="Tenuto_ApplyCache",
            **found_by("cache", "TeaCache", "DeepCache", "first block cache", "skip steps"),
            display_name="Tenuto Apply Cache",
            category="Tenuto",
            description="Makes sampling faster. With a speedup: skips whole calls of the model "
            "and forecasts them, as Tenuto Speed Up does. Else: reuses attention, feed-forward "
            "and residual blocks (in SD3 and Flux whole blocks) of earlier steps, by the "
            "artifact's cache schedule or by a fixed rule. Last in the chain, before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is."),
                io.Combo.Input(
                    "mode",
                    options=[ROUTE, *rules(SETTINGS)],
                    default=LateInterval.title,
                    tooltip="Where to reuse: as the artifact's cache schedule says; all of the "
                    "first steps, then one step of every `period`; or one of every `period` from "
                    "the start on.",
                ),
                io.Int.Input(
                    "first", default=6, min=1, max=1000, tooltip="Steps that are all computed."
                ),
                io.Int.Input(
                    "period", default=2, min=1, max=100, tooltip="1 computes every step."
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="The share of the run before which everything is computed.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="The share of the run after which everything is computed.",
                ),
                io.Boolean.Input(
                    "compute_last", default=True, tooltip="Compute the whole of the last step."
                ),
                ArtifactType.Input(
                    "artifact", optional=True,
                    tooltip="One with a cache schedule, or with a forecast.",
                ),
                speedup_input(1.0, "In place of all settings above. ", optional=True),
            ],
            outputs=[io.Model.Output(tooltip="The model with the cache.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, mode: str, first: int, period: int, start_percent: float,
        end_percent: float, compute_last: bool, artifact: Any = None, speedup: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Raises TenutoError in one sentence if the artifact is for another model."""
        if speedup > 1:
            return faster(model, artifact, speedup)
        limit = bounded(start_percent, end_percent, compute_last)
        if mode != ROUTE:
            policy = made(rules(SETTINGS)[mode], {"first": first, "period": period})
            return cached(model, Patches(policy=policy, limit=limit))
        if artifact is None:
            raise TenutoError("Connect an artifact with a cache schedule, or choose another mode.")
        if schedule_of(artifact) is None:
            raise TenutoError(
                "The artifact has no cache schedule: make one with `tenuto train-router`."
            )
        return cached(model, Patches(artifact, weights=False, limit=limit))


def bounded(start: float, end: float, last: bool) -> Callable[[CacheSchedule], CacheSchedule]:
    """A schedule between two shares of the run alone; last: the last step computes too."""

    def inside(found: CacheSchedule) -> CacheSchedule:
        table, steps = found.table.clone(), len(found.timesteps)
        table[: math.floor(start * steps + 1e-9)] = True
        table[math.ceil(end * steps - 1e-9) :] = True
        if last:
            table[-1:] = True
        return CacheSchedule(table, found.timesteps, found.branches, found.order)

    return inside
