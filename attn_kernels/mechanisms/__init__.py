"""Attention mechanisms with a state of their own, such as the alignments of the step before. See stateful.py."""

from .alignments import AlignmentsState
from .dynamic_convolution import DynamicConvolutionAttention
from .gmm import GMMAttention, GMMState
from .local import LocalAttention, LocalState, window_mask
from .mocha import MonotonicChunkwiseAttention
from .monotonic import MonotonicAttention, monotonic_alignments
from .stateful import StatefulAttention, StatefulResult
from .stepwise_monotonic import StepwiseMonotonicAttention

__all__ = [
    "AlignmentsState",
    "DynamicConvolutionAttention",
    "GMMAttention",
    "GMMState",
    "LocalAttention",
    "LocalState",
    "MonotonicAttention",
    "MonotonicChunkwiseAttention",
    "StatefulAttention",
    "StatefulResult",
    "StepwiseMonotonicAttention",
    "monotonic_alignments",
    "window_mask",
]
