"""Monotonic, chunkwise and stepwise monotonic attention, against the recursions of their papers, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels import additive_attention, dot_attention
from attn_kernels.mechanisms import (
    MonotonicAttention,
    MonotonicChunkwiseAttention,
    StepwiseMonotonicAttention,
)
from monotonic_by_hand import chunkwise, energy_of, monotonic, monotonic_dot, stepwise, walk
from stepwise import (
    MASKS,
    TK,
    UNITS,
    B,
    K,
    M,
    Parameters,
    Q,
    allowed,
    check_formula,
    decode,
    inputs,
    make_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MECHANISMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "monotonic": (lambda **k: MonotonicAttention(Q, M, UNITS, **k), monotonic),
    "monotonic-parallel": (lambda mode="parallel", **k: MonotonicAttention(Q, M, UNITS, mode=mode, **k), monotonic),
    "monotonic-normalized": (lambda **k: MonotonicAttention(Q, M, UNITS, normalize=True, **k), monotonic),
    "monotonic-dot": (lambda **k: MonotonicAttention(Q, M, score="dot", **k), monotonic_dot),
    "monotonic-dot-scaled": (lambda **k: MonotonicAttention(Q, M, score="dot", normalize=True, **k), monotonic_dot),
    "mocha": (lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, 3, **k), chunkwise),
    "mocha-1": (lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, 1, **k), partial(chunkwise, width=1)),
    "mocha-wide": (lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, 50, **k), partial(chunkwise, width=50)),
    "mocha-parallel": (
        lambda mode="parallel", **k: MonotonicChunkwiseAttention(Q, M, UNITS, 3, mode=mode, **k),
        chunkwise,
    ),
    "mocha-normalized": (lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, 3, normalize=True, **k), chunkwise),
    "mocha-dot": (
        lambda **k: MonotonicChunkwiseAttention(Q, M, chunk_size=3, score="dot", normalize=True, **k),
        partial(chunkwise, units=Q),
    ),
    "milk": (lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, None, **k), partial(chunkwise, width=None)),
    "stepwise": (lambda **k: StepwiseMonotonicAttention(Q, M, UNITS, **k), stepwise),
    "stepwise-normalized": (
        lambda **k: StepwiseMonotonicAttention(Q, M, UNITS, normalize=True, score_bias_init=0.3, **k),
        stepwise,
    ),
    "stepwise-dot": (lambda **k: StepwiseMonotonicAttention(Q, M, score="dot", **k), partial(stepwise, units=Q)),
}


make = partial(make_of, {name: make for name, (make, _) in MECHANISMS.items()})


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_formula(name: str, masks: str) -> None:
    check_formula(MECHANISMS[name][1], make(name), masks)


# Hard decoding --------------------------------------------------------------------------------------------------------


def is_hard(module: torch.nn.Module, q: Tensor, m: Tensor, units: int = UNITS) -> bool:
    p = dict(module.named_parameters())
    return bool(energy_of(p, q, m, slice(units)) + p["score_bias"] > 0)


@pytest.mark.parametrize("masks", MASKS)
def test_hard_monotonic(masks: str) -> None:
    module = make("monotonic", mode="hard")
    queries, outputs = (x.detach() for x in inputs())
    _, alignments = decode(module, queries, outputs, **MASKS[masks])
    stopped = 0
    for b, k in itertools.product(range(B), range(K)):
        allow = allowed(MASKS[masks])[b, k].tolist()
        start: int | None = 0
        for query, row in zip(queries[:, b, k], alignments[:, b, k], strict=True):
            stop = [a and is_hard(module, query, m) for a, m in zip(allow, outputs[b], strict=True)]
            assert row.tolist() == walk(stop, start)
            start = int(row.argmax()) if row.any() else None
            stopped += start is not None
    assert stopped > 5


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("width", [1, 3, None])
def test_hard_chunks_are_a_softmax(width: int | None, masks: str) -> None:
    """In the chunk that ends where hard monotonic attention stops: the op's own softmax under a mask."""
    module = make("mocha" if width else "milk", mode="hard")
    module.chunk_size = width
    queries, outputs = inputs()
    contexts, alignments = decode(module, queries, outputs, **MASKS[masks])
    units = module.units
    single = MonotonicAttention(Q, M, UNITS, mode="hard", dtype=torch.float64)
    single.load_state_dict(
        {
            "memory_projection.weight": module.memory_projection.weight[:units],
            "query_projection.weight": module.query_projection.weight[:units],
            "v": module.v,
            "score_bias": module.score_bias,
        }
    )
    _, stops = decode(single, queries, outputs, **MASKS[masks])
    first = torch.zeros_like(stops) if width is None else stops.roll(-width + 1, -1)
    if width is not None and width > 1:
        first[..., -width + 1 :] = 0.0
        first[..., 0] += stops[..., : width - 1].sum(-1)  # a chunk that begins before the first step
    began = torch.ones_like(stops) if width is None else first.cumsum(-1)
    chunk = (began > 0) & (stops.flip(-1).cumsum(-1).flip(-1) > 0) & allowed(MASKS[masks])
    expected = [
        additive_attention(
            query @ module.query_projection.weight[units:].T,
            outputs @ module.memory_projection.weight[units:].T,
            outputs,
            module.chunk_v,
            module.chunk_bias,
            mask=mask,
        )
        for query, mask in zip(queries, chunk, strict=True)
    ]
    torch.testing.assert_close(contexts, torch.stack([x.context for x in expected]))
    torch.testing.assert_close(alignments, torch.stack([x.alignments for x in expected]))


