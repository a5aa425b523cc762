"""A T5 with the outliers of trained ones, all of it in int8: inputs of `wo` that one token has."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encoders import codes_in_int8, markdown_of_files, of_file
from benchmarks.outliers import Rounded, put_in, sizes, states
from tenuto.calibration import ENCODER_SCHEMES, EncoderCodes
from tenuto.measure import states_distance
from tenuto.sampling import calls_of
from tests.core.tiny_encoders import t5

END = 1  # every prompt's last token


def with_outliers() -> nn.Module:
    """Column 0 of what goes into `wo` is some thousands where a text ends, elsewhere small."""
    encoder: Any = t5()
    words = encoder.shared.weight.data
    way = words[END] / words[END].norm()
    words -= (words @ way)[:, None] * way
    words *= 12
    words[END] = 20 * way
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.q.weight.data *= 0.1  # logits are not divided by sqrt(d)
        block.layer[0].SelfAttention.o.weight.data *= 0.1
        inner = block.layer[1].DenseReluDense
        inner.wi_0.weight.data[0] = inner.wi_1.weight.data[0] = 10 * way
        inner.wo.weight.data[:, 0] = 0.2 * way
    return encoder.eval()


def calls(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Prompts of 5 to 12 tokens."""
    draw = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, 64, (1, 4 + i % 8), generator=draw) for i in range(count)]
    ids = [torch.cat((text, torch.tensor([[END]])), 1) for text in texts]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def test_a_range_a_tensor_loses_what_outliers_leave_no_levels_for() -> None:
    """What `benchmarks/outliers.py` calls naive, and what makes these inputs outliers."""
    encoder, unseen = with_outliers(), calls(16, 2)
    linears = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    most = sizes(encoder, linears, calls(16, 1))
    for name, size in most.items():
        assert (size.max() > 1000 * size.median()) == name.endswith(".wo"), name
    before, full = copy.deepcopy(encoder.state_dict()), torch.cat(states(encoder, unseen))
    naive = {n: Rounded(n, m, lambda name, _: most[name].max()) for n, m in linears.items()}
    with put_in(encoder, naive):
        low = torch.cat(states(encoder, unseen))
    assert (low - full).norm() > 0.5 * full.norm()
    assert torch.equal(torch.cat(states(encoder, unseen)), full)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_all_of_it_in_int8_is_two_per_cent_off() -> None:
    """A range a token and rotated columns; calibrated codes are nearer still."""
    encoder, errors = with_outliers(), dict[str, float]()
    linears = {n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    some = calls_of(calls(32, 3), 8, held_out=calls(8, 4), by_length=True)
    for method in ("rtn", "gptq"):
        made = EncoderCodes.of(encoder, some, ENCODER_SCHEMES["w8a8"], method)
        layers = codes_in_int8(made)
        assert set(layers) == linears
        assert all(layer.scheme.activation is not None for layer in layers.values())
        found = states_distance(encoder, calls_of(calls(16, 2), 8), layers)
        errors[method] = found["relative_l2"]
    assert errors["gptq"] < errors["rtn"] < 0.02


def test_codes_of_a_folded_encoder_have_inputs_in_int8_too() -> None:
    """Scales of columns are in the weights: in int8 it is about as far off as with float inputs."""
    encoder, unseen = with_outliers(), calls_of(calls(16, 2), 8)
    some = calls_of(calls(32, 3), 8, held_out=calls(8, 4), by_length=True)
    row = of_file(encoder, some, unseen, "w4a8", "awq+gptq")
    assert row["layers"] == 14 and row["db"] > 3
    assert row["relative_l2"] / 1.5 < row["int8"] < 1.5 * row["relative_l2"]


def test_the_table_has_a_line_a_method_and_decibels_to_nearest() -> None:
    given = [("w4a8 rtn", 0, 0.2, 0.4), ("w4a8 gptq", 33, 0.1, 0.1), ("fp8 gptq", 33, 0.05, 0.0),
             ("w4a8 gptq", 129, 0.02, 0.04)]  # fmt: skip
    rows = [{"model": "t5", "prompts": prompts, "row": name, "relative_l2": error, "int8": int8,
             "seconds": 7.0} for name, prompts, error, int8 in given]  # fmt: skip
    lines = markdown_of_files(rows).splitlines()
    assert (
        lines[2] == "| model | method | prompts | W4A16 | W4A8 | nvfp4 | fp8 | W8A16 | W8A8 | s |"
    )
    assert lines[4:] == [
        "| t5 | rtn |  | 20.00 | 40.00 |  |  |  |  | 7 |",
        "| t5 | gptq | 129 | 2.00 (+20.0) | 4.00 (+20.0) |  |  |  |  | 7 |",
        "| t5 | gptq | 33 | 10.00 (+6.0) | 10.00 (+12.0) |  | 5.00 |  |  | 7 |",
    ]
