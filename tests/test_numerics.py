"""NaN and Inf in attended steps, and magnitudes where fast arithmetic would overflow or lose accuracy.

The kernels compute tanh(q + k) from products of e^2q and e^2k, which is valid only within guards. A wrong guard shows
at |q| + |k| around 14.5, 22, 43 and 88, and at the smallest and largest v.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attn_kernels
from matrix import (
    MAIN,
    OPS,
    VARIANTS,
    Arguments,
    Case,
    Op,
    assert_close,
    check,
    check_by_sentences,
    eager_errors,
    interpreted,
    is_slow,
    make,
    of_variants,
    oracle,
    run,
    slow_if,
    slow_interpreted,
)

pytestmark = [pytest.mark.every_level, pytest.mark.every_form]
# docs/numerics.md says what normalizer="sigmoid" does not do with infinite and huge scores.
ops = of_variants([name for name, op in VARIANTS.items() if op.options.get("normalizer") != "sigmoid"])
# The guards are of the bounded activations: relu has none, and scores as large as its inputs.
additive = [name for name, op in VARIANTS.items() if "v" in op.inputs and "relu" not in name]
additive_ops = of_variants(additive)
# Nor have the kernels of a gate and several score vectors; packed memories have the same kernels, and with extra, keys
# that are prepared have no effect.
guarded = [
    name for name in additive if not any(word in name for word in ("gate", "vectors", "packed", "extra, prepared"))
]
guarded_ops = of_variants(guarded)


def check_arguments(op: Op, case: Case, backend: str, arguments: Arguments) -> None:
    """Against the oracle, with the tolerance widened by the size of the scores where it is above 1."""
    dtype = arguments.tensors["query"].dtype
    check(op, case, dtype, backend, arguments=arguments, condition=max(1.0, largest_score(op, arguments)))


def largest_score(op: Op, arguments: Arguments) -> float:
    """What the terms of a score amount to: the error of a sum is relative to them."""
    t = {name: x.double().cpu().nan_to_num(0, 0, 0).abs() for name, x in arguments.tensors.items()}
    if "v" in t:
        return t["v"].sum(-1).max().item()
    return op.options.get("scale", 1.0) * t["query"].amax().item() * t["keys"].amax().item() * t["query"].shape[-1]


# NaN and Inf ----------------------------------------------------------------------------------------------------------

PLACES = {
    "query": (0, -1, 2),
    "keys": (0, 3, 2),
    "values": (0, 3, 2),
    "v": (..., 2),
    "bias": (2,),
    "gate": (0, 3, 2),
    "score_bias": (0, -1, 3),
    "extra": (0, 3, 2),
}
# Small, then what takes whole vectors: a decode step, tiles of queries with a rest, many units.
SPECIAL = {
    "small": Case(B=2, Tq=3, Tk=6, A=9, D=5),
    "decode": Case(B=2, Tq=1, Tk=37, A=64, D=33),
    "9 queries": Case(B=2, Tq=9, Tk=11, A=48, D=16),
    "600 units": Case(B=2, Tq=1, Tk=7, A=600, D=5),
}


@slow_if(
    lambda backend, special, masks, size, **_: (
        special == -math.inf or (interpreted(backend) and (masks or special != math.inf or size != "small"))
    )
)
@pytest.mark.parametrize("size", SPECIAL)
@pytest.mark.parametrize("masks", [{}, {"lengths": "full"}, {"mask": "pairs"}], ids=["all", "lengths", "pairs"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@ops
def test_nan_and_inf_spread_as_the_formula_says(
    op: Op, backend: str, device: str, special: float, masks: dict, size: str
) -> None:
    if is_slow(backend) and ("lengths" in masks or size != "small"):
        pytest.skip("the other masks and the small size are enough for Triton's interpreter")
    case = SPECIAL[size]._replace(**masks)
    for name in op.inputs:
        if name in ("v", "bias") and "mask" in masks:
            continue  # they take part in every pair, padding too: whether 0 * NaN is 0 there is left open
        if name == "v" and op.options.get("activation") == "sigmoid" and not op.masked:
            continue  # the tanh of half the argument, plus a constant: where v is Inf, Inf - Inf
        for dtype in (torch.float32, torch.bfloat16)[: 1 if is_slow(backend) else 2]:
            arguments = make(op, case, dtype, device)
            arguments.tensors[name][PLACES[name]] = special
            try:
                check_arguments(op, case, backend, arguments)
            except AssertionError as error:
                raise AssertionError(f"{special} in {name}, {dtype}\n{error}") from None


@slow_interpreted((math.inf, -math.inf))
@pytest.mark.parametrize("pair", [(math.inf, -math.inf), (-math.inf, math.inf), (math.inf, math.inf)])
@ops
def test_inf_meets_inf(op: Op, backend: str, device: str, pair: tuple[float, float]) -> None:
    """inf - inf is NaN, and tanh(inf) is 1, whatever e^inf would make of it."""
    case = Case(B=2, Tq=3, Tk=6, A=9, D=5)
    arguments = make(op, case, torch.float32, device)
    arguments.tensors["query"][PLACES["query"]], arguments.tensors["keys"][PLACES["keys"]] = pair
    check_arguments(op, case, backend, arguments)


@ops
def test_nan_stays_in_its_row(op: Op, backend: str, device: str) -> None:
    """One sentence of a batch that is NaN leaves the others as they were."""
    case = Case(B=3, Tq=3, Tk=6, A=9, D=5)
    arguments = make(op, case, torch.float32, device)
    arguments.tensors["keys"][1] = math.nan
    check_arguments(op, case, backend, arguments)
    results = run(op.function, op, arguments, backend=backend)
    for name in (*op.outputs, "dquery", "dkeys"):
        assert results[name][[0, 2]].isfinite().all(), name
        if "relu" not in op.options.get("activation", "tanh"):  # the gradient of relu does not depend on its size
            assert results[name][1].isnan().all(), name


# Magnitudes -----------------------------------------------------------------------------------------------------------


@slow_interpreted(100.0)
@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@ops
def test_large_inputs(op: Op, backend: str, device: str, dtype: torch.dtype, size: float) -> None:
    case = Case(B=2, Tq=5, Tk=19, A=35, D=8, lengths="random")
    arguments = make(op, case, dtype, device)
    for name in ("query", "keys"):
        arguments.tensors[name].mul_(size)
    if op.options.get("activation") not in ("relu", "leaky_relu") or size <= 100:
        return check_arguments(op, case, backend, arguments)
    # Scores become as large as rectified units, and where two are close their rounding decides. The yardstick is that
    # of eager in any order of the units, all the same to the formula: in a single one it may be right by luck.
    exact, results = oracle(op, arguments), run(op.function, op, arguments, backend=backend)
    random = torch.Generator().manual_seed(0)
    orders = [of_units(arguments, torch.randperm(case.A, generator=random)) for _ in range(8)]
    errors = [eager_errors(op, other, oracle(op, other)) for other in (arguments, *orders)]
    largest = {name: max(error[name] for error in errors) for name in exact}
    assert_close(results, exact, largest, dtype, max(1.0, largest_score(op, arguments)))


def of_units(arguments: Arguments, order: Tensor) -> Arguments:
    """The arguments with their units in another order."""
    apart = ("values", "score_bias")
    tensors = {n: t if n in apart else t[..., order.to(t.device)] for n, t in arguments.tensors.items()}
    return arguments._replace(tensors=tensors)


@slow_interpreted(0.05)
@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@additive_ops
def test_small_inputs(op: Op, fused: str, device: str, dtype: torch.dtype, size: float) -> None:
    """Scores of tanh near 0, where 1 - 2 / (1 + e^2x) would show how exact its reciprocal is."""
    for queries, units in [(3, 16)] if is_slow(fused) else [(1, 40), (9, 40), (10, 512)]:
        arguments = make(op, Case(B=2, Tq=queries, Tk=19, A=units, D=8), dtype, device)
        for name in ("query", "keys", "bias"):
            arguments.tensors[name].mul_(size)
        check_arguments(op, Case(), fused, arguments)


def _vectors(size: int) -> dict[str, Tensor]:
    signs = torch.tensor([1.0, -1.0]).repeat(size)[:size]
    steps = torch.arange(size)
    return {
        "zero": torch.zeros(size),
        "some zeros": signs * (steps % 3 > 0),
        "negative zeros": -torch.zeros(size),
        "denormal": signs * 1e-40,
        "denormal and zeros": signs * 1e-40 * (steps % 3 > 0),
        "tiny": signs * 1e-30,
        "large": signs * 1e4,
        "all sizes": signs * 10.0 ** (steps % 9 - 4.0),
        "all sizes and zeros": signs * 10.0 ** (steps % 13 - 8.0) * (steps % 4 > 0),
        "one large": torch.where(steps == 4, 1e4, 1e-3),
        "denormal and large": torch.where(steps % 2 == 0, 1e-40, 1e4),
    }


@slow_if(lambda backend, vector, size, **_: interpreted(backend) and (vector != "all sizes" or size == 1.0))
@pytest.mark.parametrize("size", [1.0, 8.0, 20.0])
@pytest.mark.parametrize("vector", _vectors(1))
@additive_ops
def test_score_vector(op: Op, backend: str, device: str, vector: str, size: float) -> None:
    sizes = [(3, 1), (3, 5), (3, 19), (3, 48)] + [(1, 16), (1, 100), (9, 21), (9, 100)] * (not is_slow(backend))
    for queries, units in sizes:
        case = Case(B=2, Tq=queries, Tk=9, A=units, D=6)
        arguments = make(op, case, torch.float32, device)
        arguments.tensors["v"].copy_(_vectors(units)[vector])
        arguments.tensors["query"].mul_(size)
        try:
            check_arguments(op, case, backend, arguments)
        except AssertionError as error:
            raise AssertionError(f"{queries} queries, {units} units\n{error}") from None


@slow_interpreted(math.inf)
@pytest.mark.parametrize("largest", [64.0, 1e37, math.inf])
def test_large_score_vector_of_many_units(backend: str, device: str, largest: float) -> None:
    """From |q| + |k| = 10 on the factored form is right for any v of 256 units or more, unless v leaves its range."""
    op = OPS["additive_scores"]
    for queries in [9] if is_slow(backend) else [1, 3, 19]:
        case = Case(B=1, Tq=queries, Tk=9, A=300, without=("bias",), receives=())
        arguments = make(op, case, torch.float32, device)
        arguments.tensors["query"].mul_(6.0)
        arguments.tensors["keys"].mul_(3.0)
        arguments.tensors["v"].mul_(64.0)[..., 4] = largest
        try:
            check(op, case, torch.float32, backend, arguments=arguments)
        except AssertionError as error:
            raise AssertionError(f"{queries} queries\n{error}") from None


# |q| + |k| where a kernel changes its form or could leave its range: sharing of a division by two, three or four; the
# reach from which on a large v may use the factored form; the exponentials themselves.
LIMITS = (2.0, 5.0, 14.5, 16.0, 19.0, 22.0, 27.0, 32.0, 43.0, 44.0, 86.0, 88.0)


def edges(coarse: float) -> list[float]:
    """Steps over the whole range, and in float32 the numbers next to each limit, and fine steps around it."""
    steps = [a + coarse * i for a, b in ((0.5, 46), (78, 92)) for i in range(int((b - a) / coarse) + 1)]
    away = (0.0, 2.0**-23, 1e-4, 0.01, 0.05)
    return sorted(steps + [limit * (1 + sign * d) for limit in LIMITS for d in away for sign in (-1, 1)])


# The score vector decides by its norm from which reach on the factored form may be used (never, if it is large), and by
# its smallest elements how large a denominator gets: up to 2^24 times that of the largest.
VECTORS = {
    "norm 1": lambda units: unit_norm(torch.randn(units, generator=torch.Generator().manual_seed(2))),
    "norm 4": lambda units: 4 * VECTORS["norm 1"](units),
    "norm of a normal vector": lambda units: units**0.5 * VECTORS["norm 1"](units),
    "one large, norm 1": lambda units: unit_norm(torch.where(torch.arange(units) == 4, 1.0, -3e-7)),
    "all sizes, norm 1": lambda units: unit_norm(2.0 ** -(torch.arange(units) * 7.0 % 27)),
    "all sizes and zeros, norm 1": lambda units: unit_norm(_vectors(units)["all sizes and zeros"]),
    "all sizes": lambda units: _vectors(units)["all sizes"],
    "denormal and large": lambda units: _vectors(units)["denormal and large"],
}


def rows(t: Tensor) -> Tensor:
    """The number of each row of (B, T, A), as (T, 1)."""
    return torch.arange(t.shape[1], device=t.device)[:, None]


def unit_norm(v: Tensor) -> Tensor:
    return v / v.norm()


@slow_if(lambda fused, share, vector, **_: interpreted(fused) or share != 0.5 or vector != "all sizes, norm 1")
# Variants share the guards of the op: each vector in turn has two of the four shares there.
@pytest.mark.left_out_if(
    lambda op, share, cancel, vector, **_: (
        op not in MAIN.values()
        and (share == 0.5) == ((list(VARIANTS.values()).index(op) + list(VECTORS).index(vector)) % 2 == 0)
    )
)
@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize(
    ("share", "cancel"),
    [(0.0, False), (0.5, False), (0.5, True), (1.0, False)],
    ids=["all in k", "same sign", "opposite signs", "all in q"],
)
@guarded_ops
def test_edges_of_guards(op: Op, fused: str, device: str, share: float, cancel: bool, vector: str) -> None:
    """|q| + |k| in small steps, all in q, all in k or half and half; with opposite signs q + k is of the order of 1.

    Each sentence of a batch has its own |q| + |k|; neighbours in size are compared together.
    """
    slow = is_slow(fused)
    if slow and vector not in ("one large, norm 1", "all sizes"):
        pytest.skip("the other vectors are enough for Triton's interpreter")
    steps = [float(step) for step in range(5, 92, 8)] if slow else edges(2.0 if interpreted(fused) else 0.5)
    totals = torch.tensor(steps, device=device)
    sizes = [(1, 48), (3, 21), (9, 100)]  # a step of a decoder, a part of a tile, whole tiles
    if not interpreted(fused):
        sizes += [(1, 100), (9, 48)]
    for queries, units in sizes[1:2] if slow else sizes:
        case = Case(B=len(totals), Tq=queries, Tk=9, A=units, D=6, without=("bias",))
        arguments = make(op, case, torch.float32, device)
        query, keys = arguments.tensors["query"], arguments.tensors["keys"]
        signs = torch.where(query[:, :1] > 0, 1.0, -1.0)  # of each unit
        for t, part, sign in ((query, share, 1), (keys, 1 - share, -1 if cancel else 1)):
            size = part * totals[:, None, None]
            less = torch.rand(t.shape, generator=torch.Generator().manual_seed(1)).to(device)
            less[:, :, -1] = 0  # the sum of the largest |q| and |k| is the total itself
            # A little less in the first rows, so that all factors are large; anything from 0 on in the others.
            t.copy_(sign * signs * (size - less * torch.where(rows(t) < t.shape[1] // 2, 0.5 * min(part, 1), size)))
        arguments.tensors["v"].copy_(VECTORS[vector](units))
        condition = max(1.0, largest_score(op, arguments))
        total = None
        try:
            for b in check_by_sentences(op, arguments, fused, 6, condition=condition):
                total = totals[b].item()
        except AssertionError as error:
            raise AssertionError(f"|q| + |k| from {total} on, {queries} queries, {units} units\n{error}") from None


@slow_interpreted(0.1, 30.0)
@pytest.mark.parametrize("fused", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("of_keys", ["any", "opposite", "zero"])
@pytest.mark.parametrize("size", [0.1, 2.0, 12.0, 30.0])
def test_large_v_of_small_sums(fused: str, device: str, size: float, of_keys: str) -> None:
    """On a GPU scores of many queries are right to the rounding of each tanh, however large v and near q to -k.

    What is allowed besides is a part of the rounding of q and k, an eighth of what a rounding of 1 in each unit may add
    up to, as of 1 - 2 / (1 + e^2x).
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    query, bias, v = size / 4 * normal(1, 9, 30), size / 100 * normal(30), 50 * normal(30)
    keys = {
        "any": size / 4 * normal(1, 9, 30),
        "opposite": (1e-2 * normal(1, 9, 30) - 1) * query,
        "zero": torch.zeros(1, 9, 30),
    }[of_keys]
    if of_keys == "zero":  # what query + bias rounds off counts for nothing where its tanh is flat
        query = (3 * query).clamp(-30, 30)
        lost = query.double() + bias.double() - (query + bias).double()
        v = v.abs() * lost[0, 0].sign().float()
    tanh = (query.double()[:, :, None] + keys.double()[:, None] + bias.double()).tanh()
    scores = attn_kernels.additive_scores(*(t.to(device) for t in (query, keys, v, bias)), backend=fused).cpu().double()
    allowed = (2.5e-7 * tanh.abs() + 6e-9 * min(1, size)) @ v.double().abs()
    assert ((scores - tanh @ v.double()).abs() / allowed).max() < 1


