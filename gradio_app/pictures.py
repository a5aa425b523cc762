"""Generated images as files, and the settings that such a file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenuto.caching import DEFAULT_FORECAST
from tenuto.errors import TenutoError

from .call import kept
from .given import disk_told
from .infotext import parsed
from .places import Places
from .png import texts
from .studio import Generated, settings_of


@disk_told()
def saved(places: Places, found: Generated) -> dict[str, Any]:
    """Write what was generated; returns paths, numbers, seconds and the infotext."""
    from tenuto.sampling.images import image_name, save_png

    folder, paths, infos, wanted = places.out / "pictures", {}, {}, found.used
    call = kept(wanted.call, places.inputs)
    for which, (first, *more) in found.pictures.items():
        settings = settings_of(wanted, which, call)
        infos[which] = found.infotext(settings, which)
        path = image_name(wanted.prompt, wanted.seed, folder)
        save_png(first, path, settings, infos[which], more)
        paths[which] = str(path)
    info = infos.get("artifact", infos.get("full", ""))
    frames = max(map(len, found.pictures.values()))
    return {
        "pictures": paths, "frames": frames, "numbers": found.numbers, "seconds": found.seconds,
        "infotext": info, "steps": wanted.steps, "seed": wanted.seed,
        "artifact": wanted.artifact_name or (DEFAULT_FORECAST if wanted.changes else ""),
    }  # fmt: skip


@disk_told()
def restored(places: Places, path: str | Path) -> dict[str, Any]:
    """The settings in a PNG that was dropped; TenutoError where there are none."""
    found = parsed(texts(Path(path)).get("parameters", ""))
    if not found:
        raise TenutoError("This image does not say how it was made.")
    if "model" in found and found["model"] not in places.models():
        del found["model"]  # another program's, or not here
    known = places.artifacts(str(found.get("model", "")))
    if "artifact" in found and found["artifact"] not in known:
        del found["artifact"]
        found.pop("speedup", None)
    return found
