"""Attention mechanisms with a state of their own, such as the alignments of the step before. See stateful.py."""

from .coverage import CoverageAttention, CoverageState, coverage_loss
from .forward import ForwardAttention, ForwardState
from .location import CumulativeLocationState, LocationSensitiveAttention, LocationState
from .stateful import StatefulAttention, StatefulResult, reorder_state, select_state

__all__ = [
    "CoverageAttention",
    "CoverageState",
    "CumulativeLocationState",
    "ForwardAttention",
    "ForwardState",
    "LocationSensitiveAttention",
    "LocationState",
    "StatefulAttention",
    "StatefulResult",
    "coverage_loss",
    "reorder_state",
    "select_state",
]
