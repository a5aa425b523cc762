"""What the commands say of what they made, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..artifact.summary import check_lines, counted, layers_by_scheme, mib
from ..caching import SHORTEST, predicted
from ..measure import resident_weight_bytes
from ..model import denoisers_of
from ..runtime import Tenuto, attach
from ..sampling.loading import on_disk
from .calls import given_again


def quantized_lines(out: Path, artifact: Artifact, pipe: Any, count: int) -> list[str]:
    """What was made: size, layers by scheme, and how they execute here."""
    denoisers = denoisers_of(pipe)
    before, size = resident_weight_bytes(*denoisers.values()), out.stat().st_size
    execution, encoders = {}, {}
    if not on_disk(pipe):
        with attach(pipe, artifact, route=False, execution="int8") as attached:
            execution, encoders = attached.execution()["layers"], attached.encoders()
    layers = layers_by_scheme(artifact)
    was = "the denoiser was" if len(denoisers) == 1 else f"{len(denoisers)} denoisers were"
    was = "the denoiser would be" if on_disk(pipe) else was
    found = [f"{out}: {mib(size)}; {was} {mib(before)} in memory."]
    if layers:
        found.append(f"Layers: {', '.join(f'{n} in {name}' for name, n in layers.items())}.")
    if execution:
        how = ", ".join(f"{how} ({n})" for how, n in execution.items())
        found.append(f"Here they run as {how}.")
    found += [f"Checked: {line}." for line in check_lines(artifact.header)]
    found += [f"{name}: {counted(n, 'layer')}, weights alone." for name, n in encoders.items()]
    return [*found, f"Calibrated on {counted(count, 'prompt')}."]


def skipped_line(attached: Any) -> list[str]:
    """What a forecast did in the run that is over: nothing, or one line."""
    found = attached.forecast() if isinstance(attached, Tenuto) else None
    if not found:
        return []
    if not found["skipped"]:
        few = (
            f": runs of fewer than {SHORTEST} steps compute each"
            if found["steps"] < SHORTEST
            else ""
        )
        return [f"None of the {counted(found['steps'], 'call')} was skipped{few}."]
    said = predicted(found["predicted_db"], bool(found["kernel"]))
    return [f"{found['skipped']} of {found['steps']} calls were skipped. {said}"]


def compare_line(
    model: str, artifact: Path, call: Mapping[str, Any] | None = None, **options: Any
) -> str:
    """The command that measures what was just made. model: as the command line has it.

    It takes steps, guidance and call from the artifact, but for images. call, options: what was
    given and is not there.
    """
    return f"tenuto compare {model}{given_again(call, artifact=artifact, **options)}"


def quantize_line(model: str, call: Mapping[str, Any] | None = None, **options: Any) -> str:
    """The command that calibrates a model as it was just used, or asked about."""
    kept = {key: value for key, value in options.items() if value is not None}
    kept = kept if "text_encoder" in kept else {"scheme": "w8a8"} | kept
    return f"tenuto quantize {model}{given_again(call, **kept)} --out quantized.safetensors"
