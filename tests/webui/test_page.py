"""The page, the infotext, the axes, the API: what a user and other programs rely on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("a1111", "neo")  # the two that share the least: the others have their own parts elsewhere
BALANCED = "Built-in: Balanced"
FIELDS = (  # label, default: the positional interface of the API. Append; never reorder or rename
    ("Tenuto", False), ("Artifact", BALANCED), ("Precision", "From artifact"),
    ("Feature cache", "Auto"), ("Speed", 2.0), ("Start at", 0.15),
    ("Stop at", 1.0), ("Always compute last step", True), ("Max. consecutive reuse", 3),
    ("Passes", "Both"), ("Speedup", 1.0),
)  # fmt: skip
CHOSEN = (True, BALANCED, "W4A8", "Uniform", 2.5, 0.3, 0.9, False, 5, "First pass only", 2.25)


def webui(name: str) -> Any:
    """A module of the extension as the host has it."""
    return sys.modules[f"tenuto_webui.{name}"]


def test_the_fields_and_their_order_are_frozen(host: Any) -> None:
    assert tuple((c.label, c.value) for c in host.inputs) == FIELDS
    assert host.script.title() == "Tenuto"
    kind = type(host.inputs[4].value), type(host.inputs[8].value)
    assert kind == (float, int), "hosts cast what an infotext says to the type of the default"
    assert all(c.elem_id.startswith("script_txt2img_tenuto_") for c in host.inputs)
    assert host.inputs[1].do_not_save_to_config


def test_missing_arguments_take_their_defaults(host: Any) -> None:
    choices = webui("choices").Choices
    assert choices.of(()) == choices()
    assert choices.of((True, BALANCED, "W4A8", "Uniform", 2)).cache == "Uniform"
    assert tuple(vars(choices.of(CHOSEN)).values()) == CHOSEN


def test_infotext_and_back(host: Any) -> None:
    p = host.p(*CHOSEN)
    found = host.pictures(p)
    params = host.infotext(p)
    assert params["Tenuto"] == "W4A8+uniform" and params["Tenuto speed"] == "2.5"
    assert params["Tenuto artifact"] == BALANCED and "Tenuto artifact hash" not in params
    values = host.paste(params)
    assert values == list(CHOSEN)
    assert [type(v) for v in values] == [type(c.value) for c in host.inputs]
    assert torch.equal(host.pictures(host.p(*values)), found)
    assert set(params) - {"Steps"} <= set(host.script.paste_field_names)


def test_infotext_has_only_what_is_not_the_default(host: Any) -> None:
    p = host.p(True)
    found = host.pictures(p)
    params = host.infotext(p)
    assert set(params) == {"Steps", "Tenuto", "Tenuto artifact", "Tenuto version"}
    assert params["Tenuto"] == "W8A8+auto"
    values = host.paste(params)
    assert values[0] is True and values[3:] == [value for _, value in FIELDS[3:]]
    assert torch.equal(host.pictures(host.p(*values)), found), "what W8A8 meant"


@pytest.mark.parametrize("cache", ["Router (from artifact)", "Uniform", "Off"])
def test_an_infotext_of_before_means_what_it_meant(host: Any, cache: str) -> None:
    """It has nothing of what is new, and other caches than the default of now."""
    short = cache.partition(" ")[0].lower()
    old = {"Steps": "12", "Tenuto": f"W8A8+{short}", "Tenuto artifact": BALANCED}
    values = host.paste(old)
    assert values == [True, BALANCED, "W8A8", cache, *(value for _, value in FIELDS[4:])]
    p = host.p(*values, steps=12)
    found = host.pictures(p)
    again = host.pictures(host.p(True, BALANCED, "W8A8", cache, steps=12))
    assert torch.allclose(again, found, rtol=1e-4, atol=1e-5)
    assert "calls of the model skipped" not in p.processed.comments
    assert ("blocks computed" in p.processed.comments) == (cache != "Off")
    assert host.infotext(p)["Tenuto"] == old["Tenuto"]


def test_a_picture_without_it_turns_it_off(host: Any) -> None:
    assert host.paste({"Steps": "20"})[0] is False
    assert host.script.infotext_fields[0].function({}) is None


@pytest.mark.parametrize("wrong", ["another name", "another file", "nonsense"])
def test_an_unknown_artifact_stays_off_with_a_warning(
    host: Any, tmp_path: Path, wrong: str
) -> None:
    from tenuto.artifact.artifact import Artifact

    folder = tmp_path / "tenuto"
    folder.mkdir()
    made = Artifact.new(host.unet, {"timesteps": [999.0], "steps": 1, "guidance": 1.0})
    made.tensors["route/costs"] = torch.zeros(1)  # safetensors 0.4.2 wants one
    made.save(folder / "mine.safetensors")
    mark = webui("artifacts").mark(webui("artifacts").find("mine.safetensors"))
    params = {"Steps": "6", "Tenuto": "off+uniform", "Tenuto artifact": "mine.safetensors",
              "Tenuto artifact hash": mark}  # fmt: skip
    assert len(mark) == 8 and host.paste(params)[:2] == [True, "mine.safetensors"]
    changed = {
        "another name": {"Tenuto artifact": "yours.safetensors"},
        "another file": {"Tenuto artifact hash": "00000000"},
        "nonsense": {"Tenuto speed": "fast"},
    }[wrong]
    values = host.paste(params | changed)
    assert values[:2] == [False, BALANCED], "never another artifact silently"
    assert host.warnings and "Tenuto stays off" in host.warnings[-1]
    status = host.script.infotext_fields[-1].component
    assert "Warning: Tenuto stays off" in host.pasted[id(status)]
    assert 'aria-live="polite"' in host.pasted[id(status)]
    told = host.inputs[0].events["change"][0]
    assert "Warning: Tenuto stays off" in told(*values), "the fields that changed say so too"
    assert "Warning" not in told(True, *values[1:])


def test_the_artifacts_of_the_folder_are_offered(host: Any, tmp_path: Path) -> None:
    """Those of this architecture, and nothing that is not an artifact."""
    from safetensors.torch import save_file

    from tenuto.artifact.artifact import Artifact
    from tenuto.artifact.host_names import canonicalized

    folder = tmp_path / "tenuto"
    (folder / "more").mkdir(parents=True)
    made = Artifact.new(host.unet, {"timesteps": [999.0], "steps": 1, "guidance": 1.0})
    made.tensors["route/costs"] = torch.zeros(1)
    canonicalized(made, host.unet).save(folder / "more" / "fits.safetensors")
    made.header["model_class"] = "PixArtTransformer2DModel"
    made.save(folder / "other.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "lora.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    artifacts = webui("artifacts")
    builtin = ["Built-in: Quality", BALANCED, "Built-in: Fast"]
    assert artifacts.names(host.unet) == [*builtin, "more/fits.safetensors"]
    for name in ("../secret.safetensors", "/etc/passwd", "lora.safetensors"):
        with pytest.raises(Exception, match="no artifact called"):
            artifacts.find(name)


def test_buttons_fill_fields_and_the_status_line_follows(host: Any) -> None:
    fn, inputs, outputs = host.inputs[4].events["change"]
    assert inputs == host.inputs and len(outputs) == 1
    assert "Tenuto is off" in fn(*(c.value for c in host.inputs))
    said = fn(True, *(c.value for c in host.inputs[1:]))
    line = (
        "Layers run in W8A8, and about 50% of the model&#x27;s calls are skipped, in runs of 9 "
        "steps or more, by a forecast that ships and was not measured on your model; where none "
        "can be, as under Euler a, about 50% of the blocks are computed."
    )
    kind = webui("hosts").detect()
    assert f">{line} Host: {kind}.<" in said
    host.pictures(host.p(True))
    again = fn(True, *(c.value for c in host.inputs[1:]))
    assert f">{line} Last image, in {kind}: " in again and again.endswith(".</div>")
    assert "about 50%" in fn(True, BALANCED, "Off", "Uniform", 2.0, 0.0, 1.0, False, 0, "Both")
    for preset in webui("choices").PRESETS.values():
        assert 0 < webui("plans").share(preset, None) < 1
        assert preset.cache == "Auto" and preset.artifact == BALANCED and preset.passes == "Both"


def test_settings_are_there_and_what_changes_pictures_is_in_the_infotext(host: Any) -> None:
    """By the host, which writes and restores what an option has `infotext=` for."""
    names = {key.removeprefix("tenuto_"): info for key, info in host.options.items()}
    assert set(names) == set(webui("options").DEFAULTS)
    written = {name for name, info in names.items() if getattr(info, "infotext", None)}
    assert written == {"cache_dtype", "lora", "execution"}
    assert all(info.section == ("tenuto", "Tenuto") for info in names.values())


def test_axes_are_added_once_and_each_cell_tells_its_own(host: Any) -> None:
    grid = host.modules["modules.scripts"].scripts_data[0].module
    labels = [o.label for o in grid.axis_options]
    assert labels == [f"[Tenuto] {n}" for n in (
        "Enabled", "Artifact", "Precision", "Cache", "Speed", "Start", "Speedup")]  # fmt: skip
    host.fire("on_before_ui")
    assert len(grid.axis_options) == 7
    axes = {o.label.removeprefix("[Tenuto] "): o for o in grid.axis_options}
    for name, value, key, text in (
        ("Precision", "W8A8", "Tenuto", "W8A8+auto"), ("Cache", "uniform", "Tenuto",
         "W8A8+uniform"), ("Speed", 3.0, "Tenuto speed", "3.0"),
        ("Start", 0.5, "Tenuto start", "0.5"), ("Speedup", 2.0, "Tenuto speedup", "2.0"),
        ("Artifact", "Built-in: Quality", "Tenuto", "Off+auto"),
    ):  # fmt: skip
        p = host.p(True)
        axes[name].apply(p, value, [value])
        host.pictures(p)
        assert host.infotext(p)[key] == text
    p = host.p(True)
    axes["Enabled"].apply(p, "False", ["True", "False"])
    host.pictures(p)
    assert "Tenuto" not in host.infotext(p)


def test_routes_only_read(host: Any) -> None:
    routes: dict[str, Any] = {}

    def add(path: str, call: Any, methods: list[str]) -> None:
        assert methods == ["GET"] and path.startswith("/tenuto/v1/")
        routes[path.rpartition("/")[2]] = call

    host.fire("on_app_started", None, SimpleNamespace(add_api_route=add))
    host.pictures(host.p(True, BALANCED, "W8A8", "Uniform", 2.0, 0.0))
    status = json.loads(json.dumps(routes["status"]()))
    assert status["last"]["held"] > 0 and status["attached"] is False
    assert status["last"]["text"].startswith("Tenuto: ")
    assert routes["artifacts"]()[1] == {"name": BALANCED, "precision": "W8A8"}


def test_the_page_is_reloaded(host: Any) -> None:
    """The host runs the script file again; what is loaded stays, and nothing is there twice."""
    plain = host.pictures(host.p(False))
    first = webui("session").session
    host.fire("on_script_unloaded")
    host.callbacks.clear()
    host.load()
    assert webui("session").session is first
    grid = host.modules["modules.scripts"].scripts_data[0].module
    assert len(grid.axis_options) == 7
    assert torch.equal(host.pictures(host.p(False)), plain)


CLONE = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("tenuto_tests_hosts", sys.argv[1])
stubs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stubs)
from torch import nn
host = stubs.Host("a1111", nn.Linear(1, 1), Path(sys.argv[3]))
sys.modules.update(host.modules)
class Lean:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "tokenizers", "accelerate"):
            raise ImportError(name + " may not be there")
sys.meta_path.insert(0, Lean)
host.load(Path(sys.argv[2]) / "scripts" / "tenuto.py")
import tenuto, tenuto_webui
print(json.dumps([tenuto.__file__, tenuto_webui.__file__, sys.path, len(host.inputs)]))
"""


@pytest.mark.parametrize("name", ["sd-webui-tenuto", "Tenuto.main 2"])
def test_a_clone_under_any_name_brings_its_own_library(tmp_path: Path, name: str) -> None:
    """Nothing is installed: `tenuto` is the clone's, and needs nothing that hosts lack."""
    clone = tmp_path / name
    for part in ("core", "webui_ext", "scripts"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", CLONE, str(Path(__file__).with_name("hosts.py")), str(clone)]
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=bare, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    library, package, path, fields = json.loads(ran.stdout)
    assert Path(library).is_relative_to(clone / "core")
    assert Path(package).is_relative_to(clone / "webui_ext")
    assert str(clone) not in path and str(clone / "core") not in path and fields == 11
