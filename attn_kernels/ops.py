"""The operators as PyTorch sees them: one schema, one fake kernel and one autograd rule per op.

Each backend is an overload of the same name, ``torch.ops.attn_kernels.additive_attention.cpu`` (or ``.triton``,
``.cuda``). All of them share the definitions in this file, and a kernel is a plain function of tensors without
autograd. Backends register their kernels when they are loaded; this file imports none of them.

The autograd rules are ``torch.autograd.Function`` registered at the Autograd key. So the op itself is differentiable
(``opcheck``, ``torch.compile``), at a third of the overhead of ``torch.library.register_autograd``.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import derivatives, formulas
from .errors import ArgumentValueError

BACKENDS = ("cuda", "triton", "cpu")  # overload names; "reference" is plain PyTorch and needs no op

# The name that the package was imported by: a kernel of the Hugging Face Hub is imported under a unique name, so that
# several versions can be in one process. The C++ modules, which such a kernel lacks, always use "attn_kernels".
NAMESPACE = __name__.partition(".")[0]
library: torch.library.Library = torch.library.Library(NAMESPACE, "DEF")


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """The overload of ``op`` that runs on ``backend``: what ``call`` calls."""
    overload: Callable[..., Any] = getattr(getattr(getattr(torch.ops, NAMESPACE), op), backend)
    return overload


def _define(op: str, schema: str, fake: Callable[..., Any]) -> None:
    for backend in BACKENDS:
        name = f"{op}.{backend}"
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake_kernel(fake), lib=library)
        _register_autograd(op, backend)
        if not op.endswith("_backward"):
            # For torch.onnx.export, whose table of decompositions has all that are registered. Others choose theirs:
            # torch.export and torch.compile keep the op.
            register_decomposition(kernel(op, backend))(_decomposition(op, fake))


def call_from_inductor() -> None:
    """Tells Inductor, where it is loaded, to call the ops as they are.

    Where the variable CI is set, as on most services that run tests, Inductor refuses an op that has a decomposition
    and is not in its list of those to call.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    getattr(lowering, "FALLBACK_ALLOW_LIST", set[str]()).update(f"{NAMESPACE}::{op}" for op in formulas.FORMULAS)


