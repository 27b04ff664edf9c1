"""The operators as PyTorch sees them: one schema, one fake kernel and one autograd rule per op.

Each backend is an overload of the same name, ``torch.ops.attn_kernels.additive_attention.cpu`` (or ``.triton``,
``.cuda``), so all of them share what stands here, and a kernel is a plain function of tensors that knows nothing of
autograd. Backends register their kernels when they are loaded; this file imports none of them.

The rules of autograd are ``torch.autograd.Function`` registered at the Autograd key. That keeps the op itself
differentiable (``opcheck``, ``torch.compile``), and costs a third of ``torch.library.register_autograd`` a call.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import derivatives

BACKENDS = ("cuda", "triton", "cpu")  # overload names; "reference" is plain PyTorch and needs no op

library = torch.library.Library("attn_kernels", "DEF")


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """The overload of ``op`` that runs on ``backend``: what ``call`` calls."""
    return getattr(getattr(torch.ops.attn_kernels, op), backend)


def _define(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    differentiable: Callable[[str], type[torch.autograd.Function]] | None = None,
) -> None:
    """``differentiable``: makes the rule of autograd for a backend; None for that of derivatives.py in all cases."""
    for backend in BACKENDS:
        name = f"{op}.{backend}"
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"attn_kernels::{name}", _seen_by_inductor(op, fake), lib=library)
        _register_autograd(op, backend, differentiable(backend) if differentiable else None)
        if not op.endswith("_backward"):
            # For torch.onnx.export, whose table of decompositions has all that are registered. Others choose theirs:
            # torch.export and torch.compile keep the op.
            register_decomposition(kernel(op, backend))(_decomposition(op, fake))


def _seen_by_inductor(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel, which tells Inductor to call the op as it is.

    Where the variable CI is set, as on most services that run tests, Inductor refuses an op that has a decomposition
    and is not in its list of those to call. It traces an op by its fake kernel before it looks there.
    """

    @functools.wraps(fake)
    def traced(*args: Any, **named: Any) -> Any:
        lowering = sys.modules.get("torch._inductor.lowering")
        if (called := getattr(lowering, "FALLBACK_ALLOW_LIST", None)) is not None:
            called.add(f"attn_kernels::{op}")
        return fake(*args, **named)

    return traced


def _decomposition(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """An op in plain PyTorch. What ``additive_prepare`` makes is not read by the formulas."""

    def decomposition(*args: Any) -> Any:
        if op == "additive_prepare":
            return torch.zeros_like(fake(*args))
        return derivatives.apply_formula(op, args)

    return decomposition


def _register_autograd(op: str, backend: str, function: type[torch.autograd.Function] | None) -> None:
    overload = kernel(op, backend)
    attends = op.endswith("_attention")

    def compute(*args: Any) -> Any:
        return below_autograd(op, backend, (*args[:-1], True) if attends else args)

    def gradients(*args: Any) -> Any:
        return call(f"{op}_backward", backend, *args)

    complete_rule = derivatives.rule(op, compute, None if function is None else gradients)
    function = function or complete_rule

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            return complete_rule.apply(*args)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return function.apply(*args)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)
        except RuntimeError as error:
            _allocate_again(error, args)
            raise

    def of_dispatcher(*args: Any) -> Any:
        result = autograd(*args)
        if not attends or args[-1]:
            return result
        context = result if isinstance(result, Tensor) else result[0]
        return context, context.new_empty(0)

    library.impl(f"{op}.{backend}", of_dispatcher, "Autograd")
    _rules[op, backend] = autograd
    _complete_rules[op, backend] = complete_rule


_rules: dict[tuple[str, str], Callable[..., Any]] = {}
_complete_rules: dict[tuple[str, str], type[torch.autograd.Function]] = {}


def call(op: str, backend: str, *args: Any) -> Any:
    """``kernel(op, backend)(*args)``, at two thirds of its cost: past the dispatcher where only autograd would act.

    Of an attention that is to return no alignments, it may return the context alone, or alignments all the same. What
    ``torch.jit.trace`` records is the formula of the reference: it would not record the rule of autograd.
    """
    if is_compiling():
        if derivatives.transforms_are_active():
            return derivatives.apply_formula(op, args)
        return kernel(op, backend)(*args)
    if torch._C._are_functorch_transforms_active():
        return _complete_rules[op, backend].apply(*args)
    if torch._C._is_tracing():
        return derivatives.apply_formula(op, args)
    return _rules[op, backend](*args)


