"""`PromptCache`: the same bits with stored states as without, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tenuto as tn
from tenuto.model import encoders_of, tensors_in
from tenuto.sampling import PipelineCall, PromptFile
from tenuto.sampling.encoder_mark import encoder_mark, folder_mark
from tenuto.sampling.loading import load
from tenuto.sampling.prompt_cache import Unknown
from tenuto.sampling.prompt_file import KEY
from tests.core import family_pipelines as families
from tests.core import tiny_pipelines as tiny

FAMILIES = (
    "stable_diffusion", "sdxl", "sd35", "flux", "flux2", "qwen_image", "z_image", "wan", "krea2",
    "ltx2", "chroma", "hunyuan_video15", "lumina2", "sana", "hidream", "pixart", "kandinsky3",
)  # fmt: skip
OTHERS = (torch.float32, torch.bfloat16)
TWICE = ("qwen_image", "krea2", "hunyuan_video15")  # both halves of guidance by a call of its own


def made(pipe: Any, ready: families.Ready, prompt: str = "a dog") -> list[torch.Tensor]:
    """The latents of two steps, by the pipeline's own call."""
    call = {name: value for name, value in ready.call.items() if "prompt" not in name}
    asked = PipelineCall(pipe, (prompt,), 2, ready.guidance, call)
    return list(tensors_in(asked(asked.denoiser, 3, 1, "latent")))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def without_encoders(pipe: Any) -> Any:
    for name in encoders_of(pipe):
        setattr(pipe, name, None)
    return pipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.safetensors"


@pytest.fixture
def diffusion() -> Any:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states(pipe: Any, cache: tn.PromptCache, prompt: Any = "a dog", **call: Any) -> None:
    """One step of a run that uses the cache."""
    with cache.used_by(pipe):
        pipe(prompt, num_inference_steps=1, output_type="latent", **call)


# --- equal bits -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_without_an_encoder(family: str, file: Path) -> None:
    """Stored once, from a file, by the pipeline's own way and in keywords of its call."""
    ready = getattr(families, family)()
    pipe = ready.model
    pipe.set_progress_bar_config(disable=True)
    plain, cache = made(pipe, ready), tn.PromptCache(file)
    with cache.used_by(pipe, "tiny"):
        assert same(made(pipe, ready), plain)
    assert (cache.made, cache.found) == (2 if family in TWICE else 1, 0)
    known = tn.PromptCache(file)
    with known.used_by(without_encoders(pipe), "tiny"):
        assert same(made(pipe, ready), plain)
        asked = PipelineCall(
            pipe, ("a dog",), 2, ready.guidance,
            {k: v for k, v in ready.call.items() if "prompt" not in k},
        )  # fmt: skip
    assert (known.made, known.found) == (0, cache.made)
    assert "encode_prompt" not in vars(pipe), "nothing is left behind"
    keywords = known.encode(pipe, ["a dog"], mark="tiny", **asked.fixed)
    assert any(name.startswith("prompt_embeds") for name in keywords)
    generator = [torch.Generator("cpu").manual_seed(3)]
    again = pipe(**keywords, generator=generator, output_type="latent")
    assert same(list(tensors_in(again)), plain)


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_a_shipped_model(name: str, file: Path) -> None:
    """A pixel for a pixel; what is in the folder stands for the encoder that is not loaded."""
    given: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}
    given |= {"use_resolution_binning": False} if name == "transformer" else {}
    pipe = tn.demo(name)
    pipe.set_progress_bar_config(disable=True)

    def image(**call: Any) -> bytes:
        noise = torch.Generator("cpu").manual_seed(7)
        return pipe(**call, generator=noise).images[0].tobytes()

    plain = image(prompt="a golden retriever", **given)
    assert image(**tn.PromptCache(file).encode(pipe, "a golden retriever", **given)) == plain
    mark = encoder_mark(pipe)
    assert mark == folder_mark(pipe)
    without_encoders(pipe)
    cache = tn.PromptCache(file)
    assert image(**cache.encode(pipe, "a golden retriever", **given)) == plain
    assert (cache.found, cache.made) == (1, 0)
    with pytest.raises(Unknown, match="no states of this prompt"), cache.used_by(pipe):
        image(prompt="a lemon", **given)


