"""Packed and jagged memories: against the padded call, and their derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_kernels
from attn_kernels import additive_attention, dot_attention, packing
from attn_kernels.activations import ACTIVATIONS
from matrix import interpreted, is_slow, slow_if

LENGTHS = [5, 0, 17, 1, 9, 0]
B, TQ, A, D = len(LENGTHS), 4, 21, 13
N, LONGEST = sum(LENGTHS), max(LENGTHS)
SCORES: dict[str, dict[str, Any]] = {
    "tanh": {},
    "scaled": {"scale": 0.5},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
    "sigmoid": {"activation": "sigmoid"},
    "dot": {"scale": 0.4},
}
scores = pytest.mark.parametrize("score", SCORES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def make(
    dtype: torch.dtype = torch.float64,
    lengths: list[int] = LENGTHS,
    sizes: tuple[int, int, int] = (TQ, A, D),
    device: str = "cpu",
) -> list[Tensor]:
    """query, packed keys and values, v, bias, as leaves."""
    queries, units, columns = sizes
    rng = torch.Generator().manual_seed(0)
    batch, steps = len(lengths), sum(lengths)
    shapes = ((batch, queries, units), (steps, units), (steps, columns), (units,), (units,))
    tensors = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    tensors[3] /= math.sqrt(max(units, 1))
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def attend(score: str, tensors: list[Tensor], **keywords: Any) -> Any:
    query, keys, values, v, bias = tensors
    if score == "dot":
        return dot_attention(query, keys, values, **SCORES[score], **keywords)
    return additive_attention(query, keys, values, v, bias, **SCORES[score], **keywords)


def used(score: str, tensors: list[Tensor]) -> list[Tensor]:
    return tensors[:3] if score == "dot" else tensors


def attend_padded(score: str, tensors: list[Tensor], lengths: list[int], **keywords: Any) -> Any:
    """The same of padded keys and values; padding is NaN."""
    query, keys, values, *others = tensors
    columns = max(lengths, default=0)

    def pad(rows: Tensor) -> Tensor:
        parts = rows.split(lengths) if lengths else []
        padded = [torch.cat((part, part.new_full((columns - len(part), part.shape[1]), math.nan))) for part in parts]
        return torch.stack(padded) if padded else rows.new_zeros(0, 0, rows.shape[1])

    masks = dict(memory_lengths=torch.tensor(lengths, dtype=torch.int64, device=query.device))
    return attend(score, [query, pad(keys), pad(values), *others], **masks, **keywords)


@slow_if(
    lambda backend, score, dtype: interpreted(backend) and (score not in ("tanh", "dot") or dtype != torch.float32)
)
@scores
@DTYPES
def test_as_padded(score: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Results and gradients."""
    tensors = make(dtype, device=device)
    packed = attend(score, tensors, memory_offsets=offsets_of(LENGTHS, device=device), backend=backend)
    padded = attend_padded(score, tensors, LENGTHS, backend=backend)
    assert packed.alignments.shape == (B, TQ, LONGEST)
    grads = [torch.randn_like(t) for t in padded]
    of_packed, of_padded = (torch.autograd.grad(r, used(score, tensors), grads) for r in (packed, padded))
    bound = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for one, other in zip((*packed, *of_packed), (*padded, *of_padded), strict=True):
        assert one.dtype == dtype
        one, other = one.double(), other.double()
        torch.testing.assert_close(one, other, rtol=0, atol=bound * max(1.0, other.abs().max().item()))
    for b in (1, 5):  # empty
        assert not packed.context[b].any() and not packed.alignments[b].any() and not of_packed[0][b].any()