def below_autograd(op: str, backend: str, args: Sequence[Any]) -> Any:
    """``kernel(op, backend)(*args)``, for a rule of autograd to call."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(op, backend)(*args)
    except RuntimeError as error:
        _allocate_again(error, args)
        raise


def _allocate_again(error: RuntimeError, args: Sequence[Any]) -> None:
    """Raises PyTorch's own error, of the type that trainers look for, where a kernel got no memory."""
    failed = re.search(r"attn_kernels: not enough memory: you tried to allocate (\d+) bytes", str(error))
    if failed:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        torch.empty(int(failed[1]), dtype=torch.uint8, device=device)


# additive_scores ------------------------------------------------------------------------------------------------------


def _additive_scores_fake(query, keys, v, bias):
    return query.new_empty(query.shape[0], query.shape[1], keys.shape[1])


def _additive_scores_backward_fake(grad_scores, query, keys, v, bias):
    return (
        query.new_empty(query.shape),
        keys.new_empty(keys.shape),
        v.new_empty(v.shape),
        v.new_empty(v.shape if bias is not None else (0,)),
    )


def _additive_scores_function(backend: str) -> type[torch.autograd.Function]:
    class AdditiveScores(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            query, keys, v, bias = args
            ctx.save_for_backward(query, keys, v, bias)
            return below_autograd("additive_scores", backend, args)

        @staticmethod
        def backward(ctx, grad_scores):
            query, keys, v, bias = ctx.saved_tensors
            dquery, dkeys, dv, dbias = call("additive_scores_backward", backend, grad_scores, query, keys, v, bias)
            return dquery, dkeys, dv, dbias if bias is not None else None

    return AdditiveScores


_define(
    "additive_scores_backward",
    "(Tensor grad_scores, Tensor query, Tensor keys, Tensor v, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _additive_scores_backward_fake,
)
_define(
    "additive_scores",
    "(Tensor query, Tensor keys, Tensor v, Tensor? bias) -> Tensor",
    _additive_scores_fake,
    _additive_scores_function,
)


# additive_prepare -----------------------------------------------------------------------------------------------------


def _additive_prepare_fake(keys):
    # PreparedSizes in csrc/additive_attention.h: lines of 64 bytes; after the steps, rows for a float32 of each step.
    dtype = torch.bfloat16 if keys.dtype == torch.bfloat16 else torch.float32
    batch, steps, units = keys.shape
    line = 64 // dtype.itemsize
    columns = (units + line - 1) // line * line
    rows = steps + (steps * 4 + columns * dtype.itemsize - 1) // (columns * dtype.itemsize) if units > 0 else 0
    return keys.new_empty((batch, rows, columns), dtype=dtype)


_define("additive_prepare", "(Tensor keys) -> Tensor", _additive_prepare_fake)


# additive_attention ---------------------------------------------------------------------------------------------------


def _attention_fake(query, keys, values, need_alignments):
    batch, queries, steps = query.shape[0], query.shape[1], keys.shape[1]
    context = query.new_empty(batch, queries, values.shape[2])
    alignments = query.new_empty((batch, queries, steps) if need_alignments else (0,))
    return context, alignments


def _additive_attention_fake(query, keys, values, v, bias, prepared, memory_lengths, mask, need_alignments):
    return _attention_fake(query, keys, values, need_alignments)


def _additive_attention_backward_fake(
    grad_context, grad_alignments, query, keys, values, v, bias, prepared, memory_lengths, mask, alignments
):
    return (
        query.new_empty(query.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
        v.new_empty(v.shape),
        v.new_empty(v.shape if bias is not None else (0,)),
    )


def _additive_attention_function(backend: str) -> type[torch.autograd.Function]:
    class AdditiveAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            query, keys, values, v, bias, prepared, memory_lengths, mask, _ = args
            ctx.set_materialize_grads(False)
            # The backward starts from the alignments, (B, Tq, Tk), and computes the hidden units again.
            context, alignments = below_autograd("additive_attention", backend, (*args[:-1], True))
            ctx.save_for_backward(query, keys, values, v, bias, prepared, memory_lengths, mask, alignments)
            return (context, alignments) if args[-1] else context  # each output costs some microseconds

        @staticmethod
        def backward(ctx, grad_context, grad_alignments=None):
            if grad_context is None and grad_alignments is None:
                return (None,) * 9
            saved = ctx.saved_tensors  # read once: checkpointing computes what is saved anew for each read
            arguments = (grad_context, grad_alignments, *saved)
            dquery, dkeys, dvalues, dv, dbias = call("additive_attention_backward", backend, *arguments)
            return dquery, dkeys, dvalues, dv, dbias if saved[4] is not None else None, None, None, None, None

    return AdditiveAttention


_define(
    "additive_attention_backward",
    "(Tensor? grad_context, Tensor? grad_alignments, Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? bias, "
    "Tensor? prepared, Tensor? memory_lengths, Tensor? mask, Tensor alignments) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _additive_attention_backward_fake,
)


# additive_attention_backward without the gradients of keys and values: see deferred.py.
def _additive_attention_query_backward_fake(
    grad_context, grad_alignments, query, keys, values, v, bias, prepared, memory_lengths, mask, alignments
):
    return query.new_empty(query.shape), v.new_empty(v.shape), v.new_empty(v.shape if bias is not None else (0,))


_define(
    "additive_attention_query_backward",
    "(Tensor? grad_context, Tensor? grad_alignments, Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? bias, "
    "Tensor? prepared, Tensor? memory_lengths, Tensor? mask, Tensor alignments) -> (Tensor, Tensor, Tensor)",
    _additive_attention_query_backward_fake,
)
_define(
    "additive_attention",
    "(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? bias, Tensor? prepared, Tensor? memory_lengths, "
    "Tensor? mask, bool need_alignments) -> (Tensor context, Tensor alignments)",
    _additive_attention_fake,
    _additive_attention_function,
)


# dot_attention --------------------------------------------------------------------------------------------------------


def _dot_attention_fake(query, keys, values, scale, memory_lengths, mask, need_alignments):
    return _attention_fake(query, keys, values, need_alignments)


def _dot_attention_backward_fake(
    grad_context, grad_alignments, query, keys, values, scale, memory_lengths, mask, alignments
):
    return query.new_empty(query.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _dot_attention_function(backend: str) -> type[torch.autograd.Function]:
    class DotAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            query, keys, values, scale, memory_lengths, mask, _ = args
            ctx.set_materialize_grads(False)
            ctx.scale = scale
            context, alignments = below_autograd("dot_attention", backend, (*args[:-1], True))
            ctx.save_for_backward(query, keys, values, memory_lengths, mask, alignments)
            return (context, alignments) if args[-1] else context  # each output costs some microseconds

        @staticmethod
        def backward(ctx, grad_context, grad_alignments=None):
            if grad_context is None and grad_alignments is None:
                return (None,) * 7
            query, keys, values, memory_lengths, mask, alignments = ctx.saved_tensors
            arguments = (query, keys, values, ctx.scale, memory_lengths, mask, alignments)
            gradients = call("dot_attention_backward", backend, grad_context, grad_alignments, *arguments)
            return *gradients, None, None, None, None

    return DotAttention


_define(
    "dot_attention_backward",
    "(Tensor? grad_context, Tensor? grad_alignments, Tensor query, Tensor keys, Tensor values, float scale, "
    "Tensor? memory_lengths, Tensor? mask, Tensor alignments) -> (Tensor, Tensor, Tensor)",
    _dot_attention_backward_fake,
)


# dot_attention_backward without the gradients of keys and values: see deferred.py.
def _dot_attention_query_backward_fake(
    grad_context, grad_alignments, query, keys, values, scale, memory_lengths, mask, alignments
):
    return query.new_empty(query.shape)


_define(
    "dot_attention_query_backward",
    "(Tensor? grad_context, Tensor? grad_alignments, Tensor query, Tensor keys, Tensor values, float scale, "
    "Tensor? memory_lengths, Tensor? mask, Tensor alignments) -> Tensor",
    _dot_attention_query_backward_fake,
)
_define(
    "dot_attention",
    "(Tensor query, Tensor keys, Tensor values, float scale, Tensor? memory_lengths, Tensor? mask, "
    "bool need_alignments) -> (Tensor context, Tensor alignments)",
    _dot_attention_fake,
    _dot_attention_function,
)


# lstm_step ------------------------------------------------------------------------------------------------------------

# For the decoder's loop (seq2seq/fused/cells.py), which is its own rule of autograd: they write into their arguments. B
# rows, H units; rows are contiguous; float32 or float64.
for _name, _schema in (
    (
        "lstm_step",
        "(Tensor(a!) gates, Tensor cell, Tensor(b!) new_cell, Tensor(c!) tanh, Tensor(d!) hidden, Tensor(e!)? again)",
    ),
    (
        "lstm_step_backward",
        "(Tensor dhidden, Tensor gates, Tensor cell, Tensor tanh, Tensor(a!) dcell, Tensor(b!) dgates)",
    ),
):
    library.define(f"{_name}.cpu{_schema} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"attn_kernels::{_name}.cpu", lambda *_: None, lib=library)