def test_infinite_look_back_at_the_end_is_attention() -> None:
    """Where nothing stops before the last step, all of the memory is attended."""
    module = make("mocha-dot", mode="hard")
    module.chunk_size = None
    queries, outputs = inputs()
    memory = module.memory(outputs)
    end = torch.zeros(B, K, TK, dtype=torch.float64)
    end[..., -1] = 1.0
    with torch.no_grad():
        module.score_bias.fill_(100.0)  # stops at once: where the step before did
    context, alignments, _ = module(queries[0], memory, type(module.initial_state(memory))(end))
    expected = dot_attention(queries[0], memory.keys[..., Q:], outputs)
    torch.testing.assert_close(context, expected.context)
    torch.testing.assert_close(alignments, expected.alignments)


@pytest.mark.parametrize("masks", MASKS)
def test_hard_stepwise(masks: str) -> None:
    module = make("stepwise-normalized", mode="hard")
    with torch.no_grad():
        module.score_bias.zero_()
    queries, outputs = (x.detach() for x in inputs())
    _, alignments = decode(module, queries, outputs, **MASKS[masks])
    moved = 0
    for b, k in itertools.product(range(B), range(K)):
        places = allowed(MASKS[masks])[b, k].nonzero().flatten().tolist()
        at = 0
        for query, row in zip(queries[:, b, k], alignments[:, b, k], strict=True):
            if at < len(places) and not is_hard(module, query, outputs[b, places[at]]):
                at += 1
                moved += 1
            assert row.nonzero().flatten().tolist() == places[at : at + 1]
            assert row.sum() == (at < len(places))
    assert moved > 3


@pytest.mark.parametrize("name", ["monotonic", "mocha", "milk", "stepwise"])
def test_confident_choices_are_hard(name: str) -> None:
    """Energies far from 0: the soft form is the hard one."""
    module = make(name)
    with torch.no_grad():
        module.v.mul_(1e4)
        module.score_bias.zero_()
    queries, outputs = inputs()
    masks = MASKS["both"]
    module.mode = "recursive" if "recursive" in module.modes else "soft"
    soft = decode(module, queries, outputs, **masks)
    module.mode = "hard"
    torch.testing.assert_close(soft, decode(module, queries, outputs, **masks))


