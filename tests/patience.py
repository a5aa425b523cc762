"""How long tests wait for what is done elsewhere: no machine is too slow, and no test goes by time.

A test that waits longer fails; `make test` ends one that takes 900 seconds in all.
"""

from __future__ import annotations

PATIENCE = 600.0  # seconds
