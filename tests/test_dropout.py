"""The dropout mask of the weights: random, determined by torch's seed, and the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import additive_attention, dot_attention, reference
from attn_kernels.ops import kernel
from matrix import is_slow
from test_options import with_kernels


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


def splitmix64(seed: int, index: int) -> int:
    """24 bits, by Python's own integers."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 40


def test_dropout_factors() -> None:
    seed, p = 0x0123456789ABCDEF, 0.3
    factors = reference.dropout_factors((2, 3, 5), p, seed, torch.zeros((), dtype=torch.float64)).flatten()
    for index, factor in enumerate(factors.tolist()):
        assert factor == pytest.approx(1 / (1 - p) if splitmix64(seed, index) >= p * 2**24 else 0.0)


def drawn(output: int) -> int:
    """The seed of which SplitMix64 makes that number first."""

    def unshifted(z: int, bits: int) -> int:
        x = z
        for _ in range(64 // bits):
            x = z ^ (x >> bits)
        return x

    z = unshifted(output, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z = unshifted(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (unshifted(z, 30) - 0x9E3779B97F4A7C15) % 2**64


def kept(queries: int, steps: int, p: float, seed: int, backend: str, device: str) -> Tensor:
    """Which weights stay in a forward, and in its backward."""
    of_dropout = torch.tensor(seed, device=device)
    query, keys = torch.zeros(2, queries, 4, device=device), torch.zeros(2, steps, 4, device=device)
    values = torch.eye(steps, device=device).expand(2, steps, steps)
    arguments = (query, keys, values, None, 1.0, p, 0, 0.0, of_dropout, None, None)
    if backend == "reference":
        return reference.dropout_factors((2, queries, steps), p, seed, query) > 0
    context, alignments, log_total = kernel("dot_attention_with_options", backend)(*arguments, True)
    backward = kernel("dot_attention_with_options_backward", backend)
    # Each query has a column of its own, so that the gradient of values is a list of weights.
    grad = torch.eye(queries, device=device).expand(2, queries, queries).contiguous()
    arguments = (
        query,
        keys,
        torch.zeros(2, steps, queries, device=device),
        None,
        1.0,
        p,
        0,
        0.0,
        of_dropout,
        None,
        None,
    )
    dvalues = backward(grad, None, None, *arguments, alignments, log_total, True, True)[2]
    assert torch.equal(dvalues.mT > 0, context > 0)
    return context > 0


SEEDS = [(0.1, 0), (0.3, -5), (0.7, 0x0123456789ABCDEF), (0.999, 2**63 - 1)]
QUERIES = (1, 5, 20)


# In Triton's interpreter each seed has one of the numbers of queries.
@pytest.mark.left_out_if(
    lambda backend, p, seed, queries: is_slow(backend) and SEEDS.index((p, seed)) % 3 != QUERIES.index(queries)
)
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize(("p", "seed"), SEEDS)
def test_same_weights_stay_on_every_backend(p: float, seed: int, queries: int, backend: str, device: str) -> None:
    """Bit for bit, in the forward and in the backward."""
    found = kept(queries, 150, p, seed, with_kernels(backend), device).cpu()
    expected = [splitmix64(seed, index) >= p * 2**24 for index in range(found.numel())]
    assert found.flatten().tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7, 0.9999])
def test_first_number_that_stays(p: float, backend: str, device: str) -> None:
    """What is compared is not rounded to float32."""
    with_kernels(backend)
    for number in range(int(p * 2**24) - 1, int(p * 2**24) + 3):
        seed = drawn(number << 40)
        assert splitmix64(seed, 0) == number
        signed = seed - 2**64 if seed >= 2**63 else seed
        assert kept(1, 1, p, signed, backend, device)[0].item() == (number >= p * 2**24)


def attend(query: Tensor, keys: Tensor, v: Tensor | None = None) -> Tensor:
    if v is None:
        return dot_attention(query, keys, keys, dropout_p=0.5).context
    return additive_attention(query, keys, keys, v, dropout_p=0.5).context


def two_calls(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Results and gradients of two calls after one seed."""
    torch.manual_seed(7)
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = function(*leaves)
        found += [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]
    return found


@pytest.mark.parametrize("v", [None, torch.randn(4), torch.randn(2, 4)], ids=["dot", "additive", "several"])
def test_a_graph_draws_another_seed_in_each_call(v: Tensor | None) -> None:
    """As eager calls do: compiled, with the backward of the same mask, and exported."""
    inputs = [torch.randn(2, 3, 4), torch.randn(2, 7, 4), *([] if v is None else [v])]
    expected = two_calls(attend, *inputs)
    half = len(expected) // 2
    assert not torch.equal(expected[0], expected[half])
    compiled: Any = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(two_calls(compiled, *inputs), expected)

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return attend(*given)

    program = torch.export.export(Module(), tuple(inputs)).module()
    torch.manual_seed(7)
    torch.testing.assert_close([program(*inputs) for _ in range(2)], expected[::half])


@pytest.mark.parametrize("v", [None, torch.randn(4)], ids=["dot", "additive"])
def test_vmap(v: Tensor | None) -> None:
    """A seed for each element, or the same one for all, as vmap is asked for; gradients are of the same weights."""
    query, keys = torch.randn(2, 3, 4), torch.randn(2, 7, 4)
    four = query.expand(4, -1, -1, -1).clone()

    def gradient(q: Tensor) -> tuple[Tensor, Tensor]:
        value, pull = torch.func.vjp(lambda q: attend(q, keys, v), q)[:2]
        return value, pull(torch.ones_like(value))[0]

    torch.manual_seed(7)
    expected = gradient(query)
    torch.manual_seed(7)
    for found, one in zip(torch.vmap(gradient, randomness="same")(four), expected, strict=True):
        torch.testing.assert_close(found, one.expand_as(found))
    different = torch.vmap(gradient, randomness="different")(four)[0]
    assert len(different.flatten(1).unique(dim=0)) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda q: attend(q, keys, v))(four)
