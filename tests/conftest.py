"""What several tests share: the project's files, and a tiny model with random weights."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tenuto.runtime.execution import INT8, Chooser

WORDS = "a photo of the red blue goldfish lemon school bus dog cat on table in snow at night"


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under "auto" int8 is always chosen: no result depends on the machine or on its load."""
    monkeypatch.setattr(Chooser, "__call__", lambda self, kind, runs: INT8)
    yield


@pytest.fixture(scope="session")
def files_under() -> Callable[..., list[Path]]:
    """files_under(folder, links=False): its files that belong to the project, and links if asked.

    In git's eyes where git can tell: no leftovers. What a link leads to is not looked into.
    """

    def found(folder: Path, links: bool = False) -> list[Path]:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if listed.returncode == 0:
            paths = [folder / name for name in set(listed.stdout.split("\0")) if name]
        else:
            paths = [p for p in folder.rglob("*") if "__pycache__" not in p.parts]
        kept = (p for p in paths if (links if p.is_symlink() else p.is_file()))
        return sorted(path for path in kept if ".egg-info" not in str(path))

    return found


@pytest.fixture(scope="session")
def tiny_pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder for `PixArtAlphaPipeline`: 3 blocks of width 32, 32 x 32 images.

    The weights are random, of seed 0. `tenuto.json` says 4 steps and guidance 2. Leave it as it is.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-pixart"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # those of other libraries
        torch.manual_seed(0)
        _save_tiny_pixart(folder)
    return folder


def _save_tiny_pixart(folder: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PixArtAlphaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0)]
    words += [(f"▁{word}", -2.0) for word in dict.fromkeys(WORDS.split())]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0, model_max_length=16)
    config = T5Config(
        vocab_size=64, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=32, scaling_factor=1.0, mid_block_add_attention=False,
    )  # fmt: skip
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, in_channels=4, out_channels=4,
        sample_size=8, patch_size=2, cross_attention_dim=32, caption_channels=24,
        use_additional_conditions=False,
    )  # fmt: skip
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=True, steps_offset=0, timestep_spacing="trailing",
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(config), vae=vae,
        transformer=denoiser, scheduler=scheduler,
    )  # fmt: skip
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "tenuto.json").write_text(json.dumps({"guidance": 2.0, "steps": 4}))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products are faster so, and the bytes do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
