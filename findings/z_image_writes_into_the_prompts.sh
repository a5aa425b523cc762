#!/usr/bin/env bash
# diffusers 0.42.1, transformers 5.17.0, torch 2.13.0 (CPU build), Python 3.11; seen 2026-11-28.
#
# The good guess: a pipeline reads its list of prompts. Calling it twice with one list gives one image twice, as FLUX.2 does,
# which has a chat template too.
#
# What happens: ZImagePipeline.encode_prompt writes the text that the chat template gives back into the caller's own list.
# A second call with that list wraps it once more, and encodes another prompt. A single string is not changed.
#
#   one string, twice: the same states
#   one list, twice: other states, 1 -> 2 templates round 'a dog'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 transformers==5.17.0 accelerate==1.15.0
cat >"$folder/twice.py" <<'PY'
import string

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

words = ["<|endoftext|>", *string.ascii_lowercase, *string.punctuation, "Ġ", "Ċ"]
tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], pad_token="<|endoftext|>")
tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}"
torch.manual_seed(0)
encoder = Qwen3Model(
    Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )
).eval()
pipe = ZImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None
)


def states(prompt):
    with torch.no_grad():
        (found,), _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False, max_sequence_length=64)
    return found


def said(one, other):
    return "the same" if one.shape == other.shape and torch.equal(one, other) else "other"


print(f"one string, twice: {said(states('a dog'), states('a dog'))} states")
prompts, counts, found = ["a dog"], [], []
for _ in range(2):
    found.append(states(prompts))
    counts.append(prompts[0].count("<user>"))
print(f"one list, twice: {said(*found)} states, {counts[0]} -> {counts[1]} templates round 'a dog'")
PY
expected="one string, twice: the same states
one list, twice: other states, 1 -> 2 templates round 'a dog'"
seen=$("$folder/venv/bin/python" -W ignore "$folder/twice.py")
echo "$seen"
[[ "$seen" == "$expected" ]] || { echo "changed: expected"; echo "$expected"; exit 1; }
