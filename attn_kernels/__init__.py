"""Fused attention for RNN sequence-to-sequence models: score, softmax and context in one pass, forward and backward."""

from typing import TYPE_CHECKING, Any

from . import recurrent_ops as _recurrent_ops  # noqa: F401 - registers its ops
from .backends import Backend, backends
from .errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .flops import register_with_counter
from .functional import additive_attention, additive_scores, dot_attention, prepare_keys
from .memory import Memory
from .modules import BahdanauAttention, CosineAttention, LuongAttention
from .patching import patch, patched, unpatch
from .types import Attention
from .version import __version__

if TYPE_CHECKING:
    from .fusing import fuse, fused, unfuse

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
    "fuse",
    "fused",
    "patch",
    "patched",
    "prepare_keys",
    "unfuse",
    "unpatch",
]

register_with_counter()


def __getattr__(name: str) -> Any:
    """Imports rarely used parts on first access."""
    if name in ("fuse", "fused", "unfuse"):
        from . import fusing

        return getattr(fusing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
