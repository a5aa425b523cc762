#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, torch 2.13.0 (CPU build), transformers 5.17.0, accelerate 1.15.0, Python 3.11; seen 2026-11-30.
#
# The good guess: a LoRA whose factors are wider than the layer that it is for is refused when it is loaded, and taking it
# off leaves the model as it was before; unload_lora_weights(reset_to_overwritten_params=True) does at the latest.
#
# What happens: FluxPipeline replaces any Linear by one as wide as the file. That is meant for Control LoRAs, whose first
# layer gets a control image, but it does so to a plain FluxPipeline, and to a layer inside a block. unload_lora_weights()
# leaves both wide. With reset_to_overwritten_params=True, off by default, the first layer of the model is as before, and
# the one inside the block is not.
#
#   as made: x_embedder 16, ff 32
#   loaded: x_embedder 32, ff 64
#   unloaded: x_embedder 32, ff 64
#   unloaded, reset_to_overwritten_params: x_embedder 16, ff 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" diffusers==0.42.1 peft==0.21.2 transformers==5.17.0 accelerate==1.15.0
cat >"$folder/wide.py" <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

model = FluxTransformer2DModel(
    patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)
pipe = FluxPipeline(
    FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
    text_encoder_2=None, tokenizer_2=None, transformer=model,
)
FF = "transformer_blocks.0.ff.net.0.proj"


def widths():
    found = (model.get_submodule(name) for name in ("x_embedder", FF))
    return [getattr(layer, "base_layer", layer).in_features for layer in found]


def factors(name):
    layer = model.get_submodule(name)
    return {
        f"transformer.{name}.lora_A.weight": torch.ones(2, 2 * layer.in_features),
        f"transformer.{name}.lora_B.weight": torch.ones(layer.out_features, 2),
    }


def show(when):
    print(f"{when}: x_embedder {widths()[0]}, ff {widths()[1]}")


wide = factors("x_embedder") | factors(FF)
show("as made")
pipe.load_lora_weights(dict(wide))
show("loaded")
pipe.unload_lora_weights()
show("unloaded")
pipe.unload_lora_weights(reset_to_overwritten_params=True)
show("unloaded, reset_to_overwritten_params")
PY
found=$("$folder/venv/bin/python" "$folder/wide.py" 2>"$folder/errors") || { tail -n 5 "$folder/errors"; exit 1; }
echo "$found"
wanted='as made: x_embedder 16, ff 32
loaded: x_embedder 32, ff 64
unloaded: x_embedder 32, ff 64
unloaded, reset_to_overwritten_params: x_embedder 16, ff 64'
[ "$found" = "$wanted" ]
