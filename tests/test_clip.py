"""Clipped scores, C tanh(score): the reference against loops, results and gradients, derivatives, modules, Seq2Seq."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import BahdanauAttention, LuongAttention, additive_attention, additive_scores, dot_attention
from attn_kernels.mechanisms import NormalizedAttention
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.fused.eligibility import has_stock_steps
from matrix import interpreted, slow_if, tolerance
from test_options import (
    MANY,
    TK,
    TQ,
    B,
    attend,
    attend_both,
    by_eager,
    finite,
    make,
    make_masks,
    results_of,
    with_kernels,
)

SCORES = ("tanh", "sigmoid", "leaky_relu", "dot")


# The formula ----------------------------------------------------------------------------------------------------------


def by_hand(
    score: str, tensors: list[Tensor], clip: float, scale: float, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Context, alignments and log-sum-exp, pair by pair in numbers of Python; dot, or additive by tanh or sigmoid."""
    query, keys, values, v, bias, score_bias = (t.tolist() for t in tensors)
    context, alignments, log_total = (torch.zeros(s) for s in ((B, TQ, len(values[0][0])), (B, TQ, TK), (B, TQ)))
    context, alignments, log_total = context.double(), alignments.double(), log_total.double()

    def of_pair(q: list[float], k: list[float]) -> float:
        if score == "dot":
            return sum(x * y for x, y in zip(q, k, strict=True))
        f = math.tanh if score == "tanh" else lambda x: 1 / (1 + math.exp(-x))
        return sum(w * f(x + y + c) for w, x, y, c in zip(v, q, k, bias, strict=True))

    for b in range(B):
        for i in range(TQ):
            pairs = [clip * math.tanh(scale * of_pair(query[b][i], keys[b][j])) for j in range(lengths[b])]
            weights = [math.exp(s + score_bias[b][i][j]) for j, s in enumerate(pairs)]
            log_total[b, i] = math.log(sum(weights)) if weights else -math.inf
            for j, weight in enumerate(weights):
                alignments[b, i, j] = weight / sum(weights)
                context[b, i] += alignments[b, i, j] * torch.tensor(values[b][j], dtype=torch.float64)
    return context, alignments, log_total


@pytest.mark.parametrize("score", ["tanh", "sigmoid", "dot"])
def test_formula(score: str, backend: str, device: str) -> None:
    """The clip is of the score with its scale, its bias is added then, and the constant of sigmoid counts."""
    backend, tensors, lengths = with_kernels(backend), [t.detach() for t in make(device=device)], [TK, 0, 6]
    query, keys, values, v, bias, score_bias = tensors
    options = dict(scale=1.7, clip=2.5, score_bias=score_bias, need_log_total=True, backend=backend)
    options["memory_lengths"] = torch.tensor(lengths, device=device)
    if score == "dot":
        found = dot_attention(query, keys, values, **options)
    else:
        found = additive_attention(query, keys, values, v, bias, activation=score, **options)
        given = dict(activation=score, clip=2.5, backend=backend)
        clipped = additive_scores(query, keys, 1.7 * v, bias, **given)
        plain = additive_scores(query, keys, 1.7 * v, bias, activation=score, backend="reference")
        torch.testing.assert_close(clipped, 2.5 * plain.tanh())
    expected = by_hand(score, [t.cpu() for t in tensors], 2.5, 1.7, lengths)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=1e-10, atol=1e-12)


def test_soft_capping_is_a_scale() -> None:
    """C tanh(score / C), which leaves small scores as they are."""
    query, keys, values = (t.detach() for t in make()[:3])
    capped = dot_attention(query, keys, values, scale=0.3 / 5.0, clip=5.0)
    scores = 0.3 * query @ keys.mT
    torch.testing.assert_close(capped.alignments, torch.softmax(5.0 * torch.tanh(scores / 5.0), -1))


# Results and gradients ------------------------------------------------------------------------------------------------


