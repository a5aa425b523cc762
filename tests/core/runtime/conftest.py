"""What the tests of attached and compiled models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is compiled before, and nothing is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
