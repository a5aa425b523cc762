"""How the app was started, checked before anything is loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenuto.cli.checks import check_file, device_of
from tenuto.errors import TenutoError

HOSTS = {False: "127.0.0.1", True: "0.0.0.0"}  # by --listen


@dataclass(frozen=True)
class Settings:
    """The options of `tenuto app`. roots, out: absolute, links followed. auth: name, password."""

    out: Path
    roots: tuple[Path, ...] = ()
    port: int | None = None
    browser: bool = True
    desktop: bool = False
    listen: bool = False
    auth: tuple[str, str] | None = None
    device: str | None = None

    @staticmethod
    def of(
        *,
        out: Path,
        roots: Iterable[Path] = (),
        port: int | None = None,
        browser: bool = True,
        desktop: bool = False,
        listen: bool = False,
        auth: str | None = None,
        device: str | None = None,
    ) -> Settings:
        """TenutoError, in one sentence, if the options cannot be."""
        if listen and auth is None:
            raise TenutoError("--listen lets other machines in: add --auth USER:PASSWORD.")
        login = None if auth is None else parted(auth)
        folders = []
        for root in roots:
            folder = root.expanduser()
            if not folder.is_dir():
                raise TenutoError(f"--roots: there is no folder {root}.")
            folders.append(folder.resolve())
        if port is not None:
            check_port(port, HOSTS[listen])
        if device is not None:
            device_of(device)
        return Settings(opened(out), tuple(folders), port, browser, desktop, listen, login, device)


def parted(auth: str) -> tuple[str, str]:
    """USER:PASSWORD in its two parts; the password may hold colons."""
    user, _, password = auth.partition(":")
    if not user or not password:
        raise TenutoError("--auth takes a name and a password: --auth USER:PASSWORD.")
    return user, password


def check_port(port: int, host: str) -> None:
    """TenutoError unless the app could be there."""
    if port > 65535:
        raise TenutoError(f"--port: there is no port {port}.")
    with socket.socket() as found:
        if os.name == "posix":  # a port that was in use until just now is free
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise TenutoError(f"--port: {port} cannot be had: {error.strerror}.") from error


def opened(folder: Path) -> Path:
    """The output folder, made where it is missing."""
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise TenutoError(f"--out: {folder} is not a folder.")
    check_file(folder / "artifact.safetensors")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TenutoError(f"Cannot make {folder}: {error.strerror or error}.") from error
    return folder.resolve()


def facts(settings: Settings) -> dict[str, Any]:
    """What the app says of itself, without the password."""
    return {
        "out": str(settings.out),
        "roots": [str(root) for root in settings.roots],
        "device": settings.device,
        "login": settings.auth is not None,
    }
