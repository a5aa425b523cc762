"""The process that calibrates or compares: the library's commands, with progress as JSON lines.

It is told what to do in the first line of its standard input, and stops when that ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenuto.cli.console import Bars
from tenuto.errors import Cancelled, TenutoError
from tenuto.progress import Progress

from .call import kept, recalled
from .failures import sentence
from .infotext import as_number, written
from .loras import described

GRACE = 10.0  # seconds after the end of the input until the process ends itself
PACE = 0.1  # seconds between two lines of progress
QUANTIZED = ("scheme", "text_encoder", "method", "rounding")  # what `tenuto quantize` is told
Send = Callable[..., None]


def main() -> int:
    """Do what the first line of standard input asks for; returns the exit code."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever other libraries print goes to the log
    sys.stdout = sys.stderr
    lock = threading.Lock()

    def send(**event: Any) -> None:
        with lock:
            print(json.dumps(event), file=out, flush=True)

    request, stop = json.loads(sys.stdin.readline()), threading.Event()
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    try:
        send(stage="Loading the model")
        send(result=WORK[request["kind"]](request, Reports(send, stop)))
    except Cancelled:
        return 130
    except TenutoError as error:
        send(error=" ".join(str(error).split()))
        return 2
    except Exception as error:  # the app shows it, the log has the rest
        traceback.print_exc()
        send(error=sentence(error))
        return 1
    return 0


def _watch(stop: threading.Event) -> None:
    """When the app closes the pipe, or is gone, the work stops."""
    sys.stdin.read()
    stop.set()
    time.sleep(GRACE)
    os._exit(130)


class Reports(Bars):
    """Progress of the library's commands as events; raises Cancelled where it was asked to stop."""

    def __init__(self, send: Send, stop: threading.Event) -> None:
        super().__init__()
        self.send, self.stop = send, stop
        self.plan: list[str] = []  # the parts of the work in order; resumed work leaves some out
        self.part = 0
        self.work: Path | None = None  # in which a router that trains leaves its state

    def __call__(self, label: str) -> Progress:
        """The next part of the work."""
        if label in self.plan[self.part :]:
            self.part = self.plan.index(label, self.part) + 1
        last = 0.0

        def progress(done: int, total: int, note: str) -> None:
            nonlocal last
            if self.stop.is_set():
                raise Cancelled
            now = time.monotonic()
            if now - last < PACE and 0 < done < total:
                return
            last = now
            self.send(
                stage=label, part=self.part, parts=len(self.plan), done=done, total=total, note=note
            )
            if self.work is not None and note.startswith("router"):
                self.send(**router_now(self.work))

        return progress


def router_now(work: Path) -> dict[str, Any]:
    """The losses and the map of a router that trains."""
    from tenuto.calibration.router.in_progress import so_far

    found = so_far(work)
    return {} if found is None else {"loss": list(found.loss), "map": plain(found.map)}


def plain(route: Any) -> dict[str, Any]:
    """A step map as plain data: "#" is computed, "." held, a string a branch."""
    rows = ["".join("#" if cell else "." for cell in row) for row in route.table.t().tolist()]
    return {
        "policy": route.policy, "branches": list(route.branches), "kinds": route.kinds(),
        "timesteps": list(route.timesteps), "rows": rows,
    }  # fmt: skip


# --- what is done ---------------------------------------------------------------------------------


def calibrate(request: dict[str, Any], bars: Reports) -> dict[str, Any]:
    """Quantize the denoiser, text encoders or both, then train a router; resumes what was begun."""
    from tenuto.artifact import step_map
    from tenuto.cli import commands
    from tenuto.cli.checks import load_artifact, work_folder

    out, first = Path(request["out"]), Path(request["first"])
    chosen = {key: request.get(key) for key in QUANTIZED}  # an older request lacks some
    route = request["reuse"] is not None
    scheme, encoder = chosen["scheme"] is not None, chosen["text_encoder"] is not None
    bars.plan = ["Recording", "Quantizing"] * scheme + ["Text encoders"] * encoder
    bars.plan += ["Recording", "Training the router"] * route
    model, names = request["model"], ("preset", "steps", "guidance", "seed", "device")
    common: dict[str, Any] = {key: request[key] for key in names}
    common |= {"prompts": _path(request["prompts"]), "call": _call(request)}
    text = ""
    if (scheme or encoder) and not (route and first.exists()):
        target = first if route else out
        text = commands.quantize(model, out=target, **chosen, **common, bars=bars).text
    if route:
        bars.part = len(bars.plan) - 2
        bars.work = work_folder(out)
        text = commands.train_router(
            model, out=out, artifact=first if scheme or encoder else None, reuse=request["reuse"],
            iterations=request["iterations"], **common, bars=bars,
        ).text  # fmt: skip
    artifact = load_artifact(out)
    found = step_map(artifact.header, artifact.tensors)
    result = {"text": text.partition("\n\n")[0].replace(str(out), out.name), "name": out.stem}
    return result if found is None else result | {"map": plain(found)}


