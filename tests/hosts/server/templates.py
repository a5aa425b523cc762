"""Writes the workflows of example_workflows/ that make a model of one family faster.

    python tests/hosts/server/templates.py

They are in templates.toml: the host's own loaders and settings, as ComfyUI's template of a family
has them, with Tenuto Speed Up before the sampler. page.py makes their pictures.
"""

from __future__ import annotations

import json
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[3] / "example_workflows"
HUB = "https://huggingface.co"
GAP, TITLE, ROW = 50, 30, 24  # pixels between nodes, of a title, of a slot or a field

# kind: (what is linked into it, its fields, what comes out, width). A type is the name in capitals
# if none is given.
KINDS: dict[str, tuple[str, str, str, int]] = {
    "CheckpointLoaderSimple": ("", "ckpt_name:COMBO", "MODEL CLIP VAE", 420),
    "UNETLoader": ("", "unet_name:COMBO weight_dtype:COMBO", "MODEL", 420),
    "CLIPLoader": ("", "clip_name:COMBO type:COMBO device:COMBO", "CLIP", 420),
    "DualCLIPLoader": (
        "", "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO", "CLIP", 420,
    ),
    "VAELoader": ("", "vae_name:COMBO", "VAE", 420),
    "EmptyLatentImage": ("", "width:INT height:INT batch_size:INT", "LATENT", 270),
    "EmptySD3LatentImage": ("", "width:INT height:INT batch_size:INT", "LATENT", 270),
    "EmptyHunyuanLatentVideo": (
        "", "width:INT height:INT length:INT batch_size:INT", "LATENT", 270,
    ),
    "CLIPTextEncode": ("clip", "text:STRING", "CONDITIONING", 360),
    "ConditioningZeroOut": ("conditioning", "", "CONDITIONING", 270),
    "FluxGuidance": ("conditioning", "guidance:FLOAT", "CONDITIONING", 270),
    "ModelSamplingAuraFlow": ("model", "shift:FLOAT", "MODEL", 270),
    "ModelSamplingSD3": ("model", "shift:FLOAT", "MODEL", 270),
    "EmptyFlux2LatentImage": ("", "width:INT height:INT batch_size:INT", "LATENT", 270),
    "Wan22ImageToVideoLatent": (
        "vae start_image:IMAGE", "width:INT height:INT length:INT batch_size:INT", "LATENT", 270,
    ),
    "Flux2Scheduler": ("", "steps:INT width:INT height:INT", "SIGMAS", 270),
    "KSamplerSelect": ("", "sampler_name:COMBO", "SAMPLER", 270),
    "RandomNoise": ("", "noise_seed:INT :SEED", "NOISE", 270),
    "CFGGuider": (
        "model positive:CONDITIONING negative:CONDITIONING", "cfg:FLOAT", "GUIDER", 270,
    ),
    "SamplerCustomAdvanced": (
        "noise guider sampler sigmas latent_image:LATENT", "",
        "output:LATENT denoised_output:LATENT", 270,
    ),
    "Tenuto_SpeedUp": ("model artifact:TENUTO_ARTIFACT", "speedup:FLOAT", "MODEL", 270),
    "KSampler": (
        "model positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "seed:INT :SEED steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO denoise:FLOAT",
        "LATENT", 270,
    ),
    "VAEDecode": ("samples:LATENT vae", "", "IMAGE", 240),
    "SaveImage": ("images:IMAGE", "filename_prefix:STRING", "", 360),
    "CreateVideo": ("images:IMAGE audio", "fps:FLOAT", "VIDEO", 240),
    "SaveVideo": ("video", "filename_prefix:STRING format:COMBO codec:COMBO", "", 360),
    "Tenuto_Report": ("model samples:LATENT", "", "text:STRING map:IMAGE", 270),
    "PreviewAny": ("source:*", "", "", 360),
    "MarkdownNote": ("", "", "", 420),
}  # fmt: skip
OPTIONAL = ("artifact", "audio", "start_image")
TALL = {"CLIPTextEncode": 150, "SaveImage": 380, "SaveVideo": 400, "PreviewAny": 170}


