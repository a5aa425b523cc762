"""A tiny random PixArt, a 6-step DDIM loop of its own, and a trajectory of both."""

import pytest
import torch

import tenuto as tn

STEPS = 6


def ddim(steps=STEPS, split=False, guidance=2.0):
    """`sample(denoiser, seed, batch)`; split: the two halves of guidance in two calls."""
    from diffusers import DDIMScheduler

    def noise(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def sample(denoiser, seed, batch):
        scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        scheduler.set_timesteps(steps)
        x = torch.stack([noise(seed + i, 4, 8, 8) for i in range(batch)])
        given = torch.stack([noise(500 + seed + i, 5, 24) for i in range(batch)])
        without = torch.zeros_like(given)
        sizes = {"resolution": None, "aspect_ratio": None}

        def call(x, prompt, t):
            return denoiser(
                x,
                encoder_hidden_states=prompt,
                timestep=t.expand(len(x)),
                added_cond_kwargs=sizes,
                return_dict=False,
            )[0]

        with torch.no_grad():
            for t in scheduler.timesteps:
                if split:
                    a, b = call(x, without, t), call(x, given, t)
                else:
                    a, b = call(torch.cat([x, x]), torch.cat([without, given]), t).chunk(2)
                x = scheduler.step(a + guidance * (b - a), t, x).prev_sample
        return x

    return sample


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """These models are too small for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def transformer():
    """Three blocks of width 32 with random weights, nine branches."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


@pytest.fixture
def branches(transformer):
    return tuple(b.name for b in tn.describe(transformer).branches)


@pytest.fixture
def loop():
    """Makes `sample` functions: loop(steps=6, split=False, guidance=2.0)."""
    return ddim


@pytest.fixture
def trajectory(transformer):
    return tn.record(transformer, sample=ddim(), batch=2, runs=1, guidance=2.0)