@slow_if(
    lambda fused, score, dtype, queries, **_: (
        dtype == torch.float16
        or (interpreted(fused) and (dtype != torch.float32 or (score, queries) not in (("tanh", 1), ("dot", MANY))))
    )
)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_at_once(score: str, queries: int, dtype: torch.dtype, fused: str, device: str) -> None:
    """With all other options, against the formula in float64. Scores of up to about 4 are well within the bend."""
    backend, masks = with_kernels(fused), "both"
    tensors = make(dtype, device, queries)
    wide, usual = ([t.detach().cpu().to(to).requires_grad_() for t in tensors] for to in (torch.float64, dtype))
    given = make_masks(masks, queries, "cpu")
    for normalizer in ("softmax", "sigmoid"):
        options = dict(clip=3.0, dropout_p=0.4, normalizer=normalizer, need_log_total=True)
        on_device = make_masks(masks, queries, device)
        results, expected, seed = attend_both(score, (tensors, on_device), (wide, given), backend, **options)
        grads = [torch.randn_like(t) for t in finite(expected)]
        ours, exact = results_of(finite(results), tensors, grads), results_of(finite(expected), wide, grads)
        of_eager = results_of(list(by_eager(score, usual, given, normalizer, 0.4, seed, 3.0)), usual, grads)
        for name, right in exact.items():
            eager_error = (of_eager[name].double() - right).abs().max().item()
            error = (ours[name].double() - right).abs().max().item()
            allowed = tolerance(name, dtype, right, eager_error)
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager {eager_error:.3g})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_large_scores(dtype: torch.dtype, fused: str, device: str) -> None:
    """1 - tanh^2 is small there, and no difference of numbers that are rounded: eager has 0 or an error of 6%."""
    backend = with_kernels(fused)
    rng = torch.Generator().manual_seed(0)
    query = torch.ones(1, 1, 1)
    keys = (7.0 + torch.rand(1, 40, 1, generator=rng)).to(dtype).float()
    values = torch.randn(1, 40, 3, generator=rng).to(dtype).float()
    found, right = (
        torch.autograd.grad(dot_attention(q, k, x, clip=10.0, backend=name).context.sum(), k)[0]
        for name, (q, k, x) in (
            (backend, [t.to(device, dtype).requires_grad_() for t in (query, keys, values)]),
            ("reference", [t.double().requires_grad_() for t in (query, keys, values)]),
        )
    )
    bound = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.cpu().double(), right, rtol=bound, atol=bound * right.abs().max().item())


# Derivatives, transforms, compilation ---------------------------------------------------------------------------------


@slow_if(lambda backend, score, **_: interpreted(backend) or score != "tanh")
@pytest.mark.parametrize("score", SCORES)
def test_derivatives(score: str, backend: str, device: str) -> None:
    backend, tensors = with_kernels(backend), make(device=device)
    used = [i for i in range(6) if score != "dot" or i not in (3, 4)]

    def function(*given: Tensor) -> list[Tensor]:
        every = list(tensors)
        for i, t in zip(used, given, strict=True):
            every[i] = t
        options = dict(clip=2.0, need_log_total=True, backend=backend)
        return finite(attend(score, every, **options, **make_masks("lengths", TQ, device)))

    inputs = [tensors[i] for i in used]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_transforms(fused: str, device: str) -> None:
    """Forward mode and vmap: tangents are those of the reference, and a mapped axis is one of sentences."""
    backend = with_kernels(fused)
    query, keys, values = (t.detach() for t in make(torch.float32, device)[:3])

    def context(q: Tensor, name: str = backend) -> Tensor:
        return dot_attention(q, keys, values, clip=2.0, backend=name).context

    tangent = torch.randn_like(query)
    _, found = torch.func.jvp(context, (query,), (tangent,))
    _, expected = torch.func.jvp(lambda q: context(q, "reference"), (query,), (tangent,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    several = torch.stack([query, 2 * query])
    torch.testing.assert_close(torch.vmap(context)(several), torch.stack([context(q) for q in several]))


def test_compile() -> None:
    query, keys, values, v, bias, _ = make(torch.float32)

    def loss(q: Tensor) -> Tensor:
        found = additive_attention(q, keys, values, v, bias, clip=2.0)
        return found.context.sum() + (found.alignments * additive_scores(q, keys, v, bias, clip=3.0)).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), loss(query))
    torch.testing.assert_close(*(torch.autograd.grad(f(query), query) for f in (compiled, loss)))


def test_autocast() -> None:
    query, keys, values, v, bias, _ = (t.detach() for t in make(torch.float32))
    exact = additive_attention(query, keys, values, v, bias, clip=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = additive_attention(query, keys, values, v, bias, clip=2.0)
        scores = additive_scores(query, keys, v, bias, clip=2.0)
    assert found.context.dtype == scores.dtype == torch.bfloat16
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.float(), right, rtol=0.05, atol=0.03)
    torch.testing.assert_close(scores.float(), additive_scores(query, keys, v, bias, clip=2.0), rtol=0.05, atol=0.03)


def test_prepared_keys_are_refused() -> None:
    query, keys, values, v, _, _ = (t.detach() for t in make(torch.float32))
    with pytest.raises(ValueError, match="additive_attention: prepared must be None with score_bias, dropout_p, norm"):
        additive_attention(query, keys, values, v, clip=2.0, prepared=torch.zeros(1))
    with pytest.raises(ValueError, match="additive_attention: prepared must be None with activation='sigmoid'"):
        additive_attention(query, keys, values, v, clip=2.0, activation="sigmoid", prepared=torch.zeros(1))
    with pytest.raises(ValueError, match="additive_scores: clip must be positive"):
        additive_scores(query, keys, v, clip=0)


