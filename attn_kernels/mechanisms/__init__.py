"""Attention mechanisms with a state of their own, such as the alignments of the step before. See stateful.py."""

from torch.utils import _pytree

from .dynamic_convolution import DynamicConvolutionAttention
from .gmm import GMMAttention, GMMState
from .local import LocalAttention, LocalState, window_mask
from .mocha import MonotonicChunkwiseAttention
from .monotonic import MonotonicAttention, monotonic_alignments
from .stateful import StatefulAttention, StatefulResult
from .steps import AlignmentsState
from .stepwise_monotonic import StepwiseMonotonicAttention

for _of_a_program in (AlignmentsState, GMMState, LocalState):
    _pytree._register_namedtuple(  # for torch.export.save
        _of_a_program, serialized_type_name=f"attn_kernels.{_of_a_program.__name__}"
    )

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
