"""Rarely used options of an attention: dropout, the logarithm of the sum, no query; their errors and derivatives.

test_dropout.py tests the dropout mask.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_kernels
from attn_kernels import additive_attention, attending, dot_attention, reference
from attn_kernels.activations import ACTIVATIONS
from attn_kernels.ops import kernel
from attn_kernels.types import attention_mask
from bench import eager
from conftest import available
from matrix import DTYPES, device_of, interpreted, slow_if, tolerance

B, TQ, TK, A, D = 3, 4, 11, 9, 5
MANY = 18  # queries
SCORES: dict[str, dict[str, Any]] = {
    "tanh": {},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
    "sigmoid": {"activation": "sigmoid"},
    "dot": {"scale": 0.4},
}
MASKS = ("all", "lengths", "pairs", "both")
scores = pytest.mark.parametrize("score", SCORES)
masks = pytest.mark.parametrize("masks", MASKS)
normalizers = pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])


def make_masks(masks: str, queries: int, device: str) -> dict[str, Tensor]:
    pairs = torch.rand((B, queries, TK), generator=torch.Generator().manual_seed(1)) < 0.6
    pairs[0, -1] = False  # a query that attends nothing
    found = {"memory_lengths": torch.tensor([TK, 0, 6]), "mask": pairs}
    names = {"all": (), "lengths": ("memory_lengths",), "pairs": ("mask",), "both": ("memory_lengths", "mask")}[masks]
    return {name: found[name].to(device) for name in names}


def make(dtype: torch.dtype = torch.float64, device: str = "cpu", queries: int = TQ) -> list[Tensor]:
    """query, keys, values, v, bias and score_bias, as leaves."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((B, queries, A), (B, TK, A), (B, TK, D), (A,), (A,), (B, queries, TK))
    made = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    made[3] /= A**0.5
    return [t.to(device, dtype).requires_grad_() for t in made]


def attend(score: str, tensors: list[Tensor], **keywords: Any) -> Any:
    query, keys, values, v, bias, score_bias = tensors
    if score == "dot":
        return dot_attention(query, keys, values, score_bias=score_bias, **SCORES[score], **keywords)
    return additive_attention(query, keys, values, v, bias, score_bias=score_bias, **SCORES[score], **keywords)


def attend_both(
    score: str, of_backend: tuple[list[Tensor], dict[str, Any]], of_reference: tuple[list[Tensor], dict[str, Any]],
    backend: str, **options: Any,
) -> tuple[Any, Any, int]:  # fmt: skip
    """Of a backend and of the reference, from tensors and masks, with one seed of dropout, which comes third.

    The reference is on the device of the backend, whose generator makes the seed; its results are brought back.
    """
    results = []
    device = of_backend[0][0].device
    for (tensors, masks), name in ((of_backend, backend), (of_reference, "reference")):
        torch.manual_seed(3)
        there, masks = [t.to(device) for t in tensors], {of: mask.to(device) for of, mask in masks.items()}
        results.append(attend(score, there, backend=name, **options, **masks))
    torch.manual_seed(3)
    expected = results[1]._make(t.to(of_reference[0][0].device) for t in results[1])
    return results[0], expected, int(torch.randint(1 << 62, (), device=device).item())


def finite(result: Any) -> list[Tensor]:
    context, alignments, log_total = result
    return [context, alignments, log_total.masked_fill(log_total == -torch.inf, 0.0)]


def with_kernels(name: str) -> str:
    """The name of a backend that has kernels for all that is here."""
    if name == "cuda":
        pytest.skip("backend cuda has no kernels for it yet")
    return name


# Results and gradients ------------------------------------------------------------------------------------------------

NAMES = ("context", "alignments", "log_total", "dquery", "dkeys", "dvalues", "dv", "dbias", "dscore_bias")


def by_eager(
    score: str,
    tensors: list[Tensor],
    masks: Mapping[str, Tensor],
    normalizer: str,
    p: float,
    seed: int,
    clip: float | None = None,
) -> Any:
    """As people write it, in the dtype of the tensors; zeros for what attends nothing."""
    query, keys, values, v, bias, score_bias = tensors
    if score == "dot":
        made = SCORES[score]["scale"] * torch.bmm(query, keys.mT)
    else:
        made = eager.additive_scores(query, keys, v, bias, **SCORES[score])
    made = (made if clip is None else clip * torch.tanh(made)) + score_bias
    if normalizer == "sigmoid":
        made = torch.nn.functional.logsigmoid(made)
    allowed = attention_mask(keys, masks.get("memory_lengths"), masks.get("mask"))
    allowed = torch.ones_like(made, dtype=torch.bool) if allowed is None else allowed.expand_as(made)
    empty = ~allowed.any(-1, keepdim=True)
    made = made.masked_fill(~(allowed | empty), -torch.inf)
    alignments = torch.softmax(made, -1).masked_fill(empty, 0.0)
    context = (alignments * reference.dropout_factors(made.shape, p, seed, made)) @ values
    return context, alignments, torch.logsumexp(made, -1).masked_fill(empty[..., 0], 0.0)


