"""What few calls of an attention have: dropout, the logarithm of the sum, no query; their errors and derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_kernels
from attn_kernels import additive_attention, dot_attention, reference

B, TQ, TK, A, D = 3, 4, 11, 9, 5
SCORES: dict[str, dict[str, Any]] = {
    "tanh": {},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
    "sigmoid": {"activation": "sigmoid"},
    "dot": {"scale": 0.4},
}
MASKS = {
    "all": {},
    "lengths": {"memory_lengths": torch.tensor([TK, 0, 6])},
    "pairs": {"mask": torch.rand((B, TQ, TK), generator=torch.Generator().manual_seed(1)) < 0.6},
}
scores = pytest.mark.parametrize("score", SCORES)
masks = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
normalizers = pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])


def make(score: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, keys, values, v, bias and score_bias, as leaves."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((B, TQ, A), (B, TK, A), (B, TK, D), (A,), (A,), (B, TQ, TK))
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def attend(score: str, tensors: list[Tensor], **keywords: Any) -> Any:
    query, keys, values, v, bias, score_bias = tensors
    if score == "dot":
        return dot_attention(query, keys, values, score_bias=score_bias, **SCORES[score], **keywords)
    return additive_attention(query, keys, values, v, bias, score_bias=score_bias, **SCORES[score], **keywords)


def finite(result: Any) -> list[Tensor]:
    context, alignments, log_total = result
    return [context, alignments, log_total.masked_fill(log_total == -torch.inf, 0.0)]


@scores
@masks
@normalizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_at_once(score: str, masks: dict, normalizer: str, dtype: torch.dtype) -> None:
    """Results and gradients of the CPU's kernels against the formula: with the same seed, the same weights stay."""
    tensors = make(score, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    options = dict(dropout_p=0.4, normalizer=normalizer, need_log_total=True)
    torch.manual_seed(3)
    results = attend(score, tensors, backend="cpu", **options, **masks)
    torch.manual_seed(3)
    expected = attend(score, wide, backend="reference", **options, **masks)
    assert results.log_total.dtype == dtype
    assert torch.equal(results.log_total.isfinite(), expected.log_total.isfinite())
    grads = [torch.randn_like(t) for t in finite(expected)]
    of_ours = torch.autograd.grad(finite(results), tensors, [g.to(dtype) for g in grads], allow_unused=True)
    of_formula = torch.autograd.grad(finite(expected), wide, grads, allow_unused=True)
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    for ours, exact in zip((*finite(results), *of_ours), (*finite(expected), *of_formula), strict=True):
        if exact is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound * max(1.0, exact.abs().max().item()))


@scores
@normalizers
def test_derivatives(score: str, normalizer: str) -> None:
    tensors = make(score)[:6]
    used = [i for i in range(6) if score != "dot" or i not in (3, 4)]

    def function(*given: Tensor) -> list[Tensor]:
        every = list(tensors)
        for i, t in zip(used, given, strict=True):
            every[i] = t
        torch.manual_seed(4)
        options = dict(dropout_p=0.3, normalizer=normalizer, need_log_total=True)
        return finite(attend(score, every, backend="cpu", **options, **MASKS["lengths"]))

    inputs = [tensors[i] for i in used]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p: float) -> None:
    """Equal weights: the context counts those that stay."""
    steps, queries = 500, 400
    query, keys = torch.zeros(1, queries, 4), torch.zeros(1, steps, 4)
    context, alignments = dot_attention(query, keys, torch.ones(1, steps, 1), dropout_p=p, backend="cpu")
    torch.testing.assert_close(alignments, torch.full_like(alignments, 1 / steps))
    kept = context.flatten().double() * (1 - p)
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / (steps * queries)) ** 0.5
    assert kept.std() == pytest.approx((p * (1 - p) / steps) ** 0.5, rel=0.2)  # queries are independent


def test_seed_is_that_of_torch() -> None:
    query, keys = torch.randn(2, 3, 4), torch.randn(2, 7, 4)

    def call() -> Tensor:
        return dot_attention(query, keys, keys, dropout_p=0.5).context

    torch.manual_seed(7)
    first, second = call(), call()
    torch.manual_seed(7)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


