"""Who may speak with the server, and what becomes of uploads: in this process, by plain HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gradio_app.guard import Guard
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\nnot a picture\r\n--x--\r\n"
)
READ, CALL = ("GET", "/config"), ("POST", "/gradio_api/call/job")
UPLOAD, FILE = ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/file=/etc/passwd")


def sent(url: str, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of a request with these headers; host=None: none at all."""
    link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    body = json.dumps({"data": ["compare"]}).encode() if method == "POST" else b""
    kind = "application/json"
    if path.endswith("upload"):
        body, kind = FORM, "multipart/form-data; boundary=x"
    link.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        link.putheader(name.replace("_", "-"), value)
    link.putheader("Content-Type", kind)
    link.putheader("Content-Length", str(len(body)))
    link.endheaders(body)
    with contextlib.closing(link), link.getresponse() as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("what", [READ, CALL, UPLOAD, FILE], ids=str)
def test_pages_of_others_are_refused(app: Any, what: tuple[str, str]) -> None:
    """By a name that leads here, by another origin, from a frame or a file: nothing is done."""
    own, before = urlsplit(app.url).netloc, uploads(app.out.parent)
    port = own.partition(":")[2]
    for headers in (
        {"host": "evil.example"}, {"host": f"evil.example:{port}"}, {"host": ""}, {"host": "["},
        {"host": "localhost.evil.example"}, {"host": "10.0.0.5"}, {"host": "127.0.0.1.evil.org"},
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost:1"},
        {"origin": f"http://evil.example@{own}.evil.example"}, {"origin": ""},
        {"host": "evil.example", "origin": "http://evil.example"}, {"origin": "file://"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"},
    ):  # fmt: skip
        status, body = sent(app.url, *what, **headers)
        assert status == 403 or (headers["host"] == "" and status == 400), (headers, status)
        assert b"compare" not in body and b"event_id" not in body and b"components" not in body
    assert uploads(app.out.parent) == before
    assert app.alive


def uploads(folder: Path) -> list[Path]:
    return [path for path in (folder / "gradio").rglob("*") if path.name == "a.png"]


def test_its_own_page_and_programs_come_in(app: Any) -> None:
    own = urlsplit(app.url).netloc
    port = own.partition(":")[2]
    for headers in (
        {}, {"host": own}, {"host": f"localhost:{port}"}, {"host": f"LOCALHOST:{port}"},
        {"host": f"[::1]:{port}"}, {"host": "127.0.0.1"}, {"host": "localhost:9"},  # ssh -L
        {"origin": app.url}, {"host": "localhost:9", "origin": "http://localhost:9"},
        {"sec_fetch_site": "same-origin"}, {"sec_fetch_site": "none"},
    ):  # fmt: skip
        for what in (READ, CALL):
            assert sent(app.url, *what, **headers)[0] == 200, headers
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert sent(app.url, "GET", "/", sec_fetch_dest="document", **link)[0] == 200, "a link"
    assert sent(app.url, *CALL, sec_fetch_dest="document", **link)[0] == 403, "a form"


def scope(**headers: str) -> dict[str, Any]:
    pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return {"type": "http", "method": "GET", "headers": pairs}


def test_other_machines_and_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """--listen: by any name, which its login keeps; Gradio's own option for a proxy's address."""
    listening = Guard(lambda *_: None, True)
    assert listening.own(scope(host="nas.home:7860", origin="http://nas.home:7860"))
    assert listening.own(scope(host="192.168.1.9:7860"))
    assert not listening.own(scope(host="nas.home:7860", origin="http://evil.example"))
    monkeypatch.setenv("GRADIO_ROOT_PATH", "https://lab.example/tenuto")
    behind = Guard(lambda *_: None, False)
    assert behind.own(scope(host="lab.example", origin="https://lab.example"))
    assert behind.own(scope(host="127.0.0.1:7860", origin="https://lab.example"))
    assert not behind.own(scope(host="127.0.0.1:7860", origin="https://evil.example"))
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/tenuto")
    assert Guard(lambda *_: None, False).own(scope(host="127.0.0.1:7860"))
    twice = scope(host="localhost")
    twice["headers"].append((b"host", b"evil.example"))
    assert not listening.own(twice)


# --- uploads --------------------------------------------------------------------------------------


SOON = """
from tenuto.cli.app import module
module("guard").PACE, module("guard").KEPT = 0.05, 4.0
"""


def test_uploads_that_nobody_uses_are_removed(start: Any) -> None:
    with start(before=SOON) as app:
        status, body = sent(app.url, *UPLOAD)
        assert status == 200
        (name,) = json.loads(body)
        assert Path(name).read_bytes() == b"not a picture"
        end = time.monotonic() + PATIENCE
        while Path(name).parent.exists():  # which goes after what is in it
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.05)
        assert not uploads(app.out.parent)


def test_an_upload_goes_when_it_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: a path of the output folder is no upload."""
    from gradio_app.bench import Bench
    from gradio_app.restore import _added, _restored
    from gradio_app.settings import Settings

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    bench = Bench(Settings(tmp_path / "out"))
    for take, ending in ((lambda p: _restored(bench, p), ".png"),
                         (lambda p: _added(bench, p, "demo:unet"), ".safetensors")):  # fmt: skip
        for folder, stays in (("gradio/0123", False), ("out", True)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            file = tmp_path / folder / f"x{ending}"
            file.write_bytes(b"x")
            os.utime(file)
            assert "tenuto-failed" in take(str(file))[1]
            assert file.exists() is stays and file.parent.exists() is stays
