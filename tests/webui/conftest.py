"""The extension in four stub hosts, each made of what the contract says of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
KINDS = ("a1111", "forge", "reforge", "neo")


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tenuto_tests_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[f"tenuto_tests_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers are so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stubs() -> Any:
    """The module hosts.py."""
    return _load("hosts")


@pytest.fixture(scope="session")
def unets() -> Any:
    """The module unets.py."""
    return _load("unets")


@pytest.fixture
def make_host(
    stubs: Any, unets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """make_host(kind): a stub host that has loaded the extension; what it imports goes again."""

    def made(kind: str, path: Path | None = None, denoiser: Any = None) -> Any:
        _forget()
        host = stubs.Host(kind, denoiser or unets.unet(kind), tmp_path)
        for name, module in host.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        host.load(*(() if path is None else (path,)))
        return host

    yield made
    _forget()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each host in turn: of the module's HOSTS, if it has them."""
    if "host" in metafunc.fixturenames:
        metafunc.parametrize("host", getattr(metafunc.module, "HOSTS", KINDS), indirect=True)


@pytest.fixture
def host(request: pytest.FixtureRequest, make_host: Callable[..., Any]) -> Any:
    """The host that `pytest_generate_tests` gives."""
    return make_host(request.param)


def _forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "tenuto_webui"]:
        del sys.modules[name]
