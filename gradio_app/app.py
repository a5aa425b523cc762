"""The app put together, served, and closed again."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from tenuto.errors import TenutoError

from .bench import Bench
from .memory import few_heaps
from .settings import HOSTS, Settings

LARGEST = "8gb"  # of an upload: artifacts of large models
SESSIONS = 32  # pages whose state is remembered: one that is older starts anew
HEAD = (
    '<div class="tenuto-head"><h1>Tenuto</h1><p>Calibrate a diffusion model once, use one file '
    "everywhere, and see what it costs and what it gains.</p></div>"
)


def build(bench: Bench) -> Any:
    """The page: `gr.Blocks` with its tabs and the API."""
    import gradio as gr

    from . import (
        api,
        calibrate,
        checking,
        compare,
        elsewhere,
        generate,
        line,
        lora_field,
        machine,
        opening,
    )
    from .answers import filling
    from .page import Page
    from .viewer import QUIET

    models = bench.places.models()
    first = models[0] if models else ""
    with Page(title="Tenuto", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        api.add(bench)
        gr.HTML(HEAD, padding=False)
        machine.machine(bench)
        line.line(bench)
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generation = generate.tab(bench)
            with gr.Tab("Calibrate", id="calibrate") as calibrating:
                calibration = calibrate.tab(bench, first)
            with gr.Tab("Compare", id="compare"):
                comparison = compare.tab(bench, first)
            with gr.Tab("Export", id="export"):
                exporting = elsewhere.tab(bench, first)
        watch = calibration.watch
        checking.follow(bench, calibration.fields, calibration.check, calibrating, watch.checked)
        into = [generation.model, generation.artifact, generation.chosen, tabs]
        filling(
            watch.use.click, lambda key: calibrate.used(bench, key), watch.key, into,
            [generation.model, *generation.filled], **QUIET,
        )  # fmt: skip
        into = comparison.chosen, [comparison.model, tabs], comparison.artifacts
        _handed(watch.compare, lambda key: compare.used(bench, key), watch.key, *into)
        into = exporting.chosen, [exporting.model, tabs], exporting.artifact
        _handed(watch.export, lambda key: elsewhere.chosen(bench, key), watch.key, *into)
        lists = [generation.artifact, comparison.artifacts, exporting.artifact]
        filling(  # an answer closes a list that was opened meanwhile
            tabs.select, lambda *models: _artifacts(bench, *models),
            [generation.model, comparison.model, exporting.model], lists, lists, **QUIET,
        )  # fmt: skip
        generation.added.change(  # not by looking at a tab: an answer would come while one types
            lambda: _models(bench, 3), None,
            [calibration.model, comparison.model, exporting.model], **QUIET,
        )  # fmt: skip
        for part in (generation, comparison):
            lora_field.watch(bench.places, part.model, part.loras, generation.added)
        opening.wire(page, bench, generation, calibration, comparison, exporting)
    return page


def _handed(button: Any, answer: Any, key: Any, seen: Any, opened: list[Any], last: Any) -> None:
    """What a calibration made goes to another tab, in three steps.

    seen: what was seen there last, or the model would be another one, which takes away the artifact
    that came with it. opened: the model and the tabs. last: the artifact, or the list of several: a
    list that gets its value while its tab is closed says again and again that it has changed
    (Gradio 6.31).
    """
    from .viewer import QUIET

    first = button.click(lambda now: answer(now)[0], key, seen, **QUIET)
    second = first.then(lambda now: answer(now)[1:3], key, opened, **QUIET)
    second.then(lambda now: answer(now)[3], key, last, **QUIET)


def _artifacts(bench: Bench, one: str, two: str, three: str) -> list[Any]:
    """What there is by now in the lists of artifacts: a calibration may have ended."""
    import gradio as gr

    from .compare import refreshed
    from .fields import artifact_choices

    made = [gr.Dropdown(choices=artifact_choices(bench, one)), refreshed(bench, two)]
    return [*made, refreshed(bench, three)]


def _models(bench: Bench, count: int) -> list[Any]:
    """The models that there are by now, for so many lists: a folder may have been added."""
    import gradio as gr

    return [gr.Dropdown(choices=bench.places.models())] * count


def serve(settings: Settings) -> None:
    """Serve the app until it is closed: by Ctrl-C, or with its window."""
    _say("starting; the address follows in a few seconds.")
    few_heaps()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no model of the app comes from elsewhere
    bench = Bench(settings)
    warm = threading.Thread(target=_warm, args=(bench,), daemon=True)
    warm.start()
    page = build(bench)
    window = False
    if settings.desktop:
        from .window import missing

        reason = missing()
        window = reason is None
        if reason is not None:
            _say(f"No window: {reason} The browser shows the app instead.")
    url = started(page, settings, settings.browser and not window)
    _say(f"the app is at {url} and writes to {settings.out}; Ctrl-C closes it.")
    try:
        if window:
            from .window import show

            show(url, settings.out)
        else:
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        bench.studio.stop()
        bench.desk.close()
        page.close(verbose=False)
        warm.join(60)  # a thread inside torch at the end of the process would abort it


def started(page: Any, settings: Settings, browser: bool) -> str:
    """Start the server and return its address; TenutoError if the port is taken."""
    from starlette.middleware import Middleware

    from .guard import Guard, swept
    from .look import STYLE, theme

    out = str(settings.out)
    blocked = [str(r) for r in settings.roots if not settings.out.is_relative_to(r)]
    try:
        page.launch(
            server_name=HOSTS[settings.listen],
            server_port=settings.port, auth=settings.auth, inbrowser=browser, share=False,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, strict_cors=True,
            allowed_paths=[out], blocked_paths=blocked, max_file_size=LARGEST,
            theme=theme(), css_paths=[STYLE], footer_links=["api", "settings"],
            state_session_capacity=SESSIONS, app_kwargs={
                "middleware": [Middleware(Guard, listen=settings.listen)], "lifespan": swept(page),
            },
        )  # fmt: skip
    except OSError as error:
        raise TenutoError(f"The app cannot start: {error}") from error
    return page.local_url.rstrip("/")


def _warm(bench: Bench) -> None:
    """Load the first model while the page comes up, so that the first image is soon there."""
    try:
        models = bench.places.models()
        if models:
            bench.studio.pipe(bench.places.model(models[0]))
    except Exception:
        pass  # generating with it says why it cannot be loaded: no memory left, say


def _say(text: str) -> None:
    print(f"tenuto: {text}", file=sys.stderr, flush=True)
