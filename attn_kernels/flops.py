"""Formulas of the ops for ``torch.utils.flop_counter``: the FLOPs of the matrix products in the reference.

An op counts the products of its formula in eager PyTorch, not what its kernel executes. So a model has the same number
on all backends with kernels. Elementwise functions count nothing, as in PyTorch. The product with v is counted: it is a
matrix-vector product, which PyTorch's own table omits. A backward counts the products for its gradients, without those
that it recomputes.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .ops import NAMESPACE

_COUNTER = "torch.utils.flop_counter"
Shape = tuple[int, ...]


def register() -> None:
    """Registers the formulas. Imports the counter, which imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(formula)  # type: ignore[arg-type]


def register_with_counter() -> None:
    """Registers the formulas when the counter is imported, without importing it."""
    if _COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _pairs(query: Shape, keys: Shape) -> int:
    """B Tq Tk."""
    return query[0] * query[1] * keys[1]


def _additive_scores(query: Shape, keys: Shape, *_: Any, **__: Any) -> int:
    """activation(...) @ v."""
    return 2 * _pairs(query, keys) * query[2]


def _gated_scores(query: Shape, keys: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """activation(...) @ v.T; the gate is elementwise."""
    return v[0] * _additive_scores(query, keys)


def _gated_scores_backward(grad_scores: Shape, query: Shape, keys: Shape, v: Shape, *others: Any, **_: Any) -> int:
    return v[0] * _additive_scores_backward(grad_scores, query, keys, *others)


def _additive_scores_backward(grad_scores: Shape, query: Shape, keys: Shape, *others: Any, **_: Any) -> int:
    """The gradient of the activation, and that of v, which is computed together with the query's."""
    need_query = others[-2]
    count: int = 2 * _pairs(query, keys) * query[2] * (1 + need_query)
    return count


def _attention(query: Shape, keys: Shape, values: Shape, *_: Any, **__: Any) -> int:
    """The scores, and alignments @ values."""
    return 2 * _pairs(query, keys) * (query[2] + values[2])


def _attention_backward(
    grad_context: Shape | None, _: Any, query: Shape, keys: Shape, values: Shape, *others: Any, **__: Any
) -> int:
    """The gradients of query and alignments, and of keys and values, if they are needed."""
    need_query, need_memory = others[-2:]
    products = query[2] + (0 if grad_context is None else values[2])
    count: int = 2 * _pairs(query, keys) * products * (need_query + need_memory)
    return count


def _options_backward(grad_context: Shape | None, grad_alignments: Any, _: Any, *others: Any, **__: Any) -> int:
    return _attention_backward(grad_context, grad_alignments, *others)


def _packed_attention(query: Shape, keys: Shape, values: Shape, *others: Any, **named: Any) -> int:
    """The FLOPs of the N packed steps, each of which belongs to one sentence."""
    return _attention((1, *query[1:]), (1, *keys), (1, *values), *others, **named)


def _packed_attention_backward(
    grad_context: Shape | None, _: Any, query: Shape, keys: Shape, values: Shape, *others: Any, **named: Any
) -> int:
    of_one = ((1, *query[1:]), (1, *keys), (1, *values))
    return _attention_backward(grad_context, _, *of_one, *others, **named)


def _extra_backward(
    grad_context: Shape | None, _: Any, query: Shape, keys: Shape, values: Shape, *others: Any, **__: Any
) -> int:
    """Like _attention_backward, but keys and values have a flag each."""
    need_query, need_keys, need_values = others[-3:]
    of_alignments = 0 if grad_context is None else values[2] * (max(need_query, need_keys) + need_values)
    count: int = 2 * _pairs(query, keys) * (query[2] * (need_query + need_keys) + of_alignments)
    return count


def _gated_attention(query: Shape, keys: Shape, values: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return v[0] * _attention(query, keys, values)


def _gated_attention_backward(
    grad_context: Shape | None,
    grad_alignments: Any,
    grad_log_total: Any,
    query: Shape,
    keys: Shape,
    values: Shape,
    v: Shape,
    *others: Any,
    **_: Any,
) -> int:
    return v[0] * _attention_backward(grad_context, grad_alignments, query, keys, values, *others)


_FORMULAS = {
    "additive_attention_packed": _packed_attention,
    "additive_attention_packed_backward": _packed_attention_backward,
    "activated_attention_packed": _packed_attention,
    "activated_attention_packed_backward": _packed_attention_backward,
    "dot_attention_packed": _packed_attention,
    "dot_attention_packed_backward": _packed_attention_backward,
    "gated_additive_scores": _gated_scores,
    "gated_additive_scores_backward": _gated_scores_backward,
    "gated_additive_attention": _gated_attention,
    "gated_additive_attention_backward": _gated_attention_backward,
    "additive_scores": _additive_scores,
    "additive_scores_backward": _additive_scores_backward,
    "activated_scores": _additive_scores,
    "activated_scores_backward": _additive_scores_backward,
    "activated_attention": _attention,
    "activated_attention_backward": _attention_backward,
    "additive_attention": _attention,
    "additive_attention_backward": _attention_backward,
    "additive_attention_with_extra": _attention,
    "additive_attention_with_extra_backward": _extra_backward,
    "activated_attention_with_extra": _attention,
    "activated_attention_with_extra_backward": _extra_backward,
    "dot_attention": _attention,
    "dot_attention_backward": _attention_backward,
    **{f"{score}_attention_with_options": _attention for score in ("additive", "activated", "dot")},
    **{f"{score}_attention_with_options_backward": _options_backward for score in ("additive", "activated", "dot")},
}