@dataclass(frozen=True)
class File:
    """A file that a loader wants: where in models/ it belongs, and where it comes from."""

    directory: str
    repository: str
    path: str

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return self.path.rpartition("/")[2]

    def facts(self) -> dict[str, str]:
        """As ComfyUI wants them in a node, to offer what is missing."""
        url = f"{HUB}/{self.repository}/resolve/main/{self.path}"
        return {"name": self.name, "url": url, "directory": self.directory}


@dataclass(frozen=True)
class Loader:
    """A node that loads files. fields: its other ones."""

    kind: str
    files: tuple[File, ...]
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """What is in templates.toml, whose head says what each is."""

    title: str
    loaders: tuple[Loader, ...]
    latent: tuple[Any, ...]
    sampler: tuple[Any, ...]
    prompt: str
    negative: str | None = None
    shift: tuple[str, float] | None = None
    guidance: float | None = None
    scheduler: tuple[Any, ...] | None = None
    fps: int | None = None
    more: str = ""

    @property
    def files(self) -> list[File]:
        """All that it wants."""
        return [file for loader in self.loaders for file in loader.files]


def templates() -> dict[str, Template]:
    """All, by their names."""

    def loader(kind: str, files: list[str], fields: tuple[str, ...] = ()) -> Loader:
        return Loader(kind, tuple(File(*text.split(", ")) for text in files), tuple(fields))

    found = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    return {
        name: Template(**facts | {"loaders": tuple(loader(**one) for one in facts["loaders"])})
        for name, facts in found.items()
    }


def slots(text: str) -> list[tuple[str, str]]:
    """(name, type) of each word."""
    pairs = (word.partition(":") for word in text.split())
    return [(name, kind or name.upper()) for name, _, kind in pairs]


class Flow:
    """A workflow in the making, as the page saves one."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.place, self.width = [0, 0], 0

    def column(self) -> None:
        """The nodes from here on are below each other, right of those before."""
        self.place, self.width = [self.place[0] + self.width + GAP, 0], 0

    def add(
        self, kind: str, *values: Any, files: tuple[File, ...] = (), height: int = 0, **given: Any
    ) -> int:
        """The id of a new node. given: what is linked, as (node, number of its output)."""
        linked, fields, out, width = KINDS[kind]
        number = len(self.nodes) + 1
        inputs: list[dict[str, Any]] = []
        for name, what in slots(linked):
            link = self.link(given[name], number, len(inputs), what) if name in given else None
            optional = {"shape": 7} if name in OPTIONAL else {}
            inputs.append({"name": name, **optional, "type": what, "link": link})
        for name, what in slots(fields):
            if name:  # what becomes of a seed is no input
                inputs.append({"name": name, "type": what, "widget": {"name": name}, "link": None})
        outputs = [{"name": name, "type": what, "links": []} for name, what in slots(out)]
        rows = max(len(slots(linked)), len(outputs)) + 1.2 * len(slots(fields))
        size = [width, height or TALL.get(kind, round(10 + ROW * rows))]
        properties: dict[str, Any] = {"Node name for S&R": kind}
        properties |= {"models": [file.facts() for file in files]} if files else {}
        self.nodes.append({
            "id": number, "type": kind, "pos": list(self.place), "size": size, "flags": {},
            "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
            "properties": properties, "widgets_values": list(values),
        })  # fmt: skip
        self.place[1] += size[1] + TITLE + GAP // 2
        self.width = max(self.width, width)
        return number

    def link(self, source: tuple[int, int], target: int, slot: int, what: str) -> int:
        """The id of a new link."""
        node, out = source
        number = len(self.links) + 1
        output = self.nodes[node - 1]["outputs"][out]
        output["links"].append(number)
        kind = output["type"] if what == "*" else what
        assert kind == output["type"], (self.nodes[node - 1]["type"], kind)
        self.links.append([number, node, out, target, slot, kind])
        return number

    def saved(self, name: str) -> dict[str, Any]:
        """As a file has it."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "revision": 0,
            "last_node_id": len(self.nodes), "last_link_id": len(self.links),
            "nodes": self.nodes, "links": self.links,
            "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip


