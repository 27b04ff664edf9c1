"""Few queries on one memory, such as beams: the CPU kernels have special tiles for each number of queries."""

from __future__ import annotations

import pytest
import torch

from attn_kernels import additive_attention, dot_attention, prepare_keys, reference

pytestmark = [pytest.mark.every_level, pytest.mark.every_form]


@pytest.mark.parametrize("prepared", [False, True], ids=["raw", "prepared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("queries", range(1, 13))
def test_every_number(compiled: str, queries: int, dtype: torch.dtype, prepared: bool) -> None:
    """Tk takes the block of rows that stays in cache and more; A and D end in a part of a vector."""
    generator = torch.Generator().manual_seed(queries)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, keys, values, v = normal(2, queries, 275), normal(2, 251, 275), normal(2, 251, 83), normal(275) / 16
    lengths = torch.tensor([251, 130])
    ready = prepare_keys(keys, backend=compiled) if prepared else None
    wide = [x.double() for x in (query, keys, values, v)]
    error = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    got = additive_attention(query, keys, values, v, prepared=ready, memory_lengths=lengths, backend=compiled)
    expected = reference.additive_attention(*wide, memory_lengths=lengths)
    torch.testing.assert_close(got.context.double(), expected.context, atol=error, rtol=0)
    torch.testing.assert_close(got.alignments.double(), expected.alignments, atol=error, rtol=0)
    got = dot_attention(query, keys, values, scale=0.06, memory_lengths=lengths, backend=compiled)
    expected = reference.dot_attention(*wide[:3], scale=0.06, memory_lengths=lengths)
    torch.testing.assert_close(got.context.double(), expected.context, atol=error, rtol=0)


def test_a_query_that_needs_tanh_itself(compiled: str) -> None:
    """One query of five is out of the range of the factored form: it alone is scored in another way."""
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 5, 40, generator=generator), torch.randn(1, 70, 40, generator=generator)
    query[0, 3] *= 60
    values, v = torch.randn(1, 70, 9, generator=generator), torch.randn(40, generator=generator)
    got = additive_attention(query, keys, values, v, prepared=prepare_keys(keys), backend=compiled)
    expected = reference.additive_attention(query.double(), keys.double(), values.double(), v.double())
    torch.testing.assert_close(got.context.double(), expected.context, atol=2e-5, rtol=0)
