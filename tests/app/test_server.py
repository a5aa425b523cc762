"""What the app's server refuses, and its API; the server is alive after each refusal."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradio_app.png import texts
from tenuto.artifact.header import read_header
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow

PICKLE = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93."
TINY = "mine/tiny"


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[Any]:
    """gradio_client, as a program would use the app."""
    yield connected(app.url)


def connected(url: str, **options: Any) -> Any:
    from gradio_client import Client

    return Client(url, verbose=False, **options)


def refused(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(Exception) as error:
        call(*args, **options)
    text = str(error.value)
    assert "Traceback" not in text
    return text


def generated(client: Any, **options: Any) -> dict[str, Any]:
    wanted = {
        "model": TINY, "prompt": "a red dog", "seed": 3, "steps": 2, "guidance": 2.0,
        "artifact": "", "beside": False, "api_name": "/generate",
    }  # fmt: skip
    return client.predict(**(wanted | options))


# --- files ----------------------------------------------------------------------------------------


def test_files_outside_the_output_folder_are_refused(
    app: Any, models: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret word")
    (app.out / "link.png").symlink_to(secret)
    (app.out / ".hidden").write_text("hidden")
    (app.out / "note.txt").write_text("ours")
    wanted = [
        "/etc/passwd", str(secret), f"{app.out}/../log", f"{app.out}/%2e%2e/log",
        f"{app.out}/../../../../../../etc/passwd", str(Path(__file__)), f"{app.out}/link.png",
        str(models / "mine" / "tiny" / "model_index.json"), "gradio_app/app.py",
    ]  # fmt: skip
    for path in wanted:
        status, body = app.get(f"/gradio_api/file={urllib.parse.quote(path, safe='/%')}")
        assert status in (403, 404), path
        assert b"secret word" not in body and b"root:" not in body
    assert app.get(f"/gradio_api/file={app.out}/note.txt") == (200, b"ours")
    (app.out / "link.png").unlink()
    assert app.alive


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "x" * 200, "$(id)"]
)
def test_names_lead_nowhere(app: Any, client: Any, name: str) -> None:
    before = sorted(p.name for p in app.out.rglob("*"))
    options = {"model": TINY, "name": name, "scheme": "w8a8"}
    assert "name has letters" in refused(client.predict, options, api_name="/calibrate")
    assert "name has letters" in refused(client.predict, name, api_name="/resume")
    if name:
        said = refused(generated, client, artifact=name)
        assert "name has letters" in said or "no artifact" in said
    assert sorted(p.name for p in app.out.rglob("*")) == before
    assert app.alive


@pytest.mark.parametrize("model", ["OUTSIDE", "../mine/tiny", "org/name", "/", "", "demo:../unet"])
def test_models_outside_the_roots_are_refused(
    app: Any, client: Any, models: Path, tiny_pixart_folder: Path, model: str
) -> None:
    (models / "link").unlink(missing_ok=True)
    (models / "link").symlink_to(tiny_pixart_folder)
    names = [str(tiny_pixart_folder), "link"] if model == "OUTSIDE" else [model]
    for name in names:
        assert "no " in refused(generated, client, model=name)
        options = {"model": name, "name": "new", "scheme": "w8a8"}
        assert "no " in refused(client.predict, options, api_name="/calibrate")
        options = {"model": name, "artifacts": ["shipped:demo-unet.w8a8"]}
        assert "no " in refused(client.predict, options, api_name="/compare")
    (models / "link").unlink()
    assert app.alive


# --- uploads --------------------------------------------------------------------------------------


def header(size: int) -> bytes:
    """The start of a safetensors file whose header has that many bytes, and no more."""
    return struct.pack("<Q", size) + b'{"a":' + b" " * 1000


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A text of half a gigabyte in half a megabyte."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    return chunk(b"zTXt", b"parameters\0\0" + packed)


ARTIFACTS = {
    "a pickle": ("a.safetensors", PICKLE * 100, "not an artifact"),
    "truncated": ("b.safetensors", None, "truncated"),
    "a header of 1 GB": ("c.safetensors", header(2**30), "too large"),
    "empty": ("d.safetensors", b"", "not an artifact"),
}
PICTURES = {
    "not a PNG": (PICKLE, "not a PNG"),
    "too many pixels": (png(width=200_000, height=200_000), "too large"),
    "a text that unpacks to 200 MB": (png(bomb()), "too long"),
    "cut off": (png()[:40], "cut off"),
    "a chunk longer than the file": (png()[:-12] + b"\x7f\xff\xff\xffIDAT", "cut off"),
    "says nothing": (png(), "does not say"),
}


def sent(tab: Any, place: str, file: Path, data: bytes, said: str) -> str:
    """What the page says to a file that is dropped; `said` is a part of it."""
    page = tab.page
    file.write_bytes(data)
    if page.locator(place).is_hidden():
        page.get_by_text("Restore settings").click()
    page.wait_for_selector(f"{place} input[type=file]", state="attached")
    page.set_input_files(f"{place} input[type=file]", file)
    page.wait_for_function(
        "said => document.querySelector('#aside-said').innerText.includes(said)", arg=said
    )
    return page.inner_text("#aside-said")


def test_what_is_no_artifact_is_not_taken(
    app: Any, visit: Any, tmp_path: Path, shipped: bytes
) -> None:
    before, tab = sorted(app.out.glob("*")), visit(app)
    for kind, (name, data, words) in ARTIFACTS.items():
        data = shipped[:-1000] if data is None else data
        said = sent(tab, "#add-artifact", tmp_path / name, data, f"{name} is not added")
        assert words in said and "Traceback" not in said, kind
        assert app.alive
    assert sorted(app.out.glob("*")) == before
    file = tmp_path / "from-elsewhere.safetensors"
    sent(tab, "#add-artifact", file, shipped, "from-elsewhere is chosen")
    assert (app.out / file.name).read_bytes() == shipped
    sent(tab, "#add-artifact", file, shipped, "already")
    (app.out / file.name).unlink()


def test_what_only_its_name_makes_an_artifact(app: Any, client: Any, tmp_path: Path) -> None:
    """A pickle with its own ending is not even uploaded by the page; nor is it taken if it is."""
    from gradio_app.bench import Bench
    from gradio_app.settings import Settings

    (tmp_path / "a.pt").write_bytes(PICKLE)
    bench = Bench(Settings(tmp_path / "out"))
    assert "nothing else is opened" in refused(bench.added, tmp_path / "a.pt", "a.pt")


def test_what_is_no_picture_restores_nothing(app: Any, visit: Any, tmp_path: Path) -> None:
    tab = visit(app)
    for number, (kind, (data, words)) in enumerate(PICTURES.items()):
        name = f"{number}.png"
        assert words in sent(tab, "#restore", tmp_path / name, data, f"{name}: nothing"), kind
        assert tab.page.input_value("#seed input") == "7"
        assert app.alive


@pytest.fixture(scope="module")
def shipped() -> bytes:
    """An artifact file."""
    from tenuto.resources import asset

    return asset("artifacts/demo-unet.w8a8.safetensors").read_bytes()


def test_damaged_files_in_the_output_folder(app: Any, client: Any, shipped: bytes) -> None:
    """They got there by another way than the app: each is refused when it is used."""
    with (app.out / "huge.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)  # sparse: as long as it says
    (app.out / "short.safetensors").write_bytes(shipped[:-100])
    (app.out / "pickled.safetensors").write_bytes(PICKLE)
    (app.out / "other.safetensors").write_bytes(shipped)
    for name, words in (
        ("huge", "too large"), ("short", "truncated"), ("pickled", "not an artifact"),
        ("other", "is for a UNet2DConditionModel"),
    ):  # fmt: skip
        assert words in refused(generated, client, artifact=name)
        (app.out / f"{name}.safetensors").unlink()
    assert app.alive


# --- login ----------------------------------------------------------------------------------------


def test_without_login_there_is_nothing(start: Any) -> None:
    with start("--auth", "ann:a:b") as app:
        (app.out / "note.txt").write_text("ours")
        for path in (f"/gradio_api/file={app.out}/note.txt", "/config", "/gradio_api/info"):
            status, body = app.get(path)
            assert status in (401, 403), path
            assert b"ours" not in body
        with pytest.raises(Exception, match=r"401|[Cc]redentials|auth"):
            connected(app.url)
        with pytest.raises(Exception, match="Could not login"):
            connected(app.url, auth=("ann", "wrong"))
        assert "demo:unet" in connected(app.url, auth=("ann", "a:b")).predict(api_name="/about")[
            "models"
        ]  # fmt: skip


OPTIONS = {
    "no login": (("--listen",), "--auth"),
    "no password": (("--listen", "--auth", "ann"), "USER:PASSWORD"),
    "no name": (("--listen", "--auth", ":secret"), "USER:PASSWORD"),
    "no such root": (("--roots", "nowhere"), "there is no folder nowhere"),
    "out is a file": (("--out", "file.txt"), "not a folder"),
    "out cannot be": (("--out", "/proc/none"), "Cannot"),
    "no such port": (("--port", "70000"), "no port 70000"),
    "no such device": (("--device", "tpu9"), "no device 'tpu9'"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_get_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tenuto import cli

    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    options, words = OPTIONS[name]
    assert cli.main(["app", *options]) == 2
    out, err = capfd.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert err.startswith("tenuto: ") and words in err
    assert [p.name for p in tmp_path.iterdir() if p.name != "tenuto-app"] == ["file.txt"]


def test_a_taken_port_gets_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tenuto import cli

    monkeypatch.chdir(tmp_path)
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port = mine.getsockname()[1]
        assert cli.main(["app", "--port", str(port)]) == 2
    assert f"--port: {port} cannot be had" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the API --------------------------------------------------------------------------------------


def until_over(client: Any, kind: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    found = client.predict(kind, api_name="/job")
    while found["state"] in ("running", "stopping"):
        assert time.monotonic() < end, found
        time.sleep(0.2)
        found = client.predict(kind, api_name="/job")
    return found


def test_the_api_calibrates_draws_and_compares(app: Any, client: Any, tmp_path: Path) -> None:
    from tenuto import cli

    about = client.predict(api_name="/about")
    assert TINY in about["models"] and about["login"] is False
    options = {"model": TINY, "name": "by-api", "scheme": "w8a8", "prompts": "a red dog\na cat"}
    job = client.predict(options, api_name="/calibrate")
    assert job["state"] == "running"
    assert "is being made, or stands" in refused(client.predict, options, api_name="/calibrate")
    encoder = options | {"name": "encoder", "scheme": None, "text_encoder": "w4", "method": "rtn"}
    wrong = encoder | {"rounding": "nearest"}
    assert "below 8 bits" in refused(client.predict, wrong, api_name="/calibrate")
    behind = client.predict(encoder, api_name="/calibrate")
    assert (behind["state"], behind["place"]) == ("waiting", 1)
    assert client.predict("calibrate", api_name="/job")["id"] == job["id"], "what runs comes first"
    found = until_over(client, "calibrate")
    assert found["state"] == "done", found
    assert found["id"] == behind["id"], "it began by itself"
    said = found["result"]["text"]
    assert found["result"]["name"] == "encoder" and "encoder.safetensors" in said
    assert "weights alone" in said
    assert {"by-api", "encoder"} <= {*client.predict(api_name="/about")["artifacts"][TINY]}
    assert "already" in refused(client.predict, options, api_name="/calibrate")

    drawn = generated(client, artifact="by-api", beside=True)
    assert drawn["numbers"]["psnr_db"]["median"] > 20
    assert drawn["numbers"]["execution"]["layers"]
    assert "Tenuto artifact: by-api" in drawn["infotext"]
    status, data = app.get(f"/gradio_api/file={drawn['pictures']['artifact']}")
    assert status == 200 and b"Steps: 2, Sampler: DDIM, CFG scale: 2, Seed: 3, Size: 32x32" in data

    command = ["generate", str(app.roots / TINY), "--prompt", "a red dog", "--steps", "2"]
    command += ["--artifact", str(app.out / "by-api.safetensors"), "--out", str(tmp_path / "x.png")]
    assert cli.main(command) == 0, "the file is the command's too"

    assert list(read_header(app.out / "encoder.safetensors")["encoders"]) == ["text_encoder"]
    drawn = generated(client, artifact="encoder", beside=True)
    assert drawn["numbers"]["psnr_db"]["median"] > 10 and drawn["infotext"]

    options = {"model": TINY, "artifacts": ["by-api", "encoder"], "count": 3}
    client.predict(options, api_name="/compare")
    found = until_over(client, "compare")
    assert found["state"] == "done", found
    assert found["result"]["numbers"]["encoder"]["encoders"]["text_encoder"]["cosine"]
    numbers = found["result"]["numbers"]["by-api"]
    assert numbers["count"] == 3 and numbers["bf16_floor_psnr_db"]["median"] > 20
    folder = Path(found["result"]["folder"])
    said = texts(folder / found["result"]["pictures"]["by-api"][1])["parameters"]
    assert "Seed: 10001" in said and "Tenuto artifact: by-api" in said
    assert json.loads((folder / "comparison.json").read_text())["numbers"]["by-api"] == numbers
    assert "Unknown: colour" in refused(client.predict, {"colour": 1}, api_name="/compare")


def test_no_address_is_fetched(app: Any, client: Any) -> None:
    """A file that is said to be elsewhere: Gradio itself would ask for it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        other.settimeout(1)
        address = f"http://127.0.0.1:{other.getsockname()[1]}/x.png"
        file = {"path": address, "meta": {"_type": "gradio.FileData"}}
        options = {"model": "mine/inpaint", "call": {"image": file}}
        assert "not fetched" in refused(lambda: generated(client, **options))
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_killed_worker_is_told_and_goes_on(app: Any, client: Any) -> None:
    """Out of memory, say: the app lives, the job failed, and Resume ends it."""
    options = {
        "model": "demo:transformer", "name": "killed", "scheme": "w8a8", "steps": 2,
        "prompts": "a lemon\na goldfish",
    }  # fmt: skip
    client.predict(options, api_name="/calibrate")
    work = app.out / "killed.work"
    (worker,) = app.workers
    while not (work / "recording" / "trajectory.safetensors").exists():
        assert Path(f"/proc/{worker}/exe").exists(), client.predict("calibrate", api_name="/job")
        time.sleep(0.02)
    os.kill(worker, signal.SIGKILL)
    found = until_over(client, "calibrate")
    assert found["state"] == "failed" and "exit code -9" in found["error"]
    other = options | {"scheme": "w4a8"}
    assert "other settings" in refused(client.predict, other, api_name="/calibrate")
    assert "killed" in client.predict(api_name="/about")["unfinished"]
    client.predict("killed", api_name="/resume")
    assert until_over(client, "calibrate")["state"] == "done"
    assert not work.exists() and app.alive


def test_the_worker_ends_with_the_app(start: Any, models: Path) -> None:
    """Ctrl-C while it calibrates: nothing is left running, and what was done is kept.

    It was asked for a window, and there is no screen: one line says so.
    """
    with start("--desktop", roots=models) as app:
        client = connected(app.url)
        options = {"model": "demo:unet", "name": "left", "scheme": "w4a8"}
        client.predict(options, api_name="/calibrate")
        (worker,) = app.workers
    assert app.process.returncode == 0
    said = [line for line in app.log.read_text().splitlines() if line.startswith("tenuto: ")]
    assert "The app is closed." in app.log.read_text()
    assert len(said) == 3 and said[0].startswith("tenuto: starting"), said
    assert said[1].startswith("tenuto: No window: "), said
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{worker}/cmdline").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
    assert (app.out / "unfinished" / "left.json").exists()
