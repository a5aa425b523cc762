"""One operation a file: an eager reference first, then what executes it on a device.

A file that defines a `Kernel` is found by the layers; nothing else names it.
"""

from .kernel import Case, Formats, Kernel, Packed, apart, graph_operation
from .registry import candidates, kernels

__all__ = [
    "Case",
    "Formats",
    "Kernel",
    "Packed",
    "apart",
    "candidates",
    "graph_operation",
    "kernels",
]
