#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0 (CPU build), transformers 5.17.0, accelerate 1.15.0, Python 3.11; seen 2026-11-28.
#
# The good guess: peft treats a subclass of nn.Linear and one of nn.Conv2d alike. It asks isinstance() of both, and a LoRA's
# two factors are plain layers of torch's.
#
# What happens: the factors of a Linear are nn.Linear, those of a convolution are made by type(base_layer)(in, out, kernel,
# stride, padding, bias=False). A Conv2d subclass with a constructor of its own (what a quantized layer has) takes a LoRA as
# a Linear and raises a TypeError as a Conv2d; one with torch's constructor gets factors of its own class, its side effects
# and its own forward included.
#
#   Linear subclass, own constructor: factors Linear, Linear
#   Conv2d subclass, own constructor: TypeError
#   Conv2d subclass, torch's constructor: factors Doubled, Doubled
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.17.0 accelerate==1.15.0
cat >"$folder/lora.py" <<'PY'
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


class OwnLinear(nn.Linear):
    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)


class OwnConv(nn.Conv2d):
    def __init__(self, base):
        super().__init__(base.in_channels, base.out_channels, base.kernel_size)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def tried(layer):
    model = nn.ModuleDict({"layer": layer})
    config = LoraConfig(r=2, target_modules=["layer"])
    try:
        inject_adapter_in_model(config, model)
    except TypeError:
        return "TypeError"
    lora = model["layer"]
    return f"factors {type(lora.lora_A['default']).__name__}, {type(lora.lora_B['default']).__name__}"


print("Linear subclass, own constructor:", tried(OwnLinear(nn.Linear(4, 4))))
print("Conv2d subclass, own constructor:", tried(OwnConv(nn.Conv2d(4, 4, 3))))
print("Conv2d subclass, torch's constructor:", tried(Doubled(4, 4, 3)))
PY
expected="Linear subclass, own constructor: factors Linear, Linear
Conv2d subclass, own constructor: TypeError
Conv2d subclass, torch's constructor: factors Doubled, Doubled"
seen=$("$folder/venv/bin/python" -W ignore "$folder/lora.py")
echo "$seen"
[[ "$seen" == "$expected" ]] || { echo "changed: expected"; echo "$expected"; exit 1; }