def note(template: Template) -> str:
    """What the template does and which files it wants, in Markdown."""
    what = "video" if template.fps else "image"
    files = "\n".join(
        f"- [{file.name}]({file.facts()['url']}) in `models/{file.directory}`"
        for file in template.files
    )
    return (
        f"## {template.title} in about half the time\n\n*Tenuto Speed Up* skips half of the "
        "model's calls and forecasts what they would have answered. The seed is fixed: run it "
        "with `speedup` at 1 and at 2, and compare. *Tenuto Report* says what was skipped and "
        f"how far off the {what} is predicted to be. {template.more}".rstrip()
        + f"\n\n**Files**\n\n{files}\n"
    )


def built(name: str, template: Template) -> dict[str, Any]:
    """The workflow, as its file has it."""
    flow, out = Flow(), {}  # what comes out of the loaders, by type
    for loader in template.loaders:
        names = [file.name for file in loader.files]
        made = flow.add(loader.kind, *names, *loader.fields, files=loader.files)
        out |= {what: (made, i) for i, (what, _) in enumerate(slots(KINDS[loader.kind][2]))}
    flow.add("MarkdownNote", note(template), height=220 + 25 * len(template.files))
    flow.column()
    positive = flow.add("CLIPTextEncode", template.prompt, clip=out["CLIP"]), 0
    if template.negative is None:
        negative = flow.add("ConditioningZeroOut", conditioning=positive), 0
    else:
        negative = flow.add("CLIPTextEncode", template.negative, clip=out["CLIP"]), 0
    if template.guidance is not None:
        positive = flow.add("FluxGuidance", template.guidance, conditioning=positive), 0
    kind, *size = template.latent
    vae = {"vae": out["VAE"]} if "vae" in dict(slots(KINDS[kind][0])) else {}
    empty = flow.add(kind, *size, **vae), 0
    flow.column()
    model = out["MODEL"]
    if template.shift is not None:
        model = flow.add(*template.shift, model=model), 0
    model = flow.add("Tenuto_SpeedUp", 2, model=model), 0
    given = {"model": model, "positive": positive, "negative": negative}
    latent = sampled(flow, template, given, empty)
    report = flow.add("Tenuto_Report", model=model, samples=latent), 0
    flow.column()
    pictures = flow.add("VAEDecode", samples=latent, vae=out["VAE"]), 0
    if template.fps is None:
        flow.add("SaveImage", f"tenuto-{name}", images=pictures)
    else:
        video = flow.add("CreateVideo", template.fps, images=pictures), 0
        flow.add("SaveVideo", f"video/tenuto-{name}", "auto", "auto", video=video)
    flow.add("PreviewAny", source=report)
    return flow.saved(name)


def sampled(flow: Flow, template: Template, given: dict[str, Any], empty: Any) -> tuple[int, int]:
    """The nodes that sample: KSampler, or those that a scheduler of a family's own wants."""
    steps, cfg, sampler, *names = template.sampler
    if template.scheduler is None:
        values = 1, "fixed", steps, cfg, sampler, *names, 1
        return flow.add("KSampler", *values, **given, latent_image=empty), 0
    kind, *size = template.scheduler
    parts = {
        "noise": flow.add("RandomNoise", 1, "fixed"), "guider": flow.add("CFGGuider", cfg, **given),
        "sampler": flow.add("KSamplerSelect", sampler), "sigmas": flow.add(kind, steps, *size),
    }  # fmt: skip
    links = {name: (node, 0) for name, node in parts.items()}
    return flow.add("SamplerCustomAdvanced", **links, latent_image=empty), 0


def written() -> Iterator[tuple[Path, str]]:
    """Each file, and what is in it."""
    for name, template in templates().items():
        text = json.dumps(built(name, template), indent=1, ensure_ascii=False)
        yield FOLDER / f"tenuto-speed-up-{name}.json", text + "\n"


if __name__ == "__main__":
    for path, text in written():
        path.write_text(text, "utf-8")
