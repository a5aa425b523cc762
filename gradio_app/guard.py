"""Who may speak with the server: its own page, and programs of this machine.

A page of another origin that is open in the same browser could otherwise call the API, read what
it answers and upload files: by a request to the loopback address, or by a name of its own that
resolves to it. Uploads that nobody used are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any]

LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # the last is how Gradio names --listen
ROOT_PATH = "GRADIO_ROOT_PATH"  # Gradio's: the address of a proxy in front of the app
REFUSED = b"This request is from another page or for another address: open the app's own.\n"
KEPT, PACE = 600.0, 60.0  # seconds that an upload may wait to be used; between two looks


class Guard:
    """Refuses requests whose Host or Origin is not the server's own.

    listen: other machines may come, by whatever name they have for this one; they must log in, and
    a browser sends the login to the name alone at which it was given.
    """

    def __init__(self, app: Asgi, listen: bool) -> None:
        self.app, self.listen = app, listen
        proxy = urlsplit(os.environ.get(ROOT_PATH, ""))
        self.proxy = proxy.netloc.lower()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] not in ("http", "websocket") or self.own(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            head = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(REFUSED))]
            await send({"type": "http.response.start", "status": 403, "headers": head})
            await send({"type": "http.response.body", "body": REFUSED})

    def own(self, scope: Scope) -> bool:
        """Whether a request is for this server, and from its own page or from a program."""
        sent: dict[str, str] = {}
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower()
            if key in ("host", "origin") and key in sent:
                return False  # two of them: which one counts?
            sent[key] = value.decode("latin-1").lower()
        host = sent.get("host", "")
        known = {host, self.proxy} - {""}
        if not (self.listen or named(host) in LOOPBACK or host == self.proxy != ""):
            return False
        if "origin" in sent:
            return urlsplit(sent["origin"]).netloc in known
        return sent.get("sec-fetch-site", "none") in ("none", "same-origin") or _opened(scope, sent)


def named(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _opened(scope: Scope, sent: dict[str, str]) -> bool:
    """Whether a link elsewhere was followed to the app: a page of its own, in nobody's frame."""
    whole = (sent.get("sec-fetch-mode"), sent.get("sec-fetch-dest")) == ("navigate", "document")
    return whole and scope.get("method") == "GET"


# --- uploads --------------------------------------------------------------------------------------


def sweep(page: Any, kept: float) -> None:
    """Remove what was uploaded more than `kept` seconds ago: who uses an upload takes a copy."""
    for name in list(page.upload_file_set):
        file = Path(name)
        with contextlib.suppress(OSError):
            if time.time() - file.lstat().st_ctime < kept:
                continue
            drop(file)
        page.upload_file_set.discard(name)


def uploaded(file: Path) -> bool:
    """Whether a file lies in the app's own temporary folder, links followed, and is there."""
    from gradio.utils import get_upload_folder

    try:
        found = file.resolve()
        return found.is_relative_to(Path(get_upload_folder()).resolve()) and found.is_file()
    except (OSError, ValueError, RuntimeError):
        return False  # a zero in its name, links in a circle


def fresh(name: str) -> Path:
    """A new place for a file in that folder; Gradio removes it once it is a day old."""
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder / name


def drop(file: Path) -> None:
    """Remove an upload, and the folder that was made for it; any other file stays."""
    from gradio.utils import get_upload_folder

    if not file.resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        return
    with contextlib.suppress(OSError):
        file.unlink()
        file.parent.rmdir()


def swept(page: Any) -> Callable[[Any], Any]:
    """What runs beside the server: a look at the uploads, from time to time."""

    async def looks() -> None:
        while True:
            await asyncio.sleep(PACE)
            sweep(page, KEPT)

    @contextlib.asynccontextmanager
    async def beside(app: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(looks())
        try:
            yield
        finally:
            task.cancel()

    return beside
