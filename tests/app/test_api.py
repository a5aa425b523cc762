"""The API as `gradio_client` and plain HTTP see it: its names, wrong types, a stop that stops."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from gradio_app.api import CALIBRATE, COMPARE
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow

NAMES = {"/about", "/generate", "/calibrate", "/resume", "/compare", "/export", "/job", "/stop"}
TINY = "mine/tiny"
GENERATE = {
    "model": TINY, "prompt": "a red dog", "seed": 3, "steps": 1, "guidance": 2.0, "artifact": "",
    "beside": False, "call": {}, "speedup": None, "loras": "",
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "generate": GENERATE, "resume": {"name": "none"}, "job": {"kind": "compare"},
    "stop": {"kind": "compare"}, "calibrate": {"options": {"model": "none"}},
    "compare": {"options": {"model": "none"}},
    "export": {"model": TINY, "artifact": "none", "to": "comfy"},
}  # fmt: skip
ADDED = ("call", "speedup", "loras")  # later than the rest of `generate`
OPTIONS = {"calibrate": CALIBRATE, "compare": COMPARE}
WRONG: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, 1e308, "x", "a\0b", "~nobody/x", "y" * 5000, [], [[]], [{}],
    {}, {"a": [1]}, "\x1b[2J\u202e",
]  # fmt: skip


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[Any]:
    """gradio_client, as a program would use the app."""
    from gradio_client import Client

    yield Client(app.url, verbose=False)


def answer(client: Any, name: str, /, **given: Any) -> dict[str, Any] | str:
    """What an endpoint answers: an object, or the one sentence of its refusal."""
    from gradio_client.exceptions import AppError

    try:
        found = client.predict(**given, api_name=f"/{name}")
    except AppError as error:
        return str(error)
    assert isinstance(found, dict), (name, given, found)
    return found


def sentence(text: Any) -> bool:
    return (
        isinstance(text, str) and text.isprintable() and text.endswith(".")
        and 10 < len(text) <= 300 and "Traceback" not in text and "Error:" not in text
    )  # fmt: skip


def test_the_names_are_those_of_the_documentation(client: Any) -> None:
    """And no others: a listener of the page may not take one."""
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == NAMES


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, good in GOOD.items() for field in good]
)
def test_wrong_types_get_one_sentence(app: Any, client: Any, name: str, field: str) -> None:
    """Every field of every endpoint; what happens to fit is answered with an object."""
    for value in WRONG:
        said = app.asked(name, *(GOOD[name] | {field: value}).values())
        assert isinstance(said, dict) or sentence(said), (value, said)
        if isinstance(said, dict) and name in ("calibrate", "resume", "compare"):  # it has begun
            kind = "compare" if name == "compare" else "calibrate"
            client.predict(kind, api_name="/stop")
            over(client, kind)
    assert "Traceback" not in app.log.read_text()


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, known in OPTIONS.items() for option in known]
)
def test_wrong_types_among_options_get_one_sentence(
    app: Any, client: Any, name: str, option: str
) -> None:
    usual: dict[str, Any] = {"model": TINY}
    usual |= {"name": "x"} if name == "calibrate" else {"artifacts": ["none"]}
    for value in WRONG:
        said = app.asked(name, usual | {option: value})
        if isinstance(said, dict):  # it was right
            client.predict(name, api_name="/stop")
            over(client, name)
        else:
            assert sentence(said), (value, said)
    assert "Traceback" not in app.log.read_text()


def over(client: Any, kind: str) -> str:
    """The state of a job, once it is over."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        state = client.predict(kind, api_name="/job")["state"]
        if state not in ("running", "stopping"):
            return state
        time.sleep(0.05)
    raise AssertionError(f"{kind} is not over")


def test_a_call_of_an_older_program_still_works(app: Any, client: Any) -> None:
    """By name or by place, without what was added since."""
    old = {name: value for name, value in GENERATE.items() if name not in ADDED}
    found = answer(client, "generate", **old)
    assert isinstance(found, dict), found
    said = app.posted("generate", json.dumps({"data": list(old.values())}).encode())
    assert said.startswith("event: complete"), said


CALLS = [
    ({"height": "x"}, "The height is a number"), ({"width": 1e9}, "The width is a number"),
    ({"height": [1]}, "The height is"), ({"colour": 1}, "takes no colour"),
    ({"hieght": 8}, "did you mean height?"), ({"a b": 1}, "name of a setting"),
    ({"prompt": "x"}, "prompt follows from"), ({"eta": 10**400}, "eta is a number from"),
    ({"eta": {"a": [1e300]}}, "eta is a number from"),
    ({"negative_prompt": "x" * 20_000}, "at most 10000"),
    ({"image": {"path": "/etc/hostname"}}, "takes no image"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), CALLS, ids=range(len(CALLS)))