# Modules --------------------------------------------------------------------------------------------------------------

MODULES = {
    "bahdanau": lambda **k: BahdanauAttention(5, 6, 7, normalize=True, **k),
    "luong-dot": lambda **k: LuongAttention(5, 5, score="dot", scale=True, **k),
    "luong-concat": lambda **k: LuongAttention(5, 6, 7, score="concat", **k),
}


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", torch.sigmoid])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, normalizer: Any) -> None:
    """Against scores without a clip, which is then taken by hand; of steps on a memory with padding that is NaN."""
    torch.manual_seed(0)
    module = MODULES[name](clip=1.5)
    assert "clip=1.5" in repr(module)
    plain = copy.deepcopy(module)
    plain.clip = None
    made = NormalizedAttention(module, normalizer)
    query, outputs, lengths = torch.randn(3, 2, 5), torch.randn(3, 4, module.memory_size), torch.tensor([4, 0, 2])
    outputs[2, 2:] = math.nan
    context, alignments = made(query, made.memory(outputs, lengths))
    seen: list[Tensor] = []
    NormalizedAttention(plain, lambda s: seen.append(s) or torch.softmax(s, -1))(query, plain.memory(outputs, lengths))
    allowed = (torch.arange(4) < lengths[:, None])[:, None].expand(3, 2, 4)
    scores = 1.5 * torch.tanh(seen[0].masked_fill(~allowed, 0.0))
    if normalizer == "softmax":
        expected = torch.softmax(scores.masked_fill(~allowed, -1e9), -1)
    else:
        expected = torch.sigmoid(scores)
    expected = expected.masked_fill(~allowed, 0.0)
    if normalizer == "sigmoid":
        expected = (expected / expected.sum(-1, keepdim=True)).nan_to_num()
    torch.testing.assert_close(alignments, expected)
    torch.testing.assert_close(context, expected @ outputs.nan_to_num())


def test_packed_memory_is_padded() -> None:
    """By the module, since packed memories take no options."""
    module = BahdanauAttention(5, 6, 7, clip=1.5)
    outputs, query = torch.randn(2, 4, 6), torch.randn(2, 5)
    rows = torch.cat([outputs[0], outputs[1, :3]])
    packed = module.memory(rows, memory_offsets=torch.tensor([0, 4, 7]))
    expected = module(query, module.memory(outputs, torch.tensor([4, 3])))
    torch.testing.assert_close(module(query, packed).context, expected.context)
    with pytest.raises(ValueError, match="memory must be padded"):
        module(query, BahdanauAttention(5, 6, 7).memory(rows, memory_offsets=torch.tensor([0, 4, 7])))


def test_seq2seq_goes_step_by_step() -> None:
    """No fused form of a decoder knows of a clip: training and searches call the module."""
    torch.manual_seed(0)
    models = {kind: Seq2Seq(11, 12, 6, 8, 7, decoder=kind).eval() for kind in ("loop", "steps")}
    models["steps"].load_state_dict(models["loop"].state_dict())
    source, lengths, target = torch.randint(3, 11, (3, 5)), torch.tensor([5, 2, 3]), torch.randint(3, 12, (3, 4))
    before = models["loop"](source, lengths, target)[0]
    for model in models.values():
        with torch.no_grad():
            model.decoder.attention.v.mul_(20.0)
        model.decoder.attention.clip = 0.5
    logits, alignments = models["loop"](source, lengths, target)
    assert (logits - before).abs().max() > 1e-4
    torch.testing.assert_close(logits, models["steps"](source, lengths, target)[0])
    weights = alignments.detach()
    assert (weights[0].amax(-1) <= math.e * weights[0].amin(-1) * (1 + 1e-5)).all()  # scores are within -0.5..0.5
    memory, state = models["loop"].encode(source, lengths)
    assert not has_stock_steps(models["loop"].decoder, state, memory)
    models["loop"].decoder.attention.clip = None
    assert has_stock_steps(models["loop"].decoder, state, memory)
    models["loop"].decoder.attention.clip = 0.5
    found = models["loop"].generate(source, lengths, beam_size=2, max_length=5)
    again = models["steps"].generate(source, lengths, beam_size=2, max_length=5)
    for ours, theirs in zip(found, again, strict=True):
        assert [h.tokens for h in ours] == [h.tokens for h in theirs]
        for hypothesis in ours:
            at = hypothesis.alignments[:, :2]
            assert (at.amax(-1) <= math.e * at.amin(-1) * (1 + 1e-5)).all()
