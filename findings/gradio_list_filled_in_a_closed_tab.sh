#!/usr/bin/env bash
# gradio 6.31.0 (playwright 1.65.2, Chromium of Debian): a Dropdown of several, filled while its tab is closed, keeps saying
# that it has changed.
#
# `change` is said when a value changes, so the good guess is that an answer which fills a list says it once, wherever the
# list is. So it is where the tab was opened before. Where the same answer fills the list and opens its tab, and two
# listeners of `change` answer with other components alone, `change` comes again and again, with the value as it was:
#
#   opened before      1 call of the first listener
#   opened with it     5, where the script stops; an earlier run saw 25 in 8 seconds
#
# Needs `chromium` on the PATH.
set -euo pipefail
WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check gradio==6.31.0 playwright==1.65.2
cd "$WORK"
GRADIO_ANALYTICS_ENABLED=False "$WORK/venv/bin/python" -W ignore - <<'PY'
import shutil
import time

import gradio as gr
from playwright.sync_api import sync_playwright

calm = {"show_progress": "hidden", "trigger_mode": "always_last"}


def changes(before):
    count = [0]

    def one(names):
        count[0] += 1
        return 1

    def other(names):
        return gr.Slider(interactive=True), "said"

    def filled():
        return gr.update(choices=["a", "b", "c"], value=["c"])

    def opened():
        return gr.Tabs(selected="second")

    with gr.Blocks() as page:
        with gr.Tabs() as tabs:
            with gr.Tab("First", id="first"):
                go = gr.Button("Go", elem_id="go")
            with gr.Tab("Second", id="second"):
                several = gr.Dropdown(
                    ["a", "b"], value=["b"], multiselect=True, allow_custom_value=True
                )
                slider, text = gr.Slider(1, 4, 1), gr.HTML("")
        several.change(one, several, slider, **calm)
        several.change(other, several, [slider, text], **calm)
        if before:
            go.click(opened, None, tabs).then(filled, None, several)
        else:
            go.click(lambda: None).then(lambda: [filled(), opened()], None, [several, tabs])
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page()
        tab.goto(url)
        tab.click("#go")
        end = time.monotonic() + (10 if before else 60)  # a machine may be slow
        while time.monotonic() < end and count[0] < 4:
            time.sleep(0.5)
        browser.close()
    page.close(verbose=False)
    print(f"{'opened before' if before else 'opened with it':19}{count[0]}", flush=True)
    return count[0]


seen = changes(True), changes(False)
assert seen[0] <= 2 < 4 <= seen[1], seen
PY
