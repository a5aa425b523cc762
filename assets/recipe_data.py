"""Pictures, captions, tokenizer and prompts of the demo models (Tiny-ImageNet, 64 x 64)."""

from __future__ import annotations

import io
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 64  # pixels a side
TEMPLATES = (
    "{x}", "{a}{x}", "a photo of {a}{x}", "a picture of {a}{x}", "a photograph of {a}{x}",
    "an image of {a}{x}", "a close-up of {a}{x}", "a snapshot of {a}{x}", "a good photo of {a}{x}",
    "a small photo of {a}{x}", "a photo of the {x}", "the {x}", "photo of {a}{x}", "{x}, a photo",
)  # fmt: skip
MASS = {"guacamole", "mashed potato", "ice cream", "icecream", "thatch", "espresso"}
AN = {"hourglass", "atm"}
SYNONYMS = 4


def decode(jpeg: bytes) -> np.ndarray:
    """One JPEG as (64, 64, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def read_part(file: Path, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, 64, 64) uint8 and labels (N,) of one packed file: every `world`-th of it."""
    with np.load(file, allow_pickle=False) as part:
        jpeg, offset, label = part["jpeg"], part["offset"], part["label"]
    index = range(rank, len(label), world)
    with ThreadPoolExecutor(16) as pool:
        rows = pool.map(lambda i: decode(jpeg[offset[i] : offset[i + 1]].tobytes()), index)
        return np.stack(list(rows)).transpose(0, 3, 1, 2), label[rank::world].astype(np.int64)


