#!/usr/bin/env bash
# transformers 5.17.0, accelerate 1.15.0, torch 2.13.0 (CPU build), Python 3.11; seen 2026-11-29.
#
# The good guess: device_map says where weights are, not what they are. T5 names `wo` among its `_keep_in_fp32_modules`, since
# its values overflow in fp16, and from_pretrained(dtype=torch.float16) keeps it in fp32. With device_map={"": "disk"} the same
# weights are read when they are needed, in the same types.
#
# What happens: on disk all of them are in fp16. The index of what is read there takes the types of the empty model, before the
# plan of types is made for loading: nothing warns, and the model is another one than in memory.
#
#   type of wo in memory      torch.float32
#   type of wo on disk        torch.float16
#   outputs equal             False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.17.0 accelerate==1.15.0
cat >"$folder/show.py" <<'PY'
import sys

import torch
from transformers import T5Config, T5EncoderModel

folder = sys.argv[1]
torch.manual_seed(0)
config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
T5EncoderModel(config).eval().save_pretrained(f"{folder}/model")
memory = T5EncoderModel.from_pretrained(f"{folder}/model", dtype=torch.float16)
disk = T5EncoderModel.from_pretrained(
    f"{folder}/model", dtype=torch.float16, device_map={"": "disk"}, offload_folder=f"{folder}/aside"
)
kinds = [model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype for model in (memory, disk)]
ids = torch.arange(6)[None]
with torch.no_grad():
    print(*kinds, torch.equal(memory(ids)[0], disk(ids)[0]))
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder" 2>/dev/null)
echo "types in memory and on disk, outputs equal: $seen"
[[ "$seen" == "torch.float32 torch.float16 False" ]] || { echo "changed: expected torch.float32 torch.float16 False"; exit 1; }
