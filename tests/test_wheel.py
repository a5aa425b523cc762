"""Outside the clone: what the wheel and the sdist hold, and that both demo models draw from one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARTS = {
    ROOT / "core" / "tenuto": "",
    ROOT / "gradio_app": "gradio_app/",
    ROOT / "assets": "assets/",
}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
INDEX_LIMIT = 100e6  # bytes of one file

pytestmark = pytest.mark.slow
Files = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def clone(files_under: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone to build in, since setuptools leaves build/ where it works; its files are links."""
    clone = tmp_path_factory.mktemp("build") / "clone"
    for path in files_under(ROOT, links=True):
        copy = clone / path.relative_to(ROOT)
        if path.relative_to(ROOT).parts[0] in {"tests", "benchmarks", "docs"}:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path.readlink() if path.is_symlink() else path)
    return clone


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run = subprocess.run([*command, str(clone)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into, without what it depends on."""
    site = tmp_path_factory.mktemp("site")
    command = [*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, cwd=site)
    return site


def outside(code: str, site: Path, folder: Path) -> str:
    """What `code` prints with the installed library, in `folder`; no warning, no network."""
    environment = {
        "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "torchvision" not in run.stderr, "transformers' advice"
    return run.stdout


def test_the_wheel_holds_the_tree(wheel: Path, files_under: Files) -> None:
    """Every file of the library, the app and the models is in it once, and nothing else."""
    expected = {
        f"tenuto/{at}{path.relative_to(folder).as_posix()}"
        for folder, at in PARTS.items()
        for path in files_under(folder)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        scripts = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    info = metadata.split("/")[0]
    assert {n for n in names if not n.startswith(f"{info}/")} == expected
    assert [n for n in names if "/vae/" in n and n.endswith(".safetensors")] == [
        "tenuto/assets/demo-transformer/vae/diffusion_pytorch_model.safetensors"
    ]
    licences = {n.removeprefix(f"{info}/licenses/") for n in names if "/licenses/" in n}
    assert licences == set(PROJECT["license-files"])
    assert f"License-Expression: {PROJECT['license']}\n" in text
    assert "tenuto = tenuto.cli:main" in scripts


def test_an_index_takes_the_wheel(wheel: Path) -> None:
    assert wheel.stat().st_size < INDEX_LIMIT


def test_the_sdist_holds_what_the_wheel_is_made_of(
    clone: Path, files_under: Files, tmp_path: Path
) -> None:
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    files = {p.relative_to(ROOT).as_posix() for folder in PARTS for p in files_under(folder)}
    assert {"pyproject.toml", "README.md", *PROJECT["license-files"], *files} <= names
    assert not [name for name in names if name.startswith("assets/demo-unet/vae")]
    assert sdist.stat().st_size < INDEX_LIMIT


def test_the_installed_wheel_finds_its_files(
    site: Path, files_under: Files, tmp_path: Path
) -> None:
    code = (
        "import json, importlib.resources as r, tenuto\n"
        "def walk(x, at=''):\n"
        "    for y in x.iterdir():\n"
        "        yield from walk(y, at + y.name + '/') if y.is_dir() else [at + y.name]\n"
        "print(json.dumps([tenuto.__file__, r.files('tenuto').joinpath('py.typed').is_file(), "
        "sorted(walk(r.files('tenuto') / 'assets')), list(tenuto.prompts('default'))[:1]]))\n"
    )
    file, typed, assets, prompts = json.loads(outside(code, site, tmp_path))
    assert Path(file).is_relative_to(site), "another tenuto answered"
    assert typed
    assert prompts and isinstance(prompts[0], str)
    there = {p.relative_to(ROOT / "assets").as_posix() for p in files_under(ROOT / "assets")}
    assert there <= {name for name in assets if "__pycache__" not in name}


def test_the_app_and_its_worker_are_found(site: Path, tmp_path: Path) -> None:
    """Without Gradio: the one that is installed is loaded, not the clone's."""
    code = (
        "from tenuto.cli.app import module\n"
        "print(module('worker').__file__)\n"
        "print(module('settings').__package__)\n"
    )
    file, package = outside(code, site, tmp_path).splitlines()
    assert Path(file) == site / "tenuto" / "gradio_app" / "worker.py"
    assert package == "tenuto.gradio_app"


def test_both_demo_models_draw_outside_the_clone(site: Path, tmp_path: Path) -> None:
    """From another folder; their one autoencoder is found."""
    code = (
        "import json, tenuto as tn\n"
        "from tenuto.sampling.loading import defaults\n"
        "from tenuto.sampling import sampler\n"
        "drawn = {}\n"
        "for name in ('transformer', 'unet'):\n"
        "    pipe = tn.demo(name)\n"
        "    sample = sampler(pipe, ['a lemon'], 2, defaults(pipe).guidance)\n"
        "    denoiser = getattr(pipe, name)\n"
        "    picture = sample(denoiser, 0, 1)\n"
        "    weights = sum(p.double().abs().sum().item() for p in pipe.vae.parameters())\n"
        "    drawn[name] = [list(picture.shape), picture.mean((0, 2, 3)).tolist(), weights]\n"
        "print(json.dumps([tn.__file__, drawn]))\n"
    )
    file, drawn = json.loads(outside(code, site, tmp_path))
    assert Path(file).is_relative_to(site), "another tenuto answered"
    for shape, (red, _, blue), _ in drawn.values():
        assert shape == [1, 3, 64, 64] and red > blue, "a lemon is yellow"
    assert drawn["transformer"][2] == drawn["unet"][2], "the same autoencoder"
    assert not list(tmp_path.iterdir())
