"""What the command checks before it loads a model, each with one sentence if it is wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ..artifact import Artifact
from ..caching import Speedup, check_speedup
from ..calibration import Preset, effort
from ..errors import ArtifactError, TenutoError
from ..model import encoders_of
from ..numerics import Scheme, named
from ..resume import MANIFEST
from ..sampling import Trajectory, processes
from ..sampling.loading import PREFIX, prompts
from ..text import printable, prompts_of

RECORDING = "recording"  # the folder of the recording inside the work folder


def check_file(path: Path) -> None:
    """Raise TenutoError unless a file can be written at `path`; nothing is left there."""
    if path.exists() and not path.is_file():
        raise TenutoError(f"Cannot write {path}: it is not a file.")
    folder = next(p for p in (path.parent, *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TenutoError(f"Cannot write {path}: {error.strerror or error}.") from error


def check_picture(path: Path | Literal[True], artifact: Path) -> Path:
    """Where an image of `artifact` goes: `path`, or beside it if that is True. A PNG only."""
    out = artifact.with_suffix(".png") if path is True else path
    if out.suffix.lower() != ".png" or out.absolute() == artifact.absolute():
        raise TenutoError(f"Cannot write a plot to {out}: name another file that ends in .png.")
    check_file(out)
    return out


def check_image(path: Path) -> None:
    """`check_file`, of an image: a PNG is written, whatever it were called."""
    check_file(path)
    if path.suffix.lower() != ".png":
        raise TenutoError(f"Images are written as PNG: name a file that ends in .png, not {path}.")


def work_folder(path: Path) -> Path:
    """Where unfinished work for `path` is kept: NAME.work beside NAME.safetensors."""
    return path.with_name(f"{path.stem}.work")


def check_out(path: Path) -> Path:
    """`check_file`, and the work folder that belongs to it."""
    check_file(path)
    work = work_folder(path)
    if work == path or (work.exists() and not work.is_dir()) or any(_foreign(work)):
        raise TenutoError(f"Unfinished work would be kept in {work}, which is taken: rename --out.")
    if path.suffix.lower() != ".safetensors":  # hosts list no others
        raise TenutoError(f"--out is a file that ends in .safetensors, and {path} is none.")
    return work


def check_kept(out: Path, *sources: str | Path | None) -> None:
    """TenutoError where `out` would replace a file that is read: a model, an artifact, a LoRA."""
    place = out.resolve()
    for source in (Path(s).expanduser().resolve() for s in sources if s is not None):
        if place == source or (place.exists() and source in place.parents):
            raise TenutoError(f"{out} is a file of the model itself: name another one.")


def _foreign(work: Path) -> Iterator[Path]:
    """What lies in `work` though no job of ours has begun there."""
    if work.is_dir() and not (work / MANIFEST).exists():
        yield from (p for p in work.iterdir() if p.name != RECORDING and p.suffix != ".part")


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompts file; TenutoError if there are none."""
    try:
        found = prompts_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TenutoError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise TenutoError(f"{path} is not a text file in UTF-8.") from error
    if not found:
        raise TenutoError(f"{path} holds no prompt: write one a line.")
    return found


def calibration_prompts(model: str, file: Path | None = None) -> list[str]:
    """The prompts in `file`, else the list that ships for such a model."""
    if file is not None:
        return read_prompts(file)
    return prompts("default" if model.startswith(PREFIX) else "general")


def comparison_prompts(model: str, file: Path | None, count: int) -> list[str]:
    """The prompts in `file`, else some that calibration does not see: the far end of the list."""
    if file is not None:
        return read_prompts(file)
    if model.startswith(PREFIX):
        return prompts("evaluation")
    return prompts("general")[::-1][:count]


