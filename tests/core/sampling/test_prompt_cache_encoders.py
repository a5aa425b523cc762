"""`PromptCache`: whose states a pipeline takes, and what its key and its mark see."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tenuto as tn
from tenuto.files import bits_of
from tenuto.sampling import encoder_mark as marks
from tenuto.sampling.encoder_mark import encoder_mark, folder_mark
from tenuto.sampling.loading import load
from tenuto.sampling.low_memory import encoder_on_disk
from tenuto.sampling.prompt_cache import Unknown
from tests.core import family_pipelines as families
from tests.core import tiny_pipelines as tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.safetensors"


def diffusion(seed: int = 0) -> Any:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    tiny.randomized(pipe.text_encoder, seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(pipe: Any, *args: Any, **call: Any) -> Any:
    """What the pipeline makes of a prompt: the tensors of it."""
    if not args and not call:
        args = ("a dog", "cpu", 1, True, "bad")
    with torch.no_grad():
        return [x for x in pipe.encode_prompt(*args, **call) if isinstance(x, torch.Tensor)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- whose states ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models as the hub's client keeps them, of different text encoders."""
    from huggingface_hub import constants

    for name, seed in (("A", 1), ("B", 2)):
        place = tmp_path / f"models--org--{name}"
        diffusion(seed).save_pretrained(place / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def of_hub(hub: Path, name: str, **parts: Any) -> Any:
    """As `from_pretrained("org/NAME")` gives it without a network."""
    place = hub / f"models--org--{name}" / "snapshots" / "abc"
    pipe = StableDiffusionPipeline.from_pretrained(place, **parts)
    pipe.register_to_config(_name_or_path=f"org/{name}")
    return pipe


def test_a_hub_id_is_known_by_its_own_folder(hub: Path, file: Path) -> None:
    """A model of the hub without its encoder takes its own states, never those of another one."""
    cache, whole = tn.PromptCache(file), of_hub(hub, "A")
    with cache.used_by(whole):
        own = encoded(whole)
    bare = of_hub(hub, "A", text_encoder=None)
    with cache.used_by(bare):
        assert equal(encoded(bare), own)
    other = of_hub(hub, "B", text_encoder=None)
    with cache.used_by(other), pytest.raises(Unknown, match="no states of this prompt"):
        encoded(other)


def test_revisions_that_differ_are_refused(hub: Path, file: Path) -> None:
    pipe, bare = of_hub(hub, "A"), of_hub(hub, "A", text_encoder=None)
    diffusion(3).save_pretrained(hub / "models--org--A" / "snapshots" / "def")
    cache = tn.PromptCache(file)
    with cache.used_by(pipe):
        encoded(pipe)
    with cache.used_by(bare), pytest.raises(Unknown, match="Nothing says whose"):
        encoded(bare)


def test_a_pipeline_of_nowhere_takes_no_states(file: Path) -> None:
    """It has neither an encoder nor a folder; what the user calls it is enough."""
    cache, pipe = tn.PromptCache(file), diffusion()
    with cache.used_by(pipe):
        encoded(pipe)
    named = tn.PromptCache()
    with named.used_by(pipe, "mine"):
        own = encoded(pipe)
    pipe.text_encoder = None
    with cache.used_by(pipe), pytest.raises(Unknown, match=r"mark=") as error:
        encoded(pipe)
    assert "\n" not in str(error.value)
    with named.used_by(pipe, "mine"):
        assert equal(encoded(pipe), own)


def test_a_relative_folder_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("A", 1), ("B", 2)):
        diffusion(seed).save_pretrained(name)
    one = StableDiffusionPipeline.from_pretrained("A")
    other = StableDiffusionPipeline.from_pretrained("B", text_encoder=None)
    cache = tn.PromptCache(file)
    with cache.used_by(one):
        encoded(one)
    monkeypatch.chdir("/")
    with cache.used_by(other), pytest.raises(Unknown):
        encoded(other)


# --- what a mark sees -----------------------------------------------------------------------------


class Int8(torch.nn.Module):
    """As libraries have it: codes that are parameters, and a scale that only saving tells."""

    def __init__(self, layer: Any, grow: float = 1.0) -> None:
        super().__init__()
        self._scale = layer.weight.detach().abs().amax() / 127
        codes = (layer.weight.detach() / self._scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.bias, self._scale = layer.bias, self._scale * grow

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = self._scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.float() * self._scale, self.bias)


def layers_of(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder).encoder.layers


def one_token(encoder: Any) -> None:
    with torch.no_grad():
        encoder.get_input_embeddings().weight[7] += 3


def one_value(encoder: Any) -> None:
    with torch.no_grad():
        layers_of(encoder)[1].mlp.fc1.weight[5, 17] += 1


