"""Where the app's files are, and which it may open: every path that a user names passes here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenuto.cli.checks import check_out
from tenuto.errors import ArtifactError, ModelError, TenutoError
from tenuto.files import write_text
from tenuto.resources import asset
from tenuto.resume import Work
from tenuto.sampling.loading import HUB_ID, PREFIX, check_model
from tenuto.sampling.model_folders import (
    ENDING,
    bare,
    downloaded,
    inside,
    loose_files,
    models_in,
)
from tenuto.sampling.opened import OPENED
from tenuto.sampling.single_file import NOTE, is_lora
from tenuto.sampling.single_file_folder import opened_folder
from tenuto.text import printable

from .given import words
from .loose_artifacts import below, fitting

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
SHIPPED = "shipped:"
DEMOS = ("demo:transformer", "demo:unet")
LENGTH = 4096  # characters of a name that is looked at
NO_FOLDER = "here, and no folder of models: start the app with --roots, or add one in Generate"


def checked_name(name: str) -> str:
    """A name that can lead nowhere; TenutoError for any other."""
    name = words(name, "A name", LENGTH).removesuffix(ENDING)
    if NAME.fullmatch(name) is None:
        raise TenutoError("A name has letters, digits, dots, hyphens and underscores.")
    return name


def _stem(name: str) -> str:
    return name.rpartition("/")[2]


def _short(names: Collection[str]) -> dict[str, str]:
    """What each path is called: its last part, where no other has the same."""
    count = Counter(map(_stem, names))
    return {name: _stem(name) if count[_stem(name)] == 1 else name for name in names}


@dataclass(frozen=True)
class Places:
    """The output folder and the roots of models.

    added: roots that were added on the page. hub: where models of the Hugging Face hub lie that
    were downloaded; they are called by their id.
    out/NAME.safetensors are artifacts, out/pictures what was generated, out/inputs the images that
    this was made from, out/comparisons what was compared; out/unfinished has the request of every
    calibration that is not done.
    """

    out: Path
    roots: tuple[Path, ...] = ()
    hub: Path | None = None
    added: list[Path] = field(default_factory=list)

    @property
    def inputs(self) -> Path:
        """The folder of start images and masks that were used."""
        return self.out / "inputs"

    # --- models ---------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """The shipped models, folders and files under the roots, those of the hub, by name."""
        found = []
        for name in DEMOS:
            try:
                check_model(name)
                found.append(name)
            except ModelError:
                continue
        for root in (*self.roots, *self.added):
            found += [name for name in models_in(root) if name not in found]
        known = downloaded(self.hub)
        return [*found, *(n for n, p in known.items() if n not in found and not bare(Path(p)))]

    def model(self, name: str) -> str:
        """What `load` takes for the model called `name`; ModelError unless it is under a root.

        A single file is opened: by a folder in out/opened, which is made where it is missing.
        """
        name = words(name, "The name of a model", LENGTH)
        if name.startswith(PREFIX):
            check_model(name)
            return name
        found = (self._model(name) or downloaded(self.hub).get(name)) if name else None
        if found is None:
            raise ModelError(f"There is no model '{printable(name)}' {self._where(name)}")
        if Path(found).is_file():
            return str(opened_folder(Path(found), self.out / OPENED, self._donors()))
        check_model(found)
        if (Path(found) / NOTE).exists():  # it may lead anywhere
            raise ModelError(f"'{printable(name)}' has its weights elsewhere: choose their file.")
        return found

    def source(self, name: str) -> str:
        """What `tn.open_model` takes for the model called `name`: a path, or what it is called."""
        return name if name.startswith(PREFIX) else self._model(name) or name

    def _donors(self) -> Iterator[Path]:
        """Folders of models, which may lend a single file what it lacks."""
        yield from (Path(place) for place in downloaded(self.hub).values())
        for root in (*self.roots, *self.added):
            yield from (root / name for name in models_in(root, single=False))

    def _where(self, name: str) -> str:
        """Where a model was looked for, and what to do."""
        if name.endswith((".ckpt", ".pt", ".gguf")):
            return (
                "that the app can open: of single files it takes .safetensors. The node Tenuto "
                "Calibrate in ComfyUI takes what ComfyUI loads."
            )
        if self.hub is not None and HUB_ID.fullmatch(name) and "\\" not in name:
            return (
                "in the folders of the app, and none with that id was downloaded from the hub: "
                "hf download does that."
            )
        here = "in the folders" if self.roots or self.added else "here, and no folder of models"
        return f"{here} that the app was started with."

    def _model(self, name: str) -> str | None:
        """The folder, or the single file, of that name under a root, links followed."""
        try:
            given = Path(name).expanduser()
            roots = [*self.roots, *self.added]
            tries = [given] if given.is_absolute() else [root / given for root in roots]
            for path in (path.resolve() for path in tries):
                there = path.is_dir() or (path.suffix == ENDING and path.is_file())
                if any(path.is_relative_to(root.resolve()) for root in roots) and there:
                    return str(path)
        except (OSError, ValueError, RuntimeError):
            pass  # no such home, a zero in the name, links in a circle
        return None

    # --- LoRAs ----------------------------------------------------------------------------------

    def loras(self) -> Iterator[str]:
        """The LoRAs below the folders of models, as they are called: by header, one by one.

        A name is the file's without its ending; where files have the same, the path to it.
        """
        files = self._lora_files()
        short = _short(files)
        yield from (short[name] for name, file in files.items() if is_lora(file))

    def lora(self, name: str) -> tuple[str, Path]:
        """What the LoRA of that name is called in `loras`, and its file; ModelError for others."""
        name = words(name, "The name of a LoRA", LENGTH).removesuffix(ENDING)
        files = self._lora_files()
        named = [path for path in files if name in (path, _stem(path))]
        found = [path for path in named if is_lora(files[path])]
        found = [name] if name in found else found
        if len(found) == 1:
            return _short(files)[found[0]], files[found[0]]
        if found:
            these = printable(" or ".join(found), 150)
            raise ModelError(f"Several LoRAs are called '{printable(name, 60)}': write {these}.")
        if named:
            raise ModelError(f"{printable(named[0], 150)} is no LoRA: its tensors are others.")
        here = "in the folders of models" if self.roots or self.added else NO_FOLDER
        raise ModelError(f"There is no LoRA '{printable(name, 100)}' {here}.")

    def _lora_files(self) -> dict[str, Path]:
        """All files that may be LoRAs, by their path below a root without the ending; unopened."""
        found, seen = dict[str, Path](), set[Path]()
        for root in (*self.roots, *self.added):
            for file in loose_files(root):
                name = file.relative_to(root).as_posix().removesuffix(ENDING)
                if name.isprintable() and file not in seen:
                    found.setdefault(name, file)
                    seen.add(file)
        return found

    # --- artifacts ------------------------------------------------------------------------------

    def artifacts(self, model: str = "") -> list[str]:
        """The artifacts in the output folder, newest first, and those of `model`.

        These lie below the folders of models, and are called by their path, or ship with it.
        """
        made = [p for p in self.out.glob(f"*{ENDING}") if p.is_file() and inside(p, self.out)]
        made = [p for p in made if NAME.fullmatch(p.stem)]
        names = [p.stem for p in sorted(made, key=lambda p: p.stat().st_mtime, reverse=True)]
        known = isinstance(model, str) and model.startswith(PREFIX)
        names += self._beside(model) if isinstance(model, str) and model else []
        kind = model.removeprefix(PREFIX) if known else None
        if kind is None:
            return names
        try:
            shipped = sorted(asset("artifacts").glob(f"demo-{kind}.*{ENDING}"))
        except TenutoError:
            shipped = []
        return [*names, *(SHIPPED + p.stem for p in shipped)]

    def artifact(self, name: str) -> Path:
        """The file of an artifact; ArtifactError unless it is one of `artifacts`."""
        name = words(name, "The name of an artifact", LENGTH)
        found = self._below().get(name) if name.endswith(ENDING) else None
        if found is not None:
            return found
        shipped = name.startswith(SHIPPED)
        folder = asset("artifacts") if shipped else self.out
        path = folder / f"{checked_name(name.removeprefix(SHIPPED))}{ENDING}"
        if not path.is_file() or not inside(path, folder):
            here = "in the output folder or below the folders of models"
            raise ArtifactError(f"There is no artifact '{printable(name)}' {here}.")
        return path

    def _beside(self, model: str) -> list[str]:
        place = model if model.startswith(PREFIX) else self._model(model)
        return fitting(self._below(), place or downloaded(self.hub).get(model))

    def _below(self) -> dict[str, Path]:
        return below((*self.roots, *self.added), self.out)

    def new_artifact(self, name: str) -> Path:
        """Where an artifact of that name goes; TenutoError if there is one."""
        path = self.out / f"{checked_name(name)}{ENDING}"
        if path.exists():
            raise TenutoError(f"There is an artifact {path.stem} already: choose another name.")
        check_out(path)
        return path

    # --- unfinished calibrations ----------------------------------------------------------------

    def aside(self, name: str, ending: str) -> Path:
        """A file of an unfinished calibration: its request, its log, its quantized weights."""
        return self.out / "unfinished" / f"{checked_name(name)}{ending}"

    def unfinished(self) -> list[str]:
        """Names of calibrations that were begun and are not done."""
        return sorted(p.stem for p in (self.out / "unfinished").glob("*.json"))

    def request(self, name: str) -> dict[str, Any] | None:
        """What was asked of the unfinished calibration `name`, or None where there is none."""
        try:
            found = json.loads(self.aside(name, ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep_request(self, name: str, request: dict[str, Any]) -> None:
        """Remember what is asked, so that it can be taken up after a stop, a kill or a crash."""
        text = json.dumps(request, indent=1, ensure_ascii=False)
        write_text(self.aside(name, ".json"), text + "\n")

    def forget(self, name: str, whole: bool = False) -> None:
        """The calibration is done; `whole`: it is given up, with what was finished of it."""
        for ending in (".json", ".prompts.txt", ENDING):
            self.aside(name, ending).unlink(missing_ok=True)
        if whole:
            for folder in (self.out, self.out / "unfinished"):
                Work(folder / f"{name}.work" / "recording", {}).discard()
                Work(folder / f"{name}.work", {}).discard()

    # --- images -------------------------------------------------------------------------------

    def comparison(self) -> Path:
        """A new folder for a comparison."""
        folder = self.out / "comparisons"
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
        found = folder / f"{max(taken, default=0) + 1:04d}"
        found.mkdir()
        return found

    def picture(self, path: str) -> Path:
        """An image that the app has written; TenutoError for any other file."""
        found = Path(str(path))
        if not inside(found, self.out) or found.suffix != ".png" or not found.is_file():
            raise TenutoError("There is no such image.")
        return found
