"""Layouts of quantized weights in files that other programs read by themselves, one a file.

A file has a `LAYOUT` at its top level, with

    format           what `comfy_quant` of a layer calls it
    takes(form)      whether weights of a `Format` can be written so
    pack(q)          suffix -> tensor, of a weight (N, K) as a `QTensor`: a file has each as
                     "LAYER.SUFFIX", beside "LAYER.comfy_quant"
    facts(q)         the JSON object of "LAYER.comfy_quant"
    unpack(t, facts, shape, form)
                     the inverse of `pack`: a `QTensor` with the same bytes
    decode(t, facts, shape)
                     the weight (N, K) fp32 in the basis of the model, from the tensors of a file
                     alone, in the order in which readers compute: equal to `q.dequantize()` bit
                     for bit, or within one rounding where `q.channel` is

and raises SchemeError where tensors or facts are not of its layout. `layout_of(form)` finds the one
that takes a format, `named(format)` the one that a file names. A weight is of a Linear: of layers
that a reader fuses (q, k, v) concatenate the weights before they are quantized, or their rows after
that; `nvfp4` has one scale for all rows, so there only before.

    form = schemes.COMFY_W4A8.weight
    q = QTensor.nearest(weight, form)                  # or the weight of an artifact
    layout = native.layout_of(form)
    tensors, facts = layout.pack(q), layout.facts(q)
    assert torch.equal(layout.decode(tensors, facts, q.shape), q.dequantize())
"""

from __future__ import annotations

from ...errors import SchemeError
from ..scheme import Format
from . import int8_rows, nvfp4, w4a8
from .layout import Layout

LAYOUTS: tuple[Layout, ...] = (w4a8.LAYOUT, int8_rows.LAYOUT, nvfp4.LAYOUT)

__all__ = ["LAYOUTS", "Layout", "layout_of", "named"]


def layout_of(form: Format) -> Layout | None:
    """The layout that takes weights of `form`; None: no other program reads them."""
    return next((layout for layout in LAYOUTS if layout.takes(form)), None)


def named(name: str) -> Layout:
    """The layout that files call `name`; else SchemeError."""
    for layout in LAYOUTS:
        if layout.format == name:
            return layout
    raise SchemeError(f"Unknown layout {name!r}: one of {', '.join(x.format for x in LAYOUTS)}.")