@pytest.mark.parametrize("fused", ["cpu", "triton", "cuda"], indirect=True)
@pytest.mark.parametrize("queries", [2, 19], ids=["few", "many"])
@pytest.mark.parametrize("keys_at", [0.0, -25.0])
def test_gradients_keep_their_digits(fused: str, device: str, queries: int, keys_at: float) -> None:
    """Each term of a gradient is right to a few units in its own last place, wherever tanh is.

    1 - tanh^2 and 1 - 2 / (1 + e^2x) would be right to a few units in the last place of 1, and the reciprocal of a GPU
    has a larger error than that of a CPU.
    """
    for scale in (1.0, 1e-3):
        x = (scale * torch.linspace(-8, 8, queries) - keys_at).to(device)[None, :, None].requires_grad_()
        keys, v = torch.full((1, 1, 1), keys_at, device=device), torch.ones(1, device=device)
        exact = torch.tanh(x.detach().double() + keys_at)
        v.requires_grad_()
        keys.requires_grad_()
        for i in range(0, queries, 3):  # a single term each
            score = attn_kernels.additive_scores(x, keys, v, backend=fused)[0, i, 0]
            dx, dkey, dv = (t.double() for t in torch.autograd.grad(score, (x, keys, v)))
            slope, tanh = 1 - exact[0, i, 0] ** 2, exact[0, i, 0]
            assert abs(dx[0, i, 0] / slope - 1) < 2e-6
            assert abs(dkey[0, 0, 0] / slope - 1) < 2e-6
            assert abs(dv[0] - tanh) < 2e-6 * abs(tanh) + 1e-7
            assert dx[0].count_nonzero() == 1


