#!/usr/bin/env bash
# torch 2.13.0 (CPU): FlopCounterMode cannot count a model that uses flex_attention, and afterwards the model itself fails.
#
# Counting a model's products is meant to change nothing: `with FlopCounterMode(display=False): model(x)`. Around a call of
# flex_attention without compile it raises a TypeError. The good guess is that one catches it, does without the number and
# goes on. But after that plain calls of flex_attention, with no counter about, raise too in the same process:
#
#   plain                ok
#   counted              TypeError: no implementation found for 'torch.ops.higher_order.flex_attention' ...
#   plain, after that    Unsupported: Attempted to call function marked as skipped
#   after a dynamo reset ok
#
# torch._dynamo.reset() mends it; compiled code is then compiled anew.
set -euo pipefail
WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$WORK/venv/bin/python" -W ignore - <<'PY'
from contextlib import nullcontext

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

q = torch.randn(1, 1, 64, 32)


def call(title, inside=None):
    try:
        with torch.no_grad(), inside or nullcontext():
            flex_attention(q, q, q)
        said = "ok"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:75]}"
    print(f"{title:21}{said}")
    return said.split(":")[0]


seen = [call("plain"), call("counted", FlopCounterMode(display=False)), call("plain, after that")]
torch._dynamo.reset()
seen.append(call("after a dynamo reset"))
assert seen == ["ok", "TypeError", "Unsupported", "ok"], seen
PY
