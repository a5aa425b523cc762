"""What a command says where something does not fit, or gives nothing: in the user's words."""

from __future__ import annotations

from pathlib import Path

import pytest

import tenuto as tn
from tenuto.cli.answers import skipped_line
from tenuto.cli.session import check_call
from tenuto.errors import ArtifactError, TenutoError
from tenuto.resources import asset
from tests.core import tiny_pipelines as tiny


def test_an_artifact_of_another_model_is_told_from_a_wrong_keyword(
    tiny_pixart_folder: Path,
) -> None:
    """The call that an artifact brings is the other model's, and its keywords are not the fault."""
    model, call = str(tiny_pixart_folder), {"text_encoder_out_layers": [1]}
    other = tn.Artifact.load(asset("artifacts/demo-unet.w8a8.safetensors"))
    own = tn.Artifact.load(asset("artifacts/demo-transformer.w8a8.safetensors"))
    with pytest.raises(ArtifactError, match="for another model: for UNet2DConditionModel"):
        check_call(model, call, other)
    for artifact in (own, None):
        with pytest.raises(TenutoError, match="takes no text_encoder_out_layers"):
            check_call(model, call, artifact)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (4, "None of the 4 calls was skipped: runs of fewer than 9 steps compute each."),
        (12, "6 of 12 calls were skipped. Predicted: about "),
    ],
)
def test_a_run_that_skips_nothing_says_why(steps: int, said: str) -> None:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    with tn.attach(pipe, speedup=2) as attached:
        pipe("a dog", num_inference_steps=steps, height=32, width=32)
        (line,) = skipped_line(attached)
    assert line.startswith(said)
