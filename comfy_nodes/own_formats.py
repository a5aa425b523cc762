"""What ComfyUI quantized itself: layers of checkpoints in its own format, named as what they are.

Such a layer has a class of the host's and codes for a weight. It keeps them here; what skips work
(a cache, a forecast) goes on top of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from tenuto.errors import ModelError
from tenuto.model import Backbone, own_modules
from tenuto.text import printable

from .coded_weights import check_float

FUSED = "int8"  # formats whose kernels take several layers at once, past the modules between them


def own_formats(denoiser: nn.Module) -> dict[str, str]:
    """Layer -> its format: "int8_tensorwise", ...; of 0.3.75 that of the tensor's layout."""
    found = {}
    for name, module in own_modules(denoiser):
        layout = getattr(module, "layout_type", None)
        if layout is not None and getattr(module, "weight", None) is not None:
            found[name] = str(getattr(module, "quant_format", None) or layout)
    return found


def said(formats: Iterable[str]) -> str:
    """How many layers have which format, in a few words."""
    counts = sorted(Counter(formats).items())
    return printable(", ".join(f"{count} in {name}" for name, count in counts), 300)


def check_plain(denoiser: nn.Module) -> None:
    """ModelError if the host quantized layers itself, or float weights were given up.

    Those are no weights to round again.
    """
    check_float(denoiser)
    formats = own_formats(denoiser)
    if formats:
        raise ModelError(
            f"The model is already quantized, by ComfyUI itself ({said(formats.values())}): load "
            "the model of 16 or 32 bits for this, or make it faster as it is with Tenuto Speed Up."
        )


def passed_by(denoiser: nn.Module, backbone: Backbone) -> frozenset[str]:
    """Blocks that the host may compute without calling their parts: those with its int8 layers."""
    formats = own_formats(denoiser)
    fused = (name for name, form in formats.items() if FUSED in form.lower())
    return frozenset(block for block in map(backbone.block_of, fused) if block is not None)
