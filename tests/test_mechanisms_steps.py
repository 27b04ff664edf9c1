"""The common properties of stateful mechanisms: padding, hypotheses, dtypes, copies, compilation, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from attn_kernels import Memory
from formulas import assert_same, gradients
from stepwise import MASKS, MECHANISMS, TK, B, K, M, T, allowed, decode, inputs, make

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(MECHANISMS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# Padding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("masks", [name for name in MASKS if name != "none"])
def test_padding_holds_anything(name: str, masks: str, poison: float) -> None:
    module = make(name)
    queries, clean = inputs()
    allow = allowed(MASKS[masks])
    unused = ~allow.any(1)
    poisoned = clean.detach().masked_fill(unused[..., None], poison).requires_grad_()
    idle = ~allow.any(2)  # hypotheses that may attend nothing
    poisoned_queries = queries.detach().masked_fill(idle[None, ..., None], poison).requires_grad_()
    runs = []
    for outputs, q in ((clean, queries), (poisoned, poisoned_queries)):
        results = decode(module, q, outputs, **MASKS[masks])
        tensors = {**gradients(module, results, queries=q, outputs=outputs), "context": results[0]}
        tensors["alignments"] = results[1]
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        runs.append(tensors)
    assert_same(runs[1], runs[0], rtol=0, atol=0)
    assert (runs[1]["outputs"][unused] == 0).all()
    assert (runs[1]["alignments"] * ~allow == 0).all()


@pytest.mark.parametrize("masks", ["lengths", "both", "mask per hypothesis"])
def test_padding_of_a_memory_that_was_not_made_here(name: str, masks: str) -> None:
    """A Memory whose keys hold NaN in padding, as a cache of them may."""
    module = make(name)
    queries, outputs = inputs()
    unused = ~allowed(MASKS[masks]).any(1)[..., None]
    runs = []
    for poison in (0.0, torch.nan):
        made = module.memory(outputs, **MASKS[masks])
        keys, values = (x.masked_fill(unused, poison) for x in (made.keys, made.values))
        memory = Memory(keys, values, **MASKS[masks])
        state, results = module.initial_state(memory, K), []
        for query in queries:
            *step, state = module(query, memory, state)
            results += step
        runs.append(gradients(module, results, queries=queries, outputs=outputs) | {"last": results[-1]})
        assert all(tensor.isfinite().all() for tensor in runs[-1].values())
    assert_same(runs[1], runs[0], rtol=0, atol=0)


@torch.no_grad()
def test_padding_that_is_written_to_later(name: str) -> None:
    """A memory knows that its padding is 0, until it is written to; copies and selected rows are right, too."""
    module = make(name)
    queries, outputs = (x.detach() for x in inputs())
    lengths = torch.tensor([6, 0, 3, 1])
    memory = module.memory(outputs, lengths)
    expected = module(queries[0], memory, module.initial_state(memory, K))
    assert memory.has_zero_padding() and not module.memory(outputs).has_zero_padding()
    rows = torch.tensor([2, 3])
    selected = memory.select(rows)
    assert selected.has_zero_padding()
    for x in (memory.keys, memory.values):
        x[torch.arange(TK) >= lengths[:, None]] = torch.nan
    assert not memory.has_zero_padding()
    for copied in (memory, copy.deepcopy(memory), Memory(memory.keys, memory.values, lengths)):
        assert not copied.has_zero_padding()
        torch.testing.assert_close(module(queries[0], copied, module.initial_state(memory, K)), expected)
    result = module(queries[0][rows], selected, module.initial_state(selected, K))
    torch.testing.assert_close(result.alignments, expected.alignments[rows])


def test_inference_mode(name: str) -> None:
    module = make(name)
    queries, outputs = (x.detach() for x in inputs())
    expected = decode(module, queries, outputs, **MASKS["both"])
    with torch.inference_mode():
        results = decode(module, queries, outputs.clone(), **MASKS["both"])
    torch.testing.assert_close(results, expected)


def test_padding_of_one_hypothesis_alone(name: str) -> None:
    """A step that one hypothesis attends and another may not: NaN stays with the one."""
    module = make(name)
    queries, outputs = inputs()
    mask = torch.ones(B, K, TK, dtype=torch.bool)
    mask[:, 1, 2] = False
    with torch.no_grad():
        poisoned = outputs.clone()
        poisoned[:, 2] = torch.nan
        expected = decode(module, queries, outputs, mask=mask)
        results = decode(module, queries, poisoned, mask=mask)
    for got, good in zip(results, expected, strict=True):
        torch.testing.assert_close(got[:, :, 1], good[:, :, 1], rtol=0, atol=0)
    if not name.startswith(("gmm", "dynamic", "local-m")):  # those read no content, or not this step at first
        assert results[0][0, :, 0].isnan().any()


def test_nothing_to_attend(name: str) -> None:
    module = make(name)
    queries, outputs = inputs()
    results = decode(module, queries, outputs, memory_lengths=torch.zeros(B, dtype=torch.int64))
    assert all((x == 0).all() for x in results)
    assert all((x == 0).all() for x in gradients(module, results, queries=queries, outputs=outputs).values())


def test_sizes_of_zero(name: str) -> None:
    module = make(name)
    queries, outputs = inputs()
    contexts, alignments = decode(module, queries, outputs[:, :0])
    assert alignments.shape == (T, B, K, 0) and (contexts == 0).all() and contexts.shape == (T, B, K, M)
    contexts, alignments = decode(module, queries[:, :0], outputs[:0], memory_lengths=torch.zeros(0, dtype=torch.int64))
    assert alignments.shape == (T, 0, K, TK) and contexts.shape == (T, 0, K, M)
    contexts, alignments = decode(module, queries[:, :, :0], outputs)
    assert alignments.shape == (T, B, 0, TK) and contexts.shape == (T, B, 0, M)
    for steps in (1, 2):
        short = decode(module, queries, outputs[:, :steps])
        padded = decode(module, queries, outputs, memory_lengths=torch.full((B,), steps))
        torch.testing.assert_close(short[0], padded[0])
        torch.testing.assert_close(short[1], padded[1][..., :steps])


# Axes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS)
def test_hypotheses_are_separate_runs(name: str, masks: str) -> None:
    module = make(name)
    queries, outputs = inputs()
    together = decode(module, queries, outputs, **MASKS[masks])
    for k in range(K):
        own = dict(MASKS[masks])
        if masks == "mask per hypothesis":
            own["mask"] = own["mask"][:, k]
        alone = decode(module, queries[:, :, k], outputs, **own)
        torch.testing.assert_close(alone[0], together[0][:, :, k])
        torch.testing.assert_close(alone[1], together[1][:, :, k])


def test_hypotheses_may_be_reordered(name: str) -> None:
    """A search selects rows of the state, as of all else that belongs to a hypothesis."""
    module = make(name)
    queries, outputs = inputs()
    memory = module.memory(outputs, torch.tensor([6, 0, 3, 1]))
    state = module.initial_state(memory, K)
    state = module(queries[0], memory, state).state
    order = torch.tensor([1, 0])
    straight = module(queries[1], memory, state)
    turned = module(queries[1][:, order], memory, type(state)(*(x[:, order] for x in state)))
    torch.testing.assert_close(turned.alignments, straight.alignments[:, order])
    rows = torch.tensor([2, 0])
    part = module(queries[1][rows], memory.select(rows), type(state)(*(x[rows] for x in state)))
    torch.testing.assert_close(part.alignments, straight.alignments[rows])


def test_sequence(name: str) -> None:
    module = make(name)
    queries, outputs = inputs()
    lengths = torch.tensor([6, 0, 3, 1])
    whole = module.sequence(queries[:, :, 0].transpose(0, 1), module.memory(outputs, lengths))
    contexts, alignments = decode(module, queries[:, :, 0], outputs, memory_lengths=lengths)
    torch.testing.assert_close(whole.context, contexts.transpose(0, 1))
    torch.testing.assert_close(whole.alignments, alignments.transpose(0, 1))


def test_a_step_may_be_taken_twice(name: str) -> None:
    """Nothing is kept in the module, and a state is not written to."""
    module = make(name)
    queries, outputs = inputs()
    memory = module.memory(outputs)
    state = module(queries[0], memory, module.initial_state(memory, K)).state
    before = [x.clone() for x in state]
    first, second = (module(queries[1], memory, x) for x in (state, tuple(state)))
    assert torch.equal(first.context, second.context) and torch.equal(first.alignments, second.alignments)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_state_is_a_tree_of_its_tensors(name: str) -> None:
    module = make(name)
    memory = module.memory(inputs()[1])
    state = module.initial_state(memory, K)
    mapped = _pytree.tree_map(lambda x: x + 1, state)
    assert type(mapped) is type(state) and torch.equal(mapped[0], state[0] + 1)
    assert all(x.shape[:2] == (B, K) for x in state)


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradcheck(name: str) -> None:
    """By finite differences: of two steps, in all inputs and parameters. Second derivatives, too."""
    module = Decoded(make(name))
    queries, outputs = (x.detach() for x in inputs())
    names = [key for key, _ in module.named_parameters()]

    def function(queries: Tensor, outputs: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (queries, outputs))

    arguments = (queries[:2, :2].clone().requires_grad_(), outputs[:2].clone().requires_grad_())
    assert torch.autograd.gradcheck(function, (*arguments, *module.parameters()))
    assert torch.autograd.gradgradcheck(function, (*arguments, *module.parameters()), fast_mode=True)


class Decoded(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, queries: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return decode(self.module, queries, outputs, memory_lengths=torch.tensor([6, 4]))