@pytest.mark.parametrize("small", [1.1e-7, 5e-7, 1e-5])
@pytest.mark.parametrize("units", [48, 2048])
@additive_ops
def test_small_units_add_up(op: Op, compiled: str, units: int, small: float) -> None:
    """One large element of v beside many that are each near or below its rounding, and together are not."""
    case = Case(B=2, Tq=3, Tk=9, A=units, D=6)
    arguments = make(op, case, torch.float32)
    arguments.tensors["v"].copy_(torch.where(torch.arange(units) == 4, 1.0, -small))
    keys = arguments.tensors["keys"]
    keys.abs_().add_(1).mul_(torch.where(keys[..., :1] > 1.7, 1.0, -1.0))  # a step has one sign: nothing cancels in it
    check_arguments(op, case, compiled, arguments)


@slow_if(lambda dtype, special, **_: dtype == torch.bfloat16 and special is None)
@slow_interpreted(math.inf)
@pytest.mark.parametrize("special", [None, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("lengths", ["", "random"], ids=["all", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@additive_ops
def test_rows_of_all_magnitudes(
    op: Op, fused: str, device: str, dtype: torch.dtype, lengths: str, special: float | None
) -> None:
    """Rows in range of every form side by side in tiles of queries and steps, one of them of NaN or Inf."""
    sizes = torch.tensor([0.1, 1.0, 4.0, 9.4, 9.6, 12.0, 21.4, 30.0, 44.0, 90.0, 1e4], device=device)
    for queries, units in [(3, 16)] if is_slow(fused) else [(1, 16), (1, 600), (3, 48), (8, 35), (9, 100), (17, 21)]:
        case = Case(B=3, Tq=queries, Tk=23, A=units, D=6, lengths=lengths)
        arguments = make(op, case, dtype, device)
        for seed, name in enumerate(("query", "keys")):
            t = arguments.tensors[name]
            rng = torch.Generator().manual_seed(seed)
            t.mul_(sizes[torch.randint(len(sizes), t.shape[:2], generator=rng)][..., None] / t.abs().amax(2, True))
        if special is not None:
            arguments.tensors["query"][0, -1, units // 2] = special
        try:
            check_arguments(op, case, fused, arguments)
        except AssertionError as error:
            raise AssertionError(f"{queries} queries, {units} units\n{error}") from None


@slow_interpreted(86.0)
@pytest.mark.parametrize("size", [10.0, 40.0, 86.0, 90.0, 1e4])
@additive_ops
def test_bias_counts_in_guards(op: Op, backend: str, device: str, size: float) -> None:
    """A large bias, alone and against a query that takes it back."""
    for query in (0.0, -1.0):
        case = Case(B=2, Tq=3, Tk=9, A=21, D=6)
        arguments = make(op, case, torch.float32, device)
        arguments.tensors["bias"].fill_(size)
        arguments.tensors["query"].add_(query * size)
        check_arguments(op, case, backend, arguments)


@slow_interpreted(200.0)
@pytest.mark.parametrize("score", [80.0, 200.0, 1e4, 1e30])
@ops
def test_softmax_does_not_overflow(op: Op, backend: str, device: str, score: float) -> None:
    """Scores beyond the range of exp, of both signs, in one row."""
    case = Case(B=2, Tq=3, Tk=40, A=8, D=6, lengths="random")
    arguments = make(op, case, torch.float32, device)
    name = "v" if "v" in op.inputs else "query"
    arguments.tensors[name].mul_(score)
    check_arguments(op, case, backend, arguments)


@slow_if(lambda fused, **_: interpreted(fused))
@pytest.mark.every_level
@pytest.mark.parametrize("queries", [1, 4, 24])
def test_sums_over_a_long_memory(queries: int, fused: str, device: str) -> None:
    """Values far from 0 over 60,000 steps: one sum of all in float32 would be off by 1e-5."""
    if is_slow(fused):
        pytest.skip("too large for Triton's interpreter; its sums are those of blocks of steps")
    torch.manual_seed(0)
    query, keys = torch.randn(1, queries, 8), 0.3 * torch.randn(1, 60_000, 8)
    values = torch.rand(1, 60_000, 8) + 1
    exact = torch.softmax(query.double() @ keys.double().mT, -1) @ values.double()
    for layout in (values, values.mT.contiguous().mT):
        inputs = (t.to(device) for t in (query, keys, layout))
        context, alignments = (t.cpu() for t in attn_kernels.dot_attention(*inputs, backend=fused))
        assert (context - exact).abs().max() < 1.2e-6, "1e-6 of the tolerance policy, and a rounding"
        assert (alignments.double().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.every_level
def test_every_number_of_float16(compiled: str) -> None:
    """The mean of any two is that of float32, rounded to nearest: subnormal numbers, Inf and NaN included."""
    every = torch.arange(2**16).sub(2**15).to(torch.int16).view(torch.float16)
    values = torch.stack([every, every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]])[None]
    query, keys = torch.zeros(1, 1, 3, dtype=torch.float16), torch.zeros(1, 2, 3, dtype=torch.float16)
    context, _ = attn_kernels.dot_attention(query, keys, values, backend=compiled)
    torch.testing.assert_close(context[0], values.float().mean(1).half(), rtol=0, atol=0, equal_nan=True)
    context, _ = attn_kernels.dot_attention(query, keys, values.mT.contiguous().mT, backend=compiled)
    torch.testing.assert_close(context[0], values.float().mean(1).half(), rtol=0, atol=0, equal_nan=True)
