"""SD.Next, which is not supported: the extension loads there, and says so in one sentence."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

SENTENCE = "SD.Next is not supported: it has no callback for an evaluation."


def test_it_loads_and_says_that_it_is_not_supported(
    make_host: Any, stubs: Any, unets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its callbacks take a function alone, as modules/script_callbacks.py of vladmandic/sdnext."""
    make_host("a1111")
    for name in [n for n in sys.modules if n.partition(".")[0] == "tenuto_webui"]:
        monkeypatch.delitem(sys.modules, name)
    host = stubs.Host("a1111", unets.unet("a1111"), tmp_path)
    registered: list[Any] = []
    callbacks = host.modules["modules.script_callbacks"]
    for name in [n for n in vars(callbacks) if n.startswith("on_")]:
        monkeypatch.setattr(callbacks, name, lambda callback: registered.append(callback))
    own = host.modules["modules.sd_offload"] = types.ModuleType("modules.sd_offload")
    own.__spec__ = importlib.util.spec_from_loader("modules.sd_offload", None)
    said: list[Any] = []
    monkeypatch.setattr(host.modules["gradio"], "HTML", said.append)
    for name, module in host.modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    with caplog.at_level(logging.WARNING, "tenuto"):
        script = host.load()
    assert [r.getMessage() for r in caplog.records] == [f"Tenuto: {SENTENCE}"]
    assert said == [f"<p>Tenuto: {SENTENCE}</p>"] and host.inputs == [] and not registered
    assert script.title() == "Tenuto"
