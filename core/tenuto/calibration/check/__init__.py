"""What calibration would make of a model, and what would stop it: found out in seconds."""

from .check import check
from .report import ENCODERS, QUANTIZE, ROUTER, USES, Check, Problem

__all__ = ["ENCODERS", "QUANTIZE", "ROUTER", "USES", "Check", "Problem", "check"]
