"""The app as a user starts it, `tenuto app` in a process of its own, and Chromium to look at it."""

from __future__ import annotations

import importlib.util
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

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
QUIET = (
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-default-apps",
)  # fmt: skip
STRICT = ("-W", "error::UserWarning")  # Gradio warns so of options that it ignores
PATIENCE = 120_000  # milliseconds: the machine may be busy with other work
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
            with urllib.request.urlopen(self.url + path, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    @property
    def busy(self) -> float:
        """Seconds of a processor that it has used, threads and ended children too (Linux)."""
        rest = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, rest[11:15])) / os.sysconf("SC_CLK_TCK")

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self.process.poll() is None and self.get("/gradio_api/startup-events")[0] == 200


@pytest.fixture(scope="session")
def environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """Of the app: with a folder for compiled modules, as an installation has them."""
    out = ("PYTHONDONTWRITEBYTECODE", "DISPLAY", "WAYLAND_DISPLAY")
    kept = {k: v for k, v in os.environ.items() if k not in out}
    return kept | {
        "PYTHONPATH": str(ROOT / "core"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPYCACHEPREFIX": str(pytestconfig.cache.mkdir("bytecode")),
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
            for _ in range(1800):
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
                process.wait(120)
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
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Tab]]:
    """visit(app, dark=False, width=1280): a new page of the app, ready, that is closed afterwards.

    Pages of one test share their storage, as the tabs of one browser do.
    """
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    tabs: list[Tab] = []
    apps: list[App] = []

    def opened(app: App, dark: bool = False, width: int = 1280, height: int = 900) -> Tab:
        page = context.new_page()
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
    context.close()
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