def results_of(outputs: list[Tensor], tensors: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(
        outputs, tensors, [g.to(t.device, t.dtype) for g, t in zip(grads, outputs, strict=True)], allow_unused=True
    )
    found = dict(zip(NAMES, (*outputs, *gradients), strict=True))
    return {name: t.detach().cpu() for name, t in found.items() if t is not None}


@slow_if(
    lambda fused, score, masks, dtype, queries, normalizer, **_: (
        masks != "both"
        or (interpreted(fused) and dtype != torch.float32)
        or (interpreted(fused) and (score, queries) not in (("tanh", MANY), ("dot", TQ), ("relu", 1)))
    )
)
@scores
@masks
@normalizers
@pytest.mark.parametrize("queries", [1, TQ, MANY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_at_once(
    score: str, masks: str, normalizer: str, queries: int, dtype: torch.dtype, fused: str, device: str
) -> None:
    """Results and gradients against the formula in float64: with the same seed, the same weights stay."""
    backend = with_kernels(fused)
    tensors = make(dtype, device, queries)
    wide, usual = ([t.detach().cpu().to(to).requires_grad_() for t in tensors] for to in (torch.float64, dtype))
    given = make_masks(masks, queries, "cpu")
    options = dict(dropout_p=0.4, normalizer=normalizer, need_log_total=True)
    on_device = make_masks(masks, queries, device)
    results, expected, seed = attend_both(score, (tensors, on_device), (wide, given), backend, **options)
    assert results.log_total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(results.log_total.isfinite().cpu(), expected.log_total.isfinite())
    grads = [torch.randn_like(t) for t in finite(expected)]
    ours = results_of(finite(results), tensors, grads)
    exact = results_of(finite(expected), wide, grads)
    of_eager = results_of(list(by_eager(score, usual, given, normalizer, 0.4, seed)), usual, grads)
    assert ours.keys() == exact.keys()
    for name, right in exact.items():
        eager_error = (of_eager[name].double() - right).abs().max().item()
        error = (ours[name].double() - right).abs().max().item()
        allowed = tolerance(name, dtype, right, eager_error)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager {eager_error:.3g})"


@slow_if(lambda fused, score, **_: interpreted(fused) and score != "dot")
@pytest.mark.parametrize("queries", [TQ, MANY])
@pytest.mark.parametrize("score", ["tanh", "relu", "dot"])
def test_padding(score: str, queries: int, fused: str, device: str) -> None:
    """NaN in what is not attended changes no bit."""
    backend = with_kernels(fused)
    masks = make_masks("both", queries, device)
    allowed = attention_mask(torch.empty(B, TK, A, device=device), **masks)

    def run(fill: float) -> list[Tensor]:
        query, keys, values, v, bias, score_bias = (t.detach() for t in make(torch.float32, device, queries))
        query = query.masked_fill(~allowed.any(2)[..., None], fill)
        keys, values = (t.masked_fill(~allowed.any(1)[..., None], fill) for t in (keys, values))
        score_bias = score_bias.masked_fill(~allowed, fill)
        tensors = [t.requires_grad_() for t in (query, keys, values, v, bias, score_bias)]
        torch.manual_seed(3)
        options = dict(clip=2.0, dropout_p=0.4, normalizer="sigmoid", need_log_total=True)
        context, alignments, log_total = attend(score, tensors, backend=backend, **options, **masks)
        grads = (torch.ones_like(context), alignments.detach().masked_fill(~allowed, fill), torch.ones_like(log_total))
        gradients = torch.autograd.grad((context, alignments, log_total), tensors, grads, allow_unused=True)
        return [context, alignments, log_total, *(g for g in gradients if g is not None)]

    for poisoned, clean in zip(run(float("nan")), run(0.25), strict=True):
        assert torch.equal(poisoned, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_large_scores(dtype: torch.dtype, fused: str, device: str) -> None:
    """1 - sigmoid is small there, and no difference of alignments that are rounded."""
    if fused != "triton":
        pytest.skip("made of the alignments on the CPU: docs/numerics.md")
    query, keys, values, _, _, score_bias = (t.detach() for t in make(dtype, device))
    score_bias = (0.2 * score_bias + 8.0).requires_grad_()
    wide = score_bias.detach().cpu().double().requires_grad_()
    options = dict(scale=0.05, normalizer="sigmoid")
    ours = dot_attention(query, keys, values, score_bias=score_bias, backend=fused, **options).context
    others = (t.cpu().double() for t in (query, keys, values))
    exact = dot_attention(*others, score_bias=wide, backend="reference", **options).context
    (found,), (right,) = (torch.autograd.grad(c.sum(), x) for c, x in ((ours, score_bias), (exact, wide)))
    size = right.abs().max()
    assert 0 < size < 1e-3
    bound = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.cpu().double(), right, rtol=0, atol=bound * size.item())


@slow_if(lambda fused, **_: interpreted(fused))
@scores
@normalizers
def test_derivatives(score: str, normalizer: str, fused: str, device: str) -> None:
    backend = with_kernels(fused)
    tensors = make(device=device)
    used = [i for i in range(6) if score != "dot" or i not in (3, 4)]

    def function(*given: Tensor) -> list[Tensor]:
        every = list(tensors)
        for i, t in zip(used, given, strict=True):
            every[i] = t
        torch.manual_seed(4)
        options = dict(dropout_p=0.3, normalizer=normalizer, need_log_total=True)
        return finite(attend(score, every, backend=backend, **options, **make_masks("lengths", TQ, device)))

    inputs = [tensors[i] for i in used]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("score", ["dot", "tanh"])
def test_gradient_of_the_sum_of_log_totals(score: str, fused: str, device: str) -> None:
    """Which is one number, with strides of 0."""
    tensors = make(device=device)
    gradients = []
    for backend in (with_kernels(fused), "reference"):
        log_total = attend(score, tensors, need_log_total=True, backend=backend).log_total
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


# Backends and errors --------------------------------------------------------------------------------------------------


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels go before those of CUDA C++, which have no options; where "cuda" is named it is refused."""
    backends = importlib.import_module("attn_kernels.backends")
    for name in (None, "cuda"):
        monkeypatch.setitem(backends._chosen, (name, "cuda"), "cuda")
    monkeypatch.setitem(backends._able, ("triton", "cuda"), True)
    able = attending.OPTIONS.backends
    assert backends.choose_among(able, None, "cuda") == "triton"
    assert backends.choose_among(able, "cuda", "cuda") is None
    monkeypatch.setitem(backends._able, ("triton", "cuda"), False)
    assert backends.choose_among(able, None, "cuda") is None
    assert backends.choose_among(able, None, "cpu") == backends.choose(None, "cpu")


def test_cuda_is_refused() -> None:
    available("cuda")
    query, keys = (torch.randn(s).to(device_of("cuda")) for s in ((2, 3, 4), (2, 6, 4)))
    with pytest.raises(ValueError, match="dot_attention: backend 'cuda' has no kernels for score_bias, dropout_p"):
        dot_attention(query, keys, keys, dropout_p=0.5, backend="cuda")


@slow_if(lambda fused, name, **_: fused != "cpu" or name != "activated")
@pytest.mark.parametrize("name", ["additive", "activated", "dot"])
def test_opcheck(name: str, fused: str, device: str) -> None:
    backend = with_kernels(fused)
    tensors = make(torch.float32, device)
    numbers = {"additive": (), "activated": (ACTIVATIONS.index("leaky_relu"), 0.2), "dot": (0.5,)}[name]
    own = tensors[5:] if name == "dot" else (*tensors[3:], tensors[1].detach().flip(0))  # the last one is extra
    masks = make_masks("both", TQ, device).values()
    inputs = (*tensors[:3], *own, *numbers, 0.3, 1, 1.5, torch.tensor(5, device=device), *masks)
    forward, backward = (kernel(f"{name}_attention_with_options{end}", backend) for end in ("", "_backward"))
    torch.library.opcheck(forward, (*inputs, True))
    inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs)
    context, alignments, log_total = forward(*inputs, True)
    grads = (torch.ones_like(context), torch.ones_like(alignments), torch.ones_like(log_total))
    torch.library.opcheck(backward, (*grads, *inputs, alignments, log_total, True, True))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        (dict(score_bias=torch.zeros(2, 3, 5)), ValueError, r"score_bias must have shape \(B, Tq, Tk\) = \(2, 3, 6\)"),
        (dict(score_bias=torch.zeros(2, 3, 6).double()), TypeError, "score_bias must have the dtype of query"),
        (dict(score_bias=1.0), TypeError, "score_bias must be a tensor, got float"),
        (dict(dropout_p=1.0), ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
        (dict(dropout_p="much"), TypeError, "dropout_p must be a number, got str"),
        (dict(normalizer="sparsemax"), ValueError, "normalizer must be 'softmax' or 'sigmoid', got 'sparsemax'"),
        (dict(normalizer=torch.relu), ValueError, "attn_kernels.mechanisms.normalize and NormalizedAttention take"),
        (dict(clip=0.0), ValueError, "clip must be positive, got 0.0"),
        (dict(clip=-3), ValueError, "clip must be positive, got -3.0"),
        (dict(clip=float("inf")), ValueError, "clip must be a finite number, got inf"),
        (dict(clip="much"), TypeError, "clip must be a number, got str"),
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
