"""Op features for location-sensitive attention: an addend of the keys, a factor of the scores, weights only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import additive_attention, additive_scores, dot_attention, reference
from bench import eager
from matrix import DTYPES, Arguments, Case, Op, assert_close, device_of, interpreted, make, run, slow_if

LOCATED = Op(
    "additive_attention",
    inputs=("query", "keys", "values", "v", "bias", "extra"),
    outputs=("context", "alignments"),
    score=lambda *_: torch.zeros(()),
)
CASES = {
    "lengths": Case(lengths="random"),
    "pairs": Case(mask="pairs"),
    "one query": Case(Tq=1, lengths="random", query_2d=True),
    "transposed": Case(layout="transposed", lengths="random"),
    "sliced": Case(layout="sliced", mask="steps"),
    "3 queries": Case(Tq=3, A=40, D=16, lengths="random"),
    "8 queries": Case(Tq=8, layout="misaligned", lengths="zero", mask="pairs"),
    "20 queries": Case(Tq=20, Tk=33, A=40, D=16, lengths="random"),
    "20 queries, strided": Case(2, 20, 17, 13, layout="columns", lengths="random"),
    "Tk = 0": Case(Tk=0),
    "A = 0": Case(A=0),
}


def located(function: Callable[..., Any], scale: float) -> Callable[..., Any]:
    def call(
        query: Tensor, keys: Tensor, values: Tensor, v: Tensor, bias: Tensor, extra: Tensor, **keywords: Any
    ) -> Any:
        return function(query, keys, values, v, bias, extra=extra, scale=scale, **keywords)

    return call


def written_out(scale: float) -> Callable[..., Any]:
    def call(
        query: Tensor, keys: Tensor, values: Tensor, v: Tensor, bias: Tensor, extra: Tensor, **keywords: Any
    ) -> Any:
        return eager.additive_attention(query, keys + extra, values, scale * v, bias, **keywords)

    return call


@slow_if(lambda backend, dtype, **_: interpreted(backend) and dtype != torch.float32)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extra_and_scale(backend: str, dtype: torch.dtype, case: str) -> None:
    arguments = make(LOCATED, CASES[case], dtype, device_of(backend))
    exact = run(located(reference.additive_attention, 1.7), LOCATED, arguments.to(torch.float64))
    safe = Arguments(arguments.tensors, {}, arguments.grads)  # eager has no rule for rows with nothing to attend
    errors = {
        name: (t.double().cpu() - other).abs().max().item() if t.numel() else 0.0
        for (name, t), other in zip(
            run(written_out(1.7), LOCATED, safe).items(),
            run(located(reference.additive_attention, 1.7), LOCATED, safe.to(torch.float64)).values(),
            strict=True,
        )
    }
    results = run(located(additive_attention, 1.7), LOCATED, arguments, backend=backend)
    assert_close(results, exact, errors, dtype)


def test_scores_take_extra(backend: str) -> None:
    device = device_of(backend)
    q, k, e, v = (
        torch.randn(shape, dtype=torch.float64, device=device) for shape in ((2, 3, 5), (2, 7, 5), (2, 7, 5), (5,))
    )
    exact = torch.tanh(q[:, :, None] + k[:, None] + e[:, None]) @ v
    torch.testing.assert_close(additive_scores(q, k, v, extra=e, backend=backend), exact)
    torch.testing.assert_close(reference.additive_scores(q, k, v, extra=e), exact)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5)], ids=["3-D", "2-D"])
def test_alignments_alone(backend: str, shape: tuple[int, ...]) -> None:
    device = device_of(backend)
    q, k, x, v = (torch.randn(size, device=device) for size in (shape, (2, 7, 5), (2, 7, 4), (5,)))
    k.requires_grad_()
    lengths = torch.tensor([7, 4], device=device)
    for function, units in ((additive_attention, (v,)), (dot_attention, ())):
        whole = function(q, k, x, *units, memory_lengths=lengths, backend=backend)
        alone = function(q, k, None, *units, memory_lengths=lengths, backend=backend)
        assert alone.context is None
        torch.testing.assert_close(alone.alignments, whole.alignments)
        weight = torch.randn_like(whole.alignments)
        torch.testing.assert_close(*(torch.autograd.grad((r.alignments * weight).sum(), k)[0] for r in (whole, alone)))
        specified = getattr(reference, function.__name__)(q, k, None, *units, memory_lengths=lengths)
        assert specified.context is None
        torch.testing.assert_close(alone.alignments, specified.alignments)


def test_compiles_whole() -> None:
    q, k, x, v, e = (torch.randn(shape) for shape in ((2, 5), (2, 7, 5), (2, 7, 4), (5,), (2, 7, 5)))

    def step(q: Tensor) -> Tensor:
        weights = additive_attention(q, k, None, v, extra=e, scale=2.0).alignments
        return additive_attention(q, k, x, v, extra=e, scale=2.0).context.sum() + weights[0, 0]

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(q), step(q))


def test_refusals() -> None:
    q, k, x, v = (torch.randn(shape) for shape in ((2, 5), (2, 7, 5), (2, 7, 4), (5,)))
    with pytest.raises(
        ValueError, match=r"additive_attention: extra must have shape \(B, Tk, A\) = \(2, 7, 5\), got \(2, 7\)"
    ):
        additive_attention(q, k, x, v, extra=torch.zeros(2, 7))
    with pytest.raises(TypeError, match=r"additive_attention: extra must have the dtype of keys"):
        additive_attention(q, k, x, v, extra=k.double())
    with pytest.raises(TypeError, match=r"additive_scores: extra must be a tensor, got int"):
        additive_scores(q, k, v, extra=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale must be a finite number, got inf"):
        additive_attention(q, k, x, v, scale=float("inf"))
    with pytest.raises(TypeError, match=r"scale must be a number, got str"):
        additive_attention(q, k, x, v, scale="2")  # type: ignore[arg-type]
    for function, units in ((additive_attention, (v,)), (dot_attention, ())):
        with pytest.raises(ValueError, match=r"need_weights must be True without values"):
            function(q, k, None, *units, need_weights=False)
