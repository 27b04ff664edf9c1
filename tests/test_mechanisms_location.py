"""Location-sensitive, coverage and forward attention against the formulas of their papers, pair by pair."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stateful
from attn_kernels import Memory
from attn_kernels.mechanisms import (
    CoverageAttention,
    CoverageState,
    CumulativeLocationState,
    ForwardAttention,
    ForwardState,
    LocationSensitiveAttention,
    LocationState,
    StatefulAttention,
    coverage_loss,
    reorder_state,
    select_state,
)
from matrix import assert_close, device_of, slow_if
from stateful import MASKS, MECHANISMS, Mechanism, allowed, assert_same, by_hand, gradients, inputs, make, take

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    torch.manual_seed(0)
    return MECHANISMS[request.param]


# The formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hypotheses", [1, 2])
@pytest.mark.parametrize("masks", MASKS)
def test_formula(mechanism: Mechanism, masks: str, hypotheses: int) -> None:
    given = MASKS[masks]
    if hypotheses == 1 and "per hypothesis" in masks:
        given = {"mask": given["mask"][:, :1]}
    module = make(mechanism)
    queries, outputs = inputs(hypotheses)
    got = take(module, queries, module.memory(outputs, **given))
    expected = by_hand(mechanism, module, queries, outputs, allowed(given, hypotheses))
    torch.testing.assert_close(got, expected)
    sums = expected[1].sum(-1)
    assert ((sums - 1).abs() < 1e-12).logical_or(sums == 0).all() and (sums > 0).any()
    of = {"query": queries, "outputs": outputs}
    assert_same(gradients(module, got[:2], **of), gradients(module, expected[:2], **of))


LENGTHS = torch.tensor([5, 0, 2, 1])


def check_precision(mechanism: Mechanism, dtype: torch.dtype, hypotheses: int, backend: str | None) -> None:
    """The error of results and gradients is measured against that of the formula in the same dtype."""
    device = "cpu" if backend is None else device_of(backend)
    module = make(mechanism, dtype=dtype, backend=backend, device=device)
    queries, outputs = (x.detach().to(device, dtype) for x in inputs(hypotheses))

    def run(steps: Callable[..., Any], module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        q, m = (x.to(dtype).requires_grad_() for x in (queries, outputs))
        context, alignments, _ = steps(module, q, m)
        named = {"context": context, "alignments": alignments}
        return named | gradients(module, [context, alignments], query=q, outputs=m)

    def formula(module: nn.Module, q: Tensor, m: Tensor) -> Any:
        return by_hand(mechanism, module, q, m, allowed({"memory_lengths": LENGTHS}, hypotheses))

    def steps(module: Any, q: Tensor, m: Tensor) -> Any:
        return take(module, q, module.memory(m, LENGTHS.to(device)))

    exact = run(formula, copy.deepcopy(module).double(), torch.float64)
    rough = run(formula, module, dtype)
    errors = {name: (rough[name].double() - x).abs().max().item() for name, x in exact.items()}
    assert_close(run(steps, module, dtype), exact, errors, dtype)


@pytest.mark.parametrize("hypotheses", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(mechanism: Mechanism, dtype: torch.dtype, hypotheses: int) -> None:
    check_precision(mechanism, dtype, hypotheses, None)


@pytest.mark.parametrize("name", ["location-cumulative", "forward-location"])
def test_backends(name: str, backend: str) -> None:
    torch.manual_seed(0)
    check_precision(MECHANISMS[name], torch.float32, 2, backend)


def random_state(module: StatefulAttention, memory: Memory, hypotheses: int) -> tuple[Tensor, ...]:
    """Numbers in 0.2..0.8, which a state may hold whatever it is."""
    state = module.initial_state(memory, hypotheses)
    return tuple((0.2 + 0.6 * torch.rand_like(x)).requires_grad_() for x in state)


@slow_if(lambda hypotheses, **_: hypotheses == 1)
@pytest.mark.parametrize("hypotheses", [1, 2])
def test_gradcheck(mechanism: Mechanism, hypotheses: int) -> None:
    """Of two steps, by everything that they are made of: first and second derivatives."""
    module = make(mechanism)
    queries, outputs = (x.detach().requires_grad_() for x in inputs(hypotheses, 2))
    state = random_state(module, module.memory(outputs), hypotheses)

    def steps(queries: Tensor, outputs: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        memory = module.memory(outputs, LENGTHS)
        context, alignments, after = take(module, queries, memory, others[: len(state)])
        return context, alignments, *(x for x in after if x.requires_grad)

    arguments = (queries, outputs, *state, *module.parameters())
    assert torch.autograd.gradcheck(steps, arguments)
    assert torch.autograd.gradgradcheck(steps, arguments, fast_mode=True)


# The promises of the base ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("hypotheses", [1, 2])
@pytest.mark.parametrize("masks", [name for name in MASKS if name != "none"])
def test_padding_holds_anything(mechanism: Mechanism, masks: str, hypotheses: int, poison: float) -> None:
    """The padding of encoder outputs, and that of a memory that the module did not make."""
    given = MASKS[masks]
    if hypotheses == 1 and "per hypothesis" in masks:
        given = {"mask": given["mask"][:, :1]}
    module = make(mechanism)
    queries, clean = inputs(hypotheses)
    unused = ~allowed(given, hypotheses).any(1)[..., None]
    made = module.memory(clean.detach())
    runs = []
    for fill in (0.0, poison):
        outputs, keys, values = (
            x.detach().masked_fill(unused, fill).requires_grad_() for x in (clean, made.keys, made.values)
        )
        for memory, leaves in (
            (module.memory(outputs, **given), {"outputs": outputs}),
            (Memory(keys, values, **given), {"keys": keys, "values": values}),
        ):
            context, alignments, state = take(module, queries, memory)
            named = gradients(module, [context, alignments], query=queries, **leaves)
            named |= {"context": context, "alignments": alignments, **{f"state {i}": x for i, x in enumerate(state)}}
            assert all(x.isfinite().all() for x in named.values())
            assert all((named[f"d{name}"].masked_select(unused) == 0).all() for name in leaves)
            runs.append(named)
    for clean_run, poisoned in zip(runs[:2], runs[2:], strict=True):
        assert_same(poisoned, clean_run, rtol=0, atol=0)


def test_padding_that_is_written_to(mechanism: Mechanism) -> None:
    """That of values which the module has made 0: what is known of it holds until a write, and for rows of it."""
    module = make(mechanism)
    queries, outputs = (x.detach() for x in inputs(2))
    with torch.no_grad():
        memory = module.memory(outputs, LENGTHS)
        expected = take(module, queries, memory)
        rows = memory.select(torch.tensor([2, 0]))
        assert memory.has_zero_padding() and rows.has_zero_padding()
        assert not copy.deepcopy(memory).has_zero_padding() and not module.memory(outputs).has_zero_padding()
        for written in (memory, rows):
            written.values[1 if written is memory else 0, -1] = torch.nan
            assert not written.has_zero_padding()
        torch.testing.assert_close(take(module, queries, memory), expected, rtol=0, atol=0)
        torch.testing.assert_close(take(module, queries[:, [2, 0]], rows)[0], expected[0][:, [2, 0]])
        with torch.inference_mode():
            memory = module.memory(outputs.clone(), LENGTHS)
            memory.values[1] = torch.nan
            torch.testing.assert_close(take(module, queries, memory), expected, rtol=0, atol=0)


def test_hypotheses_are_runs_of_their_own(mechanism: Mechanism) -> None:
    module = make(mechanism)
    queries, outputs = inputs(3)
    memory = module.memory(outputs, LENGTHS)
    state = random_state(module, memory, 3)
    context, alignments, after = take(module, queries, memory, module.initial_state(memory, 3)._make(state))
    of = {"query": queries, "outputs": outputs, **{f"state {i}": x for i, x in enumerate(state)}}
    rows = [
        take(
            module,
            queries[:, :, k : k + 1],
            memory,
            module.initial_state(memory)._make(x[:, k : k + 1] for x in state),
        )
        for k in range(3)
    ]
    expected = [torch.cat([row[i] for row in rows], dim=2) for i in range(2)]
    torch.testing.assert_close([context, alignments], expected)
    torch.testing.assert_close(after, [torch.cat(parts, dim=1) for parts in zip(*(r[2] for r in rows), strict=True)])
    assert_same(gradients(module, [context, alignments], **of), gradients(module, expected, **of))


def test_queries_in_two_axes_and_sequences(mechanism: Mechanism) -> None:
    module = make(mechanism)
    queries, outputs = inputs(1)
    memory = module.memory(outputs, LENGTHS)
    context, alignments, end = take(module, queries, memory)
    state = module.initial_state(memory)
    for t in range(stateful.T):
        step = module(queries[t, :, 0], memory, state)
        torch.testing.assert_close((step.context, step.alignments), (context[t, :, 0], alignments[t, :, 0]))
        state = step.state
    torch.testing.assert_close(list(state), end)
    whole = module.sequence(queries[:, :, 0].movedim(0, 1), memory)
    torch.testing.assert_close(whole.context, context[:, :, 0].movedim(0, 1))
    torch.testing.assert_close(whole.alignments, alignments[:, :, 0].movedim(0, 1))
    torch.testing.assert_close(list(whole.state), end)


def test_a_state_is_a_value(mechanism: Mechanism) -> None:
    """A step may be taken twice, from a copy of its state, and of the sentences and hypotheses in another order."""
    module = make(mechanism)
    queries, outputs = (x.detach() for x in inputs(3))
    memory = module.memory(outputs, LENGTHS)
    state = module(queries[0], memory, module.initial_state(memory, 3)).state
    before = [x.clone() for x in state]
    first, second = module(queries[1], memory, state), module(queries[1], memory, type(state)(*before))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(map(torch.equal, state, before))
    parents = torch.tensor([[2, 0, 2], [0, 1, 2], [1, 1, 1], [2, 1, 0]])
    moved = reorder_state(state, parents)
    assert type(moved) is type(state)
    again = module(queries[1].gather(1, parents[..., None].expand(-1, -1, stateful.Q)), memory, moved)
    expected = torch.take_along_dim(first.alignments, parents[..., None], 1)
    assert not torch.allclose(first.alignments, expected)
    torch.testing.assert_close(again.alignments, expected)
    torch.testing.assert_close(list(again.state), list(reorder_state(first.state, parents)))
    chosen = torch.tensor([3, 0])
    rows = module(queries[1][chosen], memory.select(chosen), select_state(state, chosen))
    torch.testing.assert_close(rows.alignments, first.alignments[chosen])
    fewer = reorder_state(state, parents[:, :2])
    assert all(x.shape[:2] == (stateful.B, 2) for x in fewer)
    states_of_two_axes = reorder_state((state[0][..., 0],), parents)
    assert torch.equal(states_of_two_axes[0], moved[0][..., 0])


@pytest.mark.parametrize("hypotheses", [1, 2])
def test_nothing_to_attend(mechanism: Mechanism, hypotheses: int) -> None:
    module = make(mechanism)
    queries, outputs = inputs(hypotheses)
    context, alignments, _ = take(module, queries, module.memory(outputs, torch.zeros(4, dtype=torch.int64)))
    assert (context == 0).all() and (alignments == 0).all()
    of = gradients(module, [context, alignments], query=queries, outputs=outputs)
    assert all((grad == 0).all() for grad in of.values())
    context, alignments, state = take(module, queries, module.memory(outputs[:, :0]))
    assert alignments.shape == (3, 4, hypotheses, 0) and (context == 0).all()
    assert state[0].shape == (4, hypotheses, 0)
    context, _, state = take(module, queries[:, :0], module.memory(outputs[:0], torch.zeros(0, dtype=torch.int64)))
    assert context.shape == (3, 0, hypotheses, stateful.M) and state[0].shape == (0, hypotheses, stateful.TK)


def test_parameters(mechanism: Mechanism) -> None:
    """Their names and shapes; a module whose memory was never written to, once loaded, or reset, is like any other."""
    module = make(mechanism)
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == mechanism.parameters
    with torch.device("meta"):
        other = mechanism.make(dtype=torch.float64)
    other.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    other.reset_parameters()
    assert all(x.isfinite().all() for x in other.parameters())
    assert {name for name, x in other.named_parameters() if (x == 0).all()} == {"bias"}
    other.load_state_dict(module.state_dict())
    queries, outputs = (x.detach() for x in inputs())
    expected = take(module, queries, module.memory(outputs))
    for loaded in (other, copy.deepcopy(module)):
        torch.testing.assert_close(take(loaded, queries, loaded.memory(outputs)), expected, rtol=0, atol=0)


def test_initial_state_of_hypotheses_and_masks(mechanism: Mechanism) -> None:
    """It is that of what at least one hypothesis may attend; the same for all of them."""
    module = make(mechanism)
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    memory = module.memory(inputs()[1], torch.tensor([5, 5, 2, 5]), mask)
    state = module.initial_state(memory, 3)
    rows = {"zeros": [[0.0] * 5] * 4}
    rows["uniform"] = [[0, 0.5, 0, 0.5, 0], [0] * 5, [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1]]
    rows["forward"] = [[0, 1, 0, 0, 0], [0] * 5, [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    expected = torch.tensor(rows[mechanism.first]).double()[:, None].expand(-1, 3, -1)
    assert torch.equal(state[0], expected)
    if not mechanism.is_forward:
        assert all(torch.equal(x, expected) for x in state)


@pytest.mark.parametrize("hypotheses", [1, 2])
def test_autocast(mechanism: Mechanism, hypotheses: int) -> None:
    module = make(mechanism, dtype=torch.float32)
    queries, outputs = inputs(hypotheses, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        context, alignments, _ = take(module, queries, module.memory(outputs, LENGTHS))
        mixed, *_ = take(module, queries, module.memory(outputs.detach(), LENGTHS).to(torch.float32))
    assert context.dtype == alignments.dtype == torch.bfloat16
    expected = take(module, queries, module.memory(outputs, LENGTHS))[0]
    for result in (context, mixed):
        torch.testing.assert_close(result.float(), expected, rtol=5e-2, atol=5e-2)
    for grad in gradients(module, [context, alignments], query=queries, outputs=outputs).values():
        assert grad.dtype == torch.float32 and grad.isfinite().all()


@slow_if(lambda mechanism: mechanism not in ("location", "forward-location"))
def test_compile_and_export(mechanism: Mechanism) -> None:
    module = make(mechanism, backend="reference")
    queries, outputs = (x.detach() for x in inputs(2))
    memory = module.memory(outputs, LENGTHS)
    memory = torch.utils._pytree.tree_map(torch.Tensor.detach, memory)
    state = module(queries[0], memory, module.initial_state(memory, 2)).state
    state = type(state)(*(x.detach() for x in state))
    expected = module(queries[1], memory, state)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(queries[1], memory, state)
    assert type(compiled.state) is type(state)
    torch.testing.assert_close(compiled, expected)
    sequence = torch.compile(module.sequence, fullgraph=True, backend="aot_eager")
    whole = queries[:, :, 0].transpose(0, 1)
    torch.testing.assert_close(sequence(whole, memory), module.sequence(whole, memory))
    saved = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), (queries[1], memory, state)), saved)
    saved.seek(0)
    with torch.serialization.safe_globals([Memory, type(state)]):  # example inputs, which are saved beside the program
        program = torch.export.load(saved)
    torch.testing.assert_close(program.module()(queries[1], memory, state), expected)


# What is particular to one of them ------------------------------------------------------------------------------------


def test_without_bias() -> None:
    """The form of Tacotron 2: it is that with a bias of 0."""
    torch.manual_seed(0)
    for make_one in (LocationSensitiveAttention, CoverageAttention, ForwardAttention):
        module, other = (make_one(6, 7, 8, bias=bias, dtype=torch.float64) for bias in (False, True))
        assert "bias" not in module.state_dict()
        other.load_state_dict(module.state_dict() | {"bias": torch.zeros(8)})
        queries, outputs = inputs(1)
        expected = take(other, queries, other.memory(outputs))
        torch.testing.assert_close(take(module, queries, module.memory(outputs)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_many_steps_are_float32(dtype: torch.dtype) -> None:
    """In bfloat16, 256 + 1 is 256."""
    for module in (
        CoverageAttention(6, 7, 8, dtype=dtype),
        LocationSensitiveAttention(6, 7, 8, cumulative=True, dtype=dtype),
    ):
        memory = module.memory(torch.randn(1, 1, 7, dtype=dtype))
        with torch.no_grad():
            state = module.sequence(torch.randn(1, 300, 6, dtype=dtype), memory).state
        assert state[-1].dtype == torch.float32 and state[-1].item() == 300


def far_apart(dtype: torch.dtype, transition_agent: bool = False) -> tuple[ForwardAttention, Tensor, Memory]:
    """The scores of four steps are, to within a hundredth, 0, -2, 400 and 0 for every query."""
    module = ForwardAttention(1, 1, 1, transition_agent, dtype=dtype)
    with torch.no_grad():
        module.query_projection.weight.zero_()
        module.memory_projection.weight.fill_(1.0)
        module.v.fill_(400.0)
    memory = module.memory(torch.tensor([0.0, -0.005, 8.0, 0.0], dtype=dtype).view(1, 4, 1))
    return module, torch.ones(1, 1, 1, dtype=dtype), memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_attention_far_from_the_largest_score(dtype: torch.dtype) -> None:
    """The softmax of all scores is 0 in float32 wherever the alignments may go; their quotient is not."""
    module, query, memory = far_apart(dtype)
    state = module.initial_state(memory)
    scores = 400 * memory.keys.float().tanh().flatten()
    assert (scores.softmax(0)[:2] == 0).all()
    context, alignments, after = module(query, memory, state)
    expected = scores[:2].softmax(0)
    rounding = max(torch.finfo(dtype).eps, 2e-6)
    got = after.alignments.flatten().float()
    torch.testing.assert_close(got, torch.cat([expected, torch.zeros(2)]), rtol=rounding, atol=0)
    assert alignments.dtype == context.dtype == dtype
    (alignments[..., 0].sum() + context.sum()).backward()
    assert all(x.grad.isfinite().all() for x in module.parameters())
    assert module.v.grad.abs() > 0
    # From the second step the third can be reached, which takes all.
    alignments = module(query, memory, after).alignments.flatten()
    torch.testing.assert_close(alignments, torch.tensor([0.0, 0, 1, 0], dtype=dtype))
    # What is left of it before counts for nothing, where the product with its softmax may be 0.
    memory = module.memory(torch.tensor([0.0, -0.005, 8.0, 8.0], dtype=dtype).view(1, 4, 1))
    before = torch.tensor([1.0, 0, 2.8e-45, 0], dtype=state.alignments.dtype).view(1, 1, 4)
    got = module(query, memory, ForwardState(before, state.move)).state.alignments.flatten().float()
    torch.testing.assert_close(got, torch.cat([expected, torch.zeros(2)]), rtol=rounding, atol=0)


@pytest.mark.parametrize("certain", [1.0, 0.0], ids=["moves", "stays"])
def test_forward_attention_with_a_certain_agent(certain: float) -> None:
    """Moving on from the last step of a sentence would leave nothing: it is the formula without an agent, and stays."""
    module, query, memory = far_apart(torch.float32, transition_agent=True)
    memory = Memory(memory.keys, memory.values, torch.tensor([3]))
    with torch.no_grad():
        module.transition.bias.fill_(1e4 if certain else -1e4)
    before = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 1, 4).requires_grad_()
    move = torch.tensor(certain).view(1, 1, 1).requires_grad_()
    context, alignments, state = module(query, memory, ForwardState(before, move))
    assert alignments.flatten().tolist() == [0, 0, 1, 0] and state.move.item() == certain
    leaves = [before, move, *module.parameters()]
    gradients_ = torch.autograd.grad((alignments[..., 2] + context[..., 0]).sum(), leaves, allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in gradients_)
    start = module.initial_state(memory)._replace(move=move.detach())
    assert module(query, memory, start).alignments.flatten().tolist() == [1 - certain, certain, 0, 0]


def test_forward_attention_out_of_reach() -> None:
    """Alignments cannot pass a step that may not be attended; where all are beyond it, they are 0 and stay so."""
    module, query, memory = far_apart(torch.float64)
    memory = Memory(memory.keys, memory.values, mask=torch.tensor([[True, False, True, True]]))
    state = module.initial_state(memory)
    for _ in range(3):
        _, alignments, state = module(query, memory, state)
        assert alignments.flatten().tolist() == [1, 0, 0, 0]
    nowhere = ForwardState(torch.tensor([0.0, 1, 0, 0]).double().view(1, 1, 4), state.move)
    beyond = Memory(memory.keys, memory.values, mask=torch.tensor([[True, False, False, True]]))
    context, alignments, state = module(query, beyond, nowhere)
    assert (alignments == 0).all() and (context == 0).all() and (state.alignments == 0).all()
    grads = torch.autograd.grad(context.sum(), list(module.parameters()), allow_unused=True)
    assert all(x is None or (x == 0).all() for x in grads)


def test_coverage_loss() -> None:
    torch.manual_seed(0)
    module = CoverageAttention(6, 7, 8, dtype=torch.float64)
    memory = module.memory(torch.randn(4, 5, 7).double(), LENGTHS)
    queries, state, losses, rows = torch.randn(4, 3, 6).double(), module.initial_state(memory), [], []
    for query in queries.unbind(1):
        before = state.coverage[:, 0]
        _, alignments, state = module(query, memory, state)
        losses.append(coverage_loss(alignments, before))
        smaller = [[min(a, c) for a, c in zip(*pair, strict=True)] for pair in zip(alignments, before, strict=True)]
        torch.testing.assert_close(losses[-1], torch.stack([sum(row) for row in smaller]))
        rows.append(alignments)
    assert (losses[0] == 0).all() and (losses[1] > 0).any()
    whole = coverage_loss(torch.stack(rows, dim=1))
    torch.testing.assert_close(whole, torch.stack(losses, dim=1))
    for total in (sum(x.sum() for x in losses), whole.sum()):
        grads = torch.autograd.grad(total, [module.v, module.coverage_weight], retain_graph=True)
        torch.testing.assert_close(
            grads, torch.autograd.grad(whole.sum(), [module.v, module.coverage_weight], retain_graph=True)
        )
    assert coverage_loss(torch.rand(2, 3, 5).bfloat16()).dtype == torch.float32


LOCATION, COVERAGE, FORWARD = LocationSensitiveAttention(6, 7, 8), CoverageAttention(6, 7, 8), ForwardAttention(6, 7, 8)
QUERY, OUTPUTS = torch.zeros(4, 2, 6), torch.zeros(4, 5, 7)
ROWS, STATE = torch.zeros(4, 2, 5), LocationState(torch.zeros(4, 2, 5))
MEMORY = LOCATION.memory(OUTPUTS)
PER_QUERY = LOCATION.memory(OUTPUTS, mask=torch.ones(4, 3, 5).bool())
ERRORS = [
    (lambda: LocationSensitiveAttention(6, 7, 0), ValueError, "units must be a positive integer, got 0"),
    (lambda: LocationSensitiveAttention(6, 7, 8, 0), ValueError, "channels must be a positive integer, got 0"),
    (
        lambda: LocationSensitiveAttention(6, 7, 8, 4, 2.5),
        ValueError,
        "kernel_size must be an odd positive integer, got 2.5",
    ),
    (
        lambda: LocationSensitiveAttention(6, 7, 8, 4, 30),
        ValueError,
        "kernel_size must be an odd positive integer, got 30",
    ),
    (
        lambda: ForwardAttention(6, 7, 8, channels=4, kernel_size=30),
        ValueError,
        "ForwardAttention: kernel_size must be",
    ),
    (lambda: LocationSensitiveAttention(6, 7, 8, scale="2"), TypeError, "scale must be a number, got str"),
    (lambda: CoverageAttention(6, 7, 8, float("inf")), ValueError, "CoverageAttention: scale must be a finite number"),
    (lambda: CoverageAttention(6, 7, 8, initial="ones"), ValueError, "must be 'zeros' or 'uniform', got 'ones'"),
    (lambda: LOCATION(QUERY, MEMORY, None), TypeError, "state must be a tuple of tensors, made by LocationSensitive"),
    (lambda: LOCATION(QUERY, MEMORY, (ROWS[:, :1],)), ValueError, "(B, K, *) = (4, 2, *), got (4, 1, 5)"),
    (lambda: LOCATION(QUERY, MEMORY, (ROWS, ROWS)), ValueError, "must be LocationState(alignments), got 2 tensors"),
    (lambda: LOCATION(QUERY, MEMORY, (ROWS[..., 1:],)), ValueError, "state.alignments must have shape (B, K, 5), got"),
    (
        lambda: LocationSensitiveAttention(6, 7, 8, cumulative=True)(
            QUERY, MEMORY, CumulativeLocationState(ROWS, ROWS[..., 0])
        ),
        ValueError,
        "state.cumulative must have shape (B, K, 5), got (4, 2)",
    ),
    (lambda: COVERAGE(QUERY, MEMORY, CoverageState(ROWS[..., :1])), ValueError, "state.coverage must have shape"),
    (lambda: FORWARD(QUERY, MEMORY, ForwardState(ROWS, ROWS)), ValueError, "state.move must have shape (B, K, 1), got"),
    (
        lambda: LOCATION(QUERY, PER_QUERY, STATE),
        ValueError,
        "(B, Tk) or (B, K, Tk) = (4, 5) or (4, 2, 5), got (4, 3, 5)",
    ),
    (lambda: FORWARD(QUERY[:, 0], OUTPUTS, STATE), TypeError, "must be a Memory, made by ForwardAttention.memory(...)"),
    *(
        (lambda m=m: m(QUERY, m.memory(OUTPUTS, LENGTHS + 1), m.initial_state(MEMORY, 2)), ValueError, "0..5, got 1..6")
        for m in (LOCATION, COVERAGE, FORWARD)
    ),
    (lambda: coverage_loss([0.5]), TypeError, "coverage_loss: alignments must be a tensor, got list"),
    (lambda: coverage_loss(ROWS[0]), ValueError, "alignments must be (B, T, Tk) without coverage, got (2, 5)"),
    (
        lambda: coverage_loss(ROWS, ROWS[:, 1:]),
        ValueError,
        "must have the shape of alignments, (4, 2, 5), got (4, 1, 5)",
    ),
    (lambda: coverage_loss(ROWS, 0.5), TypeError, "coverage_loss: coverage must be a tensor, got float"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_repr() -> None:
    assert "units=8, cumulative=False, scale=1.0, initial='zeros'" in repr(LOCATION)
    assert "units=8, scale=1.0, initial='zeros'" in repr(COVERAGE)
    assert "units=8, transition_agent=False, scale=1.0" in repr(FORWARD)
