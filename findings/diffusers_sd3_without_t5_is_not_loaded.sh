#!/usr/bin/env bash
# diffusers 0.42.1, transformers 5.17.0, torch 2.13.0 (CPU build), Python 3.11; seen 2026-11-30.
#
# The good guess: from_pretrained loads what save_pretrained wrote. A Stable Diffusion 3 pipeline runs without its T5
# (text_encoder_3=None, tokenizer_3=None), and is saved so: model_index.json says [null, null] for both parts, as it does for
# parts of other pipelines that are loaded again without a word.
#
# What happens: the folder cannot be loaded. The two are no optional parts of the class, and [null, null] counts as a part that
# is missing, not as one that is None; passing text_encoder_3=None and tokenizer_3=None once more loads it.
#
#   model_index.json          [None, None]
#   loaded as it was saved    ValueError
#   with both None again      StableDiffusion3Pipeline
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.17.0 diffusers==0.42.1 accelerate==1.15.0
cat >"$folder/show.py" <<'PY'
import json
import sys

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

folder = sys.argv[1]
with open(f"{folder}/vocab.json", "w") as file:
    json.dump({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, file)
with open(f"{folder}/merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer = CLIPTokenizer(vocab=f"{folder}/vocab.json", merges=f"{folder}/merges.txt")
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
encoder = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=3, projection_dim=16, **sizes))
pipe = StableDiffusion3Pipeline(
    transformer=SD3Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4, out_channels=4, sample_size=8,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
    ),
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=8),
    text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer,
    text_encoder_3=None, tokenizer_3=None,
)
pipe.save_pretrained(f"{folder}/model")
print(json.load(open(f"{folder}/model/model_index.json"))["text_encoder_3"], end=" ")
try:
    print(type(StableDiffusion3Pipeline.from_pretrained(f"{folder}/model")).__name__, end=" ")
except Exception as error:
    print(type(error).__name__, end=" ")
again = StableDiffusion3Pipeline.from_pretrained(f"{folder}/model", text_encoder_3=None, tokenizer_3=None)
print(type(again).__name__)
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder" 2>"$folder/log") || { tail -5 "$folder/log"; exit 1; }
echo "the index, loaded as saved, with both None: $seen"
wanted="[None, None] ValueError StableDiffusion3Pipeline"
[[ "$seen" == "$wanted" ]] || { echo "changed: expected $wanted"; exit 1; }
