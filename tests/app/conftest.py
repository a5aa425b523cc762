"""The app as a user starts it, `tenuto app` in a process of its own, and Chromium to look at it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.core import tiny_pipelines
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
QUIET = (
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-default-apps", "--process-per-site",
)  # fmt: skip
STRICT = ("-W", "error::UserWarning")  # Gradio warns so of options that it ignores
JOBS = ("calibrate", "compare", "export", "generate")
ALIVE = ("waiting", "running", "stopping")
ANSWERED = "!document.querySelector('[inert]')"  # no field waits for an answer
TOLERATED = {"nested-interactive"}  # Gradio's own, on toasts
MAIN = "import sys; from tenuto import cli; sys.exit(cli.main(sys.argv[1:]))"


@dataclass
class App:
    """A running app. began: when its process was started, by the monotonic clock.

    pages: what a browser shows of it, closed before it ends.
    """

    url: str
    out: Path
    roots: Path
    log: Path
    process: subprocess.Popen[bytes]
    began: float
    pages: list[Any] = field(default_factory=list)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET, whatever the status."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def posted(self, name: str, body: bytes) -> str:
        """What the API answers by the plain protocol: all events, or the text of the refusal."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/gradio_api/call/{name}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as found:
                event = json.load(found)["event_id"]
            with urllib.request.urlopen(f"{request.full_url}/{event}", timeout=PATIENCE) as found:
                return found.read().decode()
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"

    def asked(self, name: str, *given: Any) -> dict[str, Any] | str:
        """What the API answers: an object, or the one sentence of its refusal.

        By the plain protocol, which is a fifth of the work of a call by gradio_client.
        """
        said = self.posted(name, json.dumps({"data": given}).encode())
        found = json.loads(said.rpartition("data: ")[2])
        if said.rpartition("event: ")[2].startswith("error"):
            return found["error"]
        assert isinstance(found[0], dict), (name, given, found)
        return found[0]

    def stop_all(self) -> None:
        """Stop what runs and what stands in line, and wait until it has stopped."""
        for kind in JOBS:
            for _ in range(int(PATIENCE / 0.2)):
                found = self.asked("job", kind)
                if isinstance(found, str) or found["state"] not in ALIVE:
                    break
                self.asked("stop", kind)
                time.sleep(0.2)

    @property
    def busy(self) -> float:
        """Seconds of a processor that it has used, threads and ended children too (Linux)."""
        rest = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, rest[11:15])) / os.sysconf("SC_CLK_TCK")

    @property
    def workers(self) -> list[int]:
        """The processes that it has started (Linux)."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self.process.poll() is None and self.get("/gradio_api/startup-events")[0] == 200


@pytest.fixture(scope="session")
def environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """Of the app: with compiled modules, as an installation has them.

    Where the tests may not write them beside the modules, in a folder of their own.
    """
    out = ("PYTHONDONTWRITEBYTECODE", "DISPLAY", "WAYLAND_DISPLAY")
    kept = {k: v for k, v in os.environ.items() if k not in out}
    if sys.dont_write_bytecode:
        kept["PYTHONPYCACHEPREFIX"] = str(pytestconfig.cache.mkdir("bytecode"))
    return kept | {
        "PYTHONPATH": str(ROOT / "core"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip


@pytest.fixture(scope="session")
def start(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """start(*options, roots=folder, before=code): a context with an `App` that answers.

    before: what is done in its process first.
    """

    @contextmanager
    def started(*options: str, roots: Path | None = None, before: str = "pass") -> Iterator[App]:
        base = tmp_path_factory.mktemp("app")
        roots = roots or base
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, *STRICT, "-c", f"{before}\n{MAIN}", "app", "--no-browser",
            "--port", str(port), "--out", str(base / "out"), "--roots", str(roots), *options,
        ]  # fmt: skip
        with (base / "log").open("wb") as log:
            began = time.monotonic()
            process = subprocess.Popen(
                command, cwd=base, stdout=log,
                env=environment | {"TMPDIR": str(base), "HF_HUB_CACHE": str(base / "hub")},
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        app = App(url, base / "out", roots, base / "log", process, began)
        try:
            for _ in range(int(PATIENCE / 0.1)):
                assert process.poll() is None, (base / "log").read_text()[-3000:]
                try:
                    app.get("/")
                    break
                except OSError:
                    time.sleep(0.1)
            yield app
            for page in app.pages:  # one that asks an app that has ended complains
                page.close()
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()

    return started


@pytest.fixture(scope="session")
def models(tiny_pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --roots: `mine/tiny`, `mine/inpaint` from an image, `mine/video` from one."""
    root = tmp_path_factory.mktemp("roots")
    shutil.copytree(tiny_pixart_folder, root / "mine" / "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = "StableDiffusionInpaintPipeline"
        tiny_pipelines.stable_diffusion(kind).save_pretrained(root / "mine" / "inpaint")
        tiny_pipelines.video_diffusion().save_pretrained(root / "mine" / "video")
    return root


@pytest.fixture(scope="session")
def app(start: Any, models: Path) -> Iterator[App]:
    """The app that most tests share: they leave it idle."""
    with start(roots=models) as found:
        yield found
    assert "Traceback" not in found.log.read_text(), found.log.read_text()[-3000:]


@pytest.fixture(autouse=True)
def left_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test leaves running in the shared app is stopped before the next one begins."""
    app = request.getfixturevalue("app") if "app" in request.fixturenames else None
    yield
    if app is None or app.process.poll() is not None:
        return
    if ("failed", True) in request.node.user_properties or app.workers:
        app.stop_all()


# --- Chromium -------------------------------------------------------------------------------------


@dataclass
class Tab:
    """A page of the app. complaints: of its console; strange: requests that left the machine."""

    page: Any
    complaints: list[str]
    strange: list[str]

    def show(self, name: str) -> None:
        """Choose a tab; one that the window is too narrow for is in the menu behind the others."""
        tab = self.page.get_by_role("tab", name=name)
        if tab.count():
            tab.click()
        else:
            self.page.click(".overflow-menu > button")
            self.page.locator(".overflow-dropdown button", has_text=name).click()
        self.page.wait_for_timeout(300)
        self.page.wait_for_function(ANSWERED)

    def text(self, place: str) -> str:
        """What is read at a place."""
        return " ".join(self.page.inner_text(place).split())


def choose(page: Any, place: str, label: Any) -> None:
    """An entry of a list, by its text or a pattern. An answer that fills it closes it once more."""
    from playwright.sync_api import TimeoutError

    option = page.get_by_role("option", name=label).first
    for _ in range(int(PATIENCE / 5)):
        page.click(f"{place} input")
        with contextlib.suppress(TimeoutError):
            option.click(timeout=5000)
            return
    raise AssertionError(f"{place} has no {label}")


def number_of(page: Any, place: str) -> int:
    """By which the page's requests name a component: their `trigger_id`."""
    find = "id => window.gradio_config.components.find(c => c.props.elem_id == id).id"
    return page.evaluate(find, place[1:])


def restore(page: Any, file: Path) -> None:
    """Drop an image under *Restore settings*, and wait until they are back."""
    page.get_by_text("Restore settings").click()
    page.set_input_files("#restore input[type=file]", file)
    page.wait_for_selector("#aside-said [data-state=done]")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the distribution, without a window."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        flags = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """What holds the pages of a module, all in one process: the first one compiles the scripts."""
    made = browser.new_context()
    made.set_default_timeout(1000 * PATIENCE)
    yield made
    made.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep how a test ended, for what its fixtures say at its end."""
    outcome = yield
    report: Any = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call":
        item.user_properties.append(("failed", report.failed))


def seen(page: Any) -> str:
    """What a page shows, field by field, for the report of a test that fails."""
    script = (
        "[...document.querySelectorAll('input, textarea, [role=progressbar]')].map(e => "
        "(e.closest('[id]')?.id || '') + '=' + (e.value || e.ariaValueNow || '')).join('; ')"
    )
    try:
        return f"{page.url}\n{page.inner_text('body')}\n{page.evaluate(script)}"
    except Exception as error:  # it was closed, or does not answer
        return str(error)


@pytest.fixture
def visit(context: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Tab]]:
    """visit(app, dark=False, width=1280): a new page of the app, ready, that is closed afterwards.

    Pages of one test share their storage, as the tabs of one browser do; of others they see none.
    """
    tabs: list[Tab] = []
    apps: list[App] = []

    def opened(app: App, dark: bool = False, width: int = 1280, height: int = 900) -> Tab:
        if not context.pages:  # the process of the pages lives as long as one of them
            context.new_page().goto(f"{app.url}/gradio_api/startup-events")
        page = context.new_page()
        if app not in apps:
            session = context.new_cdp_session(page)
            whole = {"origin": app.url, "storageTypes": "all"}
            session.send("Storage.clearDataForOrigin", whole)
            session.detach()
        page.set_viewport_size({"width": width, "height": height})
        app.pages.append(page)
        apps.append(app)
        tab = Tab(page, [], [])
        page.on("pageerror", lambda error: tab.complaints.append(f"{error}\n{error.stack}"))
        page.on(
            "console",
            lambda m: tab.complaints.append(m.text) if m.type == "error" else None,
        )
        page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((app.url, app.url.replace("http", "ws"), "data:", "blob:"))
                else tab.strange.append(r.url)
            ),
        )
        page.goto(f"{app.url}/?__theme={'dark' if dark else 'light'}")
        page.wait_for_selector(".gradio-container[data-tenuto=ready]")
        tabs.append(tab)
        return tab

    yield opened
    if ("failed", True) in request.node.user_properties:
        print(*(seen(tab.page) for tab in tabs), sep="\n\n")
    for tab in tabs:
        tab.page.close()
    for app in apps:
        app.pages.clear()
    for tab in tabs:
        assert not tab.strange, "a request left the machine"
        assert not tab.complaints


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which comes with a test package."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None and spec.origin is not None, "pip install -e '.[test]'"
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def findings(axe: str) -> Callable[[Any], list[str]]:
    """findings(page): what axe finds serious or worse, once a button has its colour."""

    def found(page: Any) -> list[str]:
        page.wait_for_function(ANSWERED)  # what waits for an answer is paler, and cannot be used
        page.wait_for_function(
            "document.getAnimations().every(a => !(a.transitionProperty || '').includes('color'))"
        )
        page.evaluate(axe)
        seen = page.evaluate(
            "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
        )
        return [
            f"{rule['id']}: {node['target']} {node['failureSummary'][:300]}"
            for rule in seen["violations"]
            if rule["impact"] in ("serious", "critical") and rule["id"] not in TOLERATED
            for node in rule["nodes"]
        ]

    return found
