"""monotonic_alignments against the expectation that defines it, random walks, and TensorFlow's closed form."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from attn_kernels.mechanisms import monotonic_alignments
from monotonic_by_hand import expected_stops, walk

pytestmark = pytest.mark.usefixtures("one_thread")


def random_steps(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Probabilities, and what an earlier step may have given: a part of a distribution."""
    p_choose = torch.rand(shape, dtype=dtype)
    return p_choose, 0.9 * torch.softmax(torch.randn(shape, dtype=dtype), -1)


@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_function_is_the_expectation(mode: str) -> None:
    torch.manual_seed(0)
    p_choose, previous = random_steps(5, 9)
    expected = [expected_stops(p.tolist(), x.tolist()) for p, x in zip(p_choose, previous, strict=True)]
    torch.testing.assert_close(monotonic_alignments(p_choose, previous, mode), torch.tensor(expected).double())


@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_gradients_of_the_function(mode: str) -> None:
    torch.manual_seed(0)
    arguments = tuple(x.requires_grad_() for x in random_steps(2, 6))
    assert torch.autograd.gradcheck(partial(monotonic_alignments, mode=mode), arguments)
    assert torch.autograd.gradgradcheck(partial(monotonic_alignments, mode=mode), arguments)


def test_parallel_is_recursive() -> None:
    """As long as the products of 1 - p are above 1e-10: "parallel" divides by no less."""
    torch.manual_seed(0)
    p_choose, previous = random_steps(8, 3, 40)
    p_choose = 0.35 * p_choose
    arguments = [p_choose.requires_grad_(), previous.requires_grad_()]
    weight = torch.randn(8, 3, 40, dtype=torch.float64)
    results = [monotonic_alignments(*arguments, mode) for mode in ("parallel", "recursive")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), arguments) for x in results))


