"""A `modules` package made of the contract's signatures, for one stub host.

A symbol that is not in contract.json is not there, and a call that does not fit its signature in
that host raises: so every test is one of the contract.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAMES = {
    "a1111": "a1111-1.10.1", "forge": "forge-dfdcbab", "reforge": "reforge-3b56b26",
    "neo": "neo-2.26",
}  # fmt: skip
CONTRACT = json.loads(Path(__file__).with_name("contract.json").read_text(encoding="utf-8"))


def signature(text: str) -> inspect.Signature:
    """What "(self, p, *args)" says."""
    args = ast.parse(f"def f{text}: pass").body[0].args  # pyright: ignore
    kinds = inspect.Parameter
    plain = [*args.posonlyargs, *args.args]
    missing = len(plain) - len(args.defaults)
    found = [
        kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < missing else None)
        for i, a in enumerate(plain)
    ]
    if args.vararg:
        found.append(kinds(args.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        value = kinds.empty if default is None else None
        found.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=value))
    if args.kwarg:
        found.append(kinds(args.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def function(kind: str, file: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` behind the signature that `name` has in a host."""
    known = signature(CONTRACT[file][name][NAMES[kind]])

    def checked(*args: Any, **kwargs: Any) -> Any:
        known.bind(*args, **kwargs)
        return call(*args, **kwargs)

    return checked


class Component:
    """What Gradio has: a value, events, and a place in a `with`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.value = kwargs.get("value", args[0] if args else None)
        self.label, self.elem_id = kwargs.get("label"), kwargs.get("elem_id")
        self.kwargs = kwargs
        self.events: dict[str, tuple[Any, list[Any], list[Any]]] = {}

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def click(self, fn: Any, inputs: Any, outputs: Any, show_progress: bool = True) -> None:
        self.events["click"] = fn, inputs, outputs

    def change(self, fn: Any, inputs: Any, outputs: Any, show_progress: bool = True) -> None:
        self.events["change"] = fn, inputs, outputs


class Modules:
    """What a stub host has in sys.modules. A subclass has kind, opts, models, sd_model."""

    kind: str
    opts: Any
    sd_model: Any
    models: Path
    options: dict[str, Any]
    callbacks: dict[str, list[Any]]
    warnings: list[str]

    def _modules(self) -> dict[str, types.ModuleType]:
        """What is to be in sys.modules while this host runs."""
        made: dict[str, types.ModuleType] = {}

        def module(name: str, **names: Any) -> None:
            found = made[name] = types.ModuleType(name)
            found.__dict__.update(names)
            found.__spec__ = importlib.util.spec_from_loader(name, None)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(made[parent], child, found)

        module("modules", __path__=[])
        module("modules.scripts", Script=self._script_class(), AlwaysVisible=object(),
               scripts_data=[self._xyz()])  # fmt: skip
        module("modules.script_callbacks", **{
            name: self._callback(name)
            for name in CONTRACT["modules/script_callbacks.py"] if name.startswith("on_")
        })  # fmt: skip
        module("modules.options", OptionInfo=self._option_class())
        self.opts.add_option = function(
            self.kind, "modules/options.py", "Options.add_option",
            lambda _, key, info: self.options.__setitem__(key, info),
        ).__get__(self.opts)  # fmt: skip
        module("modules.shared", opts=self.opts, sd_model=self.sd_model)
        module("modules.sd_models", model_data=SimpleNamespace(sd_model=self.sd_model))
        module("modules.paths", models_path=str(self.models))
        module("modules.sd_unet", current_unet=None)
        module("modules.ui_components", InputAccordion=self._accordion(), ToolButton=Component)
        module("modules.infotext_utils", PasteField=self._paste_class())
        names = ("Row", "Button", "Dropdown", "Radio", "Slider", "Checkbox", "HTML", "Textbox")
        module("gradio", **dict.fromkeys(names, Component), update=lambda **kw: kw,
               Warning=self.warnings.append)  # fmt: skip
        if self.kind != "a1111":
            module("modules_forge", __path__=[])
        if self.kind in ("forge", "neo"):
            module("backend", __path__=[])
            module("backend.patcher", __path__=[])
        return made

    def _script_class(self) -> Any:
        file = "modules/scripts.py"

        class Script:
            is_txt2img = is_img2img = False
            elem_id = function(
                self.kind, file, "Script.elem_id",
                lambda s, item: f"script_{'img2img' if s.is_img2img else 'txt2img'}_tenuto_{item}",
            )  # fmt: skip

        for name in CONTRACT[file]:
            method = name.partition(".")[2]
            if method != "elem_id":
                setattr(Script, method, function(self.kind, file, name, lambda *a, **k: None))
        return Script

    def _callback(self, name: str) -> Any:
        def add(callback: Any, *, name_: str = name, **_: Any) -> None:
            self.callbacks[name_].append(callback)

        return function(self.kind, "modules/script_callbacks.py", name, add)

    def _option_class(self) -> Any:
        kind = self.kind

        class OptionInfo:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                text = CONTRACT["modules/options.py"]["OptionInfo.__init__"][NAMES[kind]]
                bound = signature(text).bind(self, *args, **kwargs)
                self.__dict__.update(bound.arguments)

            def info(self, info: str) -> Any:
                return self

        return OptionInfo

    def _accordion(self) -> Any:
        file = "modules/ui_components.py"
        text = CONTRACT[file]["InputAccordion"][NAMES[self.kind]]
        known = signature(text.replace("(self, ", "("))

        def made(*args: Any, **kwargs: Any) -> Component:
            known.bind(*args, **kwargs)
            return Component(*args, **kwargs)

        return made

    def _paste_class(self) -> Any:
        def made(component: Any, target: Any, *, api: Any = None) -> Any:
            assert callable(target) and api is None
            return SimpleNamespace(component=component, function=target, label=None, api=api)

        text = CONTRACT["modules/infotext_utils.py"]["PasteField.__init__"][NAMES[self.kind]]
        known = signature(text.replace("(self, ", "("))

        def checked(*args: Any, **kwargs: Any) -> Any:
            known.bind(*args, **kwargs)
            return made(*args, **kwargs)

        return checked

    def _xyz(self) -> Any:
        file, kind = "scripts/xyz_grid.py", self.kind

        class AxisOption:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                text = CONTRACT[file]["AxisOption.__init__"][NAMES[kind]]
                bound = signature(text).bind(self, *args, **kwargs)
                self.__dict__.update(bound.arguments)

        def apply(field: str) -> Any:
            return lambda p, x, xs: setattr(p, field, x)

        field = function(kind, file, "apply_field", apply)
        made = SimpleNamespace(AxisOption=AxisOption, apply_field=field, axis_options=[])
        found = type("Script", (), {"__module__": "xyz_grid.py"})
        return SimpleNamespace(script_class=found, module=made)