def test_what_a_pipeline_writes_to_is_a_copy() -> None:
    """Z-Image adds padding in place: a second run from memory is the same."""
    ready = families.z_image()
    ready.model.set_progress_bar_config(disable=True)
    cache = tn.PromptCache()
    with cache.used_by(ready.model):
        runs = [made(ready.model, ready) for _ in range(3)]
        (key,) = cache.file.facts()
        for tensor in tensors_in(ready.model.encode_prompt(["a dog"], "cpu", True)):
            tensor.zero_()
        assert all(x.abs().sum() for x in tensors_in(cache.file.get(key)))
        prompts = ["a dog"]
        cache.encode(ready.model, prompts, **ready.call)
        assert prompts == ["a dog"]
        runs.append(made(ready.model, ready))
    assert all(same(run, runs[0]) for run in runs)


def test_several_images_a_prompt(diffusion: Any, file: Path) -> None:
    """The keywords are those of one image each; how many, the call itself says."""
    given: dict[str, Any] = {"num_inference_steps": 2, "num_images_per_prompt": 3}
    noise = [torch.Generator("cpu").manual_seed(i) for i in range(3)]
    plain = diffusion("a dog", output_type="latent", generator=noise, **given).images
    keywords = tn.PromptCache(file).encode(diffusion, "a dog", **given)
    assert len(keywords["prompt_embeds"]) == 1
    noise = [torch.Generator("cpu").manual_seed(i) for i in range(3)]
    again = diffusion(**keywords, output_type="latent", generator=noise).images
    assert (again - plain).abs().max() <= 1e-5 * plain.abs().max()


# --- what states depend on ------------------------------------------------------------------------


def test_every_option_that_changes_states_is_another_entry(diffusion: Any) -> None:
    cache = tn.PromptCache()
    calls: list[dict[str, Any]] = [
        {}, {"negative_prompt": "a cat"}, {"guidance_scale": 1.0},
        {"prompt": "two cats"}, {"prompt": ["a dog", "two cats"]}, {"num_images_per_prompt": 2},
    ]  # fmt: skip
    for call in [*calls, *calls]:
        states(diffusion, cache, **call)
    assert (cache.made, cache.found, len(cache.file)) == (len(calls), len(calls), len(calls))


def test_templates_and_lengths_of_the_pipeline_count() -> None:
    pipe = families.qwen_image().model
    cache = tn.PromptCache()
    call = {"height": 32, "width": 32, "true_cfg_scale": 1.0}
    states(pipe, cache, **call)
    states(pipe, cache, max_sequence_length=7, **call)
    pipe.prompt_template_encode += "!"
    states(pipe, cache, **call)
    assert (cache.made, cache.found) == (3, 0)


