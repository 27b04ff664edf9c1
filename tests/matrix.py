"""The table of ops, the table of cases, the generation of inputs, and the tolerances of results.

A new mechanism needs one row in OPS: its public function, its reference and its eager formula are found by its name.
New argument names also need a shape in SHAPES.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import attn_kernels
from attn_kernels import reference
from attn_kernels.backends import emulated
from attn_kernels.types import attention_mask
from bench import eager

# Ops ------------------------------------------------------------------------------------------------------------------

SHAPES = {
    "query": ("B", "Tq", "A"),
    "keys": ("B", "Tk", "A"),
    "values": ("B", "Tk", "D"),
    "v": ("A",),
    "bias": ("A",),
    "extra": ("B", "Tk", "A"),
    "gate": ("B", "Tk", "A"),
    "context": ("B", "Tq", "D"),
    "alignments": ("B", "Tq", "Tk"),
    "score_bias": ("B", "Tq", "Tk"),
    "scores": ("B", "Tq", "Tk"),
}


class Op(NamedTuple):
    """One row: input and output tensors in order, and an independent formula for the score of one pair of vectors."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    score: Callable[..., Tensor]
    options: Mapping[str, Any] = {}
    optional: tuple[str, ...] = ()
    variant: Callable[..., Any] | None = None  # calls the public function in another way
    by_name: tuple[str, ...] = ()  # tensors that are passed by keyword
    vectors: int | None = None  # number of score vectors, if v has an axis for them
    lacks: tuple[str, ...] = ()  # backends without kernels for it: conftest.py leaves these out

    def axes(self, name: str) -> tuple[str, ...]:
        """The names of the axes of a tensor; R is the axis of the score vectors."""
        axes = SHAPES[name]
        if self.vectors is None or name not in ("v", *self.outputs):
            return axes
        return ("R", *axes) if name == "v" else (*axes[:-1], "R", axes[-1])

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(attn_kernels, self.name) if self.variant is None else self.variant

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    @property
    def eager(self) -> Callable[..., Any]:
        return getattr(eager, self.name)

    @property
    def masked(self) -> bool:
        """Whether the op takes memory_lengths and mask."""
        return "alignments" in self.outputs


def _additive_score(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None = None, **activation: Any) -> Tensor:
    hidden = query + keys if bias is None else query + keys + bias
    total = torch.zeros((), dtype=v.dtype)
    for a in range(len(v)):
        total = total + v[a] * _activate(hidden[a], **activation)
    return total


def _activate(x: Tensor, activation: str = "tanh", negative_slope: float = 0.01) -> Tensor:
    if activation == "tanh":
        return torch.tanh(x)
    if activation == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    return x if x > 0 else x * (negative_slope if activation == "leaky_relu" else 0.0)


