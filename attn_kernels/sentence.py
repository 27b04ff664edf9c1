"""Earlier names of what adapters share; they go with the next version."""

from collections.abc import Callable
from typing import Any

from .deprecation import renamed
from .patching.cache import cached_projection
from .patching.masks import to_softmax_dtype
from .stock import is_stock_linear

__getattr__: Callable[[str], Any] = renamed(
    __name__, {"project": cached_projection, "is_plain": is_stock_linear, "as_of_softmax": to_softmax_dtype}
)
