"""A torch model as names: what it is made of, how it is patched, watched and counted."""

from .adapters import adapted, holder_of, own_modules, own_parameters
from .backbone import WHOLE, Backbone, Branch, computes_as_torch, layers, own_kinds
from .elsewhere import Weights
from .families import (
    describe,
    host_map_of,
    hosts_of,
    key_map_of,
    names_in_host,
    same_names,
)
from .hooks import cache_on, check_fused, check_weights, private_copy, refuse_cache
from .key_map import KeyMap, Place, swapped
from .operations import multiply_adds
from .own_family import Describe, describing, own_family
from .parked import Parked, check_originals
from .parts import (
    all_frozen,
    denoiser_of,
    denoisers_of,
    device_and_dtype,
    encoders_of,
    frozen,
    parts_of,
    uncompiled,
)
from .passes import patches_on
from .patches import Attached, Override, Replacement, Swap, override_, patch_of
from .signature import Rows, Signature, is_listed, times_of
from .tree import map_held, map_leaves, map_tensors, tensors_in
from .watch import Leave, outside_graphs, watched

__all__ = [
    "WHOLE",
    "Attached",
    "Backbone",
    "Branch",
    "Describe",
    "KeyMap",
    "Leave",
    "Override",
    "Parked",
    "Place",
    "Replacement",
    "Rows",
    "Signature",
    "Swap",
    "Weights",
    "adapted",
    "all_frozen",
    "cache_on",
    "check_fused",
    "check_originals",
    "check_weights",
    "computes_as_torch",
    "denoiser_of",
    "denoisers_of",
    "describe",
    "describing",
    "device_and_dtype",
    "encoders_of",
    "frozen",
    "holder_of",
    "host_map_of",
    "hosts_of",
    "is_listed",
    "key_map_of",
    "layers",
    "map_held",
    "map_leaves",
    "map_tensors",
    "multiply_adds",
    "names_in_host",
    "outside_graphs",
    "override_",
    "own_family",
    "own_kinds",
    "own_modules",
    "own_parameters",
    "parts_of",
    "patch_of",
    "patches_on",
    "private_copy",
    "refuse_cache",
    "same_names",
    "swapped",
    "tensors_in",
    "times_of",
    "uncompiled",
    "watched",
]
