"""Attention mechanisms beside those of ``modules.py``: with a state of their own (stateful.py), and without one."""

from .gat import DenseGATv2
from .heads import HeadsMemory, MultiHeadAttention
from .layer_norm import LayerNormBahdanauAttention
from .normalizers import NormalizedAttention, normalize
from .pointer import PointerAttention
from .pooling import AttentionPooling, AttentiveStatisticsPooling
from .stateful import StatefulAttention, StatefulResult

__all__ = [
    "AttentionPooling",
    "AttentiveStatisticsPooling",
    "DenseGATv2",
    "HeadsMemory",
    "LayerNormBahdanauAttention",
    "MultiHeadAttention",
    "NormalizedAttention",
    "PointerAttention",
    "StatefulAttention",
    "StatefulResult",
    "normalize",
]
