"""Local, GMM and dynamic convolution attention, against the formulas of their papers, one source step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels import additive_attention
from attn_kernels.mechanisms import (
    DynamicConvolutionAttention,
    GMMAttention,
    LocalAttention,
)
from stepwise import MASKS, TK, UNITS, B, K, M, Parameters, Q, T, check_formula, decode, inputs, make_of

pytestmark = pytest.mark.usefixtures("one_thread")

# By hand --------------------------------------------------------------------------------------------------------------


def softmax(scores: dict[int, Tensor], steps: int) -> list[Any]:
    """Of the scores of some steps; 0 elsewhere."""
    exponentials = {j: torch.exp(x) for j, x in scores.items()}
    return [exponentials[j] / sum(exponentials.values()) if j in scores else 0.0 for j in range(steps)]


def score_of(p: Parameters, q: Tensor, m: Tensor) -> Tensor:
    key = p["memory_projection.weight"] @ m
    if "v" not in p:
        return p.get("g", torch.ones(())) * (q @ key)
    hidden = torch.tanh(p["query_projection.weight"] @ q + key + p.get("bias", torch.zeros(())))
    return p["v"] @ hidden * (p["g"] / p["v"].square().sum().sqrt() if "g" in p else 1.0)


def local(
    p: Parameters, queries: list[Tensor], memory: list[Tensor], allow: list[bool], window: int = 2
) -> list[list[Any]]:
    """Luong et al. 2015, section 3.2."""
    end = max([j + 1 for j, a in enumerate(allow) if a], default=0)
    steps = []
    for i, q in enumerate(queries):
        centre: Any = float(i)
        if "position_v" in p:
            position = p["position_v"] @ torch.tanh(p["position_projection.weight"] @ q)
            centre = end / (1 + torch.exp(-position))
        inside = [j for j, a in enumerate(allow) if a and abs(j - float(torch.as_tensor(centre).detach())) <= window]
        row = softmax({j: score_of(p, q, memory[j]) for j in inside}, len(memory))
        if "position_v" in p:
            for j in inside:
                row[j] = row[j] * torch.exp(-((j - centre) ** 2) / (2 * (window / 2) ** 2))
        steps.append(row)
    return steps


def gmm(
    p: Parameters, queries: list[Tensor], memory: list[Tensor], allow: list[bool], version: int = 2
) -> list[list[Any]]:
    """Graves 2013, equations 46 to 51, and table 1 of Battenberg et al. 2020; the first step is at 1."""
    mixtures = p["mixture.bias"].shape[0] // 3
    means: list[Any] = [0.0] * mixtures
    steps = []
    for q in queries:
        hidden = torch.tanh(p["hidden.weight"] @ q + p["hidden.bias"]) if "hidden.weight" in p else q
        raw = p["mixture.weight"] @ hidden + p["mixture.bias"]
        weight, delta, sigma = raw[:mixtures], raw[mixtures : 2 * mixtures], raw[2 * mixtures :]
        row: list[Any] = [0.0] * len(memory)
        for k in range(mixtures):
            means[k] = means[k] + (torch.log(1 + torch.exp(delta[k])) if version == 2 else torch.exp(delta[k]))
            share = torch.exp(weight[k]) / torch.exp(weight).sum()
            for j, a in enumerate(allow):
                if not a:
                    continue
                if version == 0:
                    phi = torch.exp(weight[k]) * torch.exp(-torch.exp(sigma[k]) * (means[k] - (j + 1)) ** 2)
                else:
                    width = torch.log(1 + torch.exp(sigma[k])) if version == 2 else torch.sqrt(torch.exp(sigma[k]))
                    density = torch.exp(-((j + 1 - means[k]) ** 2) / (2 * width**2))
                    phi = share * density / torch.sqrt(2 * math.pi * width**2)
                row[j] = row[j] + phi
        steps.append(row)
    return steps


def beta_binomial(n: int, alpha: float, beta: float) -> list[float]:
    """By the urn: successes of n draws, each of which adds a ball of its own colour."""
    chances = [1.0]
    for draw in range(n):
        total = alpha + beta + draw
        following = [0.0] * (len(chances) + 1)
        for k, chance in enumerate(chances):
            following[k + 1] += chance * (alpha + k) / total
            following[k] += chance * (beta + draw - k) / total
        chances = following
    return chances


def dynamic_convolution(
    p: Parameters, queries: list[Tensor], memory: list[Tensor], allow: list[bool], prior_length: int = 4
) -> list[list[Any]]:
    """Battenberg et al. 2020, section 3.2."""
    steps = len(memory)
    first = allow.index(True) if any(allow) else 0
    previous: list[Any] = list(torch.eye(steps, dtype=torch.float64)[first])
    static = p["static_filters"]
    prior = beta_binomial(prior_length - 1, 0.1, 0.9)

    def convolve(weights: Tensor, j: int) -> Any:
        half = weights.shape[0] // 2
        return sum(weights[i] * previous[j + i - half] for i in range(len(weights)) if 0 <= j + i - half < steps)

    results = []
    for q in queries:
        made = p["filter_output.weight"] @ torch.tanh(p["filter_hidden.weight"] @ q + p["filter_hidden.bias"])
        dynamic = made.view(p["dynamic_projection"].shape[1], -1)
        scores = {}
        for j, a in enumerate(allow):
            if a:
                hidden = p["bias"]
                for c, weights in enumerate(static):
                    hidden = hidden + p["static_projection"][:, c] * convolve(weights, j)
                for c, weights in enumerate(dynamic):
                    hidden = hidden + p["dynamic_projection"][:, c] * convolve(weights, j)
                moved = torch.as_tensor(sum(prior[n] * previous[j - n] for n in range(prior_length) if n <= j)).double()
                scores[j] = p["v"] @ torch.tanh(hidden) + torch.log(moved.clamp_min(1e-6))
        previous = softmax(scores, steps)
        results.append(previous)
    return results


MECHANISMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "local-p": (lambda **k: LocalAttention(Q, M, UNITS, 2, **k), local),
    "local-p-normalized": (lambda **k: LocalAttention(Q, M, UNITS, 2, normalize=True, **k), local),
    "local-p-dot": (lambda **k: LocalAttention(Q, M, window=2, score="dot", normalize=True, **k), local),
    "local-m": (lambda **k: LocalAttention(Q, M, UNITS, 1, "local-m", **k), partial(local, window=1)),
    "local-m-dot": (lambda **k: LocalAttention(Q, M, None, 1, "local-m", score="dot", **k), partial(local, window=1)),
    "gmm-0": (lambda **k: GMMAttention(Q, M, None, 3, 0, initial_sigma=2.0, **k), partial(gmm, version=0)),
    "gmm-1": (lambda **k: GMMAttention(Q, M, UNITS, 3, 1, initial_sigma=1.0, **k), partial(gmm, version=1)),
    "gmm-2": (lambda **k: GMMAttention(Q, M, UNITS, 3, 2, initial_sigma=1.0, **k), partial(gmm, version=2)),
    "dynamic convolution": (
        lambda **k: DynamicConvolutionAttention(Q, M, UNITS, 2, 5, 3, 3, prior_length=4, **k),
        dynamic_convolution,
    ),
}


make = partial(make_of, {name: make for name, (make, _) in MECHANISMS.items()})


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_formula(name: str, masks: str) -> None:
    check_formula(MECHANISMS[name][1], make(name), masks)


# Local ----------------------------------------------------------------------------------------------------------------


def test_local_m_is_attention_under_a_moving_mask() -> None:
    module = make("local-m")
    queries, outputs = inputs()
    contexts, alignments = decode(module, queries, outputs, memory_lengths=torch.tensor([6, 2, 1, 4]))
    for i, query in enumerate(queries):
        steps = torch.arange(TK)
        mask = ((steps - i).abs() <= 1) & (steps < torch.tensor([6, 2, 1, 4])[:, None])
        keys = outputs @ module.memory_projection.weight.T
        expected = additive_attention(module.query_projection(query), keys, outputs, module.v, mask=mask)
        torch.testing.assert_close(contexts[i], expected.context)
        torch.testing.assert_close(alignments[i], expected.alignments)
    assert (alignments[2, 2] == 0).all()  # the window has left a sentence of one step


def test_local_m_counts_each_hypothesis() -> None:
    module = make("local-m")
    queries, outputs = inputs()
    memory = module.memory(outputs)
    state = module.initial_state(memory, K)
    assert state.step.tolist() == [[[0]] * K] * B
    ahead = type(state)(torch.tensor([[[4], [1]]] * B))
    _, alignments, following = module(queries[0], memory, ahead)
    assert (alignments > 0).int()[0].tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert following.step[0].tolist() == [[5], [2]]


def test_local_p_learns_its_positions() -> None:
    """Through the Gaussian: the gradient moves a centre toward a step whose weight is to grow."""
    torch.manual_seed(0)
    module = LocalAttention(Q, M, UNITS, window=10, dtype=torch.float64)
    outputs = torch.randn(1, 30, M, dtype=torch.float64)
    query = torch.randn(1, Q, dtype=torch.float64)
    with torch.no_grad():
        module.v.zero_()  # all scores are the same: the peak is the centre
        memory = module.memory(outputs)
    optimizer = torch.optim.Adam([module.position_v, module.position_projection.weight], lr=0.03)
    peaks = []
    for _ in range(80):
        alignments = module(query, memory, module.initial_state(memory)).alignments
        peaks.append(int(alignments.argmax()))
        optimizer.zero_grad()
        (-alignments[0, 19]).backward()
        optimizer.step()
    assert abs(peaks[0] - 19) >= 4 and abs(peaks[-1] - 19) <= 1


# GMM ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2])
def test_initial_bias(version: int) -> None:
    """With a query of 0 and no hidden layer, what the bias says alone."""
    module = GMMAttention(Q, M, None, 4, version, initial_delta=1.5, initial_sigma=3.0, dtype=torch.float64)
    memory = module.memory(torch.randn(1, 40, M, dtype=torch.float64))
    query = torch.zeros(1, Q, dtype=torch.float64)
    state = module.initial_state(memory)
    for i in range(1, 4):
        _, alignments, state = module(query, memory, state)
        torch.testing.assert_close(state.means, torch.full((1, 1, 4), 1.5 * i, dtype=torch.float64))
        shape = torch.exp(-((torch.arange(1, 41) - 1.5 * i).double() ** 2) / 18)
        expected = 4 * shape if version == 0 else shape / math.sqrt(2 * math.pi * 9)
        torch.testing.assert_close(alignments[0], expected)


def test_no_initial_bias() -> None:
    module = GMMAttention(Q, M, None, 4, 2, initial_delta=None, initial_sigma=None)
    assert (module.mixture.bias == 0).all()


@pytest.mark.parametrize("version", [1, 2])
def test_mixture_far_from_the_ends_sums_to_one(version: int) -> None:
    """Sums over whole positions are the integral, for widths of 1 and more."""
    module = make(f"gmm-{version}")
    with torch.no_grad():
        module.mixture.bias[6:9] += 2.0
    memory = module.memory(torch.randn(2, 400, M).double())
    state = type(module.initial_state(memory))(torch.full((2, 1, 3), 200.0, dtype=torch.float64))
    alignments = module(torch.randn(2, 1, Q).double(), memory, state).alignments
    torch.testing.assert_close(alignments.sum(-1), torch.ones(2, 1).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("bias", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixtures_at_their_ends(version: int, bias: float, dtype: torch.dtype) -> None:
    """Parameters that would make widths 0 or Inf, weights Inf, or positions Inf."""
    for part in range(3):
        torch.manual_seed(0)
        module = GMMAttention(Q, M, None, 3, version, dtype=dtype)
        with torch.no_grad():
            module.mixture.bias[3 * part : 3 * part + 3] = bias
        queries = torch.randn(T, 2, 1, Q, dtype=dtype, requires_grad=True)
        outputs = torch.randn(2, 30, M, dtype=dtype, requires_grad=True)
        results = decode(module, queries, outputs, memory_lengths=torch.tensor([30, 12]))
        grads = torch.autograd.grad(sum(x.sum() for x in results), [queries, outputs, *module.parameters()])
        assert all(x.isfinite().all() for x in (*results, *grads))


def test_refusals_of_gmm() -> None:
    with pytest.raises(ValueError, match=r"GMMAttention: version must be 0, 1 or 2, got 3"):
        GMMAttention(Q, M, version=3)
    with pytest.raises(ValueError, match=r"GMMAttention: mixtures must be a positive integer, got 0"):
        GMMAttention(Q, M, mixtures=0)
    with pytest.raises(ValueError, match=r"GMMAttention: initial_sigma must be > 0 or None, got 0"):
        GMMAttention(Q, M, initial_sigma=0)
    with pytest.raises(ValueError, match=r"GMMAttention: units must be a positive integer, got -1"):
        GMMAttention(Q, M, -1)
    module = GMMAttention(Q, M, mixtures=2)
    memory = module.memory(torch.randn(2, 4, M))
    state = GMMAttention(Q, M, mixtures=3).initial_state(memory)
    with pytest.raises(ValueError, match=r"state must have means \(B, K, mixtures\) = \(2, \*, 2\), got \(2, 1, 3\)"):
        module(torch.randn(2, Q), memory, state)


# Dynamic convolution --------------------------------------------------------------------------------------------------


def test_prior() -> None:
    module = DynamicConvolutionAttention(Q, M, 8, dtype=torch.float64)
    assert len(module.prior) == 11
    torch.testing.assert_close(module.prior, torch.tensor(beta_binomial(10, 0.1, 0.9), dtype=torch.float64))
    torch.testing.assert_close(module.prior.sum(), torch.ones(()).double())
    torch.testing.assert_close(module.prior @ torch.arange(11.0).double(), torch.ones(()).double())  # a step a step
    assert "prior" not in module.state_dict()


def test_prior_alone_moves_by_its_filter() -> None:
    """With v = 0 scores are the logarithm of the prior: the alignments are those before, convolved, and normalised."""
    module = DynamicConvolutionAttention(Q, M, 8, prior_length=4, dtype=torch.float64)
    with torch.no_grad():
        module.v.zero_()
    memory = module.memory(torch.randn(1, 6, M, dtype=torch.float64), torch.tensor([5]))
    previous = torch.tensor([0.1, 0.5, 0.4, 0, 0, 0], dtype=torch.float64)
    state = type(module.initial_state(memory))(previous.view(1, 1, 6))
    alignments = module(torch.randn(1, Q, dtype=torch.float64), memory, state).alignments[0]
    prior = beta_binomial(3, 0.1, 0.9)
    moved = torch.tensor([sum(prior[n] * float(previous[j - n]) for n in range(4) if n <= j) for j in range(5)])
    torch.testing.assert_close(alignments[:5], (moved / moved.sum()).double(), rtol=1e-6, atol=1e-9)
    assert alignments[5] == 0


def test_out_of_the_reach_of_the_prior() -> None:
    """The floor of 1e-6: steps behind, and far ahead, have a weight of 1e-6 relative to the prior."""
    module = DynamicConvolutionAttention(Q, M, 8, prior_length=2, dtype=torch.float64)
    with torch.no_grad():
        module.v.zero_()
    memory = module.memory(torch.randn(1, 7, M, dtype=torch.float64))
    state = type(module.initial_state(memory))(F.one_hot(torch.tensor([[3]]), 7).double())
    alignments = module(torch.randn(1, Q, dtype=torch.float64), memory, state).alignments[0]
    expected = torch.tensor([1e-6, 1e-6, 1e-6, 0.9, 0.1, 1e-6, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(alignments, expected / expected.sum())


def test_moves_with_what_comes_before() -> None:
    """Location-relative: a sentence behind two steps of padding gives the same, two steps later."""
    module = make("dynamic convolution")
    queries, outputs = inputs()
    _, alignments = decode(module, queries, outputs)
    mask = torch.tensor([False] * 2 + [True] * TK).expand(B, -1)
    _, moved = decode(module, queries, F.pad(outputs, (0, 0, 2, 0), value=float("nan")), mask=mask)
    torch.testing.assert_close(moved, F.pad(alignments, (2, 0)))


def test_dynamic_convolution_by_grouped_convolutions() -> None:
    """The form of coqui's and other implementations: a batch's own filters as the groups of one convolution."""
    module = make("dynamic convolution")
    queries, outputs = inputs()
    alignments = F.one_hot(torch.zeros(B, dtype=torch.int64), TK).double()
    _, got = decode(module, queries[:, :, 0], outputs)
    for query, row in zip(queries[:, :, 0], got, strict=True):
        filters = module.filter_output(torch.tanh(module.filter_hidden(query))).view(B * 3, 1, 3)
        dynamic = F.conv1d(alignments[None], filters, padding=1, groups=B).view(B, 3, TK)
        static = F.conv1d(alignments[:, None], module.static_filters[:, None], padding=2)
        hidden = static.mT @ module.static_projection.T + dynamic.mT @ module.dynamic_projection.T + module.bias
        prior = F.conv1d(F.pad(alignments[:, None], (3, 0)), module.prior.flip(0)[None, None])[:, 0]
        alignments = torch.softmax(torch.tanh(hidden) @ module.v + prior.clamp_min(1e-6).log(), -1)
        torch.testing.assert_close(row[:, 0] if row.dim() == 3 else row, alignments)


def test_refusals_of_dynamic_convolution() -> None:
    name = "DynamicConvolutionAttention"
    for argument in ("static_length", "dynamic_length"):
        with pytest.raises(ValueError, match=rf"{name}: {argument} must be an odd positive integer, got 4"):
            DynamicConvolutionAttention(Q, M, 8, **{argument: 4})
    with pytest.raises(ValueError, match=rf"{name}: units must be a positive integer, got None"):
        DynamicConvolutionAttention(Q, M, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{name}: prior_alpha must be a finite number >= 1e-06, got 0"):
        DynamicConvolutionAttention(Q, M, 8, prior_alpha=0)


def test_refusals_of_local() -> None:
    with pytest.raises(ValueError, match=r"LocalAttention: mode must be 'local-m' or 'local-p', got 'global'"):
        LocalAttention(Q, M, 8, mode="global")
    with pytest.raises(ValueError, match=r"LocalAttention: window must be a positive integer, got 0"):
        LocalAttention(Q, M, 8, window=0)
    module = LocalAttention(Q, M, 8)
    memory = module.memory(torch.randn(2, 4, M))
    with pytest.raises(ValueError, match=r"LocalAttention: state must have step \(B, K, 1\), got \(2, 1, 3\)"):
        module(torch.randn(2, Q), memory, GMMAttention(Q, M, mixtures=3).initial_state(memory))