def test_parallel_clips_where_products_vanish() -> None:
    """Behind a step with p = 1 the recursion goes on from what was behind it; the closed form loses that. No NaN."""
    p_choose = torch.tensor([0.5, 1.0, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    previous = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    exact = monotonic_alignments(p_choose, previous, "recursive")
    torch.testing.assert_close(exact, torch.tensor([0.25, 0.25, 0.25, 0.125], dtype=torch.float64))
    clipped = monotonic_alignments(p_choose, previous, "parallel")
    torch.testing.assert_close(clipped, torch.tensor([0.25, 0.25, 0.0, 0.0], dtype=torch.float64))
    assert torch.autograd.grad(clipped.sum(), p_choose)[0].isfinite().all()


def test_parallel_is_tensorflows_closed_form() -> None:
    """With its limits, where products vanish: those of ``safe_cumprod`` and of the quotient."""
    torch.manual_seed(0)
    p_choose, previous = random_steps(4, 60)
    p_choose[0, 5] = p_choose[1, 0] = p_choose[2, 20:40] = 1.0
    p_choose[3] = 0.0
    expected = torch.zeros_like(previous)
    for row in range(4):
        product, quotients = 1.0, 0.0
        for j in range(60):
            quotients += previous[row, j].item() / min(max(product, 1e-10), 1.0)
            expected[row, j] = p_choose[row, j].item() * product * quotients
            product *= max(1.0 - p_choose[row, j].item(), torch.finfo(torch.float64).tiny)
    torch.testing.assert_close(monotonic_alignments(p_choose, previous, "parallel"), expected)
    assert not torch.allclose(monotonic_alignments(p_choose, previous, "recursive"), expected)


def test_long_memories() -> None:
    """1000 steps, 40 times: "recursive" in float32 is the recursion in float64, and loses nothing."""
    torch.manual_seed(0)
    result = torch.zeros(2, 1000)
    result[:, 0] = 1.0
    exact, clipped = result.double(), result
    for p_choose in 0.1 * torch.rand(40, 2, 1000):
        arrivals, arrival = [], torch.zeros(2, dtype=torch.float64)
        for j in range(1000):
            arrival = (1 - p_choose[:, j - 1].double()) * arrival + exact[:, j] if j else exact[:, 0]
            arrivals.append(arrival)
        exact = p_choose.double() * torch.stack(arrivals, 1)
        result = monotonic_alignments(p_choose, result)
        clipped = monotonic_alignments(p_choose, clipped, "parallel")
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-7)
    assert (result.sum(1) > 0.9).all() and (clipped.sum(1) < 0.01).all()


def test_hard_is_a_walk() -> None:
    """All choices of five steps, from each of them and from nowhere; the recursion gives the same."""
    for stop in itertools.product((False, True), repeat=5):
        for start in (None, *range(5)):
            previous = torch.zeros(5)
            if start is not None:
                previous[start] = 1.0
            p_choose = torch.tensor(stop).float()
            for mode in ("hard", "recursive"):
                assert monotonic_alignments(p_choose, previous, mode).tolist() == walk(list(stop), start)


@pytest.mark.parametrize("mode", ["parallel", "recursive", "hard"])
def test_function_of_no_steps(mode: str) -> None:
    assert monotonic_alignments(torch.zeros(2, 0), torch.zeros(2, 0), mode).shape == (2, 0)
    assert monotonic_alignments(torch.zeros(0, 3), torch.zeros(0, 3), mode).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_function_rounds_once(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p_choose, previous = (x.to(dtype) for x in random_steps(4, 30))
    p_choose = p_choose / 2
    exact = monotonic_alignments(p_choose.double(), previous.double(), "recursive")
    result = monotonic_alignments(p_choose, previous, mode)
    assert result.dtype == dtype
    # float32: each of 30 factors 1 - p, and a sum of 30 logarithms, has an error of its own.
    torch.testing.assert_close(result.double(), exact, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_the_ends(dtype: torch.dtype) -> None:
    """Probabilities of 0 and 1, and products that underflow."""
    p_choose = torch.tensor([[0, 1, 0, 1, 1.0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=dtype).repeat(1, 60)
    previous = torch.zeros_like(p_choose)
    previous[:, 3] = 1.0
    for mode in ("parallel", "recursive"):
        arguments = [p_choose.clone().requires_grad_(), previous.clone().requires_grad_()]
        result = monotonic_alignments(*arguments, mode)
        grads = torch.autograd.grad(result.square().sum(), arguments)
        assert all(x.isfinite().all() for x in (result, *grads))


def test_refusals_of_the_function() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"mode must be 'recursive' or 'parallel' or 'hard', got 'soft'"):
        monotonic_alignments(x, x, "soft")
    with pytest.raises(ValueError, match=r"previous must have shape \(\.\.\., Tk\) = \(2, 3\), got \(2, 4\)"):
        monotonic_alignments(x, torch.rand(2, 4))
    with pytest.raises(TypeError, match=r"one floating-point dtype, got torch.float32 and torch.float64"):
        monotonic_alignments(x, x.double())
    with pytest.raises(TypeError, match=r"previous must be a tensor, got list"):
        monotonic_alignments(x, [0.5])  # type: ignore[arg-type]


def test_alignments_are_frequencies_of_walks() -> None:
    """Stops of 40,000 random walks of two decoding steps, after equation 8's own words."""
    generator = torch.Generator().manual_seed(0)
    p_choose = torch.rand(2, 7, generator=generator) * 0.6
    walks = 40_000
    at = torch.zeros(walks, dtype=torch.int64)
    previous = torch.zeros(7)
    previous[0] = 1.0
    for p in p_choose:
        draws = torch.rand(walks, 7, generator=generator) < p
        draws &= torch.arange(7) >= at[:, None]
        at = torch.where(draws.any(1), draws.int().argmax(1), 7)  # 7: nowhere
        previous = monotonic_alignments(p, previous)
        frequencies = torch.bincount(at, minlength=8)[:7] / walks
        deviations = (previous * (1 - previous) / walks).sqrt()
        assert ((frequencies - previous).abs() <= 4.5 * deviations).all()
