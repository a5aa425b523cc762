"""A real ComfyUI server with a copy of this project in custom_nodes, beside another pack."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
CLONE = "ComfyUI-Tenuto.dev-1.0"  # dots and hyphens
Graph = dict[str, dict[str, Any]]

# A pack with a package of its own called core, and none of what only our own environment has.
OTHER = """
import importlib.abc, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import core

class Lean(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "gradio", "accelerate"):
            raise ImportError(name + " is not what ComfyUI has")

sys.meta_path.insert(0, Lean())

class Core:
    CATEGORY, FUNCTION, RETURN_TYPES = "other", "run", ("STRING",)
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}
    def run(self):
        import core
        return (core.WHOSE,)

NODE_CLASS_MAPPINGS = {"Other_Core": Core}
"""


class Server:
    """Speaks HTTP. `run(graph)` waits for the history of a prompt."""

    def __init__(self, base: Path, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.base, self.port, self.process, self.log = base, port, process, log
        self.count = itertools.count()

    def get(self, path: str, data: Any = None) -> Any:
        """The JSON that a path answers; `data` is posted."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def refused(self, graph: Graph) -> str:
        """What is said of a graph that is not even started."""
        try:
            self.get("/prompt", {"prompt": graph})
        except urllib.error.HTTPError as error:
            assert error.code == 400
            return error.read().decode()
        raise AssertionError("the graph was accepted")

    def start(self, graph: Graph) -> str:
        """The id of a prompt in the queue.

        Files have names of their own: what the server still has of an equal graph it does not save
        again, and a history without them is no answer.
        """
        fresh = next(self.count)
        graph = json.loads(json.dumps(graph))
        for one in graph.values():
            if "filename_prefix" in one["inputs"]:
                one["inputs"]["filename_prefix"] += f"-{fresh}"
        try:
            return self.get("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def wait(self, prompt: str, seconds: float = 240) -> dict[str, Any]:
        """Its history once it has ended, in whatever way."""
        for _ in range(int(seconds / 0.1)):
            found = self.get(f"/history/{prompt}").get(prompt)
            if found is not None:
                return found
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no end after {seconds} s: {self.log.read_text()[-3000:]}")

    def run(self, graph: Graph) -> dict[str, Any]:
        """As `wait`, and it has succeeded."""
        found = self.wait(self.start(graph))
        assert found["status"]["status_str"] == "success", found["status"]["messages"][-1]
        return found

    def failed(self, graph: Graph) -> str:
        """The message of a graph that fails while it runs."""
        found = self.wait(self.start(graph))
        assert found["status"]["status_str"] == "error"
        return next(m["exception_message"] for k, m in found["status"]["messages"]
                    if k == "execution_error")  # fmt: skip

    def latent(self, history: dict[str, Any], node: str = "latent") -> Tensor:
        """What SaveLatent wrote."""
        facts = history["outputs"][node]["latents"][0]
        return load_file(self.base / "output" / facts["subfolder"] / facts["filename"])[
            "latent_tensor"
        ]

    def picture(self, history: dict[str, Any], node: str = "picture") -> Tensor:
        """The pixels that SaveImage wrote."""
        import numpy as np
        from PIL import Image

        facts = history["outputs"][node]["images"][0]
        folder = self.base / facts["type"] / facts["subfolder"]
        with Image.open(folder / facts["filename"]) as image:
            return torch.from_numpy(np.array(image))


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


NEEDED = ("assets/forecast-default.safetensors",)  # of the large folders


def _packs(folder: Path) -> None:
    """The clone as git would make it, the other pack, and one that makes text encoders small."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        large = name.startswith(("assets/", "tests/", "docs/")) and name not in NEEDED
        if large or not (ROOT / name).is_file():
            continue
        target = folder / CLONE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    other = folder / "a-pack-with-core"
    (other / "core").mkdir(parents=True)
    (other / "core" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    (other / "__init__.py").write_text(OTHER)
    shutil.copyfile(Path(__file__).with_name("small_encoders.py"), folder / "small_encoders.py")


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder of the tiny checkpoints; written once an environment, beside it if not told."""
    comfyui = Path(os.environ["TENUTO_COMFYUI"])
    models = Path(os.environ.get("TENUTO_COMFYUI_MODELS") or comfyui.parent / "models")
    script = Path(__file__).with_name("tiny_checkpoints.py")
    subprocess.run([sys.executable, "-W", "ignore", script, comfyui, models], check=True)
    return models


@pytest.fixture(scope="session")
def server(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started once, with a folder of its own for everything that it writes."""
    base, port = tmp_path_factory.mktemp("comfyui"), _port()
    _packs(base / "custom_nodes")
    for file in checkpoints.glob("*/*.safetensors"):
        place = base / "models" / file.relative_to(checkpoints)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    (base / "models" / "tenuto").mkdir()
    flags = (
        f"main.py --cpu --listen 127.0.0.1 --port {port} --disable-api-nodes --disable-auto-launch"
        f" --use-pytorch-cross-attention --base-directory {base}"
        f" --database-url sqlite:///{base}/comfyui.db"
    )
    log = base / "server.log"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *flags.split()], cwd=os.environ["TENUTO_COMFYUI"], stdout=file,
            stderr=subprocess.STDOUT, env=environment | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    found = Server(base, port, process, log)
    try:
        for _ in range(600):
            try:
                found.get("/queue")
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        process.wait(30)


# --- graphs ---------------------------------------------------------------------------------------


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a graph in API form; an input of another is [its name, number]."""
    return {"class_type": kind, "inputs": inputs}


SIZES = {"sd15": 64, "sd3": 128, "pixart": 272, "flux": 64}


def plain(family: str, steps: int = 4, seed: int = 1, scheduler: str = "simple") -> Graph:
    """Text to image; the nodes are called by what they are."""
    size, guidance = SIZES[family], 1.0 if family == "flux" else 2.0
    empty = "EmptyLatentImage" if family in ("sd15", "pixart") else "EmptySD3LatentImage"
    if family in ("sd15", "sd3"):
        loader = node("CheckpointLoaderSimple", ckpt_name=f"tiny_{family}.safetensors")
        graph, clip, vae = {"model": loader}, ["model", 1], ["model", 2]
    else:
        channels = 4 if family == "pixart" else 16
        graph = {
            "model": node(
                "UNETLoader", unet_name=f"tiny_{family}.safetensors", weight_dtype="default"
            ),
            "clip": node("CLIPLoader", clip_name="tiny_clip_l.safetensors", type="sd3"),
            "vae": node("VAELoader", vae_name=f"tiny_taesd{channels}.safetensors"),
        }
        clip, vae = ["clip", 0], ["vae", 0]
    return graph | {
        "positive": node("CLIPTextEncode", text="a red bus", clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        "empty": node(empty, width=size, height=size, batch_size=1),
        "sampler": node(
            "KSampler", model=["model", 0], positive=["positive", 0], negative=["negative", 0],
            latent_image=["empty", 0], seed=seed, steps=steps, cfg=guidance,
            sampler_name="euler", scheduler=scheduler, denoise=1.0,
        ),
        "latent": node("SaveLatent", samples=["sampler", 0], filename_prefix="latent"),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=vae),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix="picture"),
    }  # fmt: skip


def chained(graph: Graph, *nodes: dict[str, Any]) -> Graph:
    """`graph` with MODEL nodes between the loader and the sampler, and a report after it."""
    graph = json.loads(json.dumps(graph))
    last: list[Any] = ["model", 0]
    for number, found in enumerate(nodes):
        name = f"ours {number}"
        graph[name] = node(found["class_type"], **(found["inputs"] | {"model": last}))
        last = [name, 0]
    graph["sampler"]["inputs"]["model"] = last
    if nodes:
        graph["report"] = node("Tenuto_Report", model=last, samples=["sampler", 0])
    return graph


QUANTIZE = {"scheme": "W8A8", "convolutions": True, "skip": "", "execution": "int8"}
CACHE = {
    "mode": "first steps, then one of", "first": 1, "period": 2, "start_percent": 0.0,
    "end_percent": 1.0, "compute_last": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def make() -> Any:
    """make.plain(family), make.chained(graph, ...), make.quantize(...), make.cache(...)."""

    class Make:
        node, plain, chained = staticmethod(node), staticmethod(plain), staticmethod(chained)

        @staticmethod
        def quantize(**options: Any) -> dict[str, Any]:
            return node("Tenuto_QuantizeModel", **(QUANTIZE | options))

        @staticmethod
        def cache(**options: Any) -> dict[str, Any]:
            return node("Tenuto_ApplyCache", **(CACHE | options))

    return Make
