"""An artifact applied to a model: `attach`, quantized layers, tables, kernels and hosts."""

from .attachment import Tenuto, attach, check_free, encoder_layers, quantized
from .default_forecast import host_kernel, with_kernel
from .denoiser_call import Calls
from .execution import DENSE, EXECUTIONS, Chooser, check_execution
from .host import Host, InFloat, InPlace, as_chosen, executions, follow_input, with_changes
from .layers import QConv2d, QLayer, QLinear
from .recipe import default_recipe, quantizable
from .replacements import Patches, Policy, Replacements, replacements_for
from .temporal_table import TemporalTable
from .timing import Latency, latency, percentile, timed

__all__ = [
    "DENSE",
    "EXECUTIONS",
    "Calls",
    "Chooser",
    "Host",
    "InFloat",
    "InPlace",
    "Latency",
    "Patches",
    "Policy",
    "QConv2d",
    "QLayer",
    "QLinear",
    "Replacements",
    "TemporalTable",
    "Tenuto",
    "as_chosen",
    "attach",
    "check_execution",
    "check_free",
    "default_recipe",
    "encoder_layers",
    "executions",
    "follow_input",
    "host_kernel",
    "latency",
    "percentile",
    "quantizable",
    "quantized",
    "replacements_for",
    "timed",
    "with_changes",
    "with_kernel",
]