def check_quantization(
    scheme: str | None = None,
    preset: str = "quick",
    *,
    text_encoder: str | None = None,
    method: str | None = None,
    rounding: str | None = None,
    temporal: str = "auto",
    table_budget: float | None = None,
    under_cache: bool = False,
) -> tuple[Scheme | None, Preset]:
    """The scheme, if any, and the preset; TenutoError where what is chosen does not fit them."""
    from ..calibration import check_under, encoder_scheme
    from ..calibration.temporal.maintenance import check_choice
    from ..calibration.temporal.selection import check_budget

    if method is not None and text_encoder is None:
        raise TenutoError("--method says how text encoders are rounded: give --text-encoder too.")
    if text_encoder is not None:
        encoder_scheme(text_encoder, method or "gptq")
    found, effort_of = None if scheme is None else named(scheme), effort(preset)
    effort_of.rounding(rounding, found)
    if rounding is not None and (found is None or found.weight.bits == 8):
        raise TenutoError("Only weights below 8 bits can round otherwise: take w4a8 or w4a16.")
    check_budget(table_budget, check_choice(temporal))
    if under_cache and found is not None:
        check_under(2.0, found, effort_of, rounding)
    return found, effort_of


def check_wanted(
    scheme: str | None,
    text_encoder: str | None,
    speedup: Speedup | None,
    reuse: float | None,
    under_cache: bool = False,
) -> tuple[Speedup | None, Speedup | None]:
    """The budget that an artifact is to have by default and that under which it is calibrated.

    None for none. TenutoError where they do not go with what it is to be of.
    """
    if scheme is None and text_encoder is None:
        raise TenutoError("Say what to quantize: --scheme, --text-encoder or both.")
    if speedup is not None and reuse is not None:
        raise TenutoError("Give --speedup or --reuse, not both: each follows from the other.")
    asked = speedup if reuse is None else 1 / (1 - reuse)
    if asked is not None and scheme is None:
        raise TenutoError("Text encoders alone have no forecast: --speedup needs --scheme.")
    if under_cache and asked in (None, 1):
        raise TenutoError("--under-cache needs what is skipped: give --speedup or --reuse too.")
    default = None if asked is None else check_speedup(asked)
    return default, default if under_cache else None


def check_kernel(speedup: Speedup | None, recorded: Trajectory) -> Trajectory:
    """`recorded`; TenutoError where a speedup is to be stored and it has not what that needs."""
    if speedup not in (None, 1) and recorded.kernel is None:
        raise TenutoError(
            "This pipeline has no forecast: --speedup needs one denoiser, and a sampler that adds "
            "no noise of its own."
        )
    return recorded


def how_called(compile: bool, graphs: bool | None, attached: bool = True) -> dict[str, Any]:
    """As `attach` and `compare` take them. graphs: None and True: where they are faster.

    TenutoError where one of them is asked for and nothing is `attached`.
    """
    if (compile or graphs) and not attached:
        raise TenutoError(
            "--compile and --graphs are for a model with something attached: give --artifact or "
            "--speedup."
        )
    return {"compile": compile, "graphs": False if graphs is False else "auto"}


def load_artifact(path: Path) -> Artifact:
    """The artifact in `path`; whatever is wrong with it becomes one sentence."""
    with damage_told(path):
        return Artifact.load(path)


@contextmanager
def damage_told(path: Path | None) -> Iterator[None]:
    """Turn the errors that a forged or damaged artifact provokes into one sentence."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {printable(error)}"
        raise ArtifactError(f"{path or 'The artifact'} is damaged: {said}.") from error


def device_of(name: str | None) -> torch.device:
    """The device called `name`, else a GPU where there is one; TenutoError if there is none."""
    if processes().size > 1 and name and ":" in name:
        raise TenutoError(f"Each process takes a device of its own: {name.partition(':')[0]}.")
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise TenutoError(f"There is no device {name!r} here.") from error
    return device


def check_encoders(pipe: Any, width: str | None) -> None:
    """TenutoError if text encoders are to be quantized and the pipeline has none."""
    if width is not None and not encoders_of(pipe):
        raise TenutoError(f"{type(pipe).__name__} has no text encoder to quantize.")
