"""The kernels of this folder, found by their files.

A module is asked for every `Kernel` that it defines at its top level. One whose name ends with
`_triton` is the half of its neighbour that a GPU needs, and is never imported from here.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import sys

from .kernel import Case, Kernel

FOLDER = __name__.rpartition(".")[0]
logger = logging.getLogger("tenuto")


def kernels() -> tuple[Kernel, ...]:
    """All of them, the one to be preferred first."""
    return _found(tuple(sys.modules[FOLDER].__path__))


def candidates(case: Case) -> tuple[Kernel, ...]:
    """Those that compute `case`, the one to be preferred first."""
    return tuple(kernel for kernel in kernels() if kernel.takes(case))


@functools.cache
def _found(folders: tuple[str, ...]) -> tuple[Kernel, ...]:
    found: dict[str, Kernel] = {}
    for info in pkgutil.iter_modules(folders):
        if info.name.endswith("_triton"):
            continue
        try:
            module = importlib.import_module(f"{FOLDER}.{info.name}")
        except ImportError as error:  # of a package that is not here: the others go on
            logger.warning("The kernel %s cannot be imported: %s.", info.name, error)
            continue
        found |= {k.name: k for k in vars(module).values() if isinstance(k, Kernel)}
    return tuple(sorted(found.values(), key=lambda kernel: (-kernel.priority, kernel.name)))
