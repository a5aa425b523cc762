"""A text encoder by itself: the file has what was meant, and does what its report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tenuto
from tenuto.artifact.export.comfy_reader import comfy_file
from tenuto.artifact.export.report import Report
from tenuto.calibration import fold
from tenuto.calibration.fold import folded
from tenuto.calibration.text_encoder import FP8, UNSEEN
from tenuto.errors import Cancelled
from tenuto.model import describe
from tenuto.model.encoder_names import names_of
from tenuto.numerics import QTensor, Scheme, schemes
from tenuto.sampling import states_read
from tenuto.sampling.consumers import CONSUMERS, calls_for
from tenuto.sampling.encoder_source import EncoderSource, encoder_source
from tenuto.sampling.reads import states_apart
from tests.core import tiny_encoders
from tests.core.tiny_encoders import PIECES, encoder_folder

Made = Callable[..., tuple[Path, Report, Path]]
FORMATS = {"w4a8": "asym_w4a8_int8", "w4a16": "asym_w4a8_int8", "w8a8": "int8_tensorwise",
           "fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Made:
    """made(consumer, scheme, method): (file, report, folder of the encoder), each once."""
    root, known = tmp_path_factory.mktemp("encoders"), dict[Any, Any]()

    def build(consumer: str, scheme: str = "w4a8", method: str = "gptq") -> Any:
        folder = root / consumer
        if not folder.exists():
            encoder_folder(folder, consumer, torch.bfloat16)
        key = consumer, scheme, method
        if key not in known:
            out = root / f"{'-'.join(key)}.safetensors"
            report = tenuto.quantize_text_encoder(
                folder, out, scheme=scheme, consumer=consumer, method=method,
                prompts=["a red fox", "two chairs"],
            )  # fmt: skip
            known[key] = out, report, folder
        return known[key]

    return build


def source_of(folder: Path, consumer: str) -> EncoderSource:
    return encoder_source(str(folder), CONSUMERS[consumer].kinds)


def as_transformers(path: Path, source: EncoderSource) -> nn.Module:
    """The encoder of the folder in fp32 with all that a file has, decoded as a host does."""
    encoder = source.load().float()
    state, names = encoder.state_dict(), source.names
    with comfy_file(path) as file:
        file.check()
        for name in file.names:
            layer, _, end = name.rpartition(".")
            if names.in_model(name) not in state:
                continue
            shape = tuple(state[names.in_model(name)].shape)
            coded = end == "weight" and layer in file.layers
            value = file.decode(layer, shape) if coded else file.file.get_tensor(name)
            state[names.in_model(name)] = value.float()
    if "shared.weight" in state:  # the same table
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    encoder.load_state_dict(state)
    return encoder


def unseen_states(encoder: nn.Module, source: EncoderSource, consumer: str) -> list[list[Tensor]]:
    blocks = len(describe(encoder).blocks)
    lines = ["", *tenuto.prompts("general")[UNSEEN]]
    given = CONSUMERS[consumer], encoder, source.tokenizer(), blocks
    calls = calls_for(*given, lines, read_alone=True)
    return [row for call in calls for row in states_read(encoder, call)]


CASES = [
    ("flux", "w4a8", "gptq"), ("wan", "nvfp4", "awq+gptq"), ("z-image", "w4a16", "awq"),
    ("z-image", "fp8", "gptq"), ("qwen-image", "w8a8", "gptq"), ("lumina2", "w4a8", "awq"),
    ("lumina2", "nvfp4", "rtn"), ("ltx2", "fp8", "awq+gptq"),
]  # fmt: skip


@pytest.mark.parametrize(("consumer", "scheme", "method"), CASES)
def test_a_file_computes_what_its_report_says(
    consumer: str, scheme: str, method: str, made: Made
) -> None:
    """Decoded and run by transformers, its states are as far off as those of our own module."""
    path, report, folder = made(consumer, scheme, method)
    source = source_of(folder, consumer)
    full = unseen_states(source.load().float(), source, consumer)
    low = unseen_states(as_transformers(path, source), source, consumer)
    said = [state["quantized"] for state in report.facts["states"]]
    for one, other in zip(states_apart(full, low), said, strict=True):
        for key, value in one.items():
            assert value == pytest.approx(other[key], rel=2e-3, abs=1e-6), (consumer, key)
    assert report.kinds == {FORMATS[scheme]: len(report.layers)} and report.kept == len(
        report.layers
    )


@pytest.mark.parametrize("consumer", sorted(tiny_encoders.KINDS))
def test_calibrated_codes_are_nearer_than_nearest(consumer: str, made: Made) -> None:
    """By 3 dB at four bits, of each state that is read but for the embedding itself."""
    for state in made(consumer)[1].facts["states"]:
        one, other = state["quantized"]["relative_l2"], state["nearest"]["relative_l2"]
        assert one <= 0.71 * other or state["state"] == 0


def test_a_file_has_the_names_and_types_that_hosts_look_for(made: Made) -> None:
    for consumer, key, missing in (
        ("flux", "encoder.block.1.layer.1.DenseReluDense.wi_1.weight", "encoder.embed_tokens"),
        ("z-image", "model.layers.0.self_attn.q_norm.weight", "lm_head"),
        ("qwen-image", "model.layers.0.self_attn.k_proj.bias", "lm_head"),
        ("lumina2", "model.layers.0.post_feedforward_layernorm.weight", "lm_head"),
    ):
        path, report, _ = made(consumer)
        with safe_open(str(path), "pt") as file:
            names = set(file.keys())
            others = [n for n in names if not n.startswith(tuple(report.layers))]
            types = {file.get_slice(n).get_dtype() for n in others if n != "spiece_model"}
            about = json.loads(file.metadata()["tenuto"])["encoder"]
        assert key in names and not any(name.startswith(missing) for name in names)
        assert types == {"BF16"} and about == json.loads(json.dumps(report.facts))
        assert about["consumer"] == consumer and about["states"]


def test_eyes_stay_in_16_bits_under_the_hosts_names(made: Made) -> None:
    path, report, _ = made("qwen-image")
    with safe_open(str(path), "pt") as file:
        eyes = [name for name in file.keys() if name.startswith("visual.")]  # noqa: SIM118
    assert eyes and not any(name.startswith("visual") for name in report.layers)
    assert any("head" in line for line in report.dropped)


def test_the_tokenizer_is_copied_byte_for_byte(made: Made, tmp_path: Path) -> None:
    path, _, folder = made("wan")
    with safe_open(str(path), "pt") as file:
        assert bytes(file.get_tensor("spiece_model").tolist()) == PIECES
    single = single_file(folder, tmp_path / "umt5.safetensors", spiece_model=b"another one")
    source = encoder_source(str(single), ("umt5",), folder)
    assert bytes(source.tokenizer_tensors()["spiece_model"].tolist()) == b"another one"


@pytest.mark.parametrize(
    ("consumer", "table"), [("wan", "shared"), ("lumina2", "model.embed_tokens")]
)
def test_embeddings_in_8_bits(consumer: str, table: str, made: Made, tmp_path: Path) -> None:
    """They are measured with the rest, and the file has what was measured."""
    _, _, folder = made(consumer)
    source, out = source_of(folder, consumer), tmp_path / "a.safetensors"
    report = tenuto.quantize_text_encoder(
        folder, out, scheme="w8a8", consumer=consumer, method="rtn", embeddings="int8"
    )
    full = unseen_states(source.load().float(), source, consumer)
    low = unseen_states(as_transformers(out, source), source, consumer)
    said = report.facts["states"][-1]["quantized"]
    assert states_apart(full, low)[-1]["relative_l2"] == pytest.approx(
        said["relative_l2"], rel=2e-3
    )
    with comfy_file(out) as file:
        assert file.layers[table] == {"format": "int8_tensorwise"} and table in report.layers
        assert file.file.get_tensor(f"{table}.weight").dtype is torch.int8
    assert report.kept == len(report.layers) and not any("convol" in d for d in report.dropped)


def single_file(folder: Path, path: Path, **tokens: bytes) -> Path:
    """The encoder of a folder as a file of hosts in 16 bits."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    state = encoder_source(str(folder), (kind,)).load().state_dict()
    pairs = ((names_of(kind).in_file(k), v) for k, v in state.items())
    found = {name: v.clone() for name, v in pairs if name is not None}
    text = {k: torch.tensor(list(v), dtype=torch.uint8) for k, v in tokens.items()}
    save_file(found | text, path)
    return path


