"""The program `tenuto`: its commands as typer declares them. What they do is in `commands.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..measure import FIRST_SEED
from ..resources import __version__
from . import call_options as c
from . import export_options as e
from . import forecast_options as f
from . import memory_options as m
from . import model_options as mo
from . import options as o
from . import run as runner
from . import text_encoder_options as x
from . import training_options as t
from .run import run
from .typer_classes import Command, Group, Loose

program = typer.Typer(
    name="tenuto",
    cls=Group,
    help="Quantize a diffusion model, train a cache router for it, and measure both.",
    epilog="example: tenuto demo --out tenuto-demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tenuto {__version__}")
        raise typer.Exit


@program.callback()
def tenuto(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The options of `tenuto` itself."""


@program.command(cls=Command, epilog="example: tenuto demo --model transformer --out tenuto-demo")
def demo(
    model: o.Demo = "transformer", out: o.Sheet = Path("tenuto-demo"), as_json: o.Json = False
) -> int:
    """Calibrate a model that ships, and show what that does to eight images."""
    return run("demo", locals())


@program.command(cls=Command, epilog="example: tenuto check demo:transformer --scheme w4a8")
def check(
    model: mo.Model,
    config: mo.Config = None,
    scheme: o.Scheme = None,
    text_encoder: o.TextEncoder = None,
    preset: o.Preset = "quick",
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    image: c.Image = None,
    mask: c.Mask = None,
    height: c.Height = None,
    width: c.Width = None,
    frames: c.Frames = None,
    negative: c.Without = None,
    given: c.Set = [],  # noqa: B006
    device: o.Device = None,
    run: o.Run = False,
    as_json: o.Json = False,
) -> int:
    """Say in seconds what works with a model, what does not, and what it takes."""
    return runner.run("check", locals())


@program.command(
    cls=Command,
    epilog="example: tenuto quantize demo:transformer --scheme w8a8 --out demo.safetensors",
)
def quantize(
    model: mo.Model,
    out: o.NewArtifact,
    config: mo.Config = None,
    scheme: o.Scheme = None,
    text_encoder: o.TextEncoder = None,
    method: o.Method = None,
    temporal: o.Temporal = "auto",
    table_budget: o.TableBudget = None,
    rounding: o.Rounding = None,
    preset: o.Preset = "quick",
    prompts: o.Prompts = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    image: c.Image = None,
    mask: c.Mask = None,
    height: c.Height = None,
    width: c.Width = None,
    frames: c.Frames = None,
    negative: c.Without = None,
    given: c.Set = [],  # noqa: B006
    seed: o.CalibrationSeed = 0,
    device: o.Device = None,
    low_memory: m.LowMemory = None,
    max_memory: m.MaxMemory = None,
    compact: o.Compact = False,
    speedup: f.SkipByDefault = None,
    reuse: f.ReuseByDefault = None,
    under_cache: f.UnderCache = False,
    measure: f.Measure = None,
) -> int:
    """Quantize a model and write one artifact; the same command resumes."""
    return run("quantize", locals())


@program.command(
    cls=Command,
    epilog="example: tenuto train-router demo:transformer --artifact a.safetensors --speedup 1.6 "
    "--out b.safetensors",
)
def train_router(
    model: mo.Model,
    out: o.NewArtifact,
    config: mo.Config = None,
    artifact: o.Base = None,
    speedup: t.Speedup = None,
    reuse: t.Reuse = None,
    whole: t.Whole = False,
    policy: t.Policy = None,
    weighting: t.Weighting = None,
    preset: o.Preset = "quick",
    iterations: t.Iterations = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    image: c.Image = None,
    mask: c.Mask = None,
    height: c.Height = None,
    width: c.Width = None,
    frames: c.Frames = None,
    negative: c.Without = None,
    given: c.Set = [],  # noqa: B006
    seed: o.CalibrationSeed = 0,
    device: o.Device = None,
) -> int:
    """Train a cache router and add it to an artifact; the same command resumes."""
    return run("train_router", locals())


