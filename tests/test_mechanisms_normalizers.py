"""normalize and NormalizedAttention against the formulas, one row at a time."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import formulas
from attn_kernels import ArgumentTypeError, ArgumentValueError, BahdanauAttention, CosineAttention, LuongAttention
from attn_kernels.mechanisms import (
    CoverageAttention,
    ForwardAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    NormalizedAttention,
    PointerAttention,
    normalize,
)
from formulas import every_kind

pytestmark = pytest.mark.usefixtures("one_thread")

B, TQ, TK, Q, M, UNITS = 3, 2, 6, 4, 5, 7
LENGTHS = torch.tensor([6, 0, 3])
MASK = torch.rand(B, TQ, TK, generator=torch.Generator().manual_seed(1)) < 0.6
MASKS = every_kind(LENGTHS, MASK)
allowed = partial(formulas.allowed, shape=(B, TQ, TK))


def sparsemax(x: Tensor) -> Tensor:
    """Martins, Astudillo, "From softmax to sparsemax", 2016, algorithm 1, for a tensor (..., n) with -inf."""
    ordered = x.sort(-1, descending=True).values.clamp(min=-1e30)
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    support = 1 + count * ordered > ordered.cumsum(-1)
    size = support.sum(-1, keepdim=True)
    threshold = (torch.where(support, ordered, 0.0).sum(-1, keepdim=True) - 1) / size
    return (x - threshold).clamp(min=0)


def row(scores: list[float], normalizer: object) -> list[float]:
    """The alignments of some scores, all of which may be attended."""
    if normalizer is sparsemax:
        return sparsemax(torch.tensor(scores, dtype=torch.float64)).tolist()
    if normalizer == "hardmax":
        return [float(j == scores.index(max(scores))) for j in range(len(scores))]
    weights = [math.exp(s) if normalizer == "softmax" else 1 / (1 + math.exp(-s)) for s in scores]
    return [weight / sum(weights) for weight in weights]


def by_hand(scores: Tensor, allow: Tensor, normalizer: object) -> Tensor:
    result = torch.zeros_like(scores)
    for b in range(B):
        for i in range(TQ):
            steps = allow[b, i].nonzero().flatten().tolist()
            if steps:
                result[b, i, steps] = torch.tensor(row(scores[b, i, steps].tolist(), normalizer), dtype=scores.dtype)
    return result


NORMALIZERS = ["softmax", "sigmoid", "hardmax", sparsemax]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("masks", MASKS)
def test_formula(normalizer: object, masks: str) -> None:
    torch.manual_seed(0)
    scores = 2 * torch.randn(B, TQ, TK, dtype=torch.float64)
    expected = by_hand(scores, allowed(MASKS[masks]), normalizer)
    torch.testing.assert_close(normalize(scores, **MASKS[masks], normalizer=normalizer), expected)
    if masks != "mask per query" and masks != "both":
        got = normalize(scores[:, 0], **MASKS[masks], normalizer=normalizer)
        torch.testing.assert_close(got, expected[:, 0])


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", sparsemax])
@pytest.mark.parametrize("masks", MASKS)
def test_gradcheck(normalizer: object, masks: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(B, TQ, TK, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: normalize(s, **MASKS[masks], normalizer=normalizer), scores)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_padding_has_no_effect(normalizer: object) -> None:
    """NaN in padding, and a gradient of 0 there, with a gradient of the result that is not."""
    torch.manual_seed(0)
    clean = torch.randn(B, TQ, TK, dtype=torch.float64)
    allow = allowed(MASKS["both"])
    poisoned = clean.masked_fill(~allow, math.nan).requires_grad_()
    got = normalize(poisoned, **MASKS["both"], normalizer=normalizer)
    torch.testing.assert_close(got.detach(), by_hand(clean, allow, normalizer))
    if normalizer == "hardmax":
        assert not got.requires_grad
        return
    (grad,) = torch.autograd.grad((got * torch.randn_like(got)).sum(), poisoned)
    assert grad.isfinite().all()
    assert (grad[~allow] == 0).all()
    assert (grad[0] != 0).any()


def test_smoothing_of_scores_below_every_float() -> None:
    scores = torch.tensor([[-2000.0, -2001.0, -5000.0]])
    expected = torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.0]])
    torch.testing.assert_close(normalize(scores, normalizer="sigmoid"), expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(normalizer: object, dtype: torch.dtype) -> None:
    """Computed in float32: the result is the exact one, rounded once."""
    torch.manual_seed(0)
    scores = torch.randn(B, TQ, TK).to(dtype)
    got = normalize(scores, LENGTHS, normalizer=normalizer)
    assert got.dtype == dtype
    expected = by_hand(scores.double(), allowed(MASKS["lengths"]), normalizer)
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("normalizer", [*NORMALIZERS, lambda x: x.softmax(-1) + 0 * x.max(-1, keepdim=True).values])
def test_no_steps(normalizer: object) -> None:
    scores = torch.randn(B, TQ, 0, requires_grad=True)
    got = normalize(scores, torch.zeros(B, dtype=torch.int64), normalizer=normalizer)
    assert got.shape == (B, TQ, 0)
    assert normalize(torch.randn(0, TK), normalizer=normalizer).shape == (0, TK)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(TK),), ArgumentValueError, r"scores must have shape \(B, Tq, Tk\) or \(B, Tk\), got \(6,\)"),
        ((torch.ones(B, TK, dtype=torch.int64),), ArgumentTypeError, "scores must be floating point"),
        ((torch.randn(B, TK), torch.tensor([7, 0, 1])), ArgumentValueError, "memory_lengths must be in 0..Tk"),
        ((torch.randn(B, TK), None, torch.ones(B, TK)), ArgumentTypeError, "mask must be bool"),
        ((torch.randn(B, TK), None, None, "max"), ArgumentValueError, "normalizer must be 'softmax'.*got 'max'"),
        ((torch.randn(B, TK), None, None, lambda x: x.sum()), ArgumentValueError, "must return a tensor of the shape"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^normalize: .*{message}"):
        normalize(*arguments)


MODULES = {
    "bahdanau": lambda **k: BahdanauAttention(Q, M, UNITS, **k),
    "normalized": lambda **k: BahdanauAttention(Q, M, UNITS, normalize=True, **k),
    "general": lambda **k: LuongAttention(Q, M, scale=True, **k),
    "concat": lambda **k: LuongAttention(Q, M, UNITS, score="concat", **k),
    "cosine": lambda **k: CosineAttention(Q, M, UNITS, **k),
}


def scores_of(module: BahdanauAttention, query: Tensor, memory: Tensor) -> Tensor:
    """(B, Tq, Tk), of the broadcast formula."""
    made, keys = module.make_query(query), module.memory(memory).keys
    score = module.make_score(module.memory(memory))
    if hasattr(score, "v"):
        bias = 0 if score.bias is None else score.bias
        return torch.tanh(made[:, :, None] + keys[:, None] + bias) @ score.v
    return made @ keys.mT


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_module(name: str, normalizer: object) -> None:
    torch.manual_seed(0)
    mechanism = MODULES[name](dtype=torch.float64)
    module = NormalizedAttention(mechanism, normalizer)
    query, memory = torch.randn(B, TQ, Q, dtype=torch.float64), torch.randn(B, TK, M, dtype=torch.float64)
    expected = by_hand(scores_of(mechanism, query, memory).detach(), allowed(MASKS["lengths"]), normalizer)
    context, alignments = module(query, module.memory(memory, LENGTHS))
    torch.testing.assert_close(alignments, expected)
    torch.testing.assert_close(context, expected @ memory)
    one, none = module(query[:, 1], module.memory(memory, LENGTHS), need_weights=False)
    torch.testing.assert_close(one, context[:, 1])
    assert none is None
    assert {key.removeprefix("attention.") for key in module.state_dict()} == set(mechanism.state_dict())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", sparsemax])
def test_module_gradients_and_padding(name: str, normalizer: object) -> None:
    """gradcheck; then the same gradients with NaN in padding and in the query of the row with nothing to attend."""
    torch.manual_seed(0)
    module = NormalizedAttention(MODULES[name](dtype=torch.float64), normalizer)
    query, memory = torch.randn(B, TQ, Q, dtype=torch.float64), torch.randn(B, TK, M, dtype=torch.float64)
    inputs = (query.requires_grad_(), memory.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, m: module(q, module.memory(m, LENGTHS)), inputs)

    def gradients(q: Tensor, m: Tensor) -> list[Tensor]:
        q, m = q.detach().requires_grad_(), m.detach().requires_grad_()
        context, alignments = module(q, module.memory(m, LENGTHS))
        loss = (context.cos() + context).sum() + alignments.square().sum()
        return list(torch.autograd.grad(loss, (q, m, *module.parameters())))

    clean = gradients(query, memory)
    q, m = query.detach().clone(), memory.detach().clone()
    q[1], m[1], m[2, 3:] = math.nan, math.nan, math.nan
    torch.testing.assert_close(gradients(q, m), clean, rtol=0, atol=0)
    assert (clean[0][1] == 0).all()


def test_softmax_is_the_mechanism_itself() -> None:
    torch.manual_seed(0)
    mechanism = BahdanauAttention(Q, M, UNITS)
    module = NormalizedAttention(mechanism, "softmax")
    query, memory = torch.randn(B, TQ, Q), module.memory(torch.randn(B, TK, M), LENGTHS)
    torch.testing.assert_close(module(query, memory), mechanism(query, memory), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_smoothing_on_backends(name: str, backend: str, device: str) -> None:
    """In one pass where the backend has one, by scores elsewhere."""
    torch.manual_seed(0)
    module = NormalizedAttention(MODULES[name](backend=backend), "sigmoid").to(device)
    query, memory = torch.randn(B, TQ, Q).to(device), torch.randn(B, TK, M).to(device)
    masks, lengths = {name: x.to(device) for name, x in MASKS["both"].items()}, LENGTHS.to(device)
    scores = scores_of(module.attention, query, memory).detach().double().cpu()
    expected = by_hand(scores, allowed(MASKS["both"]), "sigmoid")
    context, alignments = module(query, module.memory(memory, **masks))
    torch.testing.assert_close(alignments.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(context.double().cpu(), expected @ memory.double().cpu(), rtol=1e-5, atol=1e-6)
    one = module(query[:, 1], module.memory(memory, lengths), need_weights=False)
    assert one.alignments is None
    torch.testing.assert_close(one.context, module(query, module.memory(memory, lengths)).context[:, 1])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_compile(normalizer: object) -> None:
    torch.manual_seed(0)
    module = NormalizedAttention(BahdanauAttention(Q, M, UNITS), normalizer)
    query, memory = torch.randn(B, TQ, Q), module.memory(torch.randn(B, TK, M), **MASKS["both"])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, memory), module(query, memory))


def test_module_under_autocast() -> None:
    torch.manual_seed(0)
    module = NormalizedAttention(BahdanauAttention(Q, M, UNITS), "sigmoid")
    query, memory = torch.randn(B, TQ, Q), torch.randn(B, TK, M)
    exact = module(query, module.memory(memory, LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        got = module(query, module.memory(memory, LENGTHS))
    assert got.context.dtype == torch.bfloat16
    torch.testing.assert_close(got.context.float(), exact.context, rtol=0.02, atol=0.02)


def test_module_errors() -> None:
    with pytest.raises(ArgumentTypeError, match="attention must be an AttentionModule, got Linear"):
        NormalizedAttention(torch.nn.Linear(2, 2), "sigmoid")
    with pytest.raises(ArgumentValueError, match="normalizer must be"):
        NormalizedAttention(BahdanauAttention(Q, M, UNITS), "sum")
    for stateful in (LocationSensitiveAttention, CoverageAttention, ForwardAttention, MonotonicAttention):
        for normalizer in ("softmax", "sigmoid"):
            with pytest.raises(ArgumentTypeError, match=f"must be one without a state, got {stateful.__name__}"):
                NormalizedAttention(stateful(Q, M, UNITS), normalizer)
    with pytest.raises(ArgumentTypeError, match="must be one whose step is a score, got PointerAttention"):
        NormalizedAttention(PointerAttention(Q, M, UNITS), "sigmoid")
    module = NormalizedAttention(BahdanauAttention(Q, M, UNITS), "sigmoid")
    with pytest.raises(ArgumentValueError, match="BahdanauAttention: query must have shape"):
        module(torch.randn(B, TQ, Q + 1), module.memory(torch.randn(B, TK, M)))
    assert "normalizer='sigmoid'" in repr(module)


@pytest.mark.parametrize("function", ["sparsemax", "entmax15"])
def test_entmax(function: str) -> None:
    """Those of the package entmax are normalizers as they are: rows of any length, and rows with nothing to attend."""
    entmax = pytest.importorskip("entmax")
    torch.manual_seed(0)
    scores = torch.randn(B, TQ, TK, dtype=torch.float64)
    normalizer = getattr(entmax, function)
    got = normalize(scores, LENGTHS, normalizer=normalizer)
    if function == "sparsemax":
        torch.testing.assert_close(got, by_hand(scores, allowed(MASKS["lengths"]), sparsemax))
    for b in (0, 2):
        steps = int(LENGTHS[b])
        torch.testing.assert_close(got[b, :, :steps], normalizer(scores[b, :, :steps], dim=-1))
        assert (got[b, :, steps:] == 0).all()
    assert (got[1] == 0).all()
    module = NormalizedAttention(BahdanauAttention(Q, M, UNITS, dtype=torch.float64), normalizer)
    query = torch.randn(B, TQ, Q, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(B, TK, M, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, m: module(q, module.memory(m, LENGTHS)), (query, memory))
