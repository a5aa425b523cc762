"""What calibration would make of a model, and what would stop it: found out in seconds."""

from .check import check
from .report import ENCODERS, USES, Check, Problem

__all__ = ["ENCODERS", "USES", "Check", "Problem", "check"]
