"""Attention mechanisms with a state of their own, such as the alignments of the step before. See stateful.py."""

from torch.utils import _pytree

from .coverage import CoverageAttention, CoverageState, coverage_loss
from .forward import ForwardAttention, ForwardState
from .location import CumulativeLocationState, LocationSensitiveAttention, LocationState
from .stateful import StatefulAttention, StatefulResult, reorder_state, select_state

for _of_a_program in (StatefulResult, LocationState, CumulativeLocationState, CoverageState, ForwardState):
    _pytree._register_namedtuple(  # for torch.export.save
        _of_a_program, serialized_type_name=f"attn_kernels.{_of_a_program.__name__}"
    )

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
