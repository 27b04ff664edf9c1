"""Fused attention for RNN sequence-to-sequence models: score, softmax and context in one pass, forward and backward."""

from .backends import Backend, backends
from .errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .functional import additive_attention, additive_scores, dot_attention, prepare_keys
from .memory import Memory
from .modules import BahdanauAttention, CosineAttention, LuongAttention
from .patching import patch, patched, unpatch
from .reference import Attention
from .version import __version__

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "Attention",
    "Backend",
    "BahdanauAttention",
    "CosineAttention",
    "LuongAttention",
    "Memory",
    "__version__",
    "additive_attention",
    "additive_scores",
    "backends",
    "dot_attention",
    "patch",
    "patched",
    "prepare_keys",
    "unpatch",
]
