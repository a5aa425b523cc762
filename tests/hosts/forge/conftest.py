"""Tests of Forge Neo's own classes: collected where TENUTO_FORGE names its folder."""

import forge_neo

if forge_neo.FORGE is None:
    collect_ignore_glob = ["test_*.py"]
