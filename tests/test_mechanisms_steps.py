"""What all mechanisms with a state have in common: padding, hypotheses, dtypes, copies, compilation, refusals."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from attn_kernels import Memory, mechanisms
from stepwise import (
    MASKS,
    TK,
    UNITS,
    B,
    K,
    M,
    Q,
    T,
    allowed,
    assert_same,
    decode,
    gradients,
    inputs,
    randomize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MECHANISMS: dict[str, Callable[..., nn.Module]] = {
    "monotonic": lambda **k: mechanisms.MonotonicAttention(Q, M, UNITS, normalize=True, **k),
    "monotonic-parallel": lambda **k: mechanisms.MonotonicAttention(Q, M, UNITS, "parallel", **k),
    "monotonic-dot": lambda **k: mechanisms.MonotonicAttention(Q, M, score="dot", **k),
    "mocha": lambda **k: mechanisms.MonotonicChunkwiseAttention(Q, M, UNITS, 3, **k),
    "mocha-dot": lambda **k: mechanisms.MonotonicChunkwiseAttention(Q, M, None, 3, score="dot", normalize=True, **k),
    "milk": lambda **k: mechanisms.MonotonicChunkwiseAttention(Q, M, UNITS, None, **k),
    "stepwise": lambda **k: mechanisms.StepwiseMonotonicAttention(Q, M, UNITS, **k),
    "local-p": lambda **k: mechanisms.LocalAttention(Q, M, UNITS, 3, normalize=True, **k),
    "local-m": lambda **k: mechanisms.LocalAttention(Q, M, None, 2, "local-m", score="dot", **k),
    "gmm-0": lambda **k: mechanisms.GMMAttention(Q, M, None, 3, 0, initial_sigma=2.0, **k),
    "gmm-1": lambda **k: mechanisms.GMMAttention(Q, M, UNITS, 3, 1, initial_sigma=2.0, **k),
    "gmm-2": lambda **k: mechanisms.GMMAttention(Q, M, UNITS, 3, 2, initial_sigma=2.0, **k),
    "dynamic convolution": lambda **k: mechanisms.DynamicConvolutionAttention(Q, M, UNITS, 2, 5, 3, 3, **k),
}
WITH_BACKEND = [name for name in MECHANISMS if not name.startswith("gmm")]
PARAMETERS = {
    "monotonic": {"query_projection.weight", "memory_projection.weight", "v", "g", "bias", "score_bias"},
    "monotonic-dot": {"memory_projection.weight", "score_bias"},
    "mocha": {
        *("query_projection.weight", "memory_projection.weight", "v", "score_bias", "chunk_v", "chunk_bias"),
    },
    "mocha-dot": {"memory_projection.weight", "g", "score_bias"},
    "stepwise": {"query_projection.weight", "memory_projection.weight", "v", "score_bias"},
    "local-p": {
        *("query_projection.weight", "memory_projection.weight", "v", "g", "bias"),
        *("position_projection.weight", "position_v"),
    },
    "local-m": {"memory_projection.weight"},
    "gmm-0": {"mixture.weight", "mixture.bias"},
    "gmm-2": {"hidden.weight", "hidden.bias", "mixture.weight", "mixture.bias"},
    "dynamic convolution": {
        *("filter_hidden.weight", "filter_hidden.bias", "filter_output.weight", "static_filters"),
        *("static_projection", "dynamic_projection", "bias", "v"),
    },
}


def make(name: str, scale: float = 0.4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize(MECHANISMS[name](**{"dtype": torch.float64, **options}), scale)


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
    """A memory knows that its padding is clean, until it is written to; copies and selected rows are right, too."""
    module = make(name)
    queries, outputs = (x.detach() for x in inputs())
    lengths = torch.tensor([6, 0, 3, 1])
    memory = module.memory(outputs, lengths)
    expected = module(queries[0], memory, module.initial_state(memory, K))
    assert memory.has_clean_padding() and not module.memory(outputs).has_clean_padding()
    rows = torch.tensor([2, 3])
    selected = memory.select(rows)
    assert selected.has_clean_padding()
    for x in (memory.keys, memory.values):
        x[torch.arange(TK) >= lengths[:, None]] = torch.nan
    assert not memory.has_clean_padding()
    for copied in (memory, copy.deepcopy(memory), Memory(memory.keys, memory.values, lengths)):
        assert not copied.has_clean_padding()
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


# Backends and dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_BACKEND)
def test_backends(name: str) -> None:
    queries, outputs = inputs()
    results = [decode(make(name, backend=x), queries, outputs, **MASKS["both"]) for x in ("reference", None)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["monotonic", "mocha", "local-p", "local-m", "dynamic convolution"])
def test_every_backend(name: str, fused: str, device: str) -> None:
    """Keys of mocha are a part of wider ones, and those of dynamic convolution are made in each step."""
    module = make(name, dtype=torch.float32, backend=fused).to(device)
    queries, outputs = (x.detach() for x in inputs(torch.float32))
    lengths = torch.tensor([6, 4], device=device)
    queries, outputs = (x.to(device).requires_grad_() for x in (queries[:2, :2], outputs[:2]))
    got = decode(module, queries, outputs, memory_lengths=lengths)
    exact = make(name, backend="reference")
    exact.load_state_dict(module.state_dict())
    wide = [x.detach().double().cpu().requires_grad_() for x in (queries, outputs)]
    expected = decode(exact, *wide, memory_lengths=lengths.cpu())
    torch.testing.assert_close([x.double().cpu() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    loss, right = (results[0].square().sum() + results[1].square().sum() for results in (got, expected))
    grads = torch.autograd.grad(loss, [queries, outputs, *module.parameters()])
    rights = torch.autograd.grad(right, [*wide, *exact.parameters()])
    for grad, other in zip(grads, rights, strict=True):
        torch.testing.assert_close(grad.double().cpu(), other, rtol=1e-4, atol=1e-5)


# Errors of scores in the dtype of the inputs, of which a sigmoid, an exponential or a position is made.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module = make(name, dtype=dtype)
    queries, outputs = (x.detach() for x in inputs(dtype))
    lengths = torch.tensor([6, 0, 3, 1])
    memory = module.memory(outputs, lengths)
    state = module.initial_state(memory, K)
    assert all(x.dtype in (torch.float32, torch.int64) for x in state)
    got = decode(module, queries, outputs, memory_lengths=lengths)
    assert {x.dtype for x in (*got, *module.parameters())} == {dtype}
    state = module(queries[0], memory, state).state
    assert all(x.dtype in (torch.float32, torch.int64) for x in state)
    exact = decode(copy.deepcopy(module).double(), queries.double(), outputs.double(), memory_lengths=lengths)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=tolerance, atol=tolerance)


def test_autocast(name: str) -> None:
    module = make(name, dtype=torch.float32)
    queries, outputs = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = decode(module, queries, outputs, memory_lengths=torch.tensor([6, 0, 3, 1]))
    assert {x.dtype for x in results} == {torch.bfloat16}
    expected = decode(module, queries, outputs, memory_lengths=torch.tensor([6, 0, 3, 1]))
    for got, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(got.float(), exact, rtol=6e-2, atol=6e-2)
    for grad in gradients(module, results, queries=queries, outputs=outputs).values():
        assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize("masks", ["none", "both"])
def test_compiles_whole(name: str, masks: str) -> None:
    torch._dynamo.reset()  # it counts how often the forward of one class was compiled
    module = make(name)
    queries, outputs = inputs()
    memory = module.memory(outputs, **MASKS[masks])
    state = module.initial_state(memory, K)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    step, other = module(queries[0], memory, state), compiled(queries[0], memory, state)
    torch.testing.assert_close(tuple(other), tuple(step))
    torch.testing.assert_close(
        tuple(compiled(queries[1], memory, other.state)), tuple(module(queries[1], memory, step.state))
    )


# As modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_names(name: str) -> None:
    assert set(make(name).state_dict()) == PARAMETERS[name]


def test_reset_parameters(name: str) -> None:
    """On the meta device, then with memory of any content, then as the constructor makes them."""
    with torch.device("meta"):
        module = MECHANISMS[name]()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    expected = MECHANISMS[name]()
    for attribute in ("named_parameters", "named_buffers"):
        for (key, a), (_, b) in zip(getattr(module, attribute)(), getattr(expected, attribute)(), strict=True):
            assert torch.equal(a, b), key


def test_copies(name: str) -> None:
    module = make(name)
    queries, outputs = inputs()
    loaded = MECHANISMS[name](dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    expected = decode(module, queries, outputs)[0]
    for other in (loaded, copy.deepcopy(module)):
        assert torch.equal(decode(other, queries, outputs)[0], expected)


def test_meta_device(name: str) -> None:
    options = {"backend": "reference"} if name in WITH_BACKEND else {}
    module = MECHANISMS[name](device="meta", **options)
    memory = module.memory(torch.empty(B, TK, M, device="meta"), torch.empty(B, dtype=torch.int64, device="meta"))
    result = module(torch.empty(B, Q, device="meta"), memory, module.initial_state(memory))
    assert result.context.shape == (B, M) and result.alignments.shape == (B, TK) and result.context.is_meta


def test_repr(name: str) -> None:
    assert "(\n  query_size=5, memory_size=7, " in repr(MECHANISMS[name]())


def test_refusals(name: str) -> None:
    module = make(name)
    kind = type(module).__name__
    queries, outputs = inputs()
    memory = module.memory(outputs)
    state = module.initial_state(memory, K)
    with pytest.raises(TypeError, match=rf"{kind}: state must be a tuple of tensors, .* got <class 'NoneType'>"):
        module(queries[0], memory, None)
    with pytest.raises(ValueError, match=rf"{kind}: state must have tensors \(B, K, \*\) = \(4, 1, \*\), got \(4, 2,"):
        module(queries[0, :, 0], memory, state)
    with pytest.raises(ValueError, match=rf"{kind}: query must have shape .* got \(4, 2, 4\)"):
        module(queries[0, ..., 1:], memory, state)
    with pytest.raises(TypeError, match=rf"{kind}.initial_state: memory must be a Memory, .* got Tensor"):
        module.initial_state(outputs)
    with pytest.raises(ValueError, match=rf"{kind}.initial_state: hypotheses must be an integer >= 0, got 1.5"):
        module.initial_state(memory, 1.5)
    masked = module.memory(outputs, mask=torch.ones(B, 3, TK, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"{kind}: mask must have shape .* or \(4, 2, 6\), got \(4, 3, 6\)"):
        module(queries[0], masked, state)
    far = module.memory(outputs, torch.full((B,), TK + 1))
    with pytest.raises(ValueError, match=rf"{kind}: memory_lengths must be in 0..Tk = 0..6, got 7..7"):
        module(queries[0], far, state)
