"""Conditioning in a file, and back: the same bits, for real text encoders and samplers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tenuto.errors import TenutoError
from tenuto.model import tensors_in
from tenuto.sampling import PromptFile


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The only folder of prompts."""
    import folder_paths

    from comfy_nodes.prompts import FOLDER

    before = folder_paths.folder_names_and_paths.get(FOLDER)
    folder_paths.folder_names_and_paths[FOLDER] = ([str(tmp_path)], {".safetensors"})
    folder_paths.filename_list_cache.pop(FOLDER, None)
    yield tmp_path
    folder_paths.folder_names_and_paths.pop(FOLDER)
    if before is not None:
        folder_paths.folder_names_and_paths[FOLDER] = before


@pytest.fixture
def conditioning(prompts: Any) -> Any:
    def build(seed: int, **more: Any) -> Any:
        states = prompts([seed])
        return [[states, {"pooled_output": states[:, 0].clone(), **more}]]

    return build


def saved(positive: Any, name: str = "one", **more: Any) -> str:
    from comfy_nodes.prompts import SavePrompt

    return SavePrompt.execute(positive, name, **more).args[0]


def loaded(name: str = "one.safetensors") -> tuple[Any, Any, str]:
    from comfy_nodes.prompts import LoadPrompt

    return LoadPrompt.execute(name).args


def same(one: Any, other: Any) -> bool:
    a, b = list(tensors_in(one)), list(tensors_in(other))
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_it_comes_back_as_it_was(folder: Path, conditioning: Any) -> None:
    """Half types, masks, several states, plain settings; and both sides."""
    positive = conditioning(1, guidance=3.5, attention_mask=torch.tensor([[1, 1, 0]]))
    positive += [[torch.ones(1, 3, 24, dtype=torch.float16), {"area": (8, 8, 0, 0)}]]
    negative = conditioning(2, start_percent=0.25, pooled_output=None)
    said = saved(positive, negative=negative, text="a dog")
    assert (
        "a dog" in said
        and "positive: 1 x" in said
        and [*folder.iterdir()] == [folder / "one.safetensors"]
    )
    one, other, text = loaded()
    assert same(one, positive) and same(other, negative) and text == said
    assert one[0][1]["guidance"] == 3.5 and one[1][1]["area"] == (8, 8, 0, 0)
    assert other[0][1]["start_percent"] == 0.25 and other[0][1]["pooled_output"] is None


def test_without_a_negative_there_are_zeros(folder: Path, conditioning: Any) -> None:
    """As the host's own node makes them; what an older file of that name had is gone."""
    from nodes import ConditioningZeroOut

    positive = conditioning(1, guidance=2.0)
    saved(positive, negative=conditioning(2))
    saved(positive)
    one, other, _ = loaded()
    (wanted,) = ConditioningZeroOut().zero_out(positive)
    assert same(one, positive) and same(other, wanted)
    assert other[0][1]["guidance"] == 2.0 and not any(x.any() for x in tensors_in(other))


def test_the_images_are_the_same(folder: Path, in_comfy: Any, conditioning: Any) -> None:
    """Sampled by ComfyUI's own loop, with states of the file and with those that made it."""
    import comfy.sample

    model = in_comfy("sd3")
    positive, negative = conditioning(1), conditioning(2)
    saved(positive, negative=negative)

    def latents(one: Any, other: Any) -> Tensor:
        empty = torch.zeros(1, 16, 8, 8)
        noise = comfy.sample.prepare_noise(empty, 3, None)
        given = model, noise, 3, 4.0, "euler", "simple", one, other, empty
        return comfy.sample.sample(*given, disable_pbar=True, seed=3)

    plain = latents(positive, negative)
    again = latents(*loaded()[:2])
    assert torch.equal(again, plain) and plain.isfinite().all()
    assert not torch.equal(latents(negative, positive), plain)


def test_a_real_text_encoder(folder: Path) -> None:
    """What a CLIP of ComfyUI encodes, as CLIP Text Encode gives it."""
    import comfy.sd1_clip

    class Small(comfy.sd1_clip.SDClipModel):
        pass

    tokens = comfy.sd1_clip.SD1Tokenizer().tokenize_with_weights("a (dog:1.2) in the snow")
    config = {
        "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 49408,
        "intermediate_size": 64, "hidden_act": "gelu", "max_position_embeddings": 77,
        "eos_token_id": 49407, "layer_norm_eps": 1e-5, "model_type": "clip_text_model",
    }  # fmt: skip
    clip = Small(device="cpu", textmodel_json_config=config, layer_norm_hidden_state=True)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
        states, pooled = clip.encode_token_weights(tokens["l"])[:2]
    given = [[states, {"pooled_output": pooled}]]
    saved(given)
    assert same(loaded()[0], given) and states.shape[1:] == (77, 32)


def test_what_cannot_be_stored_is_refused(folder: Path, conditioning: Any) -> None:
    """By its name, and nothing is written or replaced."""
    saved(conditioning(1))
    before = (folder / "one.safetensors").read_bytes()
    with pytest.raises(TenutoError, match="positive conditioning has control, which is not stored"):
        saved(conditioning(1, control=object()))
    with pytest.raises(TenutoError, match="negative conditioning has hooks"):
        saved(conditioning(1), negative=conditioning(2, hooks=object()))
    assert (folder / "one.safetensors").read_bytes() == before


def test_bad_files_and_names_are_one_sentence(folder: Path, conditioning: Any) -> None:
    from comfy_nodes.prompts import LoadPrompt, SavePrompt

    assert SavePrompt.validate_inputs("a/../b") is not True
    assert "There is no prompt called" in str(LoadPrompt.validate_inputs("none.safetensors"))
    with pytest.raises(TenutoError, match="There is no prompt called"):
        loaded("none.safetensors")
    saved(conditioning(1))
    assert LoadPrompt.validate_inputs("one.safetensors") is True
    whole = (folder / "one.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-8])
    with pytest.raises(TenutoError, match="cannot be read as states of prompts"):
        loaded("cut.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(TenutoError, match="not one of prompts"):
        loaded("other.safetensors")
    for name, entries in (("none", {}), ("odd", {"positive": torch.zeros(1)})):
        store = PromptFile(folder / f"{name}.safetensors")
        store.put("other", torch.ones(1), {"kind": "conditioning"})
        for key, value in entries.items():
            store.put(key, value, {"kind": "conditioning"})
        store.save()
        with pytest.raises(TenutoError, match="has no conditioning"):
            loaded(f"{name}.safetensors")


def test_a_changed_file_is_another_prompt(folder: Path, conditioning: Any) -> None:
    from comfy_nodes.prompts import LoadPrompt

    saved(conditioning(1))
    first = LoadPrompt.fingerprint_inputs("one.safetensors")
    assert LoadPrompt.fingerprint_inputs("one.safetensors") == first
    saved(conditioning(2), negative=conditioning(3))
    assert LoadPrompt.fingerprint_inputs("one.safetensors") != first
