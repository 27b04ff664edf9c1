"""Earlier names of what adapters share; they go with the next version."""

from __future__ import annotations

import warnings
from typing import Any

from .patching import cache, masks
from .stock import is_stock_linear

_RENAMED = {
    "project": cache.cached_projection,
    "is_plain": is_stock_linear,
    "as_of_softmax": masks.to_softmax_dtype,
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        message = f"attn_kernels.sentence.{name} is {new.__module__}.{new.__name__} now"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return new
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
