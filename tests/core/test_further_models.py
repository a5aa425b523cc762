"""Denoisers that no family file knows go the whole way: recorded, in 4 bits, reused, as before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.model import layers
from tests.core.model.conftest import Draw, built
from tests.core.model.further import FURTHER
from tests.core.tiny_pipelines import randomized

STEPS = 4


@pytest.mark.parametrize("name", FURTHER)
def test_a_class_without_a_family_file(one_thread: None, name: str) -> None:
    known = FURTHER[name]
    model = randomized(built(known))  # some leave weights as the memory was

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        """Steps of Euler from noise; `batch` is what the inputs have."""
        given = known.inputs(Draw(seed), 1.0)
        x = given["hidden_states"]
        for step in range(STEPS):
            timestep = known.inputs(Draw(0), 1 - step / STEPS)["timestep"]
            out = denoiser(**(given | {"hidden_states": x, "timestep": timestep}))[0]
            if out.numel() == x.numel():  # else some of the sample's channels are conditions
                x = x - out.reshape(x.shape) / STEPS
            else:
                x = torch.cat((x[:, : out.shape[1]] - out / STEPS, x[:, out.shape[1] :]), 1)
        return x.flatten(1)[:, :48].reshape(-1, 3, 4, 4).tanh()

    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        plain = sample(model, 3, 2)
    recorded = tn.record(model, sample=sample, runs=1, batch=2)
    assert len(recorded.timesteps) == STEPS
    made = tn.quantize(model, "w4a8", recorded)
    known_layers = {name for name, _ in layers(model)}
    assert len(made.header["layers"]) > 0.6 * len(known_layers)
    whole = tn.train_router(model, recorded, reuse=0.5, whole=True, iterations=1)
    with torch.no_grad(), tn.attach(model, made | whole) as attached:
        other = sample(model, 3, 2)
        assert sum(reused for _, reused in attached.counts().values()) > 0
    assert bool(other.isfinite().all()) and not torch.allclose(other, plain)
    with torch.no_grad():
        torch.testing.assert_close(sample(model, 3, 2), plain)
    assert all(map(torch.equal, before, model.parameters()))