def _dot_score(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    return scale * sum((query[a] * keys[a] for a in range(len(query))), torch.zeros((), dtype=query.dtype))


OPS = {
    op.name: op
    for op in (
        Op(
            "additive_attention",
            inputs=("query", "keys", "values", "v", "bias"),
            outputs=("context", "alignments"),
            score=_additive_score,
            optional=("bias",),
        ),
        Op(
            "dot_attention",
            inputs=("query", "keys", "values"),
            outputs=("context", "alignments"),
            score=_dot_score,
            options={"scale": 0.3},
        ),
        Op(
            "additive_scores",
            inputs=("query", "keys", "v", "bias"),
            outputs=("scores",),
            score=_additive_score,
            optional=("bias",),
        ),
    )
}


def _with_prepared_keys(
    query: Tensor, keys: Tensor, *others: Tensor, backend: str | None = None, **keywords: Any
) -> Any:
    prepared = attn_kernels.prepare_keys(keys, backend=backend)
    if prepared is None and keys.dtype != torch.float64:
        pytest.skip(f"backend {backend} prepares nothing")
    return attn_kernels.additive_attention(query, keys, *others, backend=backend, prepared=prepared, **keywords)


def _packed(name: str) -> Callable[..., Any]:
    """A public function, called with packed keys and values: only the steps that are not masked."""

    def attend(query: Tensor, keys: Tensor, values: Tensor, *others: Tensor, **keywords: Any) -> Any:
        allowed = attention_mask(keys, keywords.pop("memory_lengths", None), keywords.pop("mask", None))
        if allowed is None:
            allowed = torch.ones(keys.shape[0], 1, keys.shape[1], dtype=torch.bool, device=keys.device)
        if allowed.shape[1] != 1:
            pytest.skip("packed memories are the same for all queries")
        there = allowed[:, 0]
        lengths = there.sum(1)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        packed = (query, keys[there], values[there], *others)
        context, weights = getattr(attn_kernels, name)(*packed, memory_offsets=offsets, **keywords)
        if weights is None:
            return attn_kernels.Attention(context, None)
        used = torch.arange(weights.shape[-1], device=keys.device) < lengths[:, None]
        if query.dim() == 3:
            used, there = used[:, None], there[:, None]
        alignments = weights.new_zeros(*weights.shape[:-1], keys.shape[1])
        used, there = used.expand_as(weights), there.expand_as(alignments)
        return attn_kernels.Attention(context, alignments.masked_scatter(there, weights.masked_select(used)))

    return attend


ON_GPUS = ("cuda", "triton")


def _gated(name: str, gate: bool = True, vectors: int | None = None, **options: Any) -> Op:
    op = OPS[name]
    tensors = ("gate",) if gate else ()
    return op._replace(
        inputs=op.inputs + tensors,
        by_name=tensors,
        vectors=vectors,
        options=options,
        lacks=("cuda",),
    )


# For tests of results: the ops, and other ways to call them, which must give the same results.
ACTIVATIONS = {
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.2},
    "sigmoid": {"activation": "sigmoid"},
}
MAIN = OPS | {"prepared keys": OPS["additive_attention"]._replace(variant=_with_prepared_keys)}
_OF_ATTENTION, _OF_DOT = OPS["additive_attention"], OPS["dot_attention"]
_WITH_GATE = _gated("additive_attention")
_WITH_EXTRA = _OF_ATTENTION._replace(inputs=(*_OF_ATTENTION.inputs, "extra"), by_name=("extra",))
VARIANTS = MAIN | {
    **{activation: _OF_ATTENTION._replace(options=options) for activation, options in ACTIVATIONS.items()},
    "relu scores": OPS["additive_scores"]._replace(options=ACTIVATIONS["relu"]),
    "sigmoid scores": OPS["additive_scores"]._replace(options=ACTIVATIONS["sigmoid"]),
    "extra": _WITH_EXTRA,
    "extra, prepared keys": _WITH_EXTRA._replace(variant=_with_prepared_keys),
    "extra, leaky_relu": _WITH_EXTRA._replace(options=ACTIVATIONS["leaky_relu"]),
    "extra, clip, score bias": _WITH_EXTRA._replace(
        inputs=(*_WITH_EXTRA.inputs, "score_bias"),
        by_name=("extra", "score_bias"),
        options={"clip": 2.0},
        lacks=("cuda",),
    ),
    "extra, gate, 3 vectors": _WITH_GATE._replace(
        inputs=(*_WITH_GATE.inputs, "extra"), by_name=("gate", "extra"), vectors=3
    ),
    "gate": _WITH_GATE,
    "gate, 3 vectors": _gated("additive_attention", vectors=3),
    "gate, relu, 1 vector": _gated("additive_attention", vectors=1, **ACTIVATIONS["relu"]),
    "gate, sigmoid, 10 vectors": _gated("additive_attention", vectors=10, **ACTIVATIONS["sigmoid"]),
    "leaky_relu, 10 vectors": _gated("additive_attention", False, 10, **ACTIVATIONS["leaky_relu"]),
    "gate, scores": _gated("additive_scores"),
    "scores, 3 vectors": _gated("additive_scores", False, 3),
    "score bias": _OF_ATTENTION._replace(
        inputs=(*_OF_ATTENTION.inputs, "score_bias"),
        by_name=("score_bias",),
        lacks=("cuda",),
    ),
    "score bias, sigmoid": _OF_DOT._replace(
        inputs=(*_OF_DOT.inputs, "score_bias"),
        by_name=("score_bias",),
        options={**_OF_DOT.options, "normalizer": "sigmoid"},
        lacks=("cuda",),
    ),
    "clip": _OF_DOT._replace(options={**_OF_DOT.options, "clip": 1.5}, lacks=("cuda",)),
    "clip, score bias": _OF_ATTENTION._replace(
        inputs=(*_OF_ATTENTION.inputs, "score_bias"),
        by_name=("score_bias",),
        options={"clip": 2.0},
        lacks=("cuda",),
    ),
    # CUDA runs on a padded copy. test_triton_packed.py tests Triton's kernels.
    "packed": _OF_ATTENTION._replace(variant=_packed("additive_attention"), lacks=ON_GPUS),
    "packed dot": _OF_DOT._replace(variant=_packed("dot_attention"), lacks=ON_GPUS),
}


