"""The modules against the formulas of their papers, one pair of vectors at a time; the Memory that they share."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import formulas
from attn_kernels import BahdanauAttention, CosineAttention, LuongAttention, Memory, additive_attention, dot_attention
from formulas import assert_same, gradients, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

B, TQ, TK, Q, M, UNITS = 4, 3, 5, 6, 7, 9

Score = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]


class Mechanism(NamedTuple):
    make: Callable[..., nn.Module]
    memory_size: int
    score: Score  # of one query vector and one memory vector, with the parameters by name
    parameters: set[str]


def additive(p: dict[str, Tensor], q: Tensor, m: Tensor) -> Tensor:
    return p["v"] @ torch.tanh(p["query_projection.weight"] @ q + p["memory_projection.weight"] @ m)


def additive_normalized(p: dict[str, Tensor], q: Tensor, m: Tensor) -> Tensor:
    hidden = p["query_projection.weight"] @ q + p["memory_projection.weight"] @ m + p["bias"]
    return p["g"] * (p["v"] @ torch.tanh(hidden)) / p["v"].square().sum().sqrt()


def concat(p: dict[str, Tensor], q: Tensor, m: Tensor) -> Tensor:
    weight = torch.cat([p["query_projection.weight"], p["memory_projection.weight"]], dim=1)
    return p["v"] @ torch.tanh(weight @ torch.cat([q, m]))


def general(p: dict[str, Tensor], q: Tensor, m: Tensor) -> Tensor:
    return q @ (p["memory_projection.weight"] @ m)


def cosine(q: Tensor, m: Tensor) -> Tensor:
    return (q @ m) / (q.square().sum() * m.square().sum()).sqrt()


def cosine_projected(p: dict[str, Tensor], q: Tensor, m: Tensor) -> Tensor:
    return p["sharpness"] * cosine(p["query_projection.weight"] @ q, p["memory_projection.weight"] @ m)


BOTH = {"query_projection.weight", "memory_projection.weight"}
MECHANISMS = {
    "bahdanau": Mechanism(lambda **k: BahdanauAttention(Q, M, UNITS, **k), M, additive, BOTH | {"v"}),
    "bahdanau-normalized": Mechanism(
        lambda **k: BahdanauAttention(Q, M, UNITS, normalize=True, **k),
        M,
        additive_normalized,
        BOTH | {"v", "g", "bias"},
    ),
    "luong-dot": Mechanism(lambda **k: LuongAttention(Q, Q, score="dot", **k), Q, lambda p, q, m: q @ m, set()),
    "luong-dot-scaled": Mechanism(
        lambda **k: LuongAttention(Q, Q, score="dot", scale=True, **k), Q, lambda p, q, m: p["g"] * (q @ m), {"g"}
    ),
    "luong-general": Mechanism(lambda **k: LuongAttention(Q, M, **k), M, general, {"memory_projection.weight"}),
    "luong-concat": Mechanism(lambda **k: LuongAttention(Q, M, UNITS, score="concat", **k), M, concat, BOTH | {"v"}),
    "luong-concat-scaled": Mechanism(
        lambda **k: LuongAttention(Q, M, UNITS, "concat", True, **k),
        M,
        lambda p, q, m: p["g"] * concat(p, q, m),
        BOTH | {"v", "g"},
    ),
    "cosine": Mechanism(
        lambda **k: CosineAttention(Q, Q, sharpness=3.0, learn_sharpness=False, **k),
        Q,
        lambda p, q, m: 3.0 * cosine(q, m),
        set(),
    ),
    "cosine-projected": Mechanism(
        lambda **k: CosineAttention(Q, M, UNITS, **k), M, cosine_projected, BOTH | {"sharpness"}
    ),
}

MASKS = {
    "none": {},
    "lengths": {"memory_lengths": torch.tensor([5, 0, 2, 1])},
    "mask": {"mask": torch.rand(B, TK, generator=torch.Generator().manual_seed(1)) < 0.6},
    "mask per query": {"mask": torch.rand(B, TQ, TK, generator=torch.Generator().manual_seed(2)) < 0.6},
    "both": {
        "memory_lengths": torch.tensor([4, 5, 3, 0], dtype=torch.int32),
        "mask": torch.rand(B, TK, generator=torch.Generator().manual_seed(3)) < 0.6,
    },
}


allowed = partial(formulas.allowed, shape=(B, TQ, TK))


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    torch.manual_seed(0)
    return MECHANISMS[request.param]


def make(mechanism: Mechanism, **options: Any) -> nn.Module:
    return randomize(mechanism.make(**{"dtype": torch.float64, **options}), 0.3)


def inputs(mechanism: Mechanism, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    query = torch.randn(B, TQ, Q, dtype=dtype, requires_grad=True)
    return query, torch.randn(B, TK, mechanism.memory_size, dtype=dtype, requires_grad=True)


def by_hand(score: Score, module: nn.Module, query: Tensor, memory: Tensor, allow: Tensor) -> tuple[Tensor, Tensor]:
    """Context and alignments, pair by pair, over the steps that may be attended and no others."""
    parameters = dict(module.named_parameters())
    contexts, alignments = [], []
    for b in range(query.shape[0]):
        for i in range(query.shape[1]):
            steps = allow[b, i].nonzero().flatten().tolist()
            row = query.new_zeros(memory.shape[1])
            context = memory.new_zeros(memory.shape[2])
            if steps:
                exponentials = torch.stack([score(parameters, query[b, i], memory[b, j]) for j in steps]).exp()
                row = row.index_put((torch.tensor(steps),), exponentials / exponentials.sum())
                context = sum(row[j] * memory[b, j] for j in steps)
            contexts.append(context)
            alignments.append(row)
    shape = query.shape[:2]
    return torch.stack(contexts).unflatten(0, shape), torch.stack(alignments).unflatten(0, shape)


# The formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("masks", MASKS)
def test_formula(mechanism: Mechanism, masks: str, backend: str | None) -> None:
    module = make(mechanism, backend=backend)
    query, memory = inputs(mechanism)
    got = module(query, module.memory(memory, **MASKS[masks]))
    expected = by_hand(mechanism.score, module, query, memory, allowed(MASKS[masks]))
    torch.testing.assert_close(got.context, expected[0])
    torch.testing.assert_close(got.alignments, expected[1])
    assert_same(
        gradients(module, got, query=query, memory=memory), gradients(module, expected, query=query, memory=memory)
    )


def test_a_step_is_its_score_and_query(mechanism: Mechanism) -> None:
    """What ``make_score``, ``make_query``, ``query_factor`` and ``query_eps`` say is what a step computes."""
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    memory = module.memory(outputs, torch.tensor([5, 0, 2, 1]))
    score, made = module.make_score(memory), module.make_query(query)
    op = {"additive_attention": additive_attention, "dot_attention": dot_attention}[score.op]
    named = {key: x for key, x in score._asdict().items() if x is not None}
    got = op(made, memory.keys, memory.values, **named, memory_lengths=memory.memory_lengths)
    torch.testing.assert_close(got, module(query, memory), atol=1e-14, rtol=1e-12)
    projected = query if module.query_projection is None else module.query_projection(query)
    if module.query_eps() is not None:
        projected = projected / projected.norm(dim=-1, keepdim=True)
    factor = module.query_factor()
    torch.testing.assert_close(made, projected if factor is None else factor * projected)


def test_one_query(mechanism: Mechanism) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    memory = module.memory(outputs, torch.tensor([5, 0, 2, 1]))
    whole = module(query, memory)
    for i in range(TQ):
        step = module(query[:, i], memory)
        torch.testing.assert_close(step.context, whole.context[:, i])
        torch.testing.assert_close(step.alignments, whole.alignments[:, i])


def test_hypotheses_are_queries(mechanism: Mechanism) -> None:
    """K queries on one memory are K copies of the memory with one query each."""
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    lengths = torch.tensor([5, 0, 2, 1])
    beams = module(query, module.memory(outputs, lengths))
    tiled = module.memory(outputs.repeat_interleave(TQ, 0), lengths.repeat_interleave(TQ))
    copies = module(query.flatten(0, 1), tiled)
    torch.testing.assert_close(beams.context.flatten(0, 1), copies.context)
    torch.testing.assert_close(beams.alignments.flatten(0, 1), copies.alignments)


def test_need_weights(mechanism: Mechanism) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    memory = module.memory(outputs)
    context, alignments = module(query, memory, need_weights=False)
    assert alignments is None
    torch.testing.assert_close(context, module(query, memory).context)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("masks", [name for name in MASKS if name != "none"])
def test_padding_holds_anything(mechanism: Mechanism, masks: str, poison: float) -> None:
    module = make(mechanism)
    query, clean = inputs(mechanism)
    unused = ~allowed(MASKS[masks]).any(1)
    poisoned = clean.detach().masked_fill(unused[..., None], poison).requires_grad_()
    runs = []
    for outputs in (clean, poisoned):
        result = module(query, module.memory(outputs, **MASKS[masks]))
        tensors = {**gradients(module, result, query=query, memory=outputs), **result._asdict()}
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        runs.append(tensors)
    assert_same(runs[1], runs[0], rtol=0, atol=0)
    assert (runs[1]["memory"][unused] == 0).all()


def test_nothing_to_attend(mechanism: Mechanism) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    result = module(query, module.memory(outputs, torch.zeros(B, dtype=torch.int64)))
    assert (result.context == 0).all() and (result.alignments == 0).all()
    assert all((grad == 0).all() for grad in gradients(module, result, query=query, memory=outputs).values())
    empty = module(query, module.memory(outputs[:, :0]))
    assert empty.alignments.shape == (B, TQ, 0) and (empty.context == 0).all()


def test_empty_batch(mechanism: Mechanism) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    result = module(query[:0], module.memory(outputs[:0], torch.zeros(0, dtype=torch.int64)))
    assert result.context.shape == (0, TQ, mechanism.memory_size) and result.alignments.shape == (0, TQ, TK)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_dtypes(mechanism: Mechanism, dtype: torch.dtype, tolerance: float) -> None:
    module = make(mechanism, dtype=dtype)
    query, outputs = (tensor.detach() for tensor in inputs(mechanism, dtype))
    got = module(query, module.memory(outputs, torch.tensor([5, 0, 2, 1])))
    assert {tensor.dtype for tensor in (*got, *module.parameters())} == {dtype}
    wide = copy.deepcopy(module).double()
    expected = wide(query.double(), wide.memory(outputs.double(), torch.tensor([5, 0, 2, 1])))
    torch.testing.assert_close(got.context.double(), expected.context, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.alignments.double(), expected.alignments, rtol=tolerance, atol=tolerance)


def test_autocast(mechanism: Mechanism) -> None:
    module = make(mechanism, dtype=torch.float32)
    query, outputs = inputs(mechanism, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(query, module.memory(outputs))
    assert result.context.dtype == torch.bfloat16
    expected = module(query, module.memory(outputs))
    torch.testing.assert_close(result.context.float(), expected.context, rtol=5e-2, atol=5e-2)
    for grad in gradients(module, result, query=query, memory=outputs).values():
        assert grad.dtype == torch.float32 and grad.isfinite().all()


# What is particular to one of them ------------------------------------------------------------------------------------


def test_initial_values() -> None:
    module = BahdanauAttention(Q, M, 16, normalize=True)
    assert module.g.item() == 0.25
    assert (module.bias == 0).all()
    assert 0 < module.v.abs().max() <= 0.25
    assert LuongAttention(Q, M, scale=True).g.item() == 1
    assert CosineAttention(Q, M, 8).sharpness.item() == 10


@pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
def test_reset_parameters(mechanism: Mechanism) -> None:
    """On the meta device, then with memory of any content, then as the constructor makes them."""
    with torch.device("meta"):
        module = mechanism.make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    torch.manual_seed(0)
    expected = mechanism.make()
    for (name, a), b in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_sizes_may_be_numbers_of_numpy() -> None:
    module = BahdanauAttention(np.int64(Q), np.int32(M), np.int64(8))
    assert module.v.shape == (8,) and type(module.query_size) is int


def test_nested_memory_that_is_not_jagged_is_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4, M), torch.randn(7, M)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"memory must be a padded tensor, got a nested one; pass .* memory_lengths"):
        BahdanauAttention(Q, M, 8).memory(nested)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("normalize", [False, True])
def test_activation(activation: str, normalize: bool) -> None:
    """As of the function, in several steps on one memory, whose gradients are made together."""
    module = randomize(
        BahdanauAttention(Q, M, UNITS, normalize, activation=activation, negative_slope=0.3, dtype=torch.float64)
    )
    queries, outputs = torch.randn(2, B, TQ, Q, dtype=torch.float64), torch.randn(B, TK, M, dtype=torch.float64)
    lengths = torch.tensor([TK, 0, 2, 1])
    parameters = list(module.parameters())

    def by_function(query: Tensor) -> Any:
        q, k = module.query_projection(query), module.memory_projection(outputs)
        options = dict(activation=activation, negative_slope=0.3, memory_lengths=lengths)
        return additive_attention(q, k, outputs, module.score_vector(), module.bias, **options)

    memory = module.memory(outputs, lengths)
    found, expected = ([attend(query) for query in queries] for attend in (lambda q: module(q, memory), by_function))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    losses = [
        sum(context.cos().sum() + alignments.square().sum() for context, alignments in of) for of in (found, expected)
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters) for loss in losses))
    assert f"activation='{activation}'" in repr(module)


def test_activation_errors() -> None:
    with pytest.raises(
        ValueError, match="BahdanauAttention: activation must be one of 'tanh', 'relu', 'leaky_relu', got"
    ):
        BahdanauAttention(Q, M, UNITS, activation="sigmoid")
    with pytest.raises(ValueError, match="BahdanauAttention: negative_slope must be a finite number"):
        BahdanauAttention(Q, M, UNITS, activation="leaky_relu", negative_slope=float("nan"))


def test_normalized_scores_ignore_the_length_of_v() -> None:
    module = BahdanauAttention(Q, M, UNITS, normalize=True, dtype=torch.float64)
    query, outputs = inputs(MECHANISMS["bahdanau-normalized"])
    memory = module.memory(outputs)
    before = module(query, memory)
    with torch.no_grad():
        module.v.mul_(100)
    torch.testing.assert_close(module(query, memory).alignments, before.alignments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cosine_of_zero_vectors(dtype: torch.dtype) -> None:
    module = CosineAttention(Q, Q, dtype=dtype)
    query = torch.zeros(1, 2, Q, dtype=dtype, requires_grad=True)
    outputs = torch.randn(1, TK, Q, dtype=dtype)
    outputs[:, 1] = 0
    outputs.requires_grad_()
    result = module(query, module.memory(outputs))
    torch.testing.assert_close(result.alignments, torch.full_like(result.alignments, 1 / TK))
    (result.context.sum() + result.alignments[..., 0].sum()).backward()
    for grad in (query.grad, outputs.grad, module.sharpness.grad):
        assert grad.isfinite().all() and grad.abs().max() < 100
    other = module(torch.randn(1, 2, Q, dtype=dtype), module.memory(outputs))
    assert other.alignments.isfinite().all()


def test_cosine_ignores_lengths_of_vectors() -> None:
    module = CosineAttention(Q, M, UNITS, dtype=torch.float64)
    query, outputs = inputs(MECHANISMS["cosine-projected"])
    alignments = module(query, module.memory(outputs)).alignments
    torch.testing.assert_close(module(0.01 * query, module.memory(50 * outputs)).alignments, alignments)


# As modules -----------------------------------------------------------------------------------------------------------


def test_parameter_names(mechanism: Mechanism) -> None:
    assert set(mechanism.make().state_dict()) == mechanism.parameters


def test_copies(mechanism: Mechanism) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    loaded = make(mechanism)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    memory = module.memory(outputs)
    expected = module(query, memory).context
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(query, other.memory(outputs)).context, expected)
    stored = pickle.loads(pickle.dumps(Memory(memory.keys.detach(), memory.values.detach())))
    assert torch.equal(module(query, stored).context, expected)


def test_device(mechanism: Mechanism) -> None:
    module = make(mechanism, device="meta", backend="reference")
    assert all(parameter.is_meta for parameter in module.parameters())
    query = torch.empty(B, Q, dtype=torch.float64, device="meta")
    outputs = torch.empty(B, TK, mechanism.memory_size, dtype=torch.float64, device="meta")
    memory = module.memory(outputs, torch.empty(B, dtype=torch.int64, device="meta"))
    result = module(query, memory)
    assert result.context.is_meta and result.context.shape == (B, mechanism.memory_size)
    assert result.alignments.is_meta and result.alignments.shape == (B, TK)


def test_repr() -> None:
    assert "(\n  query_size=6, memory_size=7, units=9, normalize=False\n" in repr(BahdanauAttention(Q, M, UNITS))
    assert "score='general', scale=False, backend='reference'" in repr(LuongAttention(Q, M, backend="reference"))
    assert "units=9, learn_sharpness=True" in repr(CosineAttention(Q, M, UNITS))
    assert "sharpness=2.0, learn_sharpness=False" in repr(CosineAttention(Q, Q, sharpness=2, learn_sharpness=False))


def test_compile(mechanism: Mechanism) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    lengths = torch.tensor([5, 0, 2, 1])

    def whole(query: Tensor, outputs: Tensor) -> Any:
        return module(query, module.memory(outputs, lengths))

    torch._dynamo.reset()
    expected = gradients(module, whole(query, outputs), query=query, memory=outputs)
    memory = torch.compile(module.memory, fullgraph=True, backend="aot_eager")(outputs, lengths)
    assert isinstance(memory, Memory)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")(query, memory)
    assert_same(gradients(module, step, query=query, memory=outputs), expected)
    both = torch.compile(whole, fullgraph=True, backend="aot_eager")(query, outputs)
    assert_same(gradients(module, both, query=query, memory=outputs), expected)


def test_export(mechanism: Mechanism) -> None:
    module = make(mechanism, backend="reference").eval()
    query, outputs = (tensor.detach() for tensor in inputs(mechanism))
    memory = module.memory(outputs, torch.tensor([5, 0, 2, 1]))
    memory = torch.utils._pytree.tree_map(torch.Tensor.detach, memory)
    exported = torch.export.export(module, (query, memory)).module()
    torch.testing.assert_close(exported(query, memory).context, module(query, memory).context)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([2, 0, 2]),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([True, False, False, True]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=str,
)
def test_select(mechanism: Mechanism, masks: str, indices: Tensor) -> None:
    module = make(mechanism)
    query, outputs = inputs(mechanism)
    selected = module.memory(outputs, **MASKS[masks]).select(indices)
    rows = indices if indices.dtype == torch.bool else indices.long()
    direct = module.memory(outputs[rows], **{name: tensor[rows] for name, tensor in MASKS[masks].items()})
    assert selected.batch_size == direct.batch_size == len(query[rows])
    got, expected = module(query[rows], selected), module(query[rows], direct)
    torch.testing.assert_close(got.alignments, expected.alignments)
    assert_same(
        gradients(module, got, query=query, memory=outputs), gradients(module, expected, query=query, memory=outputs)
    )


def test_to() -> None:
    lengths, mask = torch.tensor([5, 0, 2, 1]), torch.ones(B, TK, dtype=torch.bool)
    memory = Memory(torch.randn(B, TK, UNITS), torch.randn(B, TK, M), lengths, mask)
    for half in (memory.to(torch.bfloat16), memory.to(dtype=torch.bfloat16)):
        assert half.keys.dtype == half.values.dtype == torch.bfloat16
        assert half.memory_lengths.dtype == torch.int64 and half.mask.dtype == torch.bool
    for moved in (memory.to("meta"), memory.to("meta", torch.float64), memory.to(device="meta", non_blocking=True)):
        assert moved.keys.is_meta and moved.values.is_meta and moved.memory_lengths.is_meta and moved.mask.is_meta
    bare = Memory(memory.keys, memory.values).to("meta")
    assert bare.memory_lengths is None and bare.mask is None


def test_is_a_value() -> None:
    memory = Memory(torch.randn(B, TK, UNITS), torch.randn(B, TK, M))
    with pytest.raises(AttributeError):
        memory.keys = memory.values
    assert memory == memory and memory != Memory(memory.keys, memory.values)
    leaves, _ = torch.utils._pytree.tree_flatten(memory)
    assert len(leaves) == 2 and leaves[0] is memory.keys


# Errors ---------------------------------------------------------------------------------------------------------------

KEYS, VALUES = torch.zeros(B, TK, UNITS), torch.zeros(B, TK, M)
MEMORY = Memory(KEYS, VALUES)
QUERY = torch.zeros(B, TQ, Q)
BAHDANAU, DOT = BahdanauAttention(Q, M, UNITS), LuongAttention(Q, Q, score="dot")

ERRORS = [
    # Memory
    (lambda: Memory(None, VALUES), TypeError, "Memory: keys must be a tensor, got NoneType"),
    (lambda: Memory(KEYS, [1.0]), TypeError, "Memory: values must be a tensor, got list"),
    (lambda: Memory(KEYS.long(), VALUES), TypeError, "Memory: keys must be floating point, got torch.int64"),
    (lambda: Memory(KEYS[0], VALUES), ValueError, "keys must have shape (B, Tk, A), got (5, 9)"),
    (lambda: Memory(KEYS, VALUES[0]), ValueError, "values must have shape (B, Tk, D), got (5, 7)"),
    (lambda: Memory(KEYS, VALUES[:, 1:]), ValueError, "values must have shape (B, Tk, D) = (4, 5, *), got (4, 4, 7)"),
    (lambda: Memory(KEYS, VALUES.to("meta")), ValueError, "values must be on the device of keys, cpu, got meta"),
    (lambda: Memory(KEYS, VALUES, [5] * B), TypeError, "memory_lengths must be a tensor, got list"),
    (lambda: Memory(KEYS, VALUES, torch.ones(B)), TypeError, "must be int32 or int64, got torch.float32"),
    (lambda: Memory(KEYS, VALUES, torch.ones(3).int()), ValueError, "must have shape (B,) = (4,), got (3,)"),
    (lambda: Memory(KEYS, VALUES, mask=torch.ones(B, TK)), TypeError, "mask must be bool (True = attend)"),
    (lambda: Memory(KEYS, VALUES, mask=torch.ones(B, 3).bool()), ValueError, "or (4, *, 5), got (4, 3)"),
    (lambda: Memory(KEYS, VALUES, mask=torch.ones(TK).bool()), ValueError, "shape (B, Tk) or (B, Tq, Tk)"),
    (lambda: MEMORY.select([0]), TypeError, "Memory.select: indices must be an int32, int64 or bool tensor, got list"),
    (lambda: MEMORY.select(torch.ones(2)), TypeError, "int32, int64 or bool tensor, got torch.float32"),
    (lambda: MEMORY.select(torch.ones(2).bool()), ValueError, "indices must have shape (B,) = (4,), got (2,)"),
    (lambda: MEMORY.select(torch.tensor(1)), ValueError, "indices must have shape (n,), got ()"),
    # construction
    (lambda: BahdanauAttention(Q, 0, UNITS), ValueError, "memory_size must be a positive integer, got 0"),
    (lambda: BahdanauAttention(Q, M, 2.5), ValueError, "units must be a positive integer, got 2.5"),
    (lambda: LuongAttention(Q, M, score="dots"), ValueError, "must be 'dot', 'general' or 'concat', got 'dots'"),
    (lambda: LuongAttention(Q, M, score="dot"), ValueError, "needs query_size = memory_size, got 6 and 7"),
    (lambda: LuongAttention(Q, M, score="concat"), ValueError, "units must be a size with score='concat', got None"),
    (lambda: LuongAttention(Q, M, 8), ValueError, "units must be None with score='general', got 8"),
    (lambda: CosineAttention(Q, M), ValueError, "without units, query_size must be memory_size, got 6 and 7"),
    # encoder outputs
    (lambda: BAHDANAU.memory([1]), TypeError, "BahdanauAttention.memory: memory must be a tensor, got list"),
    (lambda: BAHDANAU.memory(KEYS), ValueError, "must have shape (B, Tk, memory_size) = (*, *, 7), got (4, 5, 9)"),
    (lambda: BAHDANAU.memory(VALUES, torch.ones(B)), TypeError, "memory_lengths must be int32 or int64"),
    (lambda: BAHDANAU.memory(VALUES, mask=torch.ones(B, 4).bool()), ValueError, "mask must have shape"),
    # steps
    (lambda: BAHDANAU([0], MEMORY), TypeError, "BahdanauAttention: query must be a tensor, got list"),
    (lambda: BAHDANAU(QUERY, Memory(None, None)), TypeError, "memory.keys must be a tensor, got NoneType"),
    (lambda: BAHDANAU(QUERY, VALUES), TypeError, "must be a Memory, made by BahdanauAttention.memory(...), got Tensor"),
    (lambda: BAHDANAU(QUERY[..., 1:], MEMORY), ValueError, "= (4, *, 6) or (4, 6), got (4, 3, 5)"),
    (lambda: BAHDANAU(QUERY[1:], MEMORY), ValueError, "= (4, *, 6) or (4, 6), got (3, 3, 6)"),
    (lambda: BAHDANAU(QUERY[None], MEMORY), ValueError, "query must have shape (B, Tq, query_size)"),
    (lambda: DOT(QUERY, MEMORY), ValueError, "must have keys (4, 5, 6) and values (4, 5, 6), got"),
    (
        lambda: BAHDANAU(QUERY, BAHDANAU.memory(VALUES, torch.tensor([0, 1, 6, 2]))),
        ValueError,
        "0..Tk = 0..5, got 0..6",
    ),
    (lambda: BAHDANAU(QUERY, BAHDANAU.memory(VALUES, torch.tensor([0, 1, -1, 2]))), ValueError, "got -1..2"),
    (lambda: BAHDANAU(QUERY, MEMORY.to(torch.float64)), TypeError, "keys must have the dtype of query"),
    (lambda: LuongAttention(Q, M, backend="fast")(QUERY, Memory(QUERY, VALUES[:, :TQ])), ValueError, "backend must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
