"""Attention mechanisms with a state of their own, such as the alignments of the step before. See stateful.py."""

from torch.utils import _pytree

from .coverage import CoverageAttention, CoverageState, coverage_loss
from .dynamic_convolution import DynamicConvolutionAttention
from .forward import ForwardAttention, ForwardState
from .gmm import GMMAttention, GMMState
from .local import LocalAttention, LocalState, window_mask
from .location import CumulativeLocationState, LocationSensitiveAttention, LocationState
from .mocha import MonotonicChunkwiseAttention
from .monotonic import MonotonicAttention, monotonic_alignments
from .stateful import StatefulAttention, StatefulResult, reorder_state, select_state
from .steps import AlignmentsState
from .stepwise_monotonic import StepwiseMonotonicAttention

for _of_a_program in (
    AlignmentsState,
    CoverageState,
    CumulativeLocationState,
    ForwardState,
    GMMState,
    LocalState,
    LocationState,
    StatefulResult,
):
    _pytree._register_namedtuple(  # for torch.export.save
        _of_a_program, serialized_type_name=f"attn_kernels.{_of_a_program.__name__}"
    )

__all__ = [
    "AlignmentsState",
    "CoverageAttention",
    "CoverageState",
    "CumulativeLocationState",
    "DynamicConvolutionAttention",
    "ForwardAttention",
    "ForwardState",
    "GMMAttention",
    "GMMState",
    "LocalAttention",
    "LocalState",
    "LocationSensitiveAttention",
    "LocationState",
    "MonotonicAttention",
    "MonotonicChunkwiseAttention",
    "StatefulAttention",
    "StatefulResult",
    "StepwiseMonotonicAttention",
    "coverage_loss",
    "monotonic_alignments",
    "reorder_state",
    "select_state",
    "window_mask",
]