SIZES = {
    "one step": ([1], (1, 1, 1)),
    "one query": ([7, 3, 0, 12], (1, 33, 17)),
    "many queries": ([66, 3, 129], (37, 40, 24)),
    "many sentences": ([i % 5 for i in range(70)], (2, 9, 7)),
    "one long": ([3, 301, 2], (9, 33, 65)),
    "all empty": ([0, 0, 0], (4, 8, 8)),
    "no sentences": ([], (4, 8, 8)),
    "no queries": ([3, 2], (0, 8, 8)),
    "no units": ([3, 2], (2, 0, 8)),
    "no values": ([3, 2], (2, 8, 0)),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("score", ["tanh", "relu", "dot"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_sizes(name: str, score: str, need_weights: bool, threads: int) -> None:
    lengths, sizes = SIZES[name]
    tensors = make(torch.float32, lengths, sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        offsets = offsets_of(lengths, torch.int32)
        packed = attend(score, tensors, memory_offsets=offsets, need_weights=need_weights, backend="cpu")
        grads = [torch.randn_like(t) for t in packed if t is not None]
        of_packed = torch.autograd.grad([t for t in packed if t is not None], used(score, tensors), grads)
    finally:
        torch.set_num_threads(before)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = attend_padded(score, wide, lengths, need_weights=need_weights, backend="reference")
    outputs = [t for t in exact if t is not None]
    of_exact = torch.autograd.grad(outputs, used(score, wide), [g.double() for g in grads], allow_unused=True)
    assert (packed.alignments is None) != need_weights
    for ours, right in zip((*[t for t in packed if t is not None], *of_packed), (*outputs, *of_exact), strict=True):
        right = torch.zeros_like(ours).double() if right is None else right
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-5 * max(1.0, _peak(right)))


def _peak(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("score", ["tanh", "relu", "dot"])
def test_threads_agree(score: str) -> None:
    lengths = [200, 3, 0, 40, 41, 7, 90, 30, 55]
    tensors = make(torch.float32, lengths, (12, 64, 32))
    found, before = [], torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        try:
            results = attend(score, tensors, memory_offsets=offsets_of(lengths), backend="cpu")
            grads = torch.autograd.grad((results.context.square().sum()), used(score, tensors))
        finally:
            torch.set_num_threads(before)
        found.append((*results, *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_outside_is_read() -> None:
    """Rows before, between (strides) and behind those of the memory hold NaN."""
    tensors = make(torch.float32)
    expected = attend("tanh", tensors, memory_offsets=offsets_of(LENGTHS))
    strided = list(tensors)
    for i, columns in ((1, A), (2, D)):
        room = torch.full((2 * N + 3, 2 * columns + 3), math.nan)
        view = room[1 : 1 + 2 * N : 2, 1 : 1 + 2 * columns : 2]
        view.copy_(tensors[i].detach())
        strided[i] = view.detach().requires_grad_()
    found = attend("tanh", strided, memory_offsets=offsets_of(LENGTHS)[:, None].expand(-1, 2)[:, 0])
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(t) for t in expected]
    for of in (expected, found):
        leaves = tensors if of is expected else strided
        of_leaves = torch.autograd.grad(of, leaves, grads, retain_graph=True)
        assert all(g.isfinite().all() for g in of_leaves)


@pytest.mark.parametrize("score", ["tanh", "dot"])
def test_nan_stays_in_its_sentence(score: str) -> None:
    tensors = make(torch.float32)
    with torch.no_grad():
        tensors[1][LENGTHS[0]] = math.nan  # the first step of the third sentence
    context = attend(score, tensors, memory_offsets=offsets_of(LENGTHS)).context
    assert context[2].isnan().all()
    assert context[[0, 1, 3, 4, 5]].isfinite().all()
    (of_query,) = torch.autograd.grad(context[[0, 3, 4]].sum(), tensors[:1])
    assert of_query[[0, 1, 3, 4, 5]].isfinite().all()


@slow_if(lambda score: score in ("scaled", "leaky_relu", "sigmoid"))
@scores
def test_derivatives(score: str) -> None:
    tensors = make(lengths=[3, 0, 5], sizes=(2, 6, 3))
    offsets = offsets_of([3, 0, 5])

    def with_weights(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(attend(score, [*given, *tensors[len(given) :]], memory_offsets=offsets, backend="cpu"))

    def context(*given: Tensor) -> Tensor:
        every = [*given, *tensors[len(given) :]]
        return attend(score, every, memory_offsets=offsets, need_weights=False, backend="cpu").context

    inputs = used(score, tensors)
    for function in (with_weights, context):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_transforms() -> None:
    query, keys, values, v, bias = (t.detach() for t in make(lengths=[3, 0, 5], sizes=(2, 6, 3)))
    offsets = offsets_of([3, 0, 5])

    def function(keys: Tensor) -> Tensor:
        return additive_attention(query, keys, values, v, bias, memory_offsets=offsets, need_weights=False).context

    of_ours = torch.func.jacrev(function)(keys)
    torch.testing.assert_close(torch.func.jacfwd(function)(keys), of_ours)
    several = torch.stack((keys, 2 * keys, keys - 1))
    torch.testing.assert_close(torch.vmap(function)(several), torch.stack([function(x) for x in several]))


@slow_if(lambda op, columns: columns == 0 or op != "additive_attention_packed")
@pytest.mark.parametrize("op", ["additive_attention_packed", "activated_attention_packed", "dot_attention_packed"])
@pytest.mark.parametrize("columns", [0, LONGEST])
def test_op(op: str, columns: int) -> None:
    """Schema, fake kernel and rule of autograd."""
    tensors = make(torch.float32)
    tensors = tensors[:3] if op.startswith("dot") else tensors
    of_relu = (ACTIVATIONS.index("leaky_relu"), 0.1)
    numbers = {"additive": (), "activated": of_relu, "dot": (0.5,)}[op.partition("_")[0]]
    overload = getattr(torch.ops.attn_kernels, op).cpu
    torch.library.opcheck(overload, (*tensors, *numbers, columns, offsets_of(LENGTHS), True))


@slow_if(lambda score: score not in ("tanh", "dot"))
@scores
def test_compiled(score: str) -> None:
    """One graph for all lengths, of packed tensors and of jagged ones."""
    torch._dynamo.reset()
    tensors = make(torch.float32)

    def function(*tensors: Tensor) -> Tensor:
        *tensors, offsets = tensors
        return attend(score, tensors, memory_offsets=offsets, need_weights=False, backend="cpu").context

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (LENGTHS, LENGTHS[::-1]):
        results = [f(*tensors, offsets_of(lengths)) for f in (function, compiled)]
        of_results = [torch.autograd.grad(r.square().sum(), used(score, tensors)) for r in results]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*of_results)

    def of_jagged(*tensors: Tensor) -> Tensor:
        return attend(score, list(tensors), need_weights=False, backend="cpu").context

    query, keys, values, *others = (t.detach() for t in tensors)
    nested = (query, jagged(keys), jagged(values), *others)
    compiled = torch.compile(of_jagged, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*nested), of_jagged(*nested))


def jagged(rows: Tensor, lengths: list[int] = LENGTHS) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(rows, offsets_of(lengths, device=rows.device))


@slow_if(lambda backend, score: is_slow(backend) and score == "relu")
@pytest.mark.parametrize("score", ["tanh", "relu", "dot"])
def test_jagged(score: str, backend: str, device: str) -> None:
    """Jagged leaves get jagged gradients; those made of packed leaves, packed ones."""
    query, keys, values, *others = make(torch.float32, device=device)
    expected = attend(
        score, [query, keys, values, *others], memory_offsets=offsets_of(LENGTHS, device=device), backend=backend
    )
    grads = [torch.randn_like(t) for t in expected]
    of_packed = torch.autograd.grad(expected, (query, keys, values), grads)
    found = attend(score, [query, jagged(keys), jagged(values), *others], backend=backend)
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(torch.autograd.grad(found, (query, keys, values), grads), of_packed)

    nested = [
        torch.nested.nested_tensor(list(x.detach().split(LENGTHS)), layout=torch.jagged, requires_grad=True)
        for x in (keys, values)
    ]
    found = attend(score, [query, *nested, *others], backend=backend)
    torch.testing.assert_close(tuple(found), tuple(expected))
    of_query, of_keys, of_values = torch.autograd.grad(found, (query, *nested), grads)
    assert of_keys.is_nested and of_values.is_nested
    torch.testing.assert_close((of_query, of_keys.values(), of_values.values()), of_packed)


def test_max_seqlen_of_jagged_tensors() -> None:
    query, keys, values, v, _ = make(torch.float32)

    def call(max_seqlen: int) -> attn_kernels.Attention:
        make_jagged = torch.nested.nested_tensor_from_jagged
        nested = (make_jagged(x, offsets_of(LENGTHS), max_seqlen=max_seqlen) for x in (keys, values))
        return additive_attention(query, *nested, v)

    context, alignments = call(LONGEST + 3)
    assert alignments.shape == (B, TQ, LONGEST + 3) and not alignments[..., LONGEST:].any()
    torch.testing.assert_close(context, call(LONGEST).context)
    with pytest.raises(ValueError, match=f"longer than max_length .*, {LONGEST - 1}"):
        call(LONGEST - 1)


@scores
def test_query_of_two_axes(score: str) -> None:
    tensors = make()
    with_axis = [tensors[0][:, :1], *tensors[1:]]
    expected = attend(score, with_axis, memory_offsets=offsets_of(LENGTHS))
    found = attend(score, [tensors[0][:, 0], *tensors[1:]], memory_offsets=offsets_of(LENGTHS))
    torch.testing.assert_close(found.context, expected.context[:, 0])
    torch.testing.assert_close(found.alignments, expected.alignments[:, 0])


def test_without_query_or_values(backend: str, device: str) -> None:
    _, keys, values, v, bias = make(torch.float32, device=device)
    offsets = offsets_of(LENGTHS, device=device)
    query = torch.zeros(B, A, device=device)
    expected = additive_attention(query, keys, values, v, bias, memory_offsets=offsets, backend=backend)
    found = additive_attention(None, keys, values, v, bias, memory_offsets=offsets, backend=backend)
    torch.testing.assert_close(found, expected)
    found = additive_attention(None, keys, None, v, bias, memory_offsets=offsets, backend=backend)
    assert found.context is None
    torch.testing.assert_close(found.alignments, expected.alignments)
    with pytest.raises(ValueError, match="need_weights must be True without values"):
        dot_attention(query, keys, None, memory_offsets=offsets, need_weights=False, backend=backend)


def test_autocast() -> None:
    tensors = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend("tanh", tensors, memory_offsets=offsets_of(LENGTHS))
    assert found.context.dtype == torch.bfloat16
    low = [t.detach().bfloat16() for t in tensors]
    torch.testing.assert_close(found.context, attend("tanh", low, memory_offsets=offsets_of(LENGTHS)).context)


def test_padding_and_back() -> None:
    rows, offsets = torch.arange(1.0, N + 1)[:, None], offsets_of(LENGTHS)
    padded = packing.pad(rows, offsets, LONGEST)
    assert [row[row > 0].tolist() for row in padded[..., 0]] == [x.flatten().tolist() for x in rows.split(LENGTHS)]
    pairs = padded[..., 0][:, None].expand(-1, 3, -1)
    flat = packing.flatten_alignments(pairs, offsets, N)
    assert flat.tolist() == [x for part in rows.split(LENGTHS) for x in 3 * part.flatten().tolist()]
