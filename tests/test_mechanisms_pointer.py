"""PointerAttention against the formulas of the papers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import formulas
from attn_kernels import ArgumentTypeError, ArgumentValueError, additive_attention, additive_scores
from attn_kernels.mechanisms import PointerAttention
from formulas import LENGTHS, MASK, MASKS, TK, TQ, B, allowed, assert_same, check_backend, check_precision

pytestmark = pytest.mark.usefixtures("one_thread")

M, UNITS = 5, 7
FORMS = {
    "plain": {},
    "clip": {"clip": 10.0},
    "temperature": {"temperature": 0.5},
    "glimpse": {"glimpses": 1},
    "all": {"glimpses": 2, "clip": 2.0, "temperature": 2.0},
}


def make(form: str, **options: object) -> PointerAttention:
    torch.manual_seed(0)
    return PointerAttention(M, M, UNITS, **{"dtype": torch.float64, **FORMS[form], **options})


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, TQ, M, dtype=dtype, requires_grad=True), torch.randn(
        B, TK, M, dtype=dtype, requires_grad=True
    )


def by_hand(module: PointerAttention, query: Tensor, memory: Tensor, allow: Tensor) -> Tensor:
    """Query by query, over the steps that may be attended and no others."""
    p = dict(module.named_parameters())

    def scores(q: Tensor, steps: list[int], prefix: str = "") -> Tensor:
        w1, w2 = p[f"{prefix}memory_projection.weight"], p[f"{prefix}query_projection.weight"]
        return torch.stack([p[f"{prefix}v"] @ torch.tanh(w1 @ memory[b, j] + w2 @ q) for j in steps])

    rows = []
    for b in range(B):
        for i in range(TQ):
            steps = allow[b, i].nonzero().flatten().tolist()
            row = memory.new_full((TK,), -math.inf)
            if steps:
                q = query[b, i]
                for _ in range(module.glimpses):
                    q = torch.softmax(scores(q, steps, "glimpse_"), 0) @ memory[b, steps]
                u = scores(q, steps)
                u = u if module.clip is None else module.clip * torch.tanh(u)
                exponentials = (u / module.temperature).exp()
                row = row.index_put((torch.tensor(steps),), (exponentials / exponentials.sum()).log())
            rows.append(row)
    return torch.stack(rows).unflatten(0, (B, TQ))


def gradients(module: PointerAttention, result: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """Of a loss on the log-probabilities that are finite."""
    return formulas.gradients(module, [result.masked_fill(result.isinf(), 0.0)], **inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS)
def test_formula(form: str, masks: str) -> None:
    formulas.check_formula(make(form), inputs(), MASKS[masks], by_hand, gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", MASKS)
def test_log_total_of_the_op(masks: str, dtype: torch.dtype) -> None:
    """A score less the logarithm of the sum that the op divides by is the log-probability; -inf where there is none."""
    module, (query, outputs) = make("plain", dtype=dtype), inputs(dtype)
    memory = module.memory(outputs, **MASKS[masks])
    given = (module.make_query(query), memory.keys)
    scores = additive_scores(*given, module.v)
    found = additive_attention(*given, None, module.v, need_log_total=True, **MASKS[masks])
    expected = scores.to(found.log_total.dtype) - found.log_total[..., None]
    expected = torch.where(allowed(MASKS[masks]), expected, -math.inf)
    assert ((found.log_total == -math.inf) == ~allowed(MASKS[masks]).any(-1)).all()
    # Scores are rounded to bfloat16, the sum is of those before.
    options = {"atol": scores.abs().max().item() / 128, "rtol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(module(query, memory), expected.to(dtype), **options)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    finite = allowed(MASKS["lengths"])

    def point(q: Tensor, m: Tensor) -> Tensor:
        return module(q, module.memory(m, LENGTHS))[finite]

    assert torch.autograd.gradcheck(point, (query, memory))


@pytest.mark.parametrize("form", FORMS)
def test_padding_has_no_effect(form: str) -> None:
    """Not even with a gradient of what is -inf, and NaN there and in queries with nothing to point to."""
    module, (query, memory) = make(form), inputs()
    allow = allowed(MASKS["lengths"])
    clean = module(query, module.memory(memory, LENGTHS))
    expected = gradients(module, clean, query=query, memory=memory)
    q, m = query.detach().clone(), memory.detach().clone()
    q[1] = math.nan
    m = m.masked_fill(~allow[:, 0, :, None], math.nan)
    q.requires_grad_()
    m.requires_grad_()
    got = module(q, module.memory(m, LENGTHS))
    torch.testing.assert_close(got, clean, rtol=0, atol=0)
    assert_same(gradients(module, got, query=q, memory=m), expected, rtol=0, atol=0)
    weights = torch.randn(B, TQ, TK, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = module(q, module.memory(m, LENGTHS))
    tensors = {**dict(module.named_parameters()), "query": q, "memory": m}
    dense = torch.autograd.grad(got, list(tensors.values()), weights)
    assert_same(dict(zip(tensors, dense, strict=True)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_point_to(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    got = module(query, module.memory(memory, torch.zeros(B, dtype=torch.int64)))
    assert (got == -math.inf).all()
    for name, gradient in zip(
        ("query", "memory", *dict(module.named_parameters())),
        torch.autograd.grad(got, (query, memory, *module.parameters()), torch.ones_like(got)),
        strict=True,
    ):
        assert (gradient == 0).all(), name
    empty = module(query, module.memory(torch.randn(B, 0, M, dtype=torch.float64)))
    assert empty.shape == (B, TQ, 0)


@pytest.mark.parametrize("form", FORMS)
def test_one_query(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    for masks in ({}, {"memory_lengths": LENGTHS}, {"mask": MASK[:, 0]}):
        made = module.memory(memory, **masks)
        torch.testing.assert_close(module(query[:, 2], made), module(query, made)[:, 2])
    made = module.memory(memory, mask=MASK[:, 2:])
    torch.testing.assert_close(module(query[:, 2], made), module(query, module.memory(memory, mask=MASK))[:, 2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    formula = partial(by_hand, allow=allowed(MASKS["lengths"]))
    check_precision(partial(make, form), inputs, LENGTHS, formula, dtype)


def test_autocast() -> None:
    module, (query, memory) = make("all", dtype=torch.float32), inputs(torch.float32)
    exact = module(query, module.memory(memory, LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        got = module(query, module.memory(memory, LENGTHS))
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_compile(form: str) -> None:
    module, (query, memory) = make(form), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    made = module.memory(memory, LENGTHS)
    torch.testing.assert_close(compiled(query, made), module(query, made))


@pytest.mark.parametrize("form", ["plain", "all"])
def test_backends(form: str, backend: str, device: str) -> None:
    check_backend(partial(make, form), inputs, LENGTHS, backend=backend, device=device)


def test_steps_selected_rows() -> None:
    module, (query, memory) = make("all"), inputs()
    made = module.memory(memory, LENGTHS)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(module(query[rows], made.select(rows)), module(query, made)[rows])


def test_errors() -> None:
    for options, message in (
        ({"query_size": M + 1, "glimpses": 1}, f"query_size must be memory_size with glimpses.*got {M + 1} and {M}"),
        ({"glimpses": -1}, "glimpses must be an integer of at least 0, got -1"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"temperature": -1}, "temperature must be positive, got -1.0"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"units": 0}, "units must be a positive integer"),
    ):
        with pytest.raises(ArgumentValueError, match=f"^PointerAttention: {message}"):
            PointerAttention(**{"query_size": M, "memory_size": M, "units": UNITS, **options})
    with pytest.raises(ArgumentTypeError, match="clip must be a number, got str"):
        PointerAttention(M, M, UNITS, clip="10")
    module = make("glimpse")
    with pytest.raises(ArgumentValueError, match="as of another module's memory"):
        module(torch.randn(B, M, dtype=torch.float64), make("plain").memory(inputs()[1]))
    assert "glimpses=1" in repr(module)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module.reset_parameters()
    assert not any(torch.equal(before[name], p) for name, p in module.named_parameters())
