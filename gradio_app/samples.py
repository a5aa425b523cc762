"""Python that uses an artifact, or what was exported of it, whole and with this machine's paths."""

from __future__ import annotations

import inspect
from pathlib import Path
from textwrap import indent
from typing import Any

from tenuto.cli.checks import device_of
from tenuto.sampling.loading import PREFIX, class_of, folder_of
from tenuto.sampling.pipeline_call import LABELS, PLAIN, guidance_name
from tenuto.sampling.single_file import DENOISERS, NOTE
from tenuto.sampling.weight_files import parts_in

from .bench import Bench
from .call import IMAGES, taken
from .studio import defaults_of

PROMPT = "a golden retriever"
BF16 = "torch_dtype=torch.bfloat16"


def attached(bench: Bench, model: str, file: Path) -> str:
    """An image by an artifact as it is."""
    place = bench.places.model(model)
    gpu = device_of(bench.settings.device).type == "cuda"
    how = ', device="cuda", dtype=torch.bfloat16' if gpu else ""
    imports, line, saved = _called(place, file)
    lines = ["import torch"] * gpu + [*imports, "import tenuto as tn"]
    lines += ["", f"pipe = tn.open_model({bench.places.source(model)!r}{how})"]
    lines += [f"with tn.attach(pipe, {str(file)!r}):", indent(line, "    "), saved]
    return "\n".join(lines)


def exported(bench: Bench, model: str, file: Path, to: str, out: Path) -> str:
    """An image by what was exported, in diffusers; nothing where it is for other programs alone."""
    place = bench.places.model(model)
    folder = folder_of(place)
    parts = {name: kind for name, (_, kind) in parts_in(folder)} if folder else {}
    part = next((name for name in DENOISERS if name in parts), "")
    if not part or to not in ("gguf", "diffusers"):
        return ""
    kind, whole = parts[part], not model.startswith(PREFIX) and not (Path(place) / NOTE).exists()
    source = bench.places.source(model)
    if to == "gguf" and not (whole and _reads_files(kind)):
        return ""
    names = [kind] + ["DiffusionPipeline"] * whole + ["GGUFQuantizationConfig"] * (to == "gguf")
    imports, line, saved = _called(place, file)
    lines = ["import torch", f"from diffusers import {', '.join(names)}"]
    lines += imports + ["import tenuto as tn"] * (not whole) + [""]
    if to == "gguf":
        how = "quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)"
        options = repr(str(out)), how, f"config={source!r}", f"subfolder={part!r}", BF16
        lines += [f"{part} = {_over_lines(f'{kind}.from_single_file', *options)}"]
    else:
        lines += [f"{part} = {kind}.from_pretrained({str(out)!r}, {BF16})"]
    if whole:
        begin = f"pipe = DiffusionPipeline.from_pretrained({source!r}"
        lines += [f"{begin}, {part}={part}, {BF16})"]
    else:  # which diffusers alone does not open
        lines += [
            f"pipe = tn.open_model({source!r}, dtype=torch.bfloat16)",
            f"pipe.{part} = {part}",
        ]
    return "\n".join([*lines, line, saved])


def _reads_files(kind: str) -> bool:
    """Whether a class of diffusers opens a single file."""
    import diffusers

    return hasattr(getattr(diffusers, kind, None), "from_single_file")


def _called(place: str, file: Path) -> tuple[list[str], str, str]:
    """Imports, the line that calls the pipeline as the artifact was made for, and what saves it."""
    kind = class_of(place)
    own, known = taken(kind), {} if kind is None else inspect.signature(kind.__call__).parameters
    steps, guidance = defaults_of(place, file)
    said: dict[str, Any] = {"num_inference_steps": steps} | PLAIN | {LABELS: [207]}
    guides = guidance_name({name: p.default for name, p in known.items()})
    if guides is not None and guidance is not None:
        said[guides] = guidance
    options = [repr(PROMPT)] if kind is None or "prompt" in known else []
    images = [own[option] for option in IMAGES if option in own]
    options += [f"{name}=load_image({name + '.png'!r})" for name in images]
    options += [f"{name}={value!r}" for name, value in said.items() if name in known]
    video = "frames" in own
    loads = ["export_to_video"] * video + ["load_image"] * bool(images)
    imports = [f"from diffusers.utils import {', '.join(loads)}"] * bool(loads)
    call = _over_lines("pipe", *options)
    if video:
        return imports, f"video = {call}.frames[0]", "export_to_video(video, 'video.mp4')"
    return imports, f"image = {call}.images[0]", "image.save('image.png')"


def _over_lines(name: str, *options: str) -> str:
    """A call, an option a line."""
    return "\n".join([f"{name}(", *(f"    {option}," for option in options), ")"])
