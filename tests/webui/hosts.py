"""Stub hosts: the modules of stub_modules.py, a tiny model, and a driver in the hosts' order."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]


def _sibling(name: str) -> Any:
    """A file beside this one: there is no package of tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Modules: Any = _sibling("stub_modules").Modules


class Interrupted(BaseException):
    """What hosts raise where a user stops."""


class Host(Modules):
    """One stub host with one tiny model. `images(p)` makes what p asks for."""

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
            kept = 1 / (1 + (torch.arange(1000) / 99.92).square())
            return SimpleNamespace(model=inner, alphas_cumprod=kept, parameterization="eps")
        rounded = SimpleNamespace(
            timestep=lambda sigmas: timestep_of(sigmas).round(), prediction_type="epsilon",
            sigmas=torch.arange(1000) / 99.92,
        )  # fmt: skip
        known = "predictor" if self.kind in ("forge", "neo") else "model_sampling"
        setattr(inner, known, rounded)
        if self.kind == "forge":
            inner.lora_loader = SimpleNamespace(backup={}, loaded_hash="[]")
            patcher = SimpleNamespace(model=inner, lora_loader=inner.lora_loader)
        else:
            patcher = SimpleNamespace(model=inner, backup={}, patches_uuid=0)
        return SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher))

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
        """A request for images; args: the script's, and what is missing takes defaults."""
        given = [*args, *(c.value for c in self.inputs[len(args) :])]
        usual = {
            "sd_model": self.sd_model, "steps": 6, "batch_size": 1, "seed": 1, "size": 8,
            "sampler_name": facts.pop("sampler", "euler"), "sampler": None, "hires": False,
            "split": False, "ngms": False, "is_hr_pass": False,
            "on_step": lambda step: None, "extra_generation_params": {}, "script_args": given,
            "prompts": ("cat",),
        }  # fmt: skip
        made = _P(**(usual | facts))
        return made

    def pictures(self, p: Any) -> Tensor:
        """`process_images`: (B, 4, H, W)."""
        with torch.inference_mode(self.kind in ("forge", "neo")), torch.no_grad():
            return self._pictures(p)

    def _pictures(self, p: Any) -> Tensor:
        script, args = self.script, p.script_args
        script.before_process(p, *args)
        script.process(p, *args)
        x = None
        for is_hr in (False, True) if p.hires else (False,):
            p.is_hr_pass = is_hr
            x = self._noise(p, x)
            p.sampler = self._sampler(p)
            script.process_before_every_sampling(p, *args, x=x, noise=x, c=None, uc=None)
            self.on_load()
            x = self.sampled(p, x)
        p.is_hr_pass = False
        assert x is not None
        script.post_sample(p, SimpleNamespace(samples=x), *args)
        p.processed = SimpleNamespace(comments="")
        script.postprocess(p, p.processed, *args)
        return x.clone()

    def _sampler(self, p: Any) -> Any:
        """A new one for each pass."""
        model, function = _Denoiser(self, p), _function(p.sampler_name)
        model.sampler = SimpleNamespace(
            func=function, model_wrap_cfg=model, config=SimpleNamespace(name=p.sampler_name)
        )
        return model.sampler

    def sampled(self, p: Any, x: Tensor) -> Tensor:
        """By p's sampler, with none of the script's hooks."""
        p.sampler = p.sampler or self._sampler(p)
        model, sigmas = p.sampler.model_wrap_cfg, torch.linspace(10, 0, p.steps + 1)
        given = {"extra_args": {}, "callback": model.stepped, "disable": True}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            return p.sampler.func(model, x, sigmas=sigmas, **given)

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


def timestep_of(sigma: Any) -> Any:
    """0 to 999.2."""
    return 99.92 * sigma


class _P:
    """A request; hosts' own can be referred to weakly, as this can."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)


class _Denoiser(nn.Module):
    """The host's CFGDenoiser: the callback, then the halves of guidance in the host's order.

    inner_model: A1111's wrapper of the network, which knows the timestep of a sigma.
    """

    inner_model: Any = SimpleNamespace(sigma_to_t=timestep_of)

    def __init__(self, host: Host, p: Any) -> None:
        super().__init__()
        self.host, self.p, self.step, self.steps = host, p, 0, p.steps
        self.total_steps = p.steps * (2 if p.sampler_name in ("heun", "dpm_2") else 1)
        self.sampler: Any = None
        self.done = 0
        draws = [torch.Generator().manual_seed(len(w)) for w in ("", *p.prompts)]
        self.text = [torch.randn(1, 3, 16, generator=g) for g in draws]

    def stepped(self, what: dict[str, Any]) -> None:
        """A step is done, says the sampler."""
        self.done = what["i"]

    def forward(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        """What is left without the noise that is predicted at a sigma (B,)."""
        s = float(sigma.flatten()[0])
        return x - s * self.predicted(x / (1 + s**2) ** 0.5, timestep_of(s))

    def predicted(self, x: Tensor, time: float) -> Tensor:
        """The guided prediction at a timestep in 0 to 1000."""
        p, steps = self.p, self.p.steps
        params = SimpleNamespace(
            x=x, sampling_step=self.done, total_sampling_steps=steps, denoiser=self
        )
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


def _function(name: str) -> Callable[..., Tensor]:
    """A sampling function in the form of k-diffusion's: Euler, Heun, or Euler with new noise."""

    def sample(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None,
        disable: bool = False, eta: float = 1.0 if name == "euler_ancestral" else 0.0,
    ) -> Tensor:  # fmt: skip
        for i, (high, low) in enumerate(pairwise(sigmas)):
            denoised = model(x, high)
            callback({"i": i, "denoised": denoised})
            d = (x - denoised) / high
            if name == "heun" and low:
                after = x + d * (low - high)
                d = (d + (after - model(after, low)) / low) / 2
            x = x + d * (low - high) + 0.1 * eta * low * torch.randn_like(x)
        return x

    sample.__name__ = f"sample_{name}"
    return sample
