"""An artifact applied to a model: `attach`, quantized layers, tables, kernels and hosts."""

from .attachment import Tenuto, attach, encoder_layers, quantized
from .execution import DENSE, EXECUTIONS, Chooser, check_execution
from .host import Patches, follow_input
from .layers import QConv2d, QLayer, QLinear
from .temporal_table import TemporalTable
from .timing import Latency, latency, percentile, timed

__all__ = [
    "DENSE",
    "EXECUTIONS",
    "Chooser",
    "Latency",
    "Patches",
    "QConv2d",
    "QLayer",
    "QLinear",
    "TemporalTable",
    "Tenuto",
    "attach",
    "check_execution",
    "encoder_layers",
    "follow_input",
    "latency",
    "percentile",
    "quantized",
    "timed",
]
