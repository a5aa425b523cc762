"""A quantized text encoder's file in the real ComfyUI, by its own loader of CLIPs.

This version reads 8-bit floats of Qwen3 and Mistral alone; comfy-kitchen's own code reads all other
formats, see `tests/core/artifact/export/`. It computes an encoder in the type of the last norm, and
with one in bf16 it fails, on a CPU at least: its states are in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenuto.artifact.export.comfy_reader import comfy_file
from tenuto.artifact.export.encoder import encoder_plan, write_encoder
from tenuto.calibration.text_encoder import FP8
from tenuto.model.encoder_names import names_of
from tenuto.numerics import QTensor

SIZES: dict[str, Any] = {  # head_dim, vocab_size and rope_theta are the host's own
    "vocab_size": 151936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def tiny() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(**SIZES, head_dim=128, rope_theta=1e6, max_position_embeddings=4096)
    model, draw = Qwen3Model(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    return model.bfloat16().float()


def test_the_host_reads_an_encoder_as_it_was_meant(monkeypatch: Any, tmp_path: Path) -> None:
    import comfy.sd
    import comfy.text_encoders.llama as llama
    import comfy.utils

    base = llama.Qwen3_4BConfig
    monkeypatch.setattr(llama, "Qwen3_4BConfig", lambda **given: base(**{**SIZES, **given}))
    encoder, names, out = tiny(), names_of("qwen3"), tmp_path / "q.safetensors"
    own = dict(encoder.named_modules())
    linears = [n for n, m in own.items() if isinstance(m, nn.Linear)]
    codes = {n: QTensor.nearest(own[n].weight, FP8.weight) for n in linears}  # type: ignore
    write_encoder(encoder_plan(encoder, names, codes, FP8, {}, {}), out)
    state, metadata = comfy.utils.load_torch_file(str(out), safe_load=True, return_metadata=True)
    if hasattr(comfy.utils, "convert_old_quants"):  # as load_clip does
        state, _ = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    else:
        state["_quantization_metadata"] = metadata["_quantization_metadata"]
    state["model.norm.weight"] = state["model.norm.weight"].float()  # see above
    # since 0.3.76 it tells an encoder by its width, and this one is tiny
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.QWEN3_4B)
    clip = comfy.sd.load_text_encoder_state_dicts([state])
    tokens = clip.tokenize("a red fox in the snow")
    with torch.no_grad():
        found: Tensor = clip.encode_from_tokens(tokens).float()
    (row,) = tokens["qwen3_4b"]
    ids = torch.tensor([[token for token, *_ in row]])

    def states(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, output_hidden_states=True).hidden_states[-2]

    plain = states(encoder)
    with comfy_file(out) as file, torch.no_grad():
        for name in linears:
            weight = encoder.get_parameter(f"{name}.weight")
            weight.copy_(file.decode(names.in_file(name) or ""))
    wanted = states(encoder)
    gap = float((found - wanted).norm() / wanted.norm())
    far = float((plain - wanted).norm() / wanted.norm())
    assert found.shape == wanted.shape and gap < 1e-3 and gap < far / 3, (gap, far)
