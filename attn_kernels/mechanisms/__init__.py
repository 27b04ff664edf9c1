"""Attention mechanisms besides those of ``modules.py``: stateful ones (stateful.py), and others."""

from torch.utils import _pytree

from .coverage import CoverageAttention, CoverageState, coverage_loss
from .dynamic_convolution import DynamicConvolutionAttention
from .forward import ForwardAttention, ForwardState
from .gat import DenseGATv2
from .gmm import GMMAttention, GMMState
from .heads import HeadsMemory, MultiHeadAttention
from .layer_norm import LayerNormBahdanauAttention
from .local import LocalAttention, LocalState, window_mask
from .location import CumulativeLocationState, LocationSensitiveAttention, LocationState
from .mocha import MonotonicChunkwiseAttention
from .monotonic import MonotonicAttention, monotonic_alignments
from .normalizers import NormalizedAttention, normalize
from .pointer import PointerAttention
from .pooling import AttentionPooling, AttentiveStatisticsPooling
from .stateful import StatefulAttention, StatefulResult, reorder_state, select_state
from .steps import AlignmentsState
from .stepwise_monotonic import StepwiseMonotonicAttention
from .windowed import WindowedAttention

for _exported in (
    AlignmentsState,
    CoverageState,
    CumulativeLocationState,
    ForwardState,
    GMMState,
    HeadsMemory,
    LocalState,
    LocationState,
    StatefulResult,
):
    _pytree._register_namedtuple(  # for torch.export.save
        _exported, serialized_type_name=f"{__package__.partition('.')[0]}.{_exported.__name__}"
    )

__all__ = [
    "AlignmentsState",
    "AttentionPooling",
    "AttentiveStatisticsPooling",
    "CoverageAttention",
    "CoverageState",
    "CumulativeLocationState",
    "DenseGATv2",
    "DynamicConvolutionAttention",
    "ForwardAttention",
    "ForwardState",
    "GMMAttention",
    "GMMState",
    "HeadsMemory",
    "LayerNormBahdanauAttention",
    "LocalAttention",
    "LocalState",
    "LocationSensitiveAttention",
    "LocationState",
    "MonotonicAttention",
    "MonotonicChunkwiseAttention",
    "MultiHeadAttention",
    "NormalizedAttention",
    "PointerAttention",
    "StatefulAttention",
    "StatefulResult",
    "StepwiseMonotonicAttention",
    "WindowedAttention",
    "coverage_loss",
    "monotonic_alignments",
    "normalize",
    "reorder_state",
    "select_state",
    "window_mask",
]
