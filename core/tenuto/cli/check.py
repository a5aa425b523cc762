"""`tenuto check`: what calibration would make of a model, and what would stop it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifact.summary import mib, table
from ..calibration import ENCODERS, QUANTIZE, USES
from ..errors import ModelError
from ..sampling.file_contents import DENOISER, contents
from .answers import quantize_line
from .checks import check_quantization
from .console import Answer, Bars
from .model_source import model_source
from .session import checked, loaded, sampling_of

IMPOSSIBLE = 1  # exit code; that of bad input is another


def check(
    model: str,
    *,
    scheme: str | None = None,
    text_encoder: str | None = None,
    preset: str = "quick",
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    device: str | None = None,
    run: bool = False,
    config: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Say what works with a model and what does not; `run` times one call of the denoiser.

    A folder or a demo model is not loaded for it, unless it runs. The exit code is `IMPOSSIBLE`
    where `tenuto quantize` would refuse to do what is asked for.
    """
    bars = bars or Bars()
    wanted, _ = check_quantization(scheme, preset, text_encoder=text_encoder)
    try:
        source = model_source(model, config, bars)
    except ModelError as error:
        known = None if run or config is not None else _of_header(model, error)
        if known is None:
            raise
        return known
    sampling = sampling_of(source.place, steps=steps, guidance=guidance, device=device, call=call)
    encoder = text_encoder is not None
    found = None if run else checked(source.place, sampling, wanted, encoder, preset=preset)
    if found is None:
        pipe = loaded(source.place, sampling.device, bars)
        found = checked(pipe, sampling, wanted, encoder, preset=preset, run=run)
    assert found is not None
    uses = [ENCODERS] * encoder + [QUANTIZE] * (scheme is not None or not encoder)
    if found.stopping(*uses):
        return Answer(str(found), found.to_json(), code=IMPOSSIBLE)
    line = quantize_line(
        source.line, call, scheme=scheme, text_encoder=text_encoder, steps=steps, guidance=guidance,
        preset=None if preset == "quick" else preset, device=device,
    )  # fmt: skip
    return Answer(str(found), found.to_json(), next=line)


def _of_header(model: str, error: ModelError) -> Answer | None:
    """What the header of a single file tells, and why no more can be said; None of other models."""
    path = Path(model).expanduser()
    found = contents(path) if path.is_file() else None
    if found is None:
        return None
    rows = [("file", str(path)), ("kind", found.kind or "not known to diffusers")]
    for part in sorted(found.sizes, key=lambda part: part != DENOISER):
        rows.append((part, f"{mib(found.sizes[part])} in {found.types[part]}"))
    data: dict[str, Any] = {"file": str(path), "kind": found.kind or None, "sizes": found.sizes}
    data |= {"types": found.types, "problems": [{"sentence": str(error), "stops": [*USES]}]}
    return Answer("\n".join([*table(rows), f"nothing works yet: {error}"]), data, code=IMPOSSIBLE)