def test_dropout_factors() -> None:
    """SplitMix64, by Python's own integers."""

    def uniform(seed: int, index: int) -> int:
        z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) >> 40

    seed, p = 0x0123456789ABCDEF, 0.3
    factors = reference.dropout_factors((2, 3, 5), p, seed, torch.zeros((), dtype=torch.float64)).flatten()
    for index, factor in enumerate(factors.tolist()):
        assert factor == pytest.approx(1 / (1 - p) if uniform(seed, index) >= p * 2**24 else 0.0)


@pytest.mark.parametrize("attention", ["dot", "tanh"])
def test_gradient_of_the_sum_of_log_totals(attention: str) -> None:
    """Which is one number, expanded."""
    tensors = make(attention)
    gradients = []
    for backend in ("cpu", "reference"):
        log_total = attend(attention, tensors, need_log_total=True, backend=backend).log_total
        gradients.append(torch.autograd.grad(log_total.sum(), tensors[:2]))
    torch.testing.assert_close(*gradients)


def test_log_probabilities() -> None:
    """The score of a step minus the logarithm of the sum is its log-probability, however small."""
    query, keys, v = torch.randn(2, 3, 8), torch.randn(2, 6, 8), 40 * torch.randn(8)
    found = additive_attention(query, keys, None, v, need_log_total=True)
    assert found.context is None
    scores = attn_kernels.additive_scores(query, keys, v)
    expected = torch.log_softmax(scores, -1)
    torch.testing.assert_close(scores - found.log_total[..., None], expected, rtol=1e-5, atol=1e-5)


def test_without_a_query() -> None:
    keys, values, v, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 6, 8), (2, 6, 3), (8,), (8,)))
    lengths = torch.tensor([6, 2])
    for backend in ("cpu", "reference"):
        found = additive_attention(None, keys, values, v, bias, memory_lengths=lengths, backend=backend)
        scores = (torch.tanh(keys + bias) @ v).masked_fill(torch.arange(6) >= lengths[:, None], -torch.inf)
        alignments = torch.softmax(scores, -1)
        torch.testing.assert_close(found.alignments, alignments)
        torch.testing.assert_close(found.context, torch.einsum("bk,bkd->bd", alignments, values))


def test_2d_query() -> None:
    query, keys, score_bias = torch.randn(2, 4), torch.randn(2, 6, 4), torch.randn(2, 6)
    found = dot_attention(query, keys, keys, score_bias=score_bias, need_log_total=True)
    many = dot_attention(query[:, None], keys, keys, score_bias=score_bias[:, None], need_log_total=True)
    for one, other in zip(found, many, strict=True):
        torch.testing.assert_close(one, other.squeeze(1))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        (dict(score_bias=torch.zeros(2, 3, 5)), ValueError, r"score_bias must have shape \(B, Tq, Tk\) = \(2, 3, 6\)"),
        (dict(score_bias=torch.zeros(2, 3, 6).double()), TypeError, "score_bias must have the dtype of query"),
        (dict(score_bias=1.0), TypeError, "score_bias must be a tensor, got float"),
        (dict(dropout_p=1.0), ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
        (dict(dropout_p="much"), TypeError, "dropout_p must be a number, got str"),
        (dict(normalizer="sparsemax"), ValueError, "normalizer must be 'softmax' or 'sigmoid', got 'sparsemax'"),
    ],
)
def test_errors(keywords: dict, error: type[Exception], words: str) -> None:
    query, keys = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    with pytest.raises(error, match=words):
        dot_attention(query, keys, keys, **keywords)
    with pytest.raises(error, match=words):
        additive_attention(query, keys, keys, torch.randn(4), **keywords)


def test_activation_errors() -> None:
    query, keys, v = torch.randn(2, 3, 4), torch.randn(2, 6, 4), torch.randn(4)
    with pytest.raises(ValueError, match="activation must be 'tanh', 'relu', 'leaky_relu' or 'sigmoid', got 'gelu'"):
        additive_attention(query, keys, keys, v, activation="gelu")
    with pytest.raises(ValueError, match="negative_slope must be a finite number, got inf"):
        attn_kernels.additive_scores(query, keys, v, activation="leaky_relu", negative_slope=float("inf"))
    prepared = attn_kernels.prepare_keys(keys)
    with pytest.raises(ValueError, match="prepared must be None with activation='relu'"):
        additive_attention(query, keys, keys, v, activation="relu", prepared=prepared)