GATED = tuple(op for name, op in VARIANTS.items() if "gate" in name or "vectors" in name)


def of_variants(names: Iterable[str] = VARIANTS) -> pytest.MarkDecorator:
    """Parametrizes a test with ops. Ops outside MAIN are marked slow: they share most code with MAIN."""
    marks = {name: () if name in MAIN else (pytest.mark.slow,) for name in names}
    return pytest.mark.parametrize("op", [pytest.param(VARIANTS[n], id=n, marks=m) for n, m in marks.items()])


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# Cases ----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Sizes and special properties of the arguments.

    lengths: "", "random", "random32" (int32), "zero", "full". mask: "", "steps" (B, Tk), "pairs" (B, Tq, Tk), "none"
    (all False), "all". Layouts: see lay_out. receives: the outputs that have a gradient; all by default.
    """

    B: int = 3
    Tq: int = 4
    Tk: int = 9
    A: int = 20
    D: int = 12
    lengths: str = ""
    mask: str = ""
    layout: str = "contiguous"
    mask_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    receives: tuple[str, ...] = ("context", "alignments", "scores")
    without: tuple[str, ...] = ()
    query_2d: bool = False

    @property
    def pairs(self) -> int:
        """The number of multiplications, as the cost of a case."""
        return self.B * self.Tq * self.Tk * max(self.A, self.D)


CASES = {
    "plain": Case(),
    "no bias": Case(without=("bias",)),
    "one of each": Case(1, 1, 1, 1, 1),
    "decode": Case(5, 1, 63, 64, 32),
    "decode, long": Case(2, 1, 513, 40, 24, lengths="random"),
    "beams": Case(2, 5, 33, 48, 48, lengths="random"),
    "square": Case(2, 17, 17, 32, 32),
    "63": Case(1, 63, 63, 63, 63, lengths="random"),
    "129": Case(1, 129, 129, 129, 129, mask="steps"),
    "7": Case(7, 7, 7, 7, 7, mask="pairs"),
    "many rows": Case(65, 2, 3, 5, 4, lengths="random"),
    "many units": Case(2, 2, 5, 300, 3),
    "wide values": Case(2, 3, 5, 4, 300, lengths="random"),
    "one unit": Case(2, 3, 9, 1, 1),
    "one step": Case(4, 5, 1, 16, 16, lengths="random"),
    "33 queries": Case(1, 33, 65, 16, 16, lengths="random"),
    "140 queries, 200 steps": Case(1, 140, 200, 37, 39),
    "B = 0": Case(B=0, lengths="random", mask="steps"),
    "Tq = 0": Case(Tq=0, lengths="random", mask="pairs"),
    "Tk = 0": Case(Tk=0, lengths="random", mask="pairs"),
    "Tk = 0, no mask": Case(Tk=0),
    "A = 0": Case(A=0, lengths="random"),
    "D = 0": Case(D=0, lengths="random"),
    "lengths": Case(8, 3, 7, lengths="random"),
    "lengths int32": Case(8, 3, 7, lengths="random32", mask_layout="sliced"),
    "lengths all 0": Case(lengths="zero"),
    "lengths all Tk": Case(lengths="full"),
    "mask (B, Tk)": Case(mask="steps"),
    "mask (B, Tq, Tk)": Case(mask="pairs"),
    "mask (B, Tq, Tk), 33 steps": Case(2, 9, 33, mask="pairs"),
    "mask False": Case(mask="none"),
    "mask True": Case(mask="all"),
    "mask strided": Case(mask="steps", mask_layout="transposed"),
    "mask strided, per query": Case(mask="pairs", mask_layout="transposed"),
    "mask sliced": Case(mask="pairs", mask_layout="sliced"),
    "mask stride 0": Case(mask="pairs", mask_layout="expanded"),
    "lengths and mask": Case(8, 3, 7, lengths="random", mask="steps"),
    "lengths and mask per query": Case(8, 3, 7, lengths="random32", mask="pairs"),
    "query 2-D": Case(Tq=1, query_2d=True),
    "query 2-D, masked": Case(6, 1, 9, lengths="random", mask="steps", query_2d=True),
    "query 2-D, mask 3-D": Case(6, 1, 9, mask="pairs", query_2d=True),
    "query 2-D, strided": Case(6, 1, 9, lengths="random", layout="sliced", query_2d=True),
    "time-major": Case(lengths="random", layout="transposed"),
    "units strided": Case(lengths="random", layout="columns"),
    "sliced": Case(lengths="random", layout="sliced"),
    "misaligned": Case(lengths="random", layout="misaligned"),
    "misaligned decode": Case(2, 1, 65, 33, 17, lengths="random", layout="misaligned"),
    "stride 0 in batch": Case(lengths="random", layout="expanded"),
    "stride 0 in time": Case(lengths="random", layout="repeated"),
    "stride 0": Case(lengths="random", layout="scalar"),
    "gradient of context": Case(lengths="random", receives=("context",)),
    "gradient of alignments": Case(lengths="random", receives=("alignments",)),
    "gradient of context, 2-D": Case(Tq=1, query_2d=True, receives=("context",)),
    "gradient of alignments, pairs": Case(mask="pairs", receives=("alignments",)),
    "gradient stride 0": Case(lengths="random", grad_layout="scalar"),
    "gradient stride 0 in batch": Case(mask="pairs", grad_layout="expanded"),
    "gradient time-major": Case(lengths="random", grad_layout="transposed"),
    "gradient units strided": Case(lengths="random", grad_layout="columns"),
    "gradient sliced": Case(lengths="random", grad_layout="sliced"),
    "gradient misaligned": Case(lengths="random", grad_layout="misaligned"),
}


# Inputs ---------------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """tensors: differentiable inputs by name. masks: memory_lengths, mask. grads: gradients of the outputs by name."""

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    grads: dict[str, Tensor]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Arguments:
        return Arguments(
            {name: t.to(device, dtype) for name, t in self.tensors.items()},
            {name: t.to(device) for name, t in self.masks.items()},
            {name: t.to(device, dtype) for name, t in self.grads.items()},
        )


def make(op: Op, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Arguments:
    """Random arguments. Results and gradients are of order 1 or larger."""
    rng = torch.Generator().manual_seed(seed)

    def normal(name: str) -> Tensor:
        axes = op.axes(name)
        if case.query_2d:
            axes = tuple(axis for axis in axes if axis != "Tq")
        sizes = [op.vectors if axis == "R" else getattr(case, axis) for axis in axes]
        x = torch.randn(sizes, generator=rng, dtype=torch.float64)
        spread = {"v": case.A, "context": case.D}.get(name, 1)
        return (x / math.sqrt(max(spread, 1))).to(device, dtype)

    tensors = {name: lay_out(normal(name), case.layout) for name in op.inputs if name not in case.without}
    grads = {name: lay_out(normal(name), case.grad_layout) for name in op.outputs if name in case.receives}
    return Arguments(tensors, _make_masks(case, device, rng) if op.masked else {}, grads)


def _make_masks(case: Case, device: str, rng: torch.Generator) -> dict[str, Tensor]:
    masks = {}
    if case.lengths:
        lengths = torch.randint(case.Tk + 1, (case.B,), generator=rng)
        if case.lengths.startswith("random"):
            lengths[1:2], lengths[2:3] = 0, case.Tk
        else:
            lengths[:] = {"zero": 0, "full": case.Tk}[case.lengths]
        if case.lengths == "random32":
            lengths = lengths.int()
        masks["memory_lengths"] = lay_out(lengths.to(device), case.mask_layout if case.mask == "" else "contiguous")
    if case.mask:
        shape = (case.B, case.Tk) if case.mask == "steps" else (case.B, case.Tq, case.Tk)
        mask = torch.rand(shape, generator=rng) < {"none": 0.0, "all": 2.0}.get(case.mask, 0.6)
        if case.mask in ("steps", "pairs"):
            mask[1:2, :1] = False  # one row or one query with few or no unmasked steps
        masks["mask"] = lay_out(mask.to(device), case.mask_layout)
    return masks


STRIDE_0 = ("expanded", "repeated", "scalar")


def lay_out(x: Tensor, layout: str, fill: float = math.nan) -> Tensor:
    """x with other strides, with ``fill`` between and around its elements. Layouts with stride 0 also change values."""
    if layout == "contiguous" or x.numel() == 0:
        return x
    if layout == "transposed":  # time-major; a vector has only one axis
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else lay_out(x, "sliced", fill)
    if layout == "columns":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else lay_out(x, "sliced", fill)
    if layout == "sliced":  # margins on all sides, and every second element of the last axis
        room = [size + 3 for size in x.shape[:-1]] + [2 * x.shape[-1] + 3]
        view = _buffer(x, room, fill)[tuple(slice(1, 1 + size) for size in x.shape[:-1])][
            ..., 1 : 1 + 2 * x.shape[-1] : 2
        ]
    elif layout == "misaligned":
        view = _buffer(x, [x.numel() + 2], fill)[1:-1].view(x.shape)
    elif layout == "expanded":
        return x[:1].expand(x.shape)
    elif layout == "repeated":
        return x[:, :1].expand(x.shape) if x.dim() > 1 else x
    elif layout == "scalar":
        return x.flatten()[:1].view([1] * x.dim()).expand(x.shape)
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view


def _buffer(x: Tensor, shape: list[int], fill: float) -> Tensor:
    return x.new_full(shape, fill if x.is_floating_point() else True if x.dtype == torch.bool else 1 << 20)


# Running --------------------------------------------------------------------------------------------------------------


def call(function: Callable[..., Any], op: Op, tensors: Mapping[str, Tensor], **keywords: Any) -> dict[str, Tensor]:
    """Calls the function; returns the outputs by name."""
    by_name = {name: tensors[name] for name in op.by_name if name in tensors}
    positional = (tensors.get(name) for name in op.inputs if name not in op.by_name)
    outputs = function(*positional, **by_name, **op.options, **keywords)
    return dict(zip(op.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


def run(function: Callable[..., Any], op: Op, arguments: Arguments, **keywords: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name; the gradient of query is "dquery". A gradient of None becomes zeros."""
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.tensors.items()}
    outputs = call(function, op, leaves, **arguments.masks, **keywords)
    results = {name: t.detach() for name, t in outputs.items() if t is not None}
    if arguments.grads:
        gradients = torch.autograd.grad(
            [outputs[name] for name in arguments.grads],
            list(leaves.values()),
            list(arguments.grads.values()),
            allow_unused=True,
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results["d" + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def oracle(op: Op, arguments: Arguments) -> dict[str, Tensor]:
    """The reference in float64 on the CPU."""
    return run(op.reference, op, arguments.to(torch.float64))


def baseline(op: Op, arguments: Arguments) -> dict[str, Tensor]:
    """The formulas of bench/eager.py in the dtype of the arguments, on their device.

    For a fully masked row they give NaN, even in all gradients. So here such a row attends all steps and gets no
    gradient, and its results are set to 0 afterwards, as in the specification.
    """
    masks = arguments.masks
    if not masks:
        return run(op.eager, op, arguments)
    keys, query = arguments.tensors["keys"], arguments.tensors["query"]
    allowed = attention_mask(keys, masks.get("memory_lengths"), masks.get("mask"))
    allowed = allowed.expand(-1, query.shape[1] if query.dim() == 3 else 1, -1)
    empty = ~allowed.any(-1, keepdim=True)
    blank = empty[:, 0] if query.dim() == 2 else empty
    if op.vectors is not None:
        blank = blank[..., None]
    grads = {name: g.masked_fill(blank, 0.0) for name, g in arguments.grads.items()}
    results = run(op.eager, op, Arguments(arguments.tensors, {"mask": allowed | empty}, grads))
    return {name: t.masked_fill(blank, 0.0) if name in op.outputs else t for name, t in results.items()}


def eager_errors(op: Op, arguments: Arguments, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest error of the eager formula in each result and gradient."""
    return _errors(baseline(op, arguments), exact)


def _errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _largest(t.double().cpu() - exact[name]) for name, t in results.items()}


def check(
    op: Op,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    arguments: Arguments | None = None,
    seed: int = 0,
    condition: float = 1.0,
    **keywords: Any,
) -> None:
    """Compares results and gradients of a backend with the oracle; without ``arguments``, the case determines them."""
    device = device_of(backend)
    if arguments is not None:
        exact, errors = _expected(op, case, dtype, device, seed, arguments)
    else:
        arguments = make(op, case, dtype, device, seed)
        key = (id(op), case, dtype, device, seed)
        exact, errors = _known.get(key) or _expected(op, case, dtype, device, seed, arguments)
        if case in _TABLE and id(op) in _OF_TABLE:
            _known[key] = exact, errors
    results = run(op.function, op, arguments, backend=backend, **keywords)
    if keywords.get("need_weights") is False:
        exact = {name: t for name, t in exact.items() if name != "alignments"}
    assert_close(results, exact, errors, dtype, condition)


_TABLE = frozenset(CASES.values())
_OF_TABLE = {id(op) for op in (*OPS.values(), *VARIANTS.values())}  # without ops that a test derives from them
_known: dict[Any, tuple[dict[str, Tensor], dict[str, float]]] = {}  # cache for ops of the table, used by all backends


def _expected(
    op: Op, case: Case, dtype: torch.dtype, device: str, seed: int, arguments: Arguments
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The results of the oracle, and the errors of eager."""
    exact = oracle(op, arguments)
    errors = eager_errors(op, arguments, exact)
    if case.layout in STRIDE_0 or case.grad_layout in STRIDE_0:
        # Equal elements cancel exactly in one order of summation and not in another, so eager may have no error in a
        # gradient by chance. Then its error on different elements is used.
        typical = make(op, case._replace(layout="contiguous", grad_layout="contiguous"), dtype, device, seed)
        others = eager_errors(op, typical, oracle(op, typical))
        errors = {name: max(error, others[name]) for name, error in errors.items()}
    return exact, errors


def check_by_sentences(
    op: Op, arguments: Arguments, backend: str, together: int, *, condition: float = 1.0
) -> Iterator[int]:
    """Like check, but compares a few sentences at a time, each time with the errors of eager in these sentences.

    It is for batches of different sentences, which take less time than one call per sentence. Yields the first of the
    sentences that are compared next. Sums over all sentences, such as dv, are compared last.
    """
    query = arguments.tensors["query"]
    exact, eager = oracle(op, arguments), baseline(op, arguments)
    results = run(op.function, op, arguments, backend=backend)
    shared = {name for name in exact if SHAPES[name if name in SHAPES else name[1:]][0] != "B"}  # dv, dbias

    def compare(pick: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        right = pick(exact)
        assert_close(pick(results), right, _errors(pick(eager), right), query.dtype, condition)

    for first in range(0, len(query), together):
        yield first
        part = slice(first, first + together)
        compare(lambda every, part=part: {name: t[part] for name, t in every.items() if name not in shared})
    compare(lambda every: {name: t for name, t in every.items() if name in shared})


# Tolerances: they are set only here -----------------------------------------------------------------------------------


def tolerance(name: str, dtype: torch.dtype, exact: Tensor, eager_error: float, condition: float = 1.0) -> float:
    """The largest error allowed for any element of the result ``name``.

    The measure is the error of the eager formula in the same dtype and on the same arguments. The allowed error is
    twice that for results and three times that for gradients (in float32 and float64 twice for both), plus

        float64    1e-10 * scale
        float32    1e-6 * scale
        bfloat16   one rounding of the largest element, plus 1e-6 * scale
        float16    the same

    where scale is the largest element of the exact result. The terms of a sum can be larger than the sum, and a
    gradient can cancel to 0. So the scale is at least 1, as make() gives arguments with terms of this order. This does
    not hold for alignments, whose terms are positive. ``condition`` is for tests with scores far above 1: it is the
    size of the terms of a score. The error of a score is relative to it, and softmax amplifies the error by it, up to
    1e5.
    """
    peak = _largest(exact)
    scale = peak if name == "alignments" else max(peak, 1.0)
    scale = max(scale, condition) if name == "scores" else scale * min(condition, 1e5)
    if dtype == torch.float64:
        return 2 * eager_error + 1e-10 * scale
    if dtype == torch.float32:
        return 2 * eager_error + 1e-6 * scale
    factor = 3 if name.startswith("d") else 2
    return factor * eager_error + torch.finfo(dtype).eps * peak + 1e-6 * scale


def assert_close(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eager_errors: Mapping[str, float],
    dtype: torch.dtype,
    condition: float = 1.0,
) -> None:
    """Compares every result and gradient by name: shape, dtype, positions of NaN and Inf, and the error elsewhere.

    In a gradient, NaN and Inf are equivalent: whether Inf - Inf or Inf times a sum occurs depends on the order of sums.
    """
    problems = []
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        result = actual[name]
        if result.shape != expected.shape or result.dtype != dtype:
            problems.append(f"{name}: {tuple(result.shape)} {result.dtype}, expected {tuple(expected.shape)} {dtype}")
            continue
        result, expected = result.detach().double().cpu(), expected.detach().double().cpu()
        rounded = expected.to(dtype).double()  # rounding may overflow to Inf
        special = ~rounded.isfinite()
        same = (result == rounded) | (result.isnan() & rounded.isnan())
        wrong = special & ~(~result.isfinite() if name.startswith("d") else same) | ~special & ~result.isfinite()
        if wrong.any():
            first = _first(wrong)
            problems.append(
                f"{name}: {result[first]} at {first}, should be {rounded[first]} ({wrong.sum()} such places)"
            )
            continue
        allowed = tolerance(name, dtype, expected, eager_errors[name], condition)
        error = torch.where(special, 0.0, result - expected).abs()
        if error.numel() and not error.max() <= allowed:
            worst = _first(error == error.max())
            problems.append(
                f"{name}: error {error.max():.3g} at {worst}, {result[worst]:.9g} instead of {expected[worst]:.9g};"
                f" allowed {allowed:.3g} (eager {eager_errors[name]:.3g}, largest element {_largest(expected):.3g})"
            )
    assert not problems, "\n".join(problems)


def assert_bit_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compares every result and gradient by name; NaN equals NaN, and 0.0 equals -0.0."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def _largest(x: Tensor) -> float:
    """The largest magnitude of the finite elements."""
    x = x[x.isfinite()].abs()
    return x.max().item() if x.numel() else 0.0


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(where.nonzero()[0].tolist())


# Where it runs --------------------------------------------------------------------------------------------------------


def interpreted(backend: str) -> bool:
    """Whether GPU kernels run on the CPU."""
    if backend == "cuda":
        return emulated()
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


# The cases that ``make test`` runs on interpreted GPU kernels. The CUDA emulator runs all of them. Triton's interpreter
# runs the first three, as a case takes a second there.
CORE = tuple(
    CASES[name]
    for name in (
        *("plain", "mask (B, Tq, Tk)", "gradient of alignments", "gradient of context", "decode", "7"),
        *("lengths and mask per query", "query 2-D, masked", "sliced"),
    )
)


def slow_if(predicate: Callable[..., object]) -> pytest.MarkDecorator:
    """Marks a test as slow for parameters with ``predicate(**parameters)`` true."""
    return pytest.mark.slow_if.with_args(predicate)  # a mark called with only a function would decorate it as a test


def slow_interpreted(*core: Any) -> pytest.MarkDecorator:
    """Marks a test as slow on interpreted kernels, except for the parameters in ``core``."""

    def slow(**parameters: Any) -> bool:
        backend = parameters.get("backend", parameters.get("fused"))
        kept = core[:3] if is_slow(backend) else core
        return interpreted(backend) and not any(value in kept for value in parameters.values())

    return slow_if(slow)


def is_slow(backend: str) -> bool:
    """Whether the kernels run in Triton's interpreter: tests run only few and small cases there."""
    return backend == "triton" and interpreted(backend)


def is_left_to_another(test: str, parameters: Mapping[str, Any]) -> bool:
    """Whether another gated op covers this case in Triton's interpreter, where each op takes a second.

    The gated ops use the same kernels there with other arguments. All of them run the case of ``make test``.
    """
    op, backend = parameters.get("op"), parameters.get("backend", parameters.get("fused", ""))
    if not is_slow(backend) or op not in GATED or parameters.get("case") is CASES["plain"]:
        return False
    others = [(name, x) for name, x in parameters.items() if isinstance(x, (str, int, float, tuple)) and x is not op]
    return zlib.crc32(f"{test} {others}".encode()) % len(GATED) != GATED.index(op)


def device_of(backend: str) -> str:
    """The device of the tensors for a backend."""
    return "cuda" if backend in ("triton", "cuda") and not interpreted(backend) else "cpu"


def skip_if_slow(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Skips cases that take the interpreter too long: float32 runs most cases there, other dtypes the small ones."""
    if (
        interpreted(backend)
        and backend == "triton"
        and (case.B > 16 or case.pairs > (60_000 if dtype == torch.float32 else 12_000))
    ):
        pytest.skip("too large for Triton's interpreter")
