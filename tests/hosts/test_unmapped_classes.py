"""Denoisers without a key map: calls are skipped and layers quantized; a cache is refused.

But for HiDream, whose parts are called as in diffusers. Of each version those that it has. Tiny, of
random weights.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import schemes
from tenuto.caching import LateInterval
from tenuto.errors import ModelError
from tenuto.runtime import Patches

STEPS, WIDTH = 10, 24
HEAD = {"num_layers": 2, "num_attention_heads": 1}
# class of the host's -> its sizes, the shape of a latent, how wide a token of the prompt is
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "HiDream": ({
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 1,
        "caption_channels": [WIDTH, WIDTH], "text_emb_dim": WIDTH, "llama_layers": [0, 1],
        "axes_dims_rope": (64, 32, 32),
    }, (16, 8, 8), WIDTH),
    "LTXV": ({
        "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
        "caption_channels": WIDTH, "num_layers": 2,
    }, (128, 2, 4, 4), WIDTH),
    "AuraFlow": ({
        "dim": 64, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "cond_seq_dim": WIDTH,
        "max_seq": 64, "in_channels": 4,
    }, (4, 8, 8), WIDTH),
    "Omnigen2": ({
        "hidden_size": 96, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 1,
        "num_kv_heads": 1, "axes_dim_rope": (32, 32, 32), "text_feat_dim": WIDTH,
        "multiple_of": 16,
    }, (16, 8, 8), WIDTH),
    "Krea2": ({
        "features": 64, "tdim": 32, "txtdim": WIDTH, "heads": 2, "kvheads": 2, "layers": 2,
        "txtlayers": 2, "txtheads": 2, "txtkvheads": 2,
    }, (16, 8, 8), 2 * WIDTH),
    "ErnieImage": (HEAD | {
        "hidden_size": 128, "ffn_hidden_size": 64, "text_in_dim": WIDTH,
    }, (128, 8, 8), WIDTH),
    "MageFlow": (HEAD | {"joint_attention_dim": WIDTH}, (128, 4, 4), WIDTH),
    "Lens": (HEAD | {"enc_hidden_dim": WIDTH}, (128, 4, 4), 4 * WIDTH),
    "JoyImage": (HEAD | {"hidden_size": 128, "text_dim": WIDTH}, (16, 1, 8, 8), WIDTH),
    "LTXAV": ({
        "cross_attention_dim": 64, "audio_cross_attention_dim": 64, "attention_head_dim": 32,
        "audio_attention_head_dim": 32, "num_attention_heads": 2, "audio_num_attention_heads": 2,
        "caption_channels": WIDTH, "num_layers": 2,
    }, (128, 2, 4, 4), 2 * WIDTH),
}  # fmt: skip


def present() -> list[str]:
    """Those that this version has, of more than before where it is newer."""
    known = importlib.import_module("comfy.supported_models")
    return [name for name in MODELS if hasattr(known, name)]


def built(name: str, facts: dict[str, Any]) -> Any:
    from comfy import supported_models
    from comfy.model_patcher import ModelPatcher

    config = getattr(supported_models, name)(dict(facts))
    config.set_inference_dtype(torch.float32, None)
    model, draw = config.get_model({}, "").eval(), torch.Generator().manual_seed(0)
    for key, p in model.diffusion_model.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        scale = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        p.data = noise * p[0].numel() ** -0.5 if p.ndim > 1 else scale + 0.1 * noise
        p.requires_grad_(False)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conds(width: int) -> list[Any]:
    draw = torch.Generator().manual_seed(7)
    return [[torch.randn(1, 5, width, generator=draw), {
        "pooled_output": torch.randn(1, WIDTH, generator=draw),
        "conditioning_llama3": torch.randn(1, 2, 5, WIDTH, generator=draw),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
    }]]  # fmt: skip


def sampled(model: Any, shape: tuple[int, ...], text: list[Any], sampler: Any = "euler") -> Tensor:
    import comfy.sample

    empty = torch.zeros(1, *shape)
    noise = comfy.sample.prepare_noise(empty, 3, None)
    return comfy.sample.sample(
        model, noise, STEPS, 2.0, sampler, "simple", text, text, empty, disable_pbar=True, seed=3
    )


@pytest.mark.parametrize("name", present())
def test_each_is_skipped_and_quantized_and_plain_again(name: str) -> None:
    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.report import Report

    facts, shape, width = MODELS[name]
    model, text = built(name, facts), conds(width)
    plain = sampled(model, shape, text)
    assert plain.isfinite().all() and plain.std() > 0
    skips = ComfyUI().install(model, Patches(speedup=2.0))
    found = sampled(skips.handle, shape, text)
    said = Report.execute(skips.handle, None)[0]
    assert f"{STEPS // 2} of {STEPS} calls of the model skipped" in said
    assert found.isfinite().all() and not torch.equal(found, plain)
    skips.detach()
    codes = ComfyUI().install(model, Patches(scheme=schemes.W8A8, execution="int8"))
    found, part = sampled(codes.handle, shape, text), codes.parts[0]
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.05
    assert len(part.ran) > 10 and part.how == {"int8": len(part.ran)}
    codes.detach()
    by_branch = Patches(policy=LateInterval(2, 2))
    if name == "HiDream":
        cached = ComfyUI().install(model, by_branch)
        found = sampled(cached.handle, shape, text)
        assert found.isfinite().all() and int(cached.parts[0].last.reused.sum()) > 0
        cached.detach()
    else:
        with pytest.raises(ModelError, match="Tenuto cannot cache a "):
            ComfyUI().install(model, by_branch)
    assert torch.equal(sampled(model, shape, text), plain)


def test_video_and_sound_in_one_latent() -> None:
    """MiniMax H3 answers a list of two tensors, which the host packs into one."""
    from comfy import nested_tensor, sample, supported_models

    from comfy_nodes.adapter import ComfyUI

    if not hasattr(supported_models, "MiniMaxH3"):
        pytest.skip("this ComfyUI has no MiniMax H3")
    model = built("MiniMaxH3", {
        "hidden_size": 64, "num_layers": 2, "token_refiner_num_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": 128, "ffn_hidden_size": 64,
        "text_dim": WIDTH, "time_embed_hidden_size": 32, "time_embed_dim": 16,
    })  # fmt: skip
    text, draw = conds(WIDTH), torch.Generator().manual_seed(3)
    noises = [torch.randn(1, *shape, generator=draw) for shape in ((24, 2, 8, 8), (32, 2, 6))]
    noise = nested_tensor.NestedTensor(noises)
    empty = nested_tensor.NestedTensor([torch.zeros_like(one) for one in noises])

    def latents(one: Any) -> list[Tensor]:
        return sample.sample(
            one, noise, STEPS, 2.0, "euler", "simple", text, text, empty, disable_pbar=True, seed=3
        ).unbind()

    plain = latents(model)
    skips = ComfyUI().install(model, Patches(speedup=2.0))
    found, run = latents(skips.handle), skips.parts[0].last
    assert run.reused.sum() == run.computed.sum() > 0
    skips.detach()
    codes = ComfyUI().install(model, Patches(scheme=schemes.W8A8, execution="int8"))
    rounded = latents(codes.handle)
    assert codes.parts[0].ran
    codes.detach()
    for some in (found, rounded):
        for one, other in zip(some, plain, strict=True):
            assert 0 < float((one - other).norm() / other.norm()) < 0.05
    assert all(map(torch.equal, latents(model), plain))


# --- denoisers that keep something between their calls --------------------------------------------


@pytest.mark.parametrize("patches", [Patches(speedup=2.0), Patches(policy=LateInterval(2, 2))])
def test_a_video_made_in_order_computes_every_call(
    in_comfy: Any, prompts: Any, patches: Patches
) -> None:
    """Each call writes keys and values which later frames attend to; the host marks such calls."""
    from comfy_nodes.adapter import ComfyUI

    text = [[prompts([1]), {}]]
    model = in_comfy("unet")
    made = ComfyUI().install(model, patches)
    assert not torch.equal(sampled(made.handle, (4, 8, 8), text), sampled(model, (4, 8, 8), text))
    assert int(made.parts[0].last.reused.sum()) > 0
    ordered = made.handle.clone()
    ordered.model_options["transformer_options"]["ar_state"] = {"start_frame": 0}
    assert torch.equal(sampled(ordered, (4, 8, 8), text), sampled(model, (4, 8, 8), text))
    assert int(made.parts[0].last.reused.sum()) == 0


@pytest.mark.parametrize("patches", [Patches(speedup=2.0), Patches(policy=LateInterval(2, 2))])
def test_the_sampler_of_such_videos(patches: Patches) -> None:
    from comfy import sample, samplers, supported_models

    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.report import Report

    if not hasattr(supported_models, "WAN21_CausalAR_T2V"):
        pytest.skip("this ComfyUI has no model that makes a video in order")
    model = built("WAN21_CausalAR_T2V", {
        "in_dim": 16, "dim": 32, "ffn_dim": 48, "freq_dim": 32, "text_dim": WIDTH, "num_heads": 2,
        "num_layers": 2, "model_type": "t2v",
    })  # fmt: skip
    noise, text = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3)), conds(24)
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)

    def latents(one: Any) -> Tensor:
        return sample.sample_custom(
            one, noise, 1.0, samplers.ksampler("ar_video"), sigmas, text, text,
            torch.zeros_like(noise), disable_pbar=True, seed=3,
        )  # fmt: skip

    plain, made = latents(model), ComfyUI().install(model, patches)
    assert torch.equal(latents(made.handle), plain)
    if patches.speedup:
        assert "adds noise of its own" in Report.execute(made.handle, None)[0]


def test_what_a_denoiser_keeps_of_a_prompt_is_forgotten_round_a_quantized_run(
    in_comfy: Any, prompts: Any
) -> None:
    """HiDream-O1 keeps keys and values of a prompt for later runs; a stand-in keeps a number."""
    from comfy_nodes.adapter import ComfyUI

    model, text = in_comfy("unet"), [[prompts([1]), {}]]
    denoiser, kept = model.model.diffusion_model, []
    first = denoiser.time_embed[0]

    def keeps(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        kept[:] = kept or [out.clone()]  # of the weights of the first call
        return kept[0].expand_as(out)

    denoiser.clear_kv_cache = kept.clear
    hook = first.register_forward_hook(keeps)
    plain = sampled(model, (4, 8, 8), text)
    made = ComfyUI().install(model, Patches(scheme=schemes.W4A8, execution="int8"))
    changed = sampled(made.handle, (4, 8, 8), text)
    assert not kept
    assert torch.equal(sampled(model, (4, 8, 8), text), plain)
    assert torch.equal(sampled(made.handle, (4, 8, 8), text), changed)
    hook.remove()