# Numbers at their ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_far_below_the_largest_energy(width: int | None, dtype: torch.dtype) -> None:
    """Exponentials of those are 0 beside that of the largest, and moving sums of them would be 0 / 0."""
    torch.manual_seed(0)
    module = MonotonicChunkwiseAttention(Q, Q, chunk_size=width, score="dot", dtype=dtype)
    outputs = torch.randn(1, 12, Q, dtype=dtype)
    outputs[:, 8] *= 1000
    outputs[:, 3:5] *= -1000
    outputs.requires_grad_()
    queries = torch.randn(3, 1, 1, Q, dtype=dtype, requires_grad=True)
    contexts, alignments = decode(module, queries, outputs)
    wide = MonotonicChunkwiseAttention(Q, Q, chunk_size=width, score="dot", dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    allow = [True] * 12
    expected = torch.tensor(
        chunkwise_of_logarithms(dict(wide.named_parameters()), queries.double(), outputs.double(), allow, width)
    ).double()
    torch.testing.assert_close(alignments[:, 0, 0].double(), expected, rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad((contexts.square().sum()), [queries, outputs, *module.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@torch.no_grad()
def chunkwise_of_logarithms(
    p: Parameters, queries: Tensor, outputs: Tensor, allow: list[bool], width: int | None
) -> list[list[float]]:
    rows = []
    memory = list(outputs[0])
    stops = monotonic(p, list(queries[:, 0, 0]), memory, allow, slice(Q))
    for query, stop in zip(queries[:, 0, 0], stops, strict=True):
        energies = torch.stack([energy_of(p, query, m, slice(Q, 2 * Q), "chunk") for m in memory])
        row = torch.zeros(len(memory), dtype=torch.float64)
        for k, x in enumerate(stop):
            first = 0 if width is None else max(0, k - width + 1)
            row[first : k + 1] += float(x) * torch.softmax(energies[first : k + 1], 0)
        rows.append(row.tolist())
    return rows


@pytest.mark.parametrize("name", MECHANISMS)
def test_saturated_choices_have_finite_gradients(name: str) -> None:
    """Energies of +-1000, in float32, on a memory of 200 steps."""
    module = make(name, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(100.0)
    queries = torch.randn(4, 2, 1, Q, requires_grad=True)
    outputs = torch.randn(2, 200, M, requires_grad=True)
    results = decode(module, queries, outputs, memory_lengths=torch.tensor([200, 90]))
    loss = sum(x.square().sum() for x in results)
    grads = torch.autograd.grad(loss, [queries, outputs, *module.parameters()], materialize_grads=True)
    assert all(x.isfinite().all() for x in (*results, *grads))


@pytest.mark.parametrize("width", [1, 2, 5, 9, 40, None])
def test_chunks_by_moving_sums(width: int | None) -> None:
    """The form of the paper, and of neural_sp: convolutions with ones, of energies for which exponentials do."""
    torch.manual_seed(0)
    module = MonotonicChunkwiseAttention(Q, M, UNITS, width, dtype=torch.float64)
    queries, outputs = torch.randn(2, B, 1, Q).double(), torch.randn(B, 30, M).double()
    memory = module.memory(outputs)
    state = module.initial_state(memory)
    for query in queries:
        result = module(query, memory, state)
        hidden = query @ module.query_projection.weight[UNITS:].T + memory.keys[..., UNITS:] + module.chunk_bias
        exponentials = torch.exp(torch.tanh(hidden) @ module.chunk_v)[:, None]
        w = 30 if width is None else width
        ones = torch.ones(1, 1, w, dtype=torch.float64)
        sums = F.conv1d(F.pad(exponentials, (w - 1, 0)), ones)
        stops = result.state.alignments
        expected = exponentials * F.conv1d(F.pad(stops / sums, (0, w - 1)), ones)
        torch.testing.assert_close(result.alignments, expected)
        state = result.state


# Noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["monotonic", "mocha", "stepwise"])
def test_noise_is_of_training(name: str) -> None:
    module, quiet = make(name, noise=2.0), make(name)
    queries, outputs = inputs()
    torch.testing.assert_close(decode(module.eval(), queries, outputs), decode(quiet, queries, outputs))
    module.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(decode(module, queries, outputs)[1])
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert not torch.allclose(runs[0], decode(quiet, queries, outputs)[1])


def test_noise_is_normal_and_before_the_sigmoid() -> None:
    """Of a memory of one step: p is sigmoid(energy + noise), so that its logit has that mean and deviation."""
    module = make("monotonic", noise=0.7)
    outputs = torch.randn(1, 1, M, dtype=torch.float64).expand(200, 1, M)
    query = torch.randn(1, 1, Q, dtype=torch.float64).expand(200, 100, Q)
    memory = module.memory(outputs)
    logits = torch.logit(module(query, memory, module.initial_state(memory, 100)).alignments)
    module.eval()
    exact = torch.logit(module(query, memory, module.initial_state(memory, 100)).alignments)[0, 0, 0]
    assert abs(logits.mean() - exact) < 5 * 0.7 / math.sqrt(logits.numel())
    assert abs(logits.std() / 0.7 - 1) < 5 / math.sqrt(2 * logits.numel())


# Particulars ----------------------------------------------------------------------------------------------------------


def test_initial_values() -> None:
    module = MonotonicAttention(Q, M, 16, score_bias_init=-2.0, normalize=True)
    assert module.score_bias.item() == -2 and module.g.item() == 0.25 and (module.bias == 0).all()
    assert MonotonicAttention(Q, M, score="dot", normalize=True).g.item() == 1
    assert MonotonicAttention(Q, M, 16).score_bias.item() == 0
    assert StepwiseMonotonicAttention(Q, M, 16).score_bias.item() == 3.5
    assert (MonotonicAttention(Q, M, 16).mode, StepwiseMonotonicAttention(Q, M, 16).mode) == ("recursive", "soft")
    state = module.initial_state(module.memory(torch.randn(2, 3, M)), 2)
    assert state.alignments.tolist() == [[[1, 0, 0]] * 2] * 2


def test_stepwise_begins_at_the_first_step_allowed() -> None:
    module = StepwiseMonotonicAttention(Q, M, 16)
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    state = module.initial_state(module.memory(torch.randn(3, 4, M), mask=mask), 2)
    assert state.alignments[:, 1].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_refusals() -> None:
    for cls in (MonotonicAttention, MonotonicChunkwiseAttention, StepwiseMonotonicAttention):
        name = cls.__name__
        with pytest.raises(ValueError, match=rf"{name}: units must be a size with score='additive', got None"):
            cls(Q, M)
        with pytest.raises(ValueError, match=rf"{name}: units must be None or query_size = 5 with score='dot', got 9"):
            cls(Q, M, 9, score="dot")
        with pytest.raises(ValueError, match=rf"{name}: score must be 'additive' or 'dot', got 'cosine'"):
            cls(Q, M, 9, score="cosine")
        with pytest.raises(ValueError, match=rf"{name}: mode must be .*'hard', got 'easy'"):
            cls(Q, M, 9, mode="easy")
        with pytest.raises(ValueError, match=rf"{name}: noise must be a finite number >= 0.0, got -1.0"):
            cls(Q, M, 9, noise=-1.0)
        with pytest.raises(TypeError, match=rf"{name}: score_bias_init must be a number, got str"):
            cls(Q, M, 9, score_bias_init="3")
        with pytest.raises(ValueError, match=rf"{name}: units must be a positive integer, got 0"):
            cls(Q, M, 0)
        module = cls(Q, M, 9)
        memory = module.memory(torch.randn(2, 4, M))
        state = module.initial_state(memory)
        with pytest.raises(ValueError, match=rf"{name}: state must have alignments \(B, K, Tk\) = \(2, \*, 4\), got"):
            module(torch.randn(2, Q), memory, type(state)(state.alignments[..., 1:]))
        module.mode = "soft and hard"
        with pytest.raises(ValueError, match=rf"{name}: mode must be .*'hard', got 'soft and hard'"):
            module(torch.randn(2, Q), memory, state)
    with pytest.raises(ValueError, match=r"chunk_size must be a positive integer, got 0"):
        MonotonicChunkwiseAttention(Q, M, 9, chunk_size=0)