@pytest.mark.parametrize("consumer", ["flux", "qwen-image"])
def test_a_single_file_is_read_like_its_folder(consumer: str, made: Made, tmp_path: Path) -> None:
    out, report, folder = made(consumer)
    single = single_file(folder, tmp_path / "single.safetensors")
    other = tmp_path / "other.safetensors"
    found = tenuto.quantize_text_encoder(
        single, other, scheme="w4a8", consumer=consumer, config=folder,
        prompts=["a red fox", "two chairs"],
    )  # fmt: skip
    assert found.facts == report.facts
    with safe_open(str(out), "pt") as one, safe_open(str(other), "pt") as two:
        assert set(one.keys()) == set(two.keys())
        for name in one.keys():  # noqa: SIM118
            a, b = one.get_tensor(name), two.get_tensor(name)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_the_encoder_of_a_pipelines_folder_is_found(made: Made, tmp_path: Path) -> None:
    _, _, folder = made("flux")
    (tmp_path / "model_index.json").write_text("{}")
    clip = tmp_path / "text_encoder"
    clip.mkdir()
    (clip / "config.json").write_text('{"model_type": "clip_text_model"}')
    second, tokens = tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    second.mkdir()
    tokens.mkdir()
    for file in folder.iterdir():
        (tokens if "token" in file.name else second).joinpath(file.name).write_bytes(
            file.read_bytes()
        )
    source = encoder_source(str(tmp_path), ("t5",))
    assert source.folder == second and source.tokenizer()("a cat")["input_ids"]


