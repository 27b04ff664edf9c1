"""MultiHeadAttention against the formulas, one head and one pair at a time."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from attn_kernels import ArgumentTypeError, ArgumentValueError, BahdanauAttention, Memory
from attn_kernels.mechanisms import HeadsMemory, MultiHeadAttention
from formulas import (
    LENGTHS,
    MASKS,
    TK,
    TQ,
    B,
    allowed,
    assert_same,
    check_backend,
    check_formula,
    check_padding,
    check_precision,
    gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Q, M, UNITS, H = 5, 4, 7, 3
FORMS = {
    "additive": {},
    "dot": {"score": "dot"},
    "dot, tanh": {"score": "dot", "tanh": True},
    "sizes": {"value_size": 2, "output_size": 9, "scale": 2.0},
    "one head": {"heads": 1},
}


def make(form: str, **options: object) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(Q, M, UNITS, **{"heads": H, "dtype": torch.float64, **FORMS[form], **options})


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, TQ, Q, dtype=dtype).requires_grad_(), torch.randn(B, TK, M, dtype=dtype).requires_grad_()


def by_hand(module: MultiHeadAttention, query: Tensor, memory: Tensor, allow: Tensor) -> tuple[Tensor, Tensor]:
    p = dict(module.named_parameters())
    contexts, alignments = [], []
    for b in range(B):
        for i in range(TQ):
            steps = allow[b, i].nonzero().flatten().tolist()
            rows, parts = [], []
            for h in range(module.heads):
                own = slice(h * UNITS, (h + 1) * UNITS)
                own_values = slice(h * module.value_size, (h + 1) * module.value_size)
                row, part = memory.new_zeros(TK), memory.new_zeros(module.value_size)
                if steps:
                    scores = []
                    for j in steps:
                        q = p["query_projection.weight"][own] @ query[b, i] + p["query_projection.bias"][own]
                        k = p["memory_projection.weight"][own] @ memory[b, j]
                        q, k = (q.tanh(), k.tanh()) if module.tanh else (q, k)
                        scores.append(q @ k if module.score == "dot" else p["v"][h] @ torch.tanh(q + k))
                    exponentials = (module.scale * torch.stack(scores)).exp()
                    row = row.index_put((torch.tensor(steps),), exponentials / exponentials.sum())
                    part = sum(row[j] * (p["value_projection.weight"][own_values] @ memory[b, j]) for j in steps)
                rows.append(row)
                parts.append(part)
            contexts.append(p["output_projection.weight"] @ torch.cat(parts))
            alignments.append(torch.stack(rows))
    return torch.stack(contexts).unflatten(0, (B, TQ)), torch.stack(alignments).unflatten(0, (B, TQ)).transpose(1, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS)
def test_formula(form: str, masks: str) -> None:
    check_formula(make(form), inputs(), MASKS[masks], by_hand)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    small = query[:, :2].detach().requires_grad_(), memory[:, :3].detach().requires_grad_()
    lengths = LENGTHS.clamp(max=3)
    assert torch.autograd.gradcheck(lambda q, m: tuple(module(q, module.memory(m, lengths))), small)


@pytest.mark.parametrize("form", FORMS)
def test_padding_has_no_effect(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    check_padding(module, query, memory, LENGTHS)


@pytest.mark.parametrize("form", FORMS)
def test_ways_to_call(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    made = module.memory(memory, LENGTHS)
    context, alignments = module(query, made)
    torch.testing.assert_close(module(query, made, average=True).alignments, alignments.mean(1))
    assert module(query, made, need_weights=False).alignments is None
    one = module(query[:, 1], made)
    torch.testing.assert_close(one.context, context[:, 1])
    torch.testing.assert_close(one.alignments, alignments[:, :, 1])
    assert module(query[:, 1], made, average=True).alignments.shape == (B, TK)
    rows = torch.tensor([2, 0, 2])
    torch.testing.assert_close(module(query[rows], made.select(rows)).context, context[rows])
    torch.testing.assert_close(
        module.double()(query, made.to(torch.float32).to(torch.float64)).context, context, rtol=1e-5, atol=1e-5
    )
    assert made.batch_size == B
    assert module(query, module.memory(memory[:, :0])).alignments.shape == (B, module.heads, TQ, 0)


def test_a_memory_is_a_pytree() -> None:
    module, (query, memory) = make("additive"), inputs()
    made = module.memory(memory, LENGTHS)
    copy = _pytree.tree_map(lambda x: x.clone(), made)
    assert isinstance(copy, HeadsMemory)
    torch.testing.assert_close(module(query, copy), module(query, made))


@pytest.mark.parametrize("form", ["additive", "dot, tanh"])
def test_gradients_of_many_steps(form: str) -> None:
    """Steps on one memory, whose gradients may be gathered, and all of them as one call."""
    module, (query, memory) = make(form), inputs()
    made = module.memory(memory, LENGTHS)
    context = torch.stack([module(query[:, i], made).context for i in range(TQ)], dim=1)
    one = module(query, module.memory(memory, LENGTHS)).context
    of = {"query": query, "memory": memory}
    assert_same(gradients(module, (context,), **of), gradients(module, (one,), **of))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    formula = partial(by_hand, allow=allowed(MASKS["lengths"]))
    check_precision(partial(make, form), inputs, LENGTHS, formula, dtype)


@pytest.mark.parametrize("form", ["additive", "dot, tanh"])
def test_backends(form: str, backend: str, device: str) -> None:
    check_backend(partial(make, form), inputs, LENGTHS, backend=backend, device=device)


@pytest.mark.parametrize("form", ["additive", "dot, tanh"])
def test_compile_and_autocast(form: str) -> None:
    module, (query, memory) = make(form, dtype=torch.float32), inputs(torch.float32)
    made = module.memory(memory, LENGTHS)
    exact = module(query, made)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(query, made), exact)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(query, module.memory(memory, LENGTHS))
    torch.testing.assert_close(got.context.float(), exact.context, rtol=0.05, atol=0.05)


def test_errors() -> None:
    for options, message in (
        ({"score": "general"}, "score must be 'additive' or 'dot', got 'general'"),
        ({"tanh": True}, "tanh must be False with score='additive'"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"value_size": -1}, "value_size must be a positive integer, got -1"),
        ({"scale": math.inf}, "scale must be a finite number"),
    ):
        with pytest.raises(ArgumentValueError, match=f"^MultiHeadAttention: {message}"):
            MultiHeadAttention(Q, M, UNITS, **options)
    module, (query, memory) = make("additive"), inputs()
    single = BahdanauAttention(Q, M, UNITS, dtype=torch.float64).memory(memory)
    with pytest.raises(ArgumentTypeError, match=r"memory must be a HeadsMemory, .*got Memory"):
        module(query, single)
    with pytest.raises(ArgumentValueError, match="as of another module's memory"):
        module(query, make("one head").memory(memory))
    with pytest.raises(ArgumentValueError, match="query must have shape"):
        module(query[1:], module.memory(memory))
    with pytest.raises(ArgumentTypeError, match="query must be a tensor"):
        module(None, module.memory(memory))
    assert "heads=3, score='additive'" in repr(module)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module.reset_parameters()
    assert not any(torch.equal(before[name], p) for name, p in module.named_parameters())


def test_export(tmp_path: Path) -> None:
    module, (query, memory) = make("additive"), inputs()
    made = module.memory(memory.detach(), LENGTHS)
    program = torch.export.export(module, (query.detach(), made))
    torch.export.save(program, tmp_path / "heads.pt2")
    with torch.serialization.safe_globals([Memory, HeadsMemory]):  # example inputs, which are saved beside the program
        loaded = torch.export.load(tmp_path / "heads.pt2").module()
    torch.testing.assert_close(tuple(loaded(query.detach(), made)), tuple(module(query.detach(), made)))
