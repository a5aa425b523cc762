"""Stub hosts: a `modules` package made of the contract's signatures, and a driver.

A symbol that is not in contract.json is not there, and a call that does not fit its signature in
that host raises: so every test is one of the contract.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"a1111": "a1111-1.10.1", "forge": "forge-dfdcbab", "reforge": "reforge-3b56b26"}
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


class Interrupted(BaseException):
    """What hosts raise where a user stops."""


class Host:
    """One stub host with one tiny model. `pictures(p)` makes what p asks for."""

    def __init__(self, kind: str, denoiser: nn.Module, folder: Path) -> None:
        self.kind, self.unet, self.models = kind, denoiser, folder
        self.callbacks: dict[str, list[Any]] = defaultdict(list)
        self.opts = SimpleNamespace()
        self.options: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.sd_model = self._sd_model()
        self.on_load: Callable[[], None] = lambda: None
        self.modules = self._modules()
        self.script: Any = None

    def _sd_model(self) -> Any:
        inner = SimpleNamespace(diffusion_model=self.unet)
        if self.kind == "a1111":
            return SimpleNamespace(model=inner)
        if self.kind == "forge":
            inner.lora_loader = SimpleNamespace(backup={}, loaded_hash="[]")
            patcher = SimpleNamespace(model=inner, lora_loader=inner.lora_loader)
        else:
            patcher = SimpleNamespace(model=inner, backup={}, patches_uuid=0)
        return SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher))

    # --- modules ----------------------------------------------------------------------------------

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
        if self.kind == "forge":
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

    # --- as the host does -------------------------------------------------------------------------

    def load(self, path: Path = ROOT / "scripts" / "tenuto.py") -> Any:
        """Load the script file, register its class, build the page."""
        spec = importlib.util.spec_from_file_location("tenuto.py", path)
        assert spec is not None and spec.loader is not None
        before, module = list(sys.path), importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = before
        base = self.modules["modules.scripts"].Script
        found = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base)]
        assert len(found) == 1, "the host registers every Script class of the file"
        self.fire("on_ui_settings")
        self.fire("on_before_ui")
        self.script = found[0]()
        self.script.is_txt2img = True
        self.inputs = self.script.ui(False)
        return self.script

    def fire(self, name: str, *args: Any) -> None:
        """Call what is registered."""
        for callback in self.callbacks[name]:
            callback(*args)

    def p(self, *args: Any, **facts: Any) -> Any:
        """A request for pictures; args: the script's, and what is missing takes defaults."""
        given = [*args, *(c.value for c in self.inputs[len(args) :])]
        usual = {
            "sd_model": self.sd_model, "steps": 6, "batch_size": 1, "seed": 1, "size": 8,
            "sampler": "euler", "hires": False, "split": False, "ngms": False, "is_hr_pass": False,
            "on_step": lambda step: None, "extra_generation_params": {}, "script_args": given,
            "prompts": ("cat",),
        }  # fmt: skip
        made = _P(**(usual | facts))
        return made

    def pictures(self, p: Any) -> Tensor:
        """`process_images`: (B, 4, H, W)."""
        with torch.inference_mode(self.kind == "forge"), torch.no_grad():
            return self._pictures(p)

    def _pictures(self, p: Any) -> Tensor:
        script, args = self.script, p.script_args
        script.before_process(p, *args)
        script.process(p, *args)
        x = None
        for is_hr in (False, True) if p.hires else (False,):
            p.is_hr_pass = is_hr
            x = self._noise(p, x)
            script.process_before_every_sampling(p, *args, x=x, noise=x, c=None, uc=None)
            self.on_load()
            x = _sample(_Denoiser(self, p), x, p)
        p.is_hr_pass = False
        assert x is not None
        script.post_sample(p, SimpleNamespace(samples=x), *args)
        p.processed = SimpleNamespace(comments="")
        script.postprocess(p, p.processed, *args)
        return x.clone()

    def _noise(self, p: Any, x: Tensor | None) -> Tensor:
        if x is not None:
            return nn.functional.interpolate(x, scale_factor=1.5, mode="nearest") * 2
        draw = torch.Generator().manual_seed(p.seed)
        return 10 * torch.randn(p.batch_size, 4, p.size, p.size, generator=draw)

    def infotext(self, p: Any) -> dict[str, str]:
        """What a host reads back from the text that it wrote."""
        facts = {"Steps": p.steps, **p.extra_generation_params}
        line = ", ".join(f"{k}: {json.dumps(str(v))}" for k, v in facts.items() if v is not None)
        found = re.findall(r'([^:,]+): ("(?:\\.|[^"\\])*")', line)
        return {key.strip(): json.loads(value) for key, value in found}

    def paste(self, params: dict[str, str]) -> list[Any]:
        """The values that the page's fields have after an infotext was pasted."""
        values = {id(c): c.value for c in self.inputs}
        for field in self.script.infotext_fields:
            found = field.function(params)
            if found is not None:
                values[id(field.component)] = found
        self.pasted = values
        return [values[id(c)] for c in self.inputs]