def test_stopped_it_leaves_no_file_and_resumes(made: Made, tmp_path: Path) -> None:
    path, _, folder = made("z-image")
    out, work, seen = tmp_path / "a.safetensors", tmp_path / "work", list[str]()

    def stop(done: int, total: int, note: str) -> None:
        seen.append(note)
        if note.startswith("layers.1 "):
            raise Cancelled

    how: Any = {"scheme": "w4a8", "consumer": "z-image", "work": work,
                "prompts": ["a red fox", "two chairs"]}  # fmt: skip
    with pytest.raises(Cancelled):
        tenuto.quantize_text_encoder(folder, out, **how, on_progress=stop)
    assert not out.exists() and list(work.glob("layers.0*"))
    steps: list[float] = []
    tenuto.quantize_text_encoder(
        folder, out, **how, on_progress=lambda done, total, note: steps.append(done / total)
    )
    assert steps == sorted(steps) and steps[-1] == 1
    assert out.read_bytes() == path.read_bytes()


# --- folding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("consumer", ["flux", "z-image", "lumina2"])
def test_a_folded_encoder_computes_the_same(consumer: str, tmp_path: Path) -> None:
    """To the rounding of fp32, with norms that bf16 holds exactly: those of 1 + weight too."""
    source = source_of(encoder_folder(tmp_path / "e", consumer, torch.bfloat16), consumer)
    encoder, row = source.load(), CONSUMERS[consumer]
    with torch.no_grad():  # columns of very different sizes: scales pay
        for name, p in encoder.named_parameters():
            if "layernorm" in name or "layer_norm" in name:
                p[::7] *= 8
    blocks = len(describe(encoder).blocks)
    calls = calls_for(row, encoder, source.tokenizer(), blocks, ["a cat", "two dogs in a park"])
    twin = folded(encoder, calls, schemes.NVFP4.weight)
    full = [s for c in calls for s in states_read(encoder.float(), c)]
    same = [s for c in calls for s in states_read(twin, c)]
    assert all(state["relative_l2"] < 1e-5 for state in states_apart(full, same))
    was = dict(encoder.named_parameters())
    new = {n: p for n, p in twin.named_parameters() if not torch.equal(p, was[n])}
    norms = [p for n, p in new.items() if p.ndim == 1]
    assert norms and all(torch.equal(p, p.bfloat16().float()) for p in norms)


