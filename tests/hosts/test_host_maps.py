"""What a diffusers model says of its names in a host's files is what the host itself says."""

from __future__ import annotations

from typing import Any

import pytest

from tenuto.model import families

MAPPED = (
    "unet", "pixart", "sd3", "flux", "flux2", "wan", "wan_vace", "lumina2", "chroma",
    "hunyuan_video", "hunyuan_video15", "hunyuan_image", "z_image",
)  # fmt: skip


@pytest.mark.parametrize("family", MAPPED)
def test_every_place_is_that_of_the_host(in_comfy: Any, original: Any, family: str) -> None:
    """Name, rows and swapped halves; a norm's weight may be called otherwise in this version."""
    host = in_comfy(family).model.diffusion_model
    theirs, own = families.key_map_of(host), families.host_map_of(original(family))
    assert theirs is not None and own.model_class == theirs.model_class
    assert own.rising == theirs.rising
    places = {name: place for name, place in own.places.items() if name in theirs.places}
    assert places.keys() == theirs.places.keys()
    for name, place in places.items():
        wanted, plain = theirs.places[name], place.name.removesuffix(".scale")
        assert (place.rows, place.swapped) == (wanted.rows, wanted.swapped), name
        assert place.name == wanted.name or f"{plain}.weight" == wanted.name, name
    weights = {name.rpartition(".")[0] for name in theirs.places}
    for name, hosts in theirs.modules.items():
        if any(weight == name or weight.startswith(f"{name}.") for weight in weights):
            assert own.modules.get(name) == hosts, name
    buffers = {own.places[name].name for name in own.places.keys() - theirs.places.keys()}
    assert buffers <= set(host.state_dict()), "what is no parameter here is in the host's file too"