@program.command(
    cls=Command,
    epilog='example: tenuto generate demo:transformer --prompt "a golden retriever" '
    "--artifact a.safetensors",
)
def generate(
    model: mo.Model,
    prompt: o.Prompt,
    config: mo.Config = None,
    lora: mo.Lora = [],  # noqa: B006
    negative: o.Negative = None,
    artifact: o.WithArtifact = None,
    speedup: f.SkipCalls = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    image: c.Image = None,
    mask: c.Mask = None,
    height: c.Height = None,
    width: c.Width = None,
    frames: c.Frames = None,
    given: c.Set = [],  # noqa: B006
    seed: o.Seed = 0,
    device: o.Device = None,
    execution: o.Execution = "auto",
    compile: c.Compile = False,
    graphs: c.Graphs = None,
    prompt_cache: c.Prompts = None,
    batch: o.Batch = 1,
    out: o.Image = None,
) -> int:
    """Generate images of a prompt, with an artifact or without."""
    return run("generate", locals())


@program.command(
    cls=Command,
    epilog="example: tenuto compare demo:transformer --speedup 2 --count 8 --sheet sheet.png",
)
def compare(
    model: mo.Model,
    config: mo.Config = None,
    lora: mo.Lora = [],  # noqa: B006
    artifact: o.Artifact = None,
    speedup: f.SkipCalls = None,
    prompts: o.OtherPrompts = None,
    count: o.Count = 64,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    image: c.Image = None,
    mask: c.Mask = None,
    height: c.Height = None,
    width: c.Width = None,
    frames: c.Frames = None,
    negative: c.Without = None,
    given: c.Set = [],  # noqa: B006
    seed: o.Seed = FIRST_SEED,
    device: o.Device = None,
    execution: o.Execution = "int8",
    compile: c.Compile = False,
    graphs: c.Graphs = None,
    sheet: o.SideBySide = None,
    as_json: o.Json = False,
) -> int:
    """Measure what an artifact costs and what it gains."""
    return run("compare", locals())


@program.command(
    cls=Command,
    epilog="example: tenuto export demo:transformer --artifact a.safetensors --to comfy "
    "--out b.safetensors",
)
def export(
    model: mo.Model,
    to: e.To,
    out: e.Out,
    config: mo.Config = None,
    artifact: o.WithArtifact = None,
    scheme: e.Scheme = None,
    library: e.Library = e.LIBRARIES[0],
    prefix: e.Prefix = "",
    part: e.Part = "",
    as_json: o.Json = False,
) -> int:
    """Write a model as a file that ComfyUI, GGUF loaders or diffusers read by themselves."""
    return run("export", locals())


@program.command(
    cls=Command,
    epilog="example: tenuto text-encoder Qwen3-4B --for z-image --scheme w4a8 "
    "--out qwen_3_4b_w4a8.safetensors",
)
def text_encoder(
    model: x.Encoder,
    consumer: x.For,
    scheme: x.Scheme,
    out: x.Out,
    method: x.Method = "gptq",
    embeddings: x.Embeddings = "bf16",
    prompts: o.Prompts = None,
    config: x.Config = None,
    seed: x.Seed = 0,
    device: o.Device = None,
    max_memory: x.MaxMemory = None,
    as_json: o.Json = False,
) -> int:
    """Quantize a text encoder into one file that ComfyUI reads by itself; it resumes."""
    return run("text_encoder", locals())


@program.command(cls=Loose, epilog="example: tenuto inspect demo.safetensors --plot")
def inspect(
    file: o.File, plot: o.Plot = None, layer: o.Layer = None, as_json: o.Json = False
) -> int:
    """Show what is in an artifact."""
    where = None if plot is None else Path(plot) if plot else True
    return run("inspect", {"file": file, "plot": where, "layer": layer, "as_json": as_json})


@program.command(cls=Loose, epilog="example: tenuto app --roots ~/models")
def app(
    port: o.Port = None,
    no_browser: o.NoBrowser = False,
    desktop: o.Desktop = False,
    roots: o.Roots = [],  # noqa: B006
    out: o.AppFolder = Path("tenuto-app"),
    listen: o.Listen = False,
    auth: o.Auth = None,
    device: o.Device = None,
) -> int:
    """Open the app in a browser."""
    return run("app", locals())