def one_token_in_place(encoder: Any) -> None:
    """As textual inversion does it: torch counts no change."""
    encoder.get_input_embeddings().weight.data[7] += 3


def all_but_the_first_columns(encoder: Any) -> None:
    encoder.get_input_embeddings().weight.data[:, 9:] *= 2


def swapped(encoder: Any) -> None:
    layers = layers_of(encoder)
    layers[0], layers[1] = layers[1], layers[0]


def other_activation(encoder: Any) -> None:
    layers_of(encoder)[0].mlp.activation_fn = torch.nn.ReLU()


def other_epsilon(encoder: Any) -> None:
    layers_of(encoder)[0].layer_norm1.eps = 0.5


def other_codes(encoder: Any) -> None:
    with torch.no_grad():
        layers_of(encoder)[0].mlp.fc2.weight += 1


def other_scale(encoder: Any) -> None:
    mlp = layers_of(encoder)[0].mlp
    mlp.fc1._scale *= 2


def in_training(encoder: Any) -> None:
    encoder.train()


MARKED = [
    one_token, one_value, one_token_in_place, all_but_the_first_columns, swapped, other_activation,
    other_epsilon, other_codes, other_scale, in_training,
]  # fmt: skip


@pytest.mark.parametrize("change", MARKED)
def test_whatever_an_encoder_computes_with_is_in_its_mark(change: Any) -> None:
    pipe, cache = diffusion(), tn.PromptCache()
    mlp = layers_of(pipe.text_encoder)[0].mlp
    mlp.fc1, mlp.fc2 = Int8(mlp.fc1), Int8(mlp.fc2)
    with cache.used_by(pipe):
        encoded(pipe)
        encoded(pipe)
        change(pipe.text_encoder)
        again = encoded(pipe)
    assert equal(again, encoded(pipe)) and (cache.made, cache.found) == (2, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_quantized_layers_of_torch_are_in_the_mark() -> None:
    """Their weights are packed: neither parameters nor buffers."""
    kinds = {torch.nn.Linear}
    marks = set()
    for grow in (1.0, 0.3, 1.0):
        pipe = diffusion()
        with torch.no_grad():
            layers_of(pipe.text_encoder)[0].mlp.fc1.weight *= grow
        pipe.text_encoder = torch.ao.quantization.quantize_dynamic(pipe.text_encoder, kinds)
        marks.add(encoder_mark(pipe))
    assert len(marks) == 2


def test_scales_of_adapters_have_their_places() -> None:
    from peft import LoraConfig

    pipe, cache = diffusion(), tn.PromptCache()
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(lora)
    first, second = (layer.self_attn.q_proj for layer in layers_of(pipe.text_encoder))
    (name,) = first.scaling
    with cache.used_by(pipe):
        for one, other in ((2.0, 0.0), (0.0, 2.0)):
            first.scaling[name], second.scaling[name] = one, other
            got = encoded(pipe)
            assert cache.found == 0 and equal(got, diffusers_own(pipe))


def diffusers_own(pipe: Any) -> list[torch.Tensor]:
    return encoded(type(pipe)(**pipe.components, requires_safety_checker=False))


def test_values_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking again takes one value of each row."""
    pipe, seen = diffusion(), list[int]()
    monkeypatch.setattr(marks, "bits_of", lambda x: seen.append(x.numel()) or bits_of(x))
    mark, whole = encoder_mark(pipe), sum(seen)
    del seen[:]
    assert encoder_mark(pipe) == mark and sum(seen) < whole / 5


# --- in a folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["wan", "qwen_image", "ltx2", "lumina2"])
def test_a_folder_has_the_mark_of_what_is_loaded_from_it(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Tied weights, names that loading changes, buffers of its own, parts kept in fp32."""
    own = getattr(families, family)().model
    kind = type(own.text_encoder)
    own.text_encoder.save_pretrained(tmp_path / "text_encoder")
    row = {"text_encoder": ["transformers", kind.__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(row))
    pipe = SimpleNamespace(
        transformer=torch.nn.Linear(1, 1, dtype=dtype), name_or_path=str(tmp_path),
        text_encoder=kind.from_pretrained(tmp_path / "text_encoder", dtype=dtype),
    )  # fmt: skip
    mark = encoder_mark(pipe)
    assert mark == folder_mark(pipe) is not None
    with torch.no_grad():
        next(p for n, p in pipe.text_encoder.named_parameters() if "norm" in n)[3] += 1
    assert encoder_mark(pipe) != mark


def test_what_is_kept_in_fp32_is_so_on_disk(tmp_path: Path) -> None:
    """T5 in fp16, read a layer at a time, is the T5 that is in memory."""
    own = families.wan().model.text_encoder
    own.save_pretrained(tmp_path)
    kind, ids = type(own), torch.arange(6)[None]
    memory = kind.from_pretrained(tmp_path, dtype=torch.float16)
    disk = encoder_on_disk(kind, tmp_path, torch.float16)
    with torch.no_grad():
        assert torch.equal(disk(ids)[0], memory(ids)[0])
    kinds = [{n: p.dtype for n, p in x.state_dict().items()} for x in (memory, disk)]
    assert kinds[0] == kinds[1] and {*kinds[0].values()} == {torch.float16, torch.float32}


def test_a_denoiser_with_parts_in_fp32_is_of_its_own_type(tmp_path: Path, file: Path) -> None:
    """Wan: the folder's encoder is marked in the type that the pipeline was loaded in."""
    families.wan().model.save_pretrained(tmp_path / "model")
    whole = load(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert next(whole.transformer.parameters()).dtype is torch.float32
    bare = load(str(tmp_path / "model"), dtype=torch.bfloat16, parts={"text_encoder": None})
    assert folder_mark(bare) == encoder_mark(whole) is not None


def saved(folder: Path, seed: int = 0) -> Any:
    diffusion(seed).save_pretrained(folder)
    return load(str(folder), parts={"text_encoder": None})


def test_a_folder_is_read_once(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the states remembers its mark for other processes, until a file changes."""
    bare, opened = saved(tmp_path / "model"), list[str]()
    whole = load(str(tmp_path / "model"))
    with tn.PromptCache(file).used_by(whole):
        own = encoded(whole)
    read = marks.Folder.mark
    monkeypatch.setattr(
        marks.Folder, "mark", lambda self: opened.append(str(self.path)) or read(self)
    )
    for _ in range(2):
        monkeypatch.setattr(marks, "_folders", {})  # another process
        with tn.PromptCache(file).used_by(bare):
            assert equal(encoded(bare), own) and equal(encoded(bare), own)
    assert len(opened) == 1
    weights = tmp_path / "model" / "text_encoder" / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    with tn.PromptCache(file).used_by(bare), pytest.raises(Unknown, match="no states of this"):
        encoded(bare)
    assert len(opened) == 2


@pytest.mark.filterwarnings("ignore:.torch_dtype.:FutureWarning")
def test_variants_that_differ_are_refused(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "model"
    for seed, same in ((0, True), (1, False)):
        diffusion().save_pretrained(folder)
        diffusion(seed).to(torch.float16).save_pretrained(folder, variant="fp16")
        half = {"variant": "fp16", "torch_dtype": torch.float16}
        whole = StableDiffusionPipeline.from_pretrained(folder, **half)
        bare = StableDiffusionPipeline.from_pretrained(folder, text_encoder=None, **half)
        assert (folder_mark(bare) == encoder_mark(whole)) is same
        assert same or folder_mark(bare) is None


# --- other parts, and none ------------------------------------------------------------------------


class WithMore(StableDiffusionPipeline):
    """As StableAudio: what encodes prompts is not text encoders alone."""

    def encode_prompt(self, *args: Any, **call: Any) -> Any:
        states, *others = super().encode_prompt(*args, **call)
        return self.projection_model[0](states), *others


def test_another_part_that_encodes_prompts_is_refused(file: Path) -> None:
    pipe = WithMore(**diffusion().components, requires_safety_checker=False)
    width = pipe.text_encoder.config.hidden_size
    pipe.projection_model = torch.nn.Sequential(torch.nn.Linear(width, width))
    cache = tn.PromptCache(file)
    for mark in (None, "mine"):
        with (
            cache.used_by(pipe, mark),
            pytest.raises(
                tn.TenutoError, match="encodes prompts with projection_model too"
            ) as error,
        ):
            encoded(pipe)
        assert "\n" not in str(error.value)
    assert not len(cache.file) and not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_what_is_drawn_is_not_kept() -> None:
    """In training an encoder drops values: no call is like another."""
    pipe, cache = diffusion(), tn.PromptCache()
    pipe.text_encoder.train()
    for layer in layers_of(pipe.text_encoder):
        layer.self_attn.dropout = 0.5
    torch.manual_seed(0)
    plain = encoded(pipe), encoded(pipe)
    torch.manual_seed(0)
    with cache.used_by(pipe):
        assert all(equal(encoded(pipe), own) for own in plain) and not equal(*plain)
    assert (cache.made, cache.found, len(cache.file)) == (0, 0, 0)


def test_one_of_two_encoders_is_one_sentence(file: Path) -> None:
    pipe, cache = families.sdxl().model, tn.PromptCache(file)
    call = {"do_classifier_free_guidance": False}
    with cache.used_by(pipe):
        encoded(pipe, "a dog", **call)
    pipe.text_encoder_2 = None
    with cache.used_by(pipe), pytest.raises(Unknown, match="text_encoder_2 is not there") as error:
        encoded(pipe, "a dog", **call)
    assert "\n" not in str(error.value)