def test_states_of_another_encoder_are_not_taken(diffusion: Any, file: Path) -> None:
    """One weight is enough; a cast is another one too; the old one's are still there after."""
    cache = tn.PromptCache(file)
    states(diffusion, cache)
    weight = next(p for n, p in diffusion.text_encoder.named_parameters() if "fc1.weight" in n)
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 0.5
    states(diffusion, cache)
    assert (cache.made, cache.found) == (2, 0)
    with torch.no_grad():
        weight.copy_(before)
    states(diffusion, cache)
    assert (cache.made, cache.found) == (2, 1)
    diffusion.text_encoder.double()
    assert encoder_mark(diffusion) not in {f["encoder"] for f in cache.file.facts().values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mark_of_files_is_that_of_the_encoder(dtype: torch.dtype) -> None:
    """In fp16 transformers keeps some weights of T5 in fp32."""
    pipe = load("demo:transformer", dtype=dtype)
    kinds = {p.dtype for p in pipe.text_encoder.parameters()}
    assert kinds == ({dtype, torch.float32} if dtype is torch.float16 else {dtype})
    assert encoder_mark(pipe) == folder_mark(pipe)
    others = {encoder_mark(load("demo:transformer", dtype=d)) for d in OTHERS if d is not dtype}
    assert encoder_mark(pipe) not in others


def test_another_folder_is_another_encoder(tmp_path: Path, file: Path) -> None:
    """Without its encoder a pipeline is known by its folder: a weight changed there is refused."""
    folder = tmp_path / "model"
    tiny.stable_diffusion("StableDiffusionPipeline").save_pretrained(folder)
    kind = type(tiny.stable_diffusion("StableDiffusionPipeline"))
    states(kind.from_pretrained(folder), tn.PromptCache(file))
    bare = kind.from_pretrained(folder, text_encoder=None)
    known = tn.PromptCache(file)
    states(bare, known)
    assert known.found == 1
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith("fc2.weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(Unknown, match="load the pipeline with its text encoder"):
        states(kind.from_pretrained(folder, text_encoder=None), tn.PromptCache(file))


def test_what_is_put_into_an_encoder_counts(diffusion: Any) -> None:
    """Quantized layers and a LoRA make other states; taken off, the first ones are right again."""
    from peft import LoraConfig

    artifact = tn.quantize_encoder(diffusion, "w4", ["a dog", "two cats"], method="rtn", steps=1)
    cache = tn.PromptCache()

    def encoded() -> torch.Tensor:
        with cache.used_by(diffusion):
            return diffusion.encode_prompt(["a dog"], None, 1, True)[0]

    states(diffusion, cache)
    with tn.attach(diffusion, artifact):
        states(diffusion, cache)
        quantized = encoded()
    assert (cache.made, cache.found) == (2, 1)
    assert not torch.equal(encoded(), quantized)
    assert (cache.made, cache.found) == (2, 2)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    diffusion.text_encoder.add_adapter(lora)
    states(diffusion, cache)
    diffusion.text_encoder.disable_adapters()
    states(diffusion, cache)
    assert (cache.made, cache.found) == (4, 2)


def test_an_offloaded_encoder_is_known_too(diffusion: Any) -> None:
    """Its weights are elsewhere until it is called, and it has the same mark."""
    from accelerate import cpu_offload

    cache, mark = tn.PromptCache(), encoder_mark(diffusion)
    states(diffusion, cache)
    for part in (diffusion.text_encoder, diffusion.unet, diffusion.vae):
        cpu_offload(part, torch.device("cpu"))
    assert any(p.is_meta for p in diffusion.text_encoder.parameters())
    assert encoder_mark(diffusion) == mark
    states(diffusion, cache)
    assert (cache.made, cache.found) == (1, 1)


def test_states_that_are_given_are_left_alone(diffusion: Any) -> None:
    embeds = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    cache = tn.PromptCache()
    embeds = embeds[..., : diffusion.text_encoder.config.hidden_size]
    with cache.used_by(diffusion):
        diffusion(
            prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=1,
            output_type="latent",
        )  # fmt: skip
    assert (cache.made, cache.found, len(cache.file)) == (0, 0, 0)


def test_encoders_by_other_names_are_left_alone() -> None:
    """Nothing can say whose states they are: they are computed each time."""

    class Other:
        def __init__(self) -> None:
            self.llm, self.ran = torch.nn.Linear(2, 2), 0

        def encode_prompt(self, prompt: str, device: Any = None) -> torch.Tensor:
            self.ran += 1
            return torch.ones(1)

    pipe, cache = Other(), tn.PromptCache()
    with cache.used_by(pipe):
        assert all(pipe.encode_prompt("a dog").item() == 1 for _ in range(2))
    assert pipe.ran == 2 and not len(cache.file)


def test_what_encodes_no_prompts_is_refused() -> None:
    pipe = families.dit().model
    with (
        pytest.raises(tn.TenutoError, match="encodes no prompts"),
        tn.PromptCache().used_by(pipe),
    ):
        pass


# --- known or not, and nothing left behind --------------------------------------------------------


def test_what_is_known_is_found_without_running_anything(diffusion: Any) -> None:
    cache = tn.PromptCache()

    def call() -> Any:
        return diffusion("a dog", num_inference_steps=2, output_type="latent")

    assert not cache.knows(diffusion, call)
    with cache.used_by(diffusion):
        call()
    ran = list[str]()
    for name in ("text_encoder", "unet"):
        part = getattr(diffusion, name)
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert cache.knows(diffusion, call) and (cache.made, cache.found) == (1, 0)
    assert not ran and "encode_prompt" not in vars(diffusion)
    assert not cache.knows(diffusion, lambda: diffusion(no_such_keyword=1))


def test_an_error_in_mid_run_leaves_nothing(diffusion: Any, file: Path) -> None:
    """What was made before it is in the file all the same."""
    cache = tn.PromptCache(file)

    def stop(*_: Any) -> None:
        raise tn.Cancelled

    hook = diffusion.unet.register_forward_pre_hook(stop)
    with pytest.raises(tn.Cancelled):
        states(diffusion, cache)
    hook.remove()
    assert "encode_prompt" not in vars(diffusion)
    assert len(tn.PromptCache(file).file) == 1


# --- the file -------------------------------------------------------------------------------------


def test_values_come_back_as_they_were(file: Path) -> None:
    value = (
        torch.arange(6).reshape(2, 3), [torch.ones(1, dtype=torch.bfloat16), None], {"a": 1.5},
    )  # fmt: skip
    store = PromptFile(file)
    assert store.put("k", value, {"prompts": "ü"}) and not file.exists()
    store.save()
    again = PromptFile(file)
    assert again.facts() == {"k": {"prompts": "ü"}} and again.get("none") is None
    first, (one, nothing), more = again.get("k")
    assert torch.equal(first, value[0]) and torch.equal(one, value[1][0])
    assert nothing is None and more == {"a": 1.5}
    assert not again.put("odd", object(), {}) and len(again) == 1


def test_a_file_is_bounded_and_the_oldest_go(file: Path) -> None:
    store = PromptFile(file, most=3 * 400)
    for i in range(5):
        assert store.put(f"{i}", torch.full((100,), float(i)), {})
        store.save()
    assert list(PromptFile(file).facts()) == ["2", "3", "4"]
    assert file.stat().st_size < 3 * 400 + 4000
    assert not store.put("large", torch.zeros(1000), {}) and len(store) == 3
    memory = PromptFile(most=2 * 400)
    for i in range(2):
        memory.put(f"{i}", torch.full((100,), float(i)), {})
    memory.get("0")  # used last, so that the other one goes
    memory.put("2", torch.full((100,), 2.0), {})
    assert list(memory.facts()) == ["0", "2"]


def test_equal_tensors_are_stored_once(file: Path) -> None:
    store = PromptFile(file)
    for i in range(4):
        store.put(f"{i}", [torch.ones(1000), torch.full((1,), float(i))], {})
    store.save()
    assert file.stat().st_size < 2 * 4000


def test_two_writers_lose_nothing(file: Path) -> None:
    one, other = PromptFile(file), PromptFile(file)
    one.put("a", torch.zeros(1), {})
    one.save()
    other.put("b", torch.ones(1), {})
    other.save()
    assert set(PromptFile(file).facts()) == {"a", "b"}
    assert torch.equal(PromptFile(file).get("a"), torch.zeros(1))


def written(file: Path, header: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {"x": torch.zeros(1)}, file, {KEY: text})


ENTRY = {"facts": {}, "value": ["tensor", "x"], "sizes": {"x": 4}}
BROKEN: dict[str, Any] = {
    "no JSON": "{", "no entries": {"format_version": "1.0"}, "a list": [],
    "later": {"format_version": "2.0", "entries": {}},
    "a tensor lost": {"format_version": "1.0", "entries": {"k": ENTRY | {"value": ["tensor", 7]}}},
    "no value": {"format_version": "1.0", "entries": {"k": {"facts": {}, "sizes": {}}}},
    "odd kind": {"format_version": "1.0", "entries": {"k": ENTRY | {"value": ["pickle", "x"]}}},
    "odd sizes": {"format_version": "1.0", "entries": {"k": ENTRY | {"sizes": {"x": -1}}}},
    "deep": '{"format_version": "1.0", "entries": ' + "[" * 100_000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_one_sentence(case: str, file: Path) -> None:
    written(file, BROKEN[case])
    with pytest.raises(tn.TenutoError, match="cannot be read as states of prompts") as error:
        tn.PromptCache(file)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300
    assert file.exists(), "it is the user's"


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(tn.TenutoError, match="not one of prompts"):
        tn.PromptCache(file)
    file.write_bytes(b"junk")
    with pytest.raises(tn.TenutoError, match="cannot be read"):
        tn.PromptCache(file)
    with pytest.raises(tn.TenutoError, match=r"a \.safetensors file"):
        tn.PromptCache(tmp_path / "prompts.pt")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(tn.TenutoError, match="cannot be read"):
        tn.PromptCache(folder)


def test_a_truncated_file_is_refused(diffusion: Any, file: Path) -> None:
    states(diffusion, tn.PromptCache(file))
    whole, short = file.read_bytes(), file.with_name("short.safetensors")
    short.write_bytes(whole[:-100])
    with pytest.raises(tn.TenutoError, match="cannot be read"):
        tn.PromptCache(short)


def test_a_folder_that_cannot_be_written_is_one_sentence(diffusion: Any, file: Path) -> None:
    place = file.parent / "sub"
    place.write_text("a file where a folder would be")
    with pytest.raises(tn.TenutoError, match="Cannot write"):
        states(diffusion, tn.PromptCache(place / "p.safetensors"))
