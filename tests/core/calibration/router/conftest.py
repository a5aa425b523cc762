"""The tiny transformer, its loop and its recording that the tests of cache schedules have."""

import importlib.util
from pathlib import Path

_file = Path(__file__).parents[2] / "caching" / "conftest.py"
_spec = importlib.util.spec_from_file_location("tenuto_tests_caching", _file)
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

_one_thread, transformer, branches = _shared._one_thread, _shared.transformer, _shared.branches
loop, trajectory = _shared.loop, _shared.trajectory
