#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.17.0: clip_skip of Stable Diffusion raises an AttributeError, with any model.
#
# `clip_skip=1` is an argument of StableDiffusionPipeline, and diffusers asks for no older transformers. The good guess is
# that it does what its text says. But the pipeline normalizes the skipped layer by `text_encoder.text_model`, and
# transformers 5 has flattened CLIPTextModel: its layers lie in the model itself.
#
#   without clip_skip    ok
#   clip_skip=1          AttributeError: 'CLIPTextModel' object has no attribute 'text_model'
#   clip_skip=0          AttributeError: 'CLIPTextModel' object has no attribute 'text_model'
set -euo pipefail
WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy pillow diffusers==0.42.1 transformers==5.17.0
cd "$WORK"
"$WORK/venv/bin/python" -W ignore - <<'PY'
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ends = "<|startoftext|>", "<|endoftext|>"
Path("vocab.json").write_text(json.dumps({word: n for n, word in enumerate((*ends, "a</w>"))}))
Path("merges.txt").write_text("#version: 0.2\n")
config = CLIPTextConfig(
    vocab_size=3, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=0, eos_token_id=1, pad_token_id=1,
)
pipe = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=[32], norm_num_groups=32),
    text_encoder=CLIPTextModel(config),
    tokenizer=CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77),
    unet=UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=32, layers_per_block=1,
        attention_head_dim=8,
    ),
    scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
)
pipe.set_progress_bar_config(disable=True)


def call(title, **more):
    try:
        pipe("a", num_inference_steps=1, output_type="latent", **more)
        said = "ok"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(f"{title:21}{said}")
    return said


seen = [call("without clip_skip"), call("clip_skip=1", clip_skip=1), call("clip_skip=0", clip_skip=0)]
fault = "AttributeError: 'CLIPTextModel' object has no attribute 'text_model'"
assert seen == ["ok", fault, fault], seen
PY
