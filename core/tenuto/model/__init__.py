"""A torch model as names: what it is made of, how it is patched, watched and counted."""

from .adapters import adapted, holder_of, own_modules, own_parameters
from .backbone import Backbone, Branch, computes_as_torch, layers
from .elsewhere import Weights
from .families import describe, key_map_of
from .hooks import cache_on, check_fused, check_weights, private_copy, refuse_cache
from .key_map import KeyMap, swapped
from .operations import multiply_adds
from .parts import denoiser_of, device_and_dtype, encoders_of, frozen
from .patches import Attached, Override, Replacement, Swap, override_
from .signature import Rows, Signature, is_listed, times_of
from .tree import map_leaves, map_tensors, tensors_in
from .watch import Leave, outside_graphs, watched

__all__ = [
    "Attached",
    "Backbone",
    "Branch",
    "KeyMap",
    "Leave",
    "Override",
    "Replacement",
    "Rows",
    "Signature",
    "Swap",
    "Weights",
    "adapted",
    "cache_on",
    "check_fused",
    "check_weights",
    "computes_as_torch",
    "denoiser_of",
    "describe",
    "device_and_dtype",
    "encoders_of",
    "frozen",
    "holder_of",
    "is_listed",
    "key_map_of",
    "layers",
    "map_leaves",
    "map_tensors",
    "multiply_adds",
    "outside_graphs",
    "override_",
    "own_modules",
    "own_parameters",
    "private_copy",
    "refuse_cache",
    "swapped",
    "tensors_in",
    "times_of",
    "watched",
]
