"""Scores with a large v, on small and large inputs, where the CPU kernels use compensated summation.

The tests do not use the tolerance for large scores of tests/test_numerics.py, unless the formula is exact by chance.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attn_kernels
from matrix import OPS, Case, check, make

pytestmark = pytest.mark.every_level
OP = OPS["additive_scores"]
SHAPES = {"decode": (1, 48), "few": (3, 21), "tiles": (9, 100), "many units": (10, 512)}
SINGLE = 3  # the unit that outweighs the others


def vector(units: int, norm: float, kind: str) -> Tensor:
    v = torch.randn(units, generator=torch.Generator().manual_seed(2))
    if kind == "single":
        v = torch.where(torch.arange(units) == SINGLE, 1.0, 1e-3 * v)
    return norm * v / v.norm()


@pytest.mark.parametrize("kind", ["normal", "single"])
@pytest.mark.parametrize("norm", [12.0, 64.0, 1e3])
@pytest.mark.parametrize("size", [1e-3, 0.05, 0.3, 1.0, 4.0, 12.0])
def test_scores_have_the_error_of_the_formula(compiled: str, size: float, norm: float, kind: str) -> None:
    """Measured: 1.6 of the formula's errors at most, 2.4 where a single unit decides; half of them with tanh itself."""
    for queries, units in SHAPES.values():
        case = Case(B=4, Tq=queries, Tk=19, A=units, without=("bias",), receives=())
        arguments = make(OP, case, torch.float32)
        for name in ("query", "keys"):
            arguments.tensors[name].mul_(size)
        arguments.tensors["v"].copy_(vector(units, norm, kind))
        # A unit by itself has few roundings in the formula: they are those of its v, not of the sum.
        check(
            OP, case, torch.float32, compiled, arguments=arguments, condition=max(1.0, norm if kind == "single" else 0)
        )


@pytest.mark.parametrize("opposite", [1.0, 1 - 2.0**-10, 1 - 2.0**-20], ids=["exactly", "nearly", "by bits"])
@pytest.mark.parametrize("size", [0.05, 1.0, 4.0, 12.0])
def test_arguments_that_cancel(compiled: str, size: float, opposite: float) -> None:
    """q + k near 0 with both far from it: the products of exponentials are near 1: no rounding may show."""
    for queries, units in SHAPES.values():
        case = Case(B=2, Tq=queries, Tk=queries, A=units, without=("bias",), receives=())
        arguments = make(OP, case, torch.float32)
        query, keys, v = (arguments.tensors[name] for name in ("query", "keys", "v"))
        query.mul_(size)
        keys.copy_(-opposite * query)
        v.copy_(vector(units, 64.0, "normal"))
        # The formula adds q and k without an error. Ours knows each of them to its rounding.
        check(OP, case, torch.float32, compiled, arguments=arguments, condition=max(1.0, 64.0 * units**0.5 / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.1, 8.0])
def test_prepared_keys(compiled: str, dtype: torch.dtype, size: float) -> None:
    """Prepared keys are exponentials without their rests, and in 16 bits rounded to them."""

    rng = torch.Generator().manual_seed(0)
    for queries, units in SHAPES.values():
        query, keys = (size * torch.randn(2, n, units, generator=rng).to(dtype) for n in (queries, 19))
        values, v = torch.randn(2, 19, 8, generator=rng).to(dtype), vector(units, 16.0, "normal").to(dtype)
        prepared = attn_kernels.prepare_keys(keys, backend=compiled)
        plain = attn_kernels.additive_attention(query, keys, values, v, backend=compiled)
        ours = attn_kernels.additive_attention(query, keys, values, v, prepared=prepared, backend=compiled)
        exact = torch.softmax(torch.tanh(query.double()[:, :, None] + keys.double()[:, None]) @ v.double(), -1)
        allowed = 2 * (plain.alignments.double() - exact).abs().max().item() + 1e-6
        assert (ours.alignments.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("size", [0.3, 12.0, 30.0], ids=["small arguments", "large", "beyond the limit"])
@pytest.mark.parametrize("of", ["query", "keys"])
@pytest.mark.parametrize("special", [math.nan, math.inf], ids=str)
def test_nan_and_inf_in_any_row_of_a_tile(compiled: str, special: float, of: str, size: float) -> None:
    """Every row of a tile in turn, the last one, whose limits are read last, and others."""
    rng = torch.Generator().manual_seed(0)
    v = vector(32, 6.0 if size < 1 else 0.5, "normal")
    for queries, steps in ((1, 6), (2, 2), (5, 9), (9, 7)):
        for row in range(queries if of == "query" else steps):
            query, keys = (size * torch.rand(1, n, 32, generator=rng) for n in (queries, steps))
            {"query": query, "keys": keys}[of][0, row, 5] = special
            found = attn_kernels.additive_scores(query, keys, v, backend=compiled)
            expected = torch.tanh(query.double()[:, :, None] + keys.double()[:, None]) @ v.double()
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4, equal_nan=True)


def test_a_score_does_not_depend_on_what_is_beside_it(compiled: str) -> None:
    """Tiles of queries and steps that take different forms, and each of the pairs alone."""

    rng = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.1, 0.8, 1.2, 2.0, 5.0, 9.0, 20.0, 43.5])
    query, keys = (torch.randn(1, n, 100, generator=rng) for n in (9, 19))
    for t in (query, keys):
        t.mul_(sizes[torch.randint(len(sizes), t.shape[:2], generator=rng)][..., None] / t.abs().amax(2, True))
    for norm in (1.0, 4.0, 9.0, 64.0):
        v = vector(100, norm, "normal")
        together = attn_kernels.additive_scores(query, keys, v, backend=compiled)
        alone = [
            [
                attn_kernels.additive_scores(query[:, i : i + 1], keys[:, j : j + 1], v, backend=compiled)
                for j in range(19)
            ]
            for i in range(9)
        ]
        assert torch.equal(together, torch.cat([torch.cat(row, 2) for row in alone], 1))