def _fake_kernel(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel, for arguments on one device.

    A single argument on "meta" makes the dispatcher take it in place of the kernel: it refuses the others, so that a
    call need not look at each. Inductor traces an op by it, unless it has seen the same call, before it looks in its
    list of those to call.
    """

    @functools.wraps(fake)
    def traced(*args: Any, **named: Any) -> Any:
        devices = {str(arg.device) for arg in (*args, *named.values()) if isinstance(arg, Tensor)}
        if len(devices) > 1:
            raise ArgumentValueError(f"attn_kernels: tensors must be on one device, got {', '.join(sorted(devices))}")
        call_from_inductor()
        return fake(*args, **named)

    return traced


def _decomposition(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """An op in plain PyTorch. What ``additive_prepare`` makes is not read by the formulas."""

    def decomposition(*args: Any) -> Any:
        if op == "additive_prepare":
            return torch.zeros_like(fake(*args))
        return formulas.apply_formula(op, args)

    return decomposition


def _register_autograd(op: str, backend: str) -> None:
    overload = kernel(op, backend)
    formula = formulas.FORMULAS[op]
    attends = formula.results == 2  # and may return the context alone
    differentiable = len(formula.differentiable)  # the first arguments

    def compute(*args: Any) -> Any:
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)
        except RuntimeError as error:
            _allocate_again(error, args)
            raise

    has_kernel = f"{op}_backward" in formulas.FORMULAS
    gradients = functools.partial(call, f"{op}_backward", backend) if has_kernel else None
    complete_rule, reverse_rule = derivatives.rules(op, compute, gradients)
    usual_rule = reverse_rule if has_kernel else complete_rule

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            return complete_rule.apply(*args)
        if torch.is_grad_enabled():
            for arg in args[:differentiable]:
                if arg is not None and arg.requires_grad:
                    return usual_rule.apply(*args)
        try:  # compute by hand: this is every call without gradients, and a frame of Python costs it one percent
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
    _kernels[op, backend] = compute
    _rules[op, backend] = autograd
    _complete_rules[op, backend] = complete_rule


_kernels: dict[tuple[str, str], Callable[..., Any]] = {}  # below autograd
_rules: dict[tuple[str, str], Callable[..., Any]] = {}
_complete_rules: dict[tuple[str, str], type[torch.autograd.Function]] = {}


def call(op: str, backend: str, *args: Any) -> Any:
    """``kernel(op, backend)(*args)`` at two thirds of its overhead: it bypasses the dispatcher if only autograd is on.

    An attention called with need_alignments=False may return the context only, or alignments as well.
    ``torch.jit.trace`` cannot record the autograd rule: it records the formula of the reference.
    """
    if is_compiling():
        if derivatives.transforms_are_active():
            return formulas.apply_formula(op, args)
        return kernel(op, backend)(*args)
    if torch._C._are_functorch_transforms_active():
        return _complete_rules[op, backend].apply(*args)
    if torch._C._is_tracing():
        return formulas.apply_formula(op, args)
    return _rules[op, backend](*args)


def below_autograd(op: str, backend: str, args: Sequence[Any]) -> Any:
    """``kernel(op, backend)(*args)`` without autograd, for autograd rules."""
    return _kernels[op, backend](*args)


def _allocate_again(error: RuntimeError, args: Sequence[Any]) -> None:
    """Repeats a kernel's failed allocation in PyTorch, which raises the out-of-memory error that trainers look for."""
    failed = re.search(r"attn_kernels: not enough memory: you tried to allocate (\d+) bytes", str(error))
    if failed:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        torch.empty(int(failed[1]), dtype=torch.uint8, device=device)


# The table of ops -----------------------------------------------------------------------------------------------------


class _Score(NamedTuple):
    """The arguments of a score in the schemas of its ops, after query, keys and values: see scores.py.

    tensors: those with a gradient. constants: tensors without one. addends: added to the keys, with their gradient;
    only in ops with options. numbers: the others.
    """

    tensors: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    addends: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


# activation: its index in activations.py. negative_slope: of leaky_relu.
_ACTIVATION = ("int activation", "float negative_slope")
_EXTRA = ("Tensor? extra",)
SCORES = {
    "additive": _Score(("Tensor v", "Tensor? bias"), constants=("Tensor? prepared",), addends=_EXTRA),
    "activated": _Score(("Tensor v", "Tensor? bias"), addends=_EXTRA, numbers=_ACTIVATION),
    "dot": _Score(numbers=("float scale",)),
}


def _like(tensor: Tensor | None, needed: bool, other: Tensor) -> Tensor:
    """The gradient of a tensor if it is needed, else an empty tensor with the dtype and device of ``other``."""
    return tensor.new_empty(tensor.shape) if needed and tensor is not None else other.new_empty(0)


def _attention_fake(query: Tensor, keys: Tensor, values: Tensor, *others: Any, vectors: int = 1) -> tuple[Tensor, ...]:
    batch, rows, steps = query.shape[0], query.shape[1] * vectors, keys.shape[1]
    alignments = query.new_empty((batch, rows, steps) if others[-1] else (0,))
    return query.new_empty(batch, rows, values.shape[2]), alignments


def _packed_fake(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, max_length, _, need_alignments = others
    batch, queries = query.shape[:2]
    shape = (batch, queries, max_length) if max_length else (queries * keys.shape[0],)
    return query.new_empty(batch, queries, values.shape[1]), query.new_empty(shape if need_alignments else (0,))


def _options_fake(query: Tensor, keys: Tensor, values: Tensor, *others: Any, vectors: int = 1) -> tuple[Tensor, ...]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    log_total = query.new_empty((query.shape[0], query.shape[1] * vectors), dtype=wide)
    return *_attention_fake(query, keys, values, *others, vectors=vectors), log_total


def _gated_fake(query: Tensor, keys: Tensor, values: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _options_fake(query, keys, values, *others, vectors=v.shape[0])


def _attention_backward_fake(results: int, gradients: int) -> Callable[..., tuple[Tensor, ...]]:
    """results: of the forward. gradients: of the arguments that follow query, keys and values."""

    def fake(*arguments: Any) -> Any:
        query, keys, values, *others = arguments[results:]
        need_query, need_memory = others[-2:]
        memory = (_like(x, need_memory, query) for x in (keys, values))
        own = (_like(x, need_query, query) for x in others[:gradients])
        return _like(query, need_query, query), *memory, *own

    return fake


def _extra_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, keys, values, v, bias, *others = arguments[2:]
    need_query, need_keys, need_values = others[-3:]
    needed = ((query, need_query), (keys, need_keys), (values, need_values), (v, need_query), (bias, need_query))
    return tuple(_like(x, need, query) for x, need in needed)


def _scores_fake(query: Tensor, keys: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], keys.shape[1])


def _gated_scores_fake(query: Tensor, keys: Tensor, v: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1] * v.shape[0], keys.shape[1])


def _scores_backward_fake(own: int) -> Callable[..., tuple[Tensor, ...]]:
    """own: how many arguments with a gradient follow query and keys."""

    def fake(_: Any, query: Tensor, keys: Tensor, *others: Any) -> Any:
        need_query, need_memory = others[-2:]
        gradients = (_like(x, need_query, query) for x in others[:own])
        return _like(query, need_query, query), _like(keys, need_memory, query), *gradients

    return fake


def _prepare_fake(keys: Tensor) -> Tensor:
    # As PreparedSizes in csrc/additive_attention.h: rows padded to 64 bytes, then rows for one float32 per step.
    dtype = torch.bfloat16 if keys.dtype == torch.bfloat16 else torch.float32
    batch, steps, units = keys.shape
    line = 64 // dtype.itemsize
    columns = (units + line - 1) // line * line
    rows = steps + (steps * 4 + columns * dtype.itemsize - 1) // (columns * dtype.itemsize) if units > 0 else 0
    return keys.new_empty((batch, rows, columns), dtype=dtype)


# need_query: whether the gradients of the query and of the score's arguments are needed. need_memory: those of keys and
# values. A gradient that is not needed, or whose argument is None, is empty, (0,). See memory_gradient.py.
_NEEDED = "bool need_query, bool need_memory"
_MEMORY, _MASKS = ("Tensor query", "Tensor keys", "Tensor values"), ("Tensor? memory_lengths", "Tensor? mask")


def _define_with_options(op: str, score: _Score, fake: Callable[..., Any]) -> None:
    """An attention with rarely used options (Options in types.py), which also returns log_total (log-sum-exp)."""
    options = ("float dropout_p", "int normalizer", "float clip", "Tensor? seed")
    own = (*score.tensors, "Tensor? score_bias", *score.addends, *score.numbers)
    inputs = ", ".join((*_MEMORY, *own, *options, *_MASKS))
    _define(
        f"{op}_backward",
        f"(Tensor? grad_context, Tensor? grad_alignments, Tensor? grad_log_total, {inputs}, Tensor alignments, "
        f"Tensor log_total, {_NEEDED}) -> ({', '.join(['Tensor'] * (4 + len(score.tensors)))})",
        _attention_backward_fake(3, len(score.tensors) + 1),
    )
    _define(op, f"({inputs}, bool need_alignments) -> (Tensor context, Tensor alignments, Tensor log_total)", fake)


for _name, _score in SCORES.items():
    _inputs = ", ".join((*_MEMORY, *_score.tensors, *_score.constants, *_score.numbers, *_MASKS))
    _define(
        f"{_name}_attention_backward",
        f"(Tensor? grad_context, Tensor? grad_alignments, {_inputs}, Tensor alignments, {_NEEDED}) -> "
        f"({', '.join(['Tensor'] * (3 + len(_score.tensors)))})",
        _attention_backward_fake(2, len(_score.tensors)),
    )
    _define(
        f"{_name}_attention",
        f"({_inputs}, bool need_alignments) -> (Tensor context, Tensor alignments)",
        _attention_fake,
    )
    # A separate op, so that calls without options have no overhead.
    _define_with_options(f"{_name}_attention_with_options", _score, _options_fake)

    # Packed keys (N, A) and values (N, D), the concatenated steps of all sentences: see packing.py. Alignments are
    # (B, Tq, max_length), or with max_length = 0 packed as well, (Tq N,), sentence by sentence.
    _packed = ("int max_length", "Tensor offsets")
    _inputs = ", ".join((*_MEMORY, *_score.tensors, *_score.numbers, *_packed))
    _define(
        f"{_name}_attention_packed_backward",
        f"(Tensor? grad_context, Tensor? grad_alignments, {_inputs}, Tensor alignments, {_NEEDED}) -> "
        f"({', '.join(['Tensor'] * (3 + len(_score.tensors)))})",
        _attention_backward_fake(2, len(_score.tensors)),
    )
    _define(
        f"{_name}_attention_packed",
        f"({_inputs}, bool need_alignments) -> (Tensor context, Tensor alignments)",
        _packed_fake,
    )

# With a term that a step adds to the keys: see AdditiveExtraScore in scores.py. need_keys: whether the gradient of
# keys + extra is needed, which is that of both.
for _name in ("additive", "activated"):
    _score = SCORES[_name]
    _inputs = ", ".join((*_MEMORY, *_score.tensors, "Tensor extra", *_score.numbers, *_MASKS))
    _define(
        f"{_name}_attention_with_extra_backward",
        f"(Tensor? grad_context, Tensor? grad_alignments, {_inputs}, Tensor alignments, bool need_query, "
        "bool need_keys, bool need_values) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _extra_backward_fake,
    )
    _define(
        f"{_name}_attention_with_extra",
        f"({_inputs}, bool need_alignments) -> (Tensor context, Tensor alignments)",
        _attention_fake,
    )

# v is (R, A): there are Tq R rows of scores, the R rows of a query being adjacent. gate, extra: (B, Tk, A). This
# attention has only the op with options.
GATED = _Score(("Tensor v", "Tensor? bias", "Tensor? gate"), addends=_EXTRA, numbers=_ACTIVATION)
_define_with_options("gated_additive_attention", GATED, _gated_fake)

for _name, _score, _fake in (
    ("additive_scores", _Score(SCORES["additive"].tensors), _scores_fake),
    ("activated_scores", SCORES["activated"]._replace(addends=()), _scores_fake),
    ("gated_additive_scores", GATED, _gated_scores_fake),
):
    _inputs = ", ".join(("Tensor query", "Tensor keys", *_score.tensors, *_score.addends, *_score.numbers))
    _own = len(_score.tensors)
    _define(
        f"{_name}_backward",
        f"(Tensor grad_scores, {_inputs}, {_NEEDED}) -> ({', '.join(['Tensor'] * (2 + _own))})",
        _scores_backward_fake(_own),
    )
    _define(_name, f"({_inputs}) -> Tensor", _fake)
_define("additive_prepare", "(Tensor keys) -> Tensor", _prepare_fake)
