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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import derivatives, formulas

BACKENDS = ("cuda", "triton", "cpu")  # overload names; "reference" is plain PyTorch and needs no op

# Of the package by whatever name it was imported: a kernel of the Hugging Face Hub has one of its own, so that several
# versions are in a process. That of the C++ modules, which such a kernel does not have, is "attn_kernels".
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
        torch.library.register_fake(f"{NAMESPACE}::{name}", _seen_by_inductor(fake), lib=library)
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


def _seen_by_inductor(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel. Inductor traces an op by it, unless it has seen the same call, before it looks in its list."""

    @functools.wraps(fake)
    def traced(*args: Any, **named: Any) -> Any:
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
    attends = formulas.FORMULAS[op].results == 2  # and may return the context alone

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
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
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
    """``kernel(op, backend)(*args)``, at two thirds of its cost: past the dispatcher where only autograd would act.

    Of an attention that is to return no alignments, it may return the context alone, or alignments all the same. What
    ``torch.jit.trace`` records is the formula of the reference: it would not record the rule of autograd.
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
    """``kernel(op, backend)(*args)``, for a rule of autograd to call."""
    return _kernels[op, backend](*args)


def _allocate_again(error: RuntimeError, args: Sequence[Any]) -> None:
    """Raises PyTorch's own error, of the type that trainers look for, where a kernel got no memory."""
    failed = re.search(r"attn_kernels: not enough memory: you tried to allocate (\d+) bytes", str(error))
    if failed:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        torch.empty(int(failed[1]), dtype=torch.uint8, device=device)


# The table of ops -----------------------------------------------------------------------------------------------------


class _Score(NamedTuple):
    """What a score brings into the schemas of its attention, after query, keys and values: see scores.py.

    tensors: with a gradient. constants: tensors without. numbers: the rest.
    """

    tensors: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


# activation: its place in activations.py. negative_slope: of leaky_relu.
_ACTIVATION = ("int activation", "float negative_slope")
SCORES = {
    "additive": _Score(tensors=("Tensor v", "Tensor? bias"), constants=("Tensor? prepared",)),
    "activated": _Score(tensors=("Tensor v", "Tensor? bias"), numbers=_ACTIVATION),
    "dot": _Score(numbers=("float scale",)),
}


def _like(tensor: Tensor | None, needed: bool, other: Tensor) -> Tensor:
    """A gradient of a tensor, or what stands in its place: empty, with the dtype and device of another one."""
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
    # PreparedSizes in csrc/additive_attention.h: lines of 64 bytes; after the steps, rows for a float32 of each step.
    dtype = torch.bfloat16 if keys.dtype == torch.bfloat16 else torch.float32
    batch, steps, units = keys.shape
    line = 64 // dtype.itemsize
    columns = (units + line - 1) // line * line
    rows = steps + (steps * 4 + columns * dtype.itemsize - 1) // (columns * dtype.itemsize) if units > 0 else 0
    return keys.new_empty((batch, rows, columns), dtype=dtype)


# need_query: the gradients of the query and of the score's own arguments; need_memory: those of keys and values. A
# gradient that is not needed is empty, (0,), as is that of an argument that is None. See memory_gradient.py.
_NEEDED = "bool need_query, bool need_memory"
_MEMORY, _MASKS = ("Tensor query", "Tensor keys", "Tensor values"), ("Tensor? memory_lengths", "Tensor? mask")


def _define_with_options(op: str, score: _Score, fake: Callable[..., Any]) -> None:
    """An attention with what few calls have (Options in types.py), and log_total: what alignments were divided by."""
    options = ("float dropout_p", "int normalizer", "float clip", "Tensor? seed")
    inputs = ", ".join((*_MEMORY, *score.tensors, "Tensor? score_bias", *score.numbers, *options, *_MASKS))
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
    # An op of its own, so that the others do not take longer.
    _define_with_options(f"{_name}_attention_with_options", _score, _options_fake)

    # Of keys (N, A) and values (N, D), the steps of all sentences one after the other: see packing.py. Alignments are
    # (B, Tq, max_length), or with max_length 0 those of the steps alone, (Tq N,), sentence by sentence.
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

# With what a step adds to the keys: see AdditiveExtraScore in scores.py. need_keys: the gradient of the sum, which is
# that of both.
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

# Of each of R rows of v, (R, A): Tq R rows of scores, those of a query one after the other. gate: (B, Tk, A).
# There is but one op of this attention, with options.
GATED = _Score(tensors=("Tensor v", "Tensor? bias", "Tensor? gate"), numbers=_ACTIVATION)
_define_with_options("gated_additive_attention", GATED, _gated_fake)

for _name, _score, _fake in (
    ("additive_scores", _Score(SCORES["additive"].tensors), _scores_fake),
    ("activated_scores", SCORES["activated"], _scores_fake),
    ("gated_additive_scores", GATED, _gated_scores_fake),
):
    _inputs = ", ".join(("Tensor query", "Tensor keys", *_score.tensors, *_score.numbers))
    _own = len(_score.tensors)
    _define(
        f"{_name}_backward",
        f"(Tensor grad_scores, {_inputs}, {_NEEDED}) -> ({', '.join(['Tensor'] * (2 + _own))})",
        _scores_backward_fake(_own),
    )
    _define(_name, f"({_inputs}) -> Tensor", _fake)
_define("additive_prepare", "(Tensor keys) -> Tensor", _prepare_fake)


# lstm_step, gru_step --------------------------------------------------------------------------------------------------

# For layers of cells (seq2seq/fused/cell_steps.py says what they compute), which are their own rules of autograd: they
# write into their arguments. B rows, H units; rows are contiguous; float32 or float64.
for _name, _schema in (
    (
        "lstm_step",
        "(Tensor(a!) gates, Tensor cell, Tensor(b!) new_cell, Tensor(c!) tanh, Tensor(d!) hidden, Tensor(e!)? again)",
    ),
    (
        "lstm_step_backward",
        "(Tensor dhidden, Tensor gates, Tensor cell, Tensor tanh, Tensor(a!) dcell, Tensor(b!) dgates)",
    ),
    (
        "gru_step",
        "(Tensor(a!) gates, Tensor products, Tensor? bias, Tensor before, Tensor(b!) recurrent, Tensor(c!) hidden, "
        "Tensor(d!)? again)",
    ),
    (
        "gru_step_backward",
        "(Tensor dhidden, Tensor gates, Tensor before, Tensor recurrent, Tensor(a!) dbefore, Tensor(b!) dgates, "
        "Tensor(c!) dproducts)",
    ),
):
    library.define(f"{_name}.cpu{_schema} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}.cpu", lambda *_: None, lib=library)

# One direction of a layer over few sentences, which seq2seq/fused/few_sentences.py calls without gradients. Gates are
# (B, S, G), but for the products with states; weight: (G, H), and of a GRU the bias of its products. States, (B, H),
# become those after the last step of each sentence. Without a fake kernel, as what follows.
library.define(
    "recurrent_steps.cpu(Tensor gates, Tensor weight, Tensor? bias, Tensor lengths, bool reverse, Tensor(a!) hidden, "
    "Tensor(b!)? cell, Tensor(c!) out) -> ()"
)

# decoder_search -------------------------------------------------------------------------------------------------------

# A weight (n, k) in float32, rounded to bfloat16, in the order in which products of few rows read it: csrc/decode.h has
# the layout. Without a fake kernel, as what follows.
library.define("rounded_blocks.cpu(Tensor weight) -> Tensor")

# All steps of a greedy or beam search with a decoder of seq2seq: seq2seq/fused/one_call.py calls it, on plain tensors
# and without gradients. blocks: none, or those of each weight in the order layers (two each), of_token, query,
# of_context, of_state, output; empty ones for None. How many steps there are depends on values, and nothing traces it:
# it has no fake kernel.
library.define(
    "decoder_search.cpu(Tensor[] layers, Tensor embedding, Tensor of_token, Tensor? query, float query_factor, "
    "float query_eps, Tensor? of_context, Tensor of_state, Tensor output, Tensor? output_bias, Tensor keys, "
    "Tensor values, Tensor? v, Tensor? bias, Tensor? prepared, float scale, Tensor? memory_lengths, Tensor? mask, "
    "Tensor[] hidden, Tensor[] cell, Tensor? feed, int bos, int eos, int max_length, int beam_size, "
    "int num_hypotheses, float length_penalty, float coverage_penalty, bool early_stopping, int table_bytes, "
    "Tensor[] blocks) -> "
    "(Tensor tokens, Tensor lengths, Tensor scores, Tensor alignments)"
)