def compare(request: dict[str, Any], bars: Reports) -> dict[str, Any]:
    """Generate in full precision, with every artifact and in bf16; all of it goes into a folder."""
    from tenuto.cli.checks import comparison_prompts, load_artifact
    from tenuto.cli.session import pipeline, sampling_of
    from tenuto.files import write_text
    from tenuto.measure import compare_all
    from tenuto.sampling import one_by_one, wanted_prompts
    from tenuto.sampling.loras import Lora, add_loras

    files = {name: _path(path) for name, path in request["artifacts"].items()}
    artifacts = {name: path and load_artifact(path) for name, path in files.items()}
    first, model = next(iter(files)), request["model"]
    count, seed = request["count"], request["seed"]
    lines = comparison_prompts(model, _path(request["prompts"]), count)
    sampling = sampling_of(
        model, steps=request["steps"], guidance=request["guidance"], device=request["device"],
        artifact=artifacts[first], file=files[first], call=_call(request),
        images=Path(request.get("inputs", ".")),
    )  # fmt: skip
    pipe = pipeline(model, sampling, bars, artifacts[first], files[first], use="compare")
    loras = request.get("loras", {})
    add_loras(pipe, [Lora(Path(file), weight) for file, weight in loras.values()])
    call = sampling.called(pipe)
    batch = 1 if one_by_one(pipe, call) else min(request["batch"], -(-count // 2))
    bars.plan = ["Generating"]
    found, generated = compare_all(
        pipe, artifacts, lines, count=count, steps=sampling.steps, call=call,
        guidance=sampling.guidance, seed=seed, execution=request["execution"], batch=batch,
        speedup=request.get("speedup"), on_progress=bars("Generating"),
    )  # fmt: skip
    used = replace(sampling, call=call)
    asked = request.get("speedup")
    faster = {name: as_number(asked, comparison.reuse_ratio) for name, comparison in found.items()}
    lines = wanted_prompts(pipe, lines, call)
    prompts, pictures = _saved(request, generated, lines, used, faster)
    data = {
        "model": request["shown_model"], "prompts": prompts, "pictures": pictures,
        **described(loras),
        "numbers": {
            name: comparison.to_json() | {"asked_speedup": asked}
            for name, comparison in found.items()
        },
        "text": {name: str(comparison) for name, comparison in found.items()},
    }  # fmt: skip
    folder = Path(request["folder"])
    write_text(folder / "comparison.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return data | {"folder": str(folder)}


def export(request: dict[str, Any], bars: Reports) -> dict[str, Any]:
    """Write the model as a file, or a folder, of another program."""
    from tenuto.cli.export import export as exported

    out = Path(request["out"])
    bars.plan = ["Exporting"]
    answer = exported(
        request["model"], to=request["to"], out=out, artifact=Path(request["artifact"]), bars=bars
    )
    text = f"{answer.text}\n\nNext: {answer.next}"
    return {"text": text.replace(str(out), out.name), "out": str(out)}


def _saved(
    request: dict[str, Any], generated: Any, lines: Sequence[str], sampling: Any,
    speedups: Mapping[str, float | None],
) -> tuple[list[str], dict[str, list[str]]]:  # fmt: skip
    """Write the images that can be looked at; returns their prompts, and file names by way.

    speedups: of the ways that have one.
    """
    import torch

    from tenuto.sampling.images import save_png, to_images

    folder, count, seed = Path(request["folder"]), request["count"], request["seed"]
    call = kept(sampling.call, Path(request.get("inputs", ".")))
    prompts, pictures = list[str](), dict[str, list[str]]()
    for number, (name, way) in enumerate(generated.items()):
        every = torch.cat(way.batches)
        places = picked(count, len(every) // count, request["shown"])
        pictures[name] = [f"{number}-{i}.png" for i in range(len(places))]
        prompts = [str(lines[(seed + i) % len(lines)]) if lines else "" for _, i in places]
        images = to_images(every[[place for place, _ in places]])
        for file, image, prompt, (_, i) in zip(
            pictures[name], images, prompts, places, strict=True
        ):
            settings = {
                "model": request["shown_model"], "prompt": prompt, "seed": seed + i,
                "steps": sampling.steps, "guidance": sampling.guidance,
                "artifact": request["names"].get(name) or None,
                "speedup": speedups.get(name),
            } | described(request.get("loras", {})) | ({"call": call} if call else {})  # fmt: skip
            save_png(image, folder / file, settings | {"drawn": name}, written(settings))
    return prompts, pictures


def picked(count: int, frames: int, most: int) -> list[tuple[int, int]]:
    """Which of `count` images are shown, or which frames of videos: (place among all, number)."""
    each = max(1, min(frames, most // count))
    found = [(i * frames + k * frames // each, i) for i in range(count) for k in range(each)]
    return found[:most]


def _call(request: dict[str, Any]) -> dict[str, Any]:
    """What else the pipeline is called with."""
    return recalled(request.get("call", {}), Path(request.get("inputs", ".")))


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


WORK = {"calibrate": calibrate, "compare": compare, "export": export}
