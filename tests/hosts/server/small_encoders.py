"""A pack of the test server: text encoders of few layers, by the host's own option for their sizes.

The real ones have 24 to 36 layers and 5 to 16 GB, and the host makes them all before it reads a
file. template_files.py writes files of these sizes. Classes, tokenizers and loaders are the host's.
So it is with the autoencoder of Wan 2.2, whose width the host does not read from its file.
"""

from __future__ import annotations

import functools
from typing import Any

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256}
T5 = {"num_layers": 1, "num_heads": 4, "d_ff": 128}
SIZES: dict[str, dict[str, Any]] = {
    "clip_g": {"num_hidden_layers": 3, "intermediate_size": 256},
    "t5xxl": T5, "umt5xxl": T5 | {"vocab_size": 300},
    "qwen25_7b": LLAMA | {"num_hidden_layers": 1},
    "qwen3_4b": {  # FLUX.2 reads its states after layers 9, 18 and 27
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64,
        "num_hidden_layers": 28,
    },
}  # fmt: skip
WAN22_VAE = {"dim": 8, "dec_dim": 8}
OPTIONS = {f"{name}_model_config": sizes for name, sizes in SIZES.items()}


def install() -> None:
    """From now on the host's loaders have the option."""
    import comfy.ldm.wan.vae2_2 as wan
    import comfy.sd

    whole = wan.WanVAE
    wan.WanVAE = lambda **facts: whole(**facts | WAN22_VAE)  # type: ignore[misc,assignment]
    for name, option in {
        "load_clip": "model_options", "load_checkpoint_guess_config": "te_model_options",
    }.items():  # fmt: skip
        inner = getattr(comfy.sd, name)

        @functools.wraps(inner)
        def small(*args: Any, inner: Any = inner, option: str = option, **kwargs: Any) -> Any:
            return inner(*args, **kwargs | {option: OPTIONS | kwargs.get(option, {})})

        setattr(comfy.sd, name, small)


NODE_CLASS_MAPPINGS: dict[str, Any] = {}
if __name__ != "small_encoders":  # by the host, not by template_files.py
    install()