def read_split(data: Path, split: str, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """All pictures (N, 3, 64, 64) uint8 and labels (N,) of `split`: "train" or "val"."""
    parts = [read_part(file, rank, world) for file in sorted(data.glob(f"{split}*.npz"))]
    pictures, labels = zip(*parts, strict=True)
    return torch.from_numpy(np.concatenate(pictures)), torch.from_numpy(np.concatenate(labels))


class GrowingPictures:
    """Training pictures on one device; packed files that appear later join in the background."""

    def __init__(self, data: Path, device: torch.device, capacity: int, poll: float = 2.0) -> None:
        self.data, self.seen, self.count, self.poll = data, set[str](), 0, poll
        self.pictures = torch.empty(capacity, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
        self.look()
        threading.Thread(target=self._follow, daemon=True).start()

    def look(self) -> None:
        """Take in every packed file that is not in yet."""
        for file in sorted(self.data.glob("train*.npz")):
            if file.name not in self.seen:
                rows = torch.from_numpy(read_part(file)[0])[: len(self.pictures) - self.count]
                self.pictures[self.count : self.count + len(rows)] = rows.to(self.pictures.device)
                self.seen.add(file.name)
                self.count += len(rows)

    def _follow(self) -> None:
        while self.count < len(self.pictures):
            time.sleep(self.poll)
            self.look()

    def batch(self, size: int) -> Tensor:
        """Random pictures (size, 3, 64, 64) in [-1, 1], half of them mirrored."""
        index = torch.randint(self.count, (size,), device=self.pictures.device)
        x = self.pictures[index].float() / 127.5 - 1
        mirror = torch.rand(size, 1, 1, 1, device=x.device) < 0.5
        return torch.where(mirror, x.flip(-1), x)


def class_names(data: Path) -> list[list[str]]:
    """The cleaned synonyms of each class, in lower case: no Latin names, none in two classes."""
    rows = [entry["name"].split(", ") for entry in json.loads((data / "classes.json").read_text())]
    rows = [[n for i, n in enumerate(r) if i == 0 or not _latin(n)] for r in rows]
    rows = [[n.lower() for n in r] for r in rows]
    flat = [n for r in rows for n in r]
    return [[n for i, n in enumerate(r) if i == 0 or flat.count(n) == 1][:SYNONYMS] for r in rows]


def _latin(name: str) -> bool:
    return re.fullmatch(r"[A-Z][a-z]+ [a-z]+", name) is not None


def article(name: str) -> str:
    """The indefinite article with its space, or nothing for plurals and mass nouns."""
    if name in MASS or (name.endswith("s") and not name.endswith(("ss", "us", "is"))):
        return ""
    vowel = name[0] in "aeiou" and not name.startswith("euro")
    return "an " if vowel or name in AN else "a "


def caption(name: str, template: str) -> str:
    """A template filled with a class name and its article."""
    return template.format(a=article(name), x=name)


def captions(names: list[list[str]]) -> list[list[str]]:
    """All captions of each class."""
    return [[caption(n, t) for n in synonyms for t in TEMPLATES] for synonyms in names]


class CaptionTable:
    """Token ids of every caption on one device, and a random caption for each label."""

    def __init__(
        self,
        tokenizer: Any,
        names: list[list[str]],
        device: torch.device,
        drop: float,
        masked: bool,
    ) -> None:
        rows = captions(names)
        padding = "longest" if masked else "max_length"  # unmasked padding is part of the prompt
        tokens = tokenizer(["", *chain.from_iterable(rows)], padding=padding, return_tensors="pt")
        self.ids, self.mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        self.count = torch.tensor([len(r) for r in rows], device=device)
        self.first = 1 + self.count.cumsum(0) - self.count  # row 0 is the empty prompt
        self.drop = drop

    def draw(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, L) for labels (B,); a `drop` share are the empty prompt."""
        chosen = (torch.rand(label.shape, device=label.device) * self.count[label]).long()
        row = self.first[label] + chosen
        row[torch.rand(label.shape, device=label.device) < self.drop] = 0
        return self.ids[row], self.mask[row]


def write_prompts(data: Path, out: Path, seed: int = 0) -> None:
    """Write default.txt and evaluation.txt: 64 prompts each, of 128 different classes."""
    names, rng = class_names(data), random.Random(seed)
    texts = [caption(rng.choice(n[:2]), rng.choice(TEMPLATES[1:13])) for n in names]
    rng.shuffle(texts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "default.txt").write_text("\n".join(texts[:64]) + "\n")
    (out / "evaluation.txt").write_text("\n".join(texts[64:128]) + "\n")


def pack(source: Path, out: Path, part: int = 25_000, seed: int = 0) -> None:
    """Pack an unzipped tiny-imagenet-200 into train-N.npz, val.npz and classes.json."""
    words = dict(line.split("\t", 1) for line in (source / "words.txt").read_text().splitlines())
    wnids = (source / "wnids.txt").read_text().split()
    out.mkdir(parents=True, exist_ok=True)
    classes = [{"wnid": w, "name": words[w].strip()} for w in wnids]
    (out / "classes.json").write_text(json.dumps(classes))
    train = [(f, i) for i, w in enumerate(wnids) for f in source.glob(f"train/{w}/images/*.JPEG")]
    random.Random(seed).shuffle(train)
    for n, start in enumerate(range(0, len(train), part)):
        write_part(out / f"train-{n}.npz", _bytes(train[start : start + part]))
    rows = (source / "val/val_annotations.txt").read_text().splitlines()
    val = [(source / "val/images" / r.split()[0], wnids.index(r.split()[1])) for r in rows]
    write_part(out / "val.npz", _bytes(val))


def _bytes(rows: list[tuple[Path, int]]) -> list[tuple[bytes, int]]:
    return [(file.read_bytes(), label) for file, label in rows]


def write_part(file: Path, rows: list[tuple[bytes, int]]) -> None:
    """Write JPEG bytes and labels as one packed file."""
    offset = np.cumsum([0] + [len(jpeg) for jpeg, _ in rows], dtype=np.int64)
    blob = np.frombuffer(b"".join(jpeg for jpeg, _ in rows), dtype=np.uint8)
    label = np.array([label for _, label in rows], dtype=np.int16)
    np.savez(file, jpeg=blob, offset=offset, label=label)


def synthetic(out: Path, pictures: int = 64, seed: int = 0) -> None:
    """A stand-in for the data, for `--smoke`: plain coloured squares with noise, two classes."""
    out.mkdir(parents=True, exist_ok=True)
    names = [{"wnid": "n0", "name": "red square"}, {"wnid": "n1", "name": "blue square, azure"}]
    (out / "classes.json").write_text(json.dumps(names))
    rng, rows = np.random.default_rng(seed), []
    for i in range(pictures):
        x = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        x[16:48, 16:48, 2 * (i % 2)] = 230
        file = io.BytesIO()
        Image.fromarray(x).save(file, "JPEG")
        rows.append((file.getvalue(), i % 2))
    write_part(out / "train-0.npz", rows)
    write_part(out / "val.npz", rows)
