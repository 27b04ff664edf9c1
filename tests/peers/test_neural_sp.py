"""neural_sp's MoChA by formula, and by itself where its source is on the path: there is no package of it.

Its additive energies have relu, where the papers and we have tanh: here they are taken with tanh. Its limits, 1e-6 and
1e-5, are where nothing of these inputs gets.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from attn_kernels.mechanisms import MonotonicChunkwiseAttention

T, TK, Q, M, UNITS = 4, 7, 5, 6, 8
LENGTHS = [7, 4, 1]
WIDTHS = {"1": 1, "3": 3, "all": None}
widths = pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
SOURCE = importlib.util.find_spec("neural_sp")


def make(width: int | None, mode: str) -> MonotonicChunkwiseAttention:
    torch.manual_seed(0)
    ours = MonotonicChunkwiseAttention(Q, M, UNITS, width, mode, normalize=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(-1.0, 1.0)
        ours.g.fill_(3.0)
        ours.score_bias.fill_(-0.5)
    return ours


def inputs() -> tuple[Tensor, Tensor]:
    """Queries (T, B, Q) and encoder outputs (B, Tk, M)."""
    torch.manual_seed(1)
    queries = torch.randn(T, 3, Q, dtype=torch.float64, requires_grad=True)
    return queries, torch.randn(3, TK, M, dtype=torch.float64, requires_grad=True)


def decode(ours: MonotonicChunkwiseAttention, queries: Tensor, outputs: Tensor) -> list[Tensor]:
    """Contexts, alignments and monotonic alignments of each step."""
    memory = ours.memory(outputs, torch.tensor(LENGTHS))
    state = ours.initial_state(memory)
    results = []
    for query in queries:
        context, alignments, state = ours(query, memory, state)
        results += [context, alignments, state.alignments[:, 0]]
    return results


def energies(ours: MonotonicChunkwiseAttention, query: Tensor, steps: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each step of a sentence, (Tk, M): that of stopping there, and that of the chunks."""
    w_query, w_key = ours.query_projection.weight, ours.memory_projection.weight
    v = ours.g * ours.v / ours.v.norm()
    stop, chunk = [], []
    for step in steps:
        hidden = w_query @ query + w_key @ step
        stop.append(v @ torch.tanh(hidden[:UNITS] + ours.bias) + ours.score_bias)
        chunk.append(ours.chunk_v @ torch.tanh(hidden[UNITS:] + ours.chunk_bias))
    return stop, chunk


def soft_step(
    stop: list[Tensor], chunk: list[Tensor], previous: list[Tensor], width: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of training: alpha by quotients of the products of 1 - p, and beta by sums of exponentials."""
    alpha: list[Tensor] = []
    product, quotients = 1.0, 0.0
    for energy, before in zip(stop, previous, strict=True):
        p = 1 / (1 + torch.exp(-energy))
        quotients = quotients + before / max(product, 1e-6)
        alpha.append(p * product * quotients)
        product = product * torch.clamp(1 - p, min=1e-6)
    most = max(chunk)
    exponentials = [torch.clamp(torch.exp(energy - most), min=1e-5) for energy in chunk]
    sums = [sum(exponentials[max(0, k - width + 1) : k + 1]) for k in range(len(chunk))]
    beta = [
        exponential * sum(alpha[k] / sums[k] for k in range(j, min(j + width, len(chunk))))
        for j, exponential in enumerate(exponentials)
    ]
    return alpha, beta


def hard_step(
    stop: list[Tensor], chunk: list[Tensor], previous: list[Tensor], width: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of decoding: alpha is the first step from the previous one on with p >= 0.5, and beta a softmax of its chunk."""
    zero = torch.zeros_like(stop[0])
    alpha, beta = [zero] * len(stop), [zero] * len(stop)
    at = [j for j, before in enumerate(previous) if before > 0]
    ends = [j for j in range(at[0], len(stop)) if 1 / (1 + math.exp(-stop[j].item())) >= 0.5] if at else []
    if ends:
        first = max(0, ends[0] - width + 1)
        total = sum(torch.exp(energy) for energy in chunk[first : ends[0] + 1])
        alpha[ends[0]] = zero + 1
        beta[first : ends[0] + 1] = [torch.exp(energy) / total for energy in chunk[first : ends[0] + 1]]
    return alpha, beta


def by_formula(ours: MonotonicChunkwiseAttention, queries: Tensor, outputs: Tensor) -> list[Tensor]:
    """As decode, of each sentence without its padding."""
    sentences = []
    for b, length in enumerate(LENGTHS):
        zero = outputs.new_zeros(())
        previous, results = [zero + 1] + [zero] * (length - 1), []
        for query in queries[:, b]:
            step = hard_step if ours.mode == "hard" else soft_step
            made = energies(ours, query, outputs[b, :length])
            previous, beta = step(*made, previous, ours.chunk_size or length)
            context = sum(weight * x for weight, x in zip(beta, outputs[b], strict=False))
            rows = [torch.stack([*row, *[zero] * (TK - length)]) for row in (beta, previous)]
            results += [context, *rows]
        sentences.append(results)
    return [torch.stack(parts) for parts in zip(*sentences, strict=True)]


def check_same(results: list[Tensor], expected: list[Tensor], *leaves: Tensor) -> None:
    torch.testing.assert_close(results, expected)
    gradients = []
    for outputs in (results, expected):
        torch.manual_seed(2)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*gradients)


