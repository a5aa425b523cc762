"""Models of the hub: what was downloaded is read without network, in whichever files it has."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from tenuto.errors import ModelError
from tenuto.sampling import skeleton
from tenuto.sampling.loading import load
from tenuto.sampling.opened import open_model, opened
from tests.core import single_files
from tests.core import tiny_pipelines as tiny

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has fp16 files alone."""
    pipe = tiny.stable_diffusion("StableDiffusionPipeline").to(torch.float16)
    folder = tmp_path_factory.mktemp("model") / "half"
    pipe.save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and a client without network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "hub"


def stored(folder: Path, hub: Path, name: str = "org/half") -> Path:
    """The snapshot of a model in the cache: links to blobs, as the hub's client makes them."""
    place = hub / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for file in (p for p in folder.rglob("*") if p.is_file()):
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_fp16_files_alone_are_read_from_the_cache(half: Path, hub: Path) -> None:
    snapshot = stored(half, hub)
    assert opened("org/half") == str(snapshot)
    assert load("org/half").unet.dtype == torch.float32
    bones = skeleton(opened("org/half"))
    assert bones is not None and not bones.complaints, "checked without loading"
    low = load("org/half", low_memory=True)
    assert any(p.is_meta for p in low.unet.parameters())
    (snapshot / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert opened("org/half") == "org/half", "not whole: the hub is asked"
    with pytest.raises(
        ModelError, match=r"download of org/half is not whole: .*unet has no weights"
    ):
        load("org/half")


def test_a_model_of_the_cache_lends_a_file_what_it_lacks(half: Path, hub: Path) -> None:
    """Its name decides between models with equal denoisers; --config takes the hub's id too."""
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    file = single_files.stable_diffusion_file(pipe, hub.parent / "files" / "my model.safetensors")
    with pytest.raises(ModelError, match="--config stable-diffusion-v1-5/stable-diffusion-v1-5"):
        opened(file)
    stored(half, hub, "a/turbo")
    known = stored(half, hub, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    found = json.loads((Path(opened(file)) / "tenuto-single-file.json").read_text())
    assert found["rest"] == str(known)
    other = json.loads((Path(opened(file, "a/turbo")) / "tenuto-single-file.json").read_text())
    assert "a--turbo" in other["rest"]
    found = open_model(file, config="a/turbo", dtype=torch.float16)
    assert found.unet.dtype == torch.float16
    for config, said in (
        ("org/none", "The hub does not give org/none"), ("a b", "is a folder or a hub id"),
        (str(hub.parent / "files"), "has no model in diffusers format"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said):
            opened(file, config)
    with pytest.raises(ModelError, match="--config is for a model in a single file"):
        opened("demo:unet", "a/turbo")


def test_forge_lends_what_its_folder_has(half: Path, hub: Path) -> None:
    forge = hub.parent / "forge"
    shutil.copytree(half, forge / "backend" / "huggingface" / "org" / "sd")
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    place = forge / "models" / "Stable-diffusion" / "mine.safetensors"
    assert open_model(single_files.stable_diffusion_file(pipe, place)).vae is not None


# --- with a network -------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub for its own client: what is in a model, and each file."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*"))
        if path.startswith("/api/models/org/half/tree"):
            rows = [(name, (self.folder / name).stat().st_size) for name in names]
            data = json.dumps(
                [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in rows]
            ).encode()
        elif path.startswith("/api/models/org/half"):
            files = [{"rfilename": name} for name in names]
            facts = {"id": "org/half", "modelId": "org/half", "sha": COMMIT, "siblings": files}
            data = json.dumps(facts).encode()
        elif path.rpartition("/resolve/")[2].partition("/")[2] in names:
            data = (self.folder / path.rpartition("/resolve/")[2].partition("/")[2]).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(half: Path) -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Hub,), {"folder": half}))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.slow
def test_fp16_files_are_downloaded_where_a_model_has_no_others(server: str, tmp_path: Path) -> None:
    own = {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    paths = {"PYTHONPATH": f"{ROOT / 'core'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from tenuto.sampling.loading import load; print(load('org/half').name_or_path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert COMMIT in done.stdout
    assert list(tmp_path.rglob("*/unet/*.fp16.safetensors"))
