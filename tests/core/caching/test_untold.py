"""Plans that are made to be measured warn nobody; the first that is used says what it costs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tenuto.caching import forecast_budget as budget
from tenuto.caching import untold


def test_a_plan_that_is_measured_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"calls": 4, "steps": 10, "db": 20.0, "foreign": False}
    with caplog.at_level(logging.WARNING, "tenuto"):
        with untold():
            assert not budget.tell(**given) and not caplog.records
        assert budget.tell(**given)
    (record,) = caplog.records
    assert "6 of 10 calls are skipped" in record.getMessage()