@widths
@pytest.mark.parametrize("mode", ["recursive", "parallel", "hard"])
def test_formula(mode: str, width: int | None) -> None:
    ours, (queries, outputs) = make(width, mode), inputs()
    expected = by_formula(ours, queries, outputs)
    check_same(decode(ours, queries, outputs), expected, queries, outputs, *ours.parameters())
    if mode == "hard":
        assert [row[1].argmax().item() for row in expected[2::3]] == [2, 2, 2, 3]
        assert [row[0].any().item() for row in expected[2::3]] == [True, False, False, False]


@pytest.mark.skipif(SOURCE is None, reason="neural_sp's source is not on the path: tests/peers/requirements.txt")
@widths
@pytest.mark.parametrize("mode", ["parallel", "hard"])
def test_itself(mode: str, width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentence by sentence, as it decodes; in float32, as its hard choices are."""
    from neural_sp.models.modules.mocha.mocha import MoChA

    ours, (queries, outputs) = make(width, mode), inputs()
    with pytest.warns(FutureWarning, match="weight_norm"):
        theirs = MoChA(M, Q, UNITS, M, "add", -1 if width is None else width, noise_std=0.0)
    mine = dict(ours.named_parameters())
    named = {"monotonic_energy.v.weight_g": ours.g.view(1), "monotonic_energy.v.weight_v": ours.v[None]}
    named |= {"monotonic_energy.r": ours.score_bias.view(1), "monotonic_energy.w_key.bias": ours.bias}
    for name, part in (("monotonic_energy", slice(UNITS)), ("chunk_energy", slice(UNITS, None))):
        named[f"{name}.w_key.weight"] = mine["memory_projection.weight"][part]
        named[f"{name}.w_query.weight"] = mine["query_projection.weight"][part]
    named |= {"chunk_energy.w_key.bias": ours.chunk_bias, "chunk_energy.v.weight": ours.chunk_v[None]}
    known = theirs.state_dict()
    theirs.load_state_dict({name: x.detach().view_as(known[name]) for name, x in named.items() if name in known})
    monkeypatch.setattr(torch, "relu", torch.tanh)
    for b, length in enumerate(LENGTHS):
        steps, previous = outputs[b : b + 1, :length].float(), None
        expected = []
        theirs.reset()
        for query in queries[:, b : b + 1, None].float():
            context, previous, kept = theirs(steps, steps, query, None, previous, mode=mode)
            beta = previous if width == 1 else kept["beta"]
            expected += [context[0, 0], beta[0, 0, 0], previous[0, 0, 0]]
        results = [x[b, : x.shape[1] if i % 3 == 0 else length] for i, x in enumerate(decode(ours, queries, outputs))]
        torch.testing.assert_close([x.float() for x in results], expected)