def test_a_call_that_cannot_be_gets_one_sentence(
    app: Any, client: Any, call: dict[str, Any], words: str
) -> None:
    """From each function that takes one, and nothing is begun."""
    wanted = {"model": TINY, "call": call}
    shipped = wanted | {"model": "demo:unet", "artifacts": ["shipped:demo-unet.w8a8"]}
    for name, given in (
        ("generate", GENERATE | {"call": call}),
        ("calibrate", {"options": wanted | {"name": "never"}}), ("compare", {"options": shipped}),
    ):  # fmt: skip
        said = answer(client, name, **given)
        assert sentence(said) and words in said, (name, said)
    assert not (app.out / "unfinished" / "never.json").exists()


@pytest.mark.parametrize("name", [*GOOD, "about"])
def test_too_few_and_too_many_values_get_a_sentence(app: Any, client: Any, name: str) -> None:
    good = list(GOOD.get(name, {}).values())
    for data in (good[:-1], [*good, "more", {}], [None] * len(good)):
        said = app.posted(name, json.dumps({"data": data}).encode())
        if name == "about" or said.startswith("event: complete"):
            continue
        assert sentence(json.loads(said.partition("data: ")[2])["error"]), (data, said)
    for body in (b"", b"[]", b'{"data": 1}', b'{"data": {}}', b"\xff", b'{"data": "x"}'):
        said = app.posted(name, body)
        assert said and "null}" not in said.replace('"input":null}', ""), (body, said)
    assert "Traceback" not in app.log.read_text(), app.log.read_text()[-3000:]
    assert app.alive


def told(app: Any, listener: dict[str, Any], data: list[Any]) -> Any:
    """What a listener of the page answers to these values, as the page would send them."""
    session = uuid.uuid4().hex
    body = {"fn_index": listener["id"], "data": data, "session_hash": session}
    queued = listener["queue"] is not False
    url = f"{app.url}/gradio_api/{'queue/join' if queued else 'run/predict'}"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as found:
            answered = json.load(found)
    except urllib.error.HTTPError as error:
        return json.load(error)
    if not queued:
        return answered
    events = f"{app.url}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(events, timeout=PATIENCE) as found:
        for line in found:
            if b"process_completed" in line:
                return json.loads(line.removeprefix(b"data: "))["output"]
    raise AssertionError("no answer")


def test_listeners_of_the_page_get_wrong_values_too(app: Any, client: Any) -> None:
    """By their number, as anyone on this machine can call them: a sentence, nothing in the log.

    One call is enough of what takes no value, and of what the page does by itself.
    """
    before = len(app.log.read_text())
    listeners = json.loads(app.get("/config")[1])["dependencies"]
    assert len(listeners) > 30
    values = (None, True, -1, "x", [], {}, {"a": 1}, [[1]])
    for listener in listeners:
        for value in values if listener["inputs"] and listener["backend_fn"] else values[:1]:
            answered = told(app, listener, [value] * len(listener["inputs"]))
            said = answered.get("error", "none")
            assert said and "Traceback" not in said and len(said) <= 300, (listener, value, said)
    app.stop_all()
    assert "Traceback" not in app.log.read_text()[before:], app.log.read_text()[before:][-3000:]


def test_stop_stops_a_calibration(app: Any, client: Any) -> None:
    options = {"model": "demo:unet", "name": "stopped-by-api", "scheme": "w4a8"}
    client.predict(options, api_name="/calibrate")
    assert client.predict("compare", api_name="/stop")["state"] != "running"
    assert client.predict("calibrate", api_name="/job")["state"] == "running"
    assert client.predict("calibrate", api_name="/stop")["state"] in ("stopping", "stopped")
    assert over(client, "calibrate") == "stopped"
    assert not (app.out / "stopped-by-api.safetensors").exists()
    assert "stopped-by-api" in client.predict(api_name="/about")["unfinished"]


def test_stop_stops_an_image(app: Any, client: Any) -> None:
    said: list[Any] = []
    long = GENERATE | {"model": "demo:unet", "steps": 1000}
    thread = threading.Thread(target=lambda: said.append(answer(client, "generate", **long)))
    thread.start()
    while client.predict("generate", api_name="/job")["state"] != "running":
        assert thread.is_alive(), said
        time.sleep(0.02)
    time.sleep(1)  # into its steps
    client.predict("generate", api_name="/stop")
    thread.join(PATIENCE)
    assert said == ["Stopped."]
    assert client.predict("generate", api_name="/job")["state"] == "none"
