#!/usr/bin/env bash
# comfy-kitchen 0.2.40, torch 2.13.0 (CPU build), Python 3.11, Linux x86-64, no GPU needed; seen 2026-11-29.
#
# The good guess: a layer whose weight is a QuantizedTensor in int8 multiplies every input in int8, its range found a row.
#
# What happens: where the input is a part of a longer row of tokens (x[:, 4:], what follows an attention over text and image)
# and the layer has no bias, torch does not fold batch and tokens but asks for a product of batches (bmm). comfy-kitchen has no
# integer form of that: the weight is dequantized, the input stays in float. Nothing is said; .contiguous() changes nothing for
# a batch of one, whose stride stays. With a bias, or folded by reshape(-1, K), the same input is multiplied in int8. So ComfyUI
# 0.33 computes both attn.proj of FLUX.2 in float from a file in int8 or W4A8.
#
# Below: the largest difference to the product with the dequantized weight, relative; 0.0: no int8.
#
#   whole 0.006, part 0.0, part.contiguous() 0.0, part with bias 0.006, part.reshape(-1, K) 0.006 (about)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check comfy-kitchen==0.2.40 packaging==26.3
cat >"$folder/product.py" <<'PY'
import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch.nn.functional import linear

torch.manual_seed(0)
weight = QuantizedTensor.from_float(torch.randn(32, 32), "TensorWiseINT8Layout", per_channel=True)
x = torch.randn(1, 8, 32)
part = x[:, 4:]
with torch.no_grad():
    for name, given, bias in (
        ("whole", x, None),
        ("part", part, None),
        ("contiguous", part.contiguous(), None),
        ("bias", part, torch.zeros(32)),
        ("folded", part.reshape(-1, 32), None),
    ):
        wanted = given @ weight.dequantize().T
        gap = (linear(given, weight, bias) - wanted).norm() / wanted.norm()
        print(name, "int8" if gap > 1e-3 else "float")
PY
seen=$("$folder/venv/bin/python" "$folder/product.py" | tr '\n' ' ')
echo "$seen"
expected="whole int8 part float contiguous float bias int8 folded int8 "
[[ "$seen" == "$expected" ]] || { echo "changed: expected $expected"; exit 1; }
