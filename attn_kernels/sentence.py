"""Earlier names of functions that adapters share. They will be removed in the next version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .checksums import is_cacheable
from .deprecation import Changed, renamed
from .patching.cache import cached, cached_projection, clear
from .patching.masks import mask_without_empty_rows, to_softmax_dtype
from .stock import is_stock_linear


def _once(module: Any, what: str, sources: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
    return cached(module, what, make, read=sources)


def _attended_steps(module: Any, mask: Tensor, keep: bool) -> Tensor | None:
    """None if a row may attend nothing."""

    def allowed() -> Tensor | None:
        steps = mask.clone() if keep else ~mask
        return steps if bool(steps.any(1).all()) else None

    return cached(module, f"attended {keep}", allowed, read=(mask,))


__getattr__: Callable[[str], Any] = renamed(
    __name__,
    {
        "project": cached_projection,
        "is_plain": is_stock_linear,
        "as_of_softmax": to_softmax_dtype,
        "keeps": is_cacheable,
        "forget": clear,
        "once": Changed(cached, _once),
        "attended_steps": Changed(mask_without_empty_rows, _attended_steps),
    },
)