@pytest.mark.parametrize("gated", [False, True])
def test_what_something_else_reads_is_not_folded(gated: bool, tmp_path: Path) -> None:
    """A gate beside the MLP reads what the norm gives: then that stays as it is."""
    source = source_of(encoder_folder(tmp_path / "e", "z-image"), "z-image")
    encoder, row = source.load(), CONSUMERS["z-image"]
    layers: Any = encoder.layers
    norm, kind = layers[0].post_attention_layernorm, type(layers[0].mlp)
    with torch.no_grad():
        norm.weight[::7] *= 8

    class Gated(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.mean(-1, keepdim=True).sigmoid()

    layers[0].mlp.__class__ = Gated if gated else kind
    calls = calls_for(row, encoder, source.tokenizer(), 3, ["a cat", "two dogs in a park"])
    twin: Any = folded(encoder, calls, schemes.NVFP4.weight)
    assert torch.equal(twin.layers[0].post_attention_layernorm.weight, norm.weight) == gated


@pytest.mark.parametrize("consumer", ["flux", "z-image"])
def test_no_scale_is_searched_for_that_cannot_be_folded(
    consumer: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """A look before the search changes no scale; where norms follow the sums there is no search."""
    source = source_of(encoder_folder(tmp_path / "e", consumer), consumer)
    encoder, row = source.load(), CONSUMERS[consumer]
    blocks = len(describe(encoder).blocks)
    calls = calls_for(row, encoder, source.tokenizer(), blocks, ["a cat", "two dogs in a park"])
    found, tried = folded(encoder, calls, schemes.NVFP4.weight), list[str]()

    def error(self: Any) -> float:
        tried.append(self.name)
        return known(self)

    known = fold._Block._error
    monkeypatch.setattr(fold._Block, "_error", error)
    again = folded(encoder, calls, schemes.NVFP4.weight)
    assert len(tried) > 10
    tried.clear()
    monkeypatch.setattr(fold._Block, "_folded", lambda *_: False)
    none = folded(encoder, calls, schemes.NVFP4.weight)
    assert not tried
    monkeypatch.undo()
    monkeypatch.setattr(fold._Block, "_folds", lambda *_: True)
    without = folded(encoder, calls, schemes.NVFP4.weight).state_dict()
    for name, value in found.state_dict().items():
        assert torch.allclose(value, again.state_dict()[name], rtol=1e-4, atol=1e-6)
        assert torch.allclose(value, without[name], rtol=1e-4, atol=1e-6), name
        assert torch.equal(none.state_dict()[name], encoder.state_dict()[name])
    plain = encoder.state_dict()
    assert any(not torch.allclose(v, plain[n], rtol=1e-2) for n, v in without.items())


# --- one scale for a whole weight of 8-bit floats -------------------------------------------------


def test_8_bit_floats_with_one_scale() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    q = QTensor.nearest(weight, FP8.weight)
    assert len(q.scale) == 8 and len(q.scale.unique()) == 1
    assert (q.dequantize() - weight).abs().max() < 0.07 * weight.abs().max()
    assert Scheme.from_json(FP8.to_json()) == FP8
    with pytest.raises(tenuto.SchemeError, match="per output channel"):
        Scheme("x", tenuto.Format(8, granularity="tensor"))


# --- larger than memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(("consumer", "single"), [("flux", False), ("qwen-image", True)])
def test_an_encoder_on_disk_becomes_the_same_file(
    consumer: str, single: bool, made: Made, tmp_path: Path
) -> None:
    """Read block by block, of a folder or a single file: nearly all tensors have the same bytes."""
    out, report, folder = made(consumer)
    other, model = tmp_path / "other.safetensors", folder
    if single:
        model = single_file(folder, tmp_path / "single.safetensors")
    found = tenuto.quantize_text_encoder(
        model, other, scheme="w4a8", consumer=consumer, config=folder if single else None,
        max_memory=2**20, prompts=["a red fox", "two chairs"],
    )  # fmt: skip
    for one, two in zip(found.facts["states"], report.facts["states"], strict=True):
        assert one["quantized"] == pytest.approx(two["quantized"], rel=1e-3)
    with safe_open(str(out), "pt") as a, safe_open(str(other), "pt") as b:
        names = set(a.keys())
        assert names == set(b.keys())
        pairs = ((a.get_tensor(n), b.get_tensor(n)) for n in names)
        same = [torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs]
    assert sum(same) >= 0.98 * len(same)


@pytest.mark.parametrize(("consumer", "method"), [("flux", "awq-gptq"), ("z-image", "awq")])
def test_scales_are_folded_on_disk_too(
    consumer: str, method: str, made: Made, tmp_path: Path
) -> None:
    """Block by block, with the scales that an encoder in memory gets; a stopped job goes on."""
    out, report, folder = made(consumer, "w4a8", method)
    other, work, seen = tmp_path / "other.safetensors", tmp_path / "work", list[str]()

    def make(stop: str | None = None) -> Report:
        def note(done: int, total: int, what: str) -> None:
            seen.append(what)
            if stop is not None and what == stop:
                raise Cancelled

        return tenuto.quantize_text_encoder(
            folder, other, scheme="w4a8", consumer=consumer, method=method, max_memory=2**20,
            prompts=["a red fox", "two chairs"], work=work, on_progress=note,
        )  # fmt: skip

    last = describe(source_of(folder, consumer).load()).blocks[1]
    with pytest.raises(Cancelled):
        make(last)
    assert len(list((work / "fold").glob("*block*" if consumer == "flux" else "*layers*"))) == 1
    found = make()
    assert found.facts["method"] == method.replace("-", "+"), "an older name says the same"
    for one, two in zip(found.facts["states"], report.facts["states"], strict=True):
        assert one["quantized"] == pytest.approx(two["quantized"], rel=1e-2)
    with safe_open(str(out), "pt") as a, safe_open(str(other), "pt") as b:
        assert set(a.keys()) == set(b.keys())
        norms = [n for n in a.keys() if "norm" in n and a.get_tensor(n).ndim == 1]  # noqa: SIM118
        assert norms and all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in norms)