class _P(SimpleNamespace):
    """Hosts hold it weakly in places; a namespace alone cannot be hashed."""

    def __hash__(self) -> int:
        return id(self)


class _Denoiser(nn.Module):
    """The host's CFGDenoiser: the callback, then the halves of guidance in the host's order."""

    def __init__(self, host: Host, p: Any) -> None:
        super().__init__()
        self.host, self.p, self.step, self.steps = host, p, 0, p.steps
        self.total_steps = p.steps * (2 if p.sampler in ("heun", "dpm_2") else 1)
        self.sampler = SimpleNamespace(config=SimpleNamespace(name=p.sampler))
        draws = [torch.Generator().manual_seed(len(w)) for w in ("", *p.prompts)]
        self.text = [torch.randn(1, 3, 16, generator=g) for g in draws]

    def forward(self, x: Tensor, time: float, done: int) -> Tensor:
        """The guided prediction at a timestep in 0 to 1000. done: the last step that is."""
        p, steps = self.p, self.p.steps
        params = SimpleNamespace(x=x, sampling_step=done, total_sampling_steps=steps, denoiser=self)
        p.on_step(self.step)
        self.host.fire("on_cfg_denoiser", params)
        forge = self.host.kind != "a1111"
        time = float(round(time)) if forge else time
        texts = list(enumerate(self.text))  # 0 is the empty prompt
        if p.ngms and self.step % 2:
            texts = texts[1:]
        texts = texts if forge else sorted(texts, key=lambda t: t[0] == 0)  # uncond last
        self.step += 1
        out = {}
        for group in [[t] for t in texts] if p.split else [texts]:
            tags = [1 if number == 0 else 0 for number, _ in group]
            batch = torch.cat([x] * len(group))
            context = torch.cat([t.expand(len(x), -1, -1) for _, t in group])
            options = {"transformer_options": {"cond_or_uncond": tags}} if forge else {}
            t = torch.full((len(batch),), time)
            found = self.host.unet(batch, t, context=context, **options).chunk(len(group))
            out |= {number: part for (number, _), part in zip(group, found, strict=True)}
        empty = out.get(0, out[1])
        return empty + sum(out[n] - empty for n in out if n) * 2


def _sample(model: Any, x: Tensor, p: Any) -> Tensor:
    """Euler or Heun from 10 to 0."""
    sigmas = torch.linspace(10, 0, p.steps + 1).tolist()
    for i, (high, low) in enumerate(pairwise(sigmas)):

        def slope(at: Tensor, sigma: float, i: int = i) -> Tensor:
            return model(at / (1 + sigma**2) ** 0.5, 99.92 * sigma, max(0, i - 1))

        d = slope(x, high)
        if p.sampler == "heun" and low:
            d = (d + slope(x + d * (low - high), low)) / 2
        x = x + d * (low - high)
    return x
