"""The deferred gradient of a memory: in every program the gradients equal those of the reference."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_kernels import BahdanauAttention, Memory, memory_gradient
from attn_kernels.ops import kernel
from conftest import available
from matrix import CASES, CORE, OPS, Case, Op, device_of, is_slow, make, slow_if, slow_interpreted
from test_modules import MASKS, MECHANISMS, TK, B, M, Q

STEPS = 4
Grads = dict[str, Tensor]


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every memory is large enough. Gives the numbers of steps of which gradients of a memory were made at once."""
    available("cpu")
    made: list[int] = []
    memory_gradients = memory_gradient._memory_gradients

    def counted(steps: list[Any]) -> tuple[Tensor, Tensor]:
        made.append(len(steps))
        return memory_gradients(steps)

    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 0)
    monkeypatch.setattr(memory_gradient, "_memory_gradients", counted)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)


class World:
    """A module, its inputs and a decoder that feeds each context into the next query; the same for each backend."""

    def __init__(
        self,
        mechanism: str,
        backend: str,
        dtype: torch.dtype = torch.float64,
        rounded: torch.dtype = torch.float32,
        **masks: Tensor,
    ) -> None:
        """rounded: every number can be represented in it."""
        generator = torch.Generator().manual_seed(0)
        device = device_of(backend)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(rounded).to(device, dtype)

        self.module: nn.Module = MECHANISMS[mechanism].make(backend=backend, dtype=dtype, device=device)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(normal(*parameter.shape))
        size = MECHANISMS[mechanism].memory_size
        self.outputs = normal(B, TK, size).requires_grad_()
        self.queries = [normal(B, Q).requires_grad_() for _ in range(STEPS)]
        self.mix = 0.25 * normal(size, Q)
        self.weights = [(normal(B, size), normal(B, TK)) for _ in range(STEPS)]
        masks = {name: mask.to(device) for name, mask in masks.items()}
        self.memory: Memory = self.module.memory(self.outputs, **masks)

    def decode(self, memory: Memory | None = None, **options: Any) -> list[tuple[Tensor, Tensor]]:
        memory = self.memory if memory is None else memory
        results, feed = [], 0.0
        for query in self.queries:
            context, alignments = self.module(query + feed, memory, **options)
            feed = context @ self.mix
            results.append((context, alignments))
        return results

    def losses(self, results: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Of each step, on context and alignments."""
        return [
            (context * on_context).sum() + (0 if alignments is None else (alignments * on_alignments).sum())
            for (context, alignments), (on_context, on_alignments) in zip(results, self.weights, strict=True)
        ]

    def leaves(self) -> dict[str, Tensor]:
        queries = {f"query {i}": query for i, query in enumerate(self.queries)}
        return {**dict(self.module.named_parameters()), "outputs": self.outputs, **queries}

    def grads(self) -> Grads:
        """What has gathered in .grad, by name; leaves that got none are not named."""
        return {f"d{name}": leaf.grad.clone() for name, leaf in self.leaves().items() if leaf.grad is not None}


def largest_error(got: Tensor, expected: Tensor) -> float:
    """As a share of the largest value."""
    wide = expected.double().cpu()
    return ((got.double().cpu() - wide).abs().max() / wide.abs().max().clamp_min(1e-3)).item()


def assert_same(got: Grads, expected: Grads, tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = largest_error(got[name], tensor)
        assert error <= tolerance, f"{name}: {error:.1e}"


def both(program: Callable[[World], Any], mechanism: str, **masks: Tensor) -> Any:
    """Runs a program that returns gradients by name on the deferring backend and on the reference; they must agree."""
    got, expected = program(World(mechanism, "cpu", **masks)), program(World(mechanism, "reference", **masks))
    assert_same(got, expected)
    return got


semantics = pytest.mark.parametrize("mechanism", ["bahdanau-normalized", "luong-dot", "luong-concat"])

# Right for every mechanism, mask and dtype ----------------------------------------------------------------------------

ONE_QUERY = {name: masks for name, masks in MASKS.items() if name != "mask per query"} | {
    "mask of one query": {"mask": MASKS["mask per query"]["mask"][:, :1]}
}


@pytest.mark.parametrize("masks", ONE_QUERY)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients(mechanism: str, masks: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        sum(world.losses(world.decode())).backward()
        return world.grads()

    both(program, mechanism, **ONE_QUERY[masks])
    assert passes == [STEPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_precision(
    mechanism: str, masks: str, dtype: torch.dtype, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sum and one rounding: as exact as gradients that each step makes and rounds, added up."""

    def gradients(backend: str, precision: torch.dtype) -> Grads:
        world = World(mechanism, backend, precision, rounded=dtype, **MASKS[masks])
        sum(world.losses(world.decode())).backward()
        return world.grads()

    exact, got = gradients("reference", torch.float64), gradients("cpu", dtype)
    assert passes == [STEPS]
    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 1 << 60)
    step_by_step = gradients("cpu", dtype)
    factor, rounding = (2, 1e-6) if dtype == torch.float32 else (3, torch.finfo(dtype).eps)
    for name, wide in exact.items():
        assert largest_error(got[name], wide) <= factor * largest_error(step_by_step[name], wide) + rounding, name


def test_several_queries_a_step(passes: list[int]) -> None:
    """Beams; and a mask for each of them, which is not deferred."""

    def program(world: World) -> Grads:
        for size in (3, 2):
            states = torch.stack(world.queries[:size], 1)
            result = world.module(states, world.memory)
            (result.context.square().sum() + result.alignments.square().sum()).backward(retain_graph=True)
        return world.grads()

    for mechanism in MECHANISMS:
        both(program, mechanism, **MASKS["lengths"])
    assert passes == [1] * 2 * len(MECHANISMS)

    def with_mask(world: World) -> Grads:
        result = world.module(torch.stack(world.queries[:3], 1), world.memory)
        result.context.square().sum().backward()
        return world.grads()

    for mechanism in MECHANISMS:
        both(with_mask, mechanism, **MASKS["mask per query"])
    assert len(passes) == 2 * len(MECHANISMS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bahdanau", "luong-dot"])
def test_padding_holds_anything(name: str, poison: float, passes: list[int]) -> None:
    """Keys and values of a Memory that no module has cleaned; and a query that attends nothing."""
    lengths = torch.tensor([5, 0, 2, 1])
    padding = torch.arange(TK) >= lengths[:, None]
    results = []
    for filling in (0.0, poison):
        world = World(name, "cpu")
        keys = world.memory.keys.detach().masked_fill(padding[..., None], filling).requires_grad_()
        values = world.memory.values.detach().masked_fill(padding[..., None], filling).requires_grad_()
        with torch.no_grad():
            for query in world.queries:
                query[1] = filling
        world.mix.zero_()
        memory = Memory(keys, values, lengths)
        contexts = [world.module(query, memory).context for query in world.queries]
        sum(context.square().sum() for context in contexts).backward()
        results.append({"keys": keys.grad, "values": values.grad})
    assert passes == [STEPS, STEPS]
    for key, grad in results[1].items():
        assert torch.equal(grad, results[0][key])
        assert (grad[padding] == 0).all() and (grad[~padding] != 0).any()


# As autograd has it ---------------------------------------------------------------------------------------------------


@semantics
def test_steps_that_are_not_differentiated(mechanism: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        losses = world.losses(world.decode())
        world.module(world.queries[0], world.memory)
        (losses[0] + losses[2]).backward()
        return world.grads()

    assert "dquery 3" not in both(program, mechanism)
    assert passes == [3]


@semantics
@pytest.mark.parametrize("output", [0, 1], ids=["context", "alignments"])
def test_one_output(mechanism: str, output: int, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        steps = [world.module(query, world.memory) for query in world.queries]
        sum(step[output].pow(3).sum() for step in steps).backward()
        return world.grads()

    both(program, mechanism, **MASKS["lengths"])
    assert passes == [STEPS]


@semantics
def test_outputs_taken_in_turn(mechanism: str, passes: list[int]) -> None:
    """Some steps give a gradient of their context, some of their alignments, some of both."""

    def program(world: World) -> Grads:
        steps = [world.module(query, world.memory) for query in world.queries]
        parts = [steps[0].context, steps[1].alignments, steps[2].context, steps[2].alignments]
        sum(part.pow(3).sum() for part in parts).backward()
        return world.grads()

    both(program, mechanism, **MASKS["lengths"])
    assert passes == [3]


@semantics
def test_without_weights(mechanism: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        sum(world.losses(world.decode(need_weights=False))).backward()
        return world.grads()

    both(program, mechanism)
    assert passes == [STEPS]


@semantics
def test_retained_graph(mechanism: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        loss = sum(world.losses(world.decode()))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return world.grads()

    both(program, mechanism)
    assert passes == [STEPS] * 3


@semantics
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_several_losses(mechanism: str, order: tuple[int, ...], passes: list[int]) -> None:
    def program(world: World) -> Grads:
        losses = world.losses(world.decode())
        for i in order:
            losses[i].backward(retain_graph=True)
        return world.grads()

    both(program, mechanism)
    assert passes == [i + 1 for i in order]


@semantics
def test_leaves_as_memory(mechanism: str, passes: list[int]) -> None:
    """Steps that share no graph, but for leaves, are differentiated one by one without retain_graph."""

    def program(world: World) -> Grads:
        keys, values = (t.detach().clone().requires_grad_() for t in (world.memory.keys, world.memory.values))
        memory = Memory(keys, values)
        steps = [world.module(query, memory) for query in world.queries]
        for loss in world.losses(steps):
            loss.backward()
        return {**world.grads(), "keys": keys.grad, "values": values.grad}

    both(program, mechanism)
    assert passes == [1] * STEPS


@semantics
@pytest.mark.parametrize("needed", ["keys", "values"])
def test_one_of_keys_and_values(mechanism: str, needed: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        tensors = {name: getattr(world.memory, name).detach().clone() for name in ("keys", "values")}
        tensors[needed].requires_grad_()
        sum(world.losses(world.decode(Memory(**tensors)))).backward()
        return {**world.grads(), needed: tensors[needed].grad}

    both(program, mechanism)
    assert passes == [STEPS]


@semantics
def test_new_steps_after_a_backward(mechanism: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        for _ in range(2):
            sum(world.losses(world.decode())).backward(retain_graph=True)
        return world.grads()

    both(program, mechanism)
    assert passes == [STEPS, STEPS]


def test_two_modules(passes: list[int]) -> None:
    """Two modules on one memory: of the same form with a v of each, or of other scores."""

    def program(world: World) -> Grads:
        torch.manual_seed(1)
        other = copy.deepcopy(world.module) if world.module.key_size != Q else BahdanauAttention(Q, M, Q)
        other.double().backend = world.module.backend
        for parameter in other.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        steps = [(other if i % 2 else world.module)(query, world.memory) for i, query in enumerate(world.queries)]
        sum(world.losses(steps)).backward()
        used = [(name, p) for name, p in other.named_parameters() if p.grad is not None]
        return {**world.grads(), **{f"other {name}": p.grad for name, p in used}}

    both(program, "bahdanau-normalized")
    assert passes == [2, 2]
    both(program, "luong-general")
    assert passes == [2] * 4


def test_v_written_between_steps(passes: list[int]) -> None:
    def program(world: World) -> Grads:
        world.module.requires_grad_(False)
        steps = []
        for i, query in enumerate(world.queries):
            if i == 2:
                world.module.v = nn.Parameter(-world.module.v, requires_grad=False)
            steps.append(world.module(query, world.memory))
        sum(world.losses(steps)).backward()
        return world.grads()

    both(program, "bahdanau-normalized")
    assert passes == [2, 2]


SUBSETS = {
    "a query": lambda world: {"query 1": world.queries[1]},
    "v": lambda world: {"v": world.module.v},
    "outputs": lambda world: {"outputs": world.outputs},
    "keys": lambda world: {"keys": world.memory.keys},
    "values": lambda world: {"values": world.memory.values},
    "keys and a query": lambda world: {"keys": world.memory.keys, "query 0": world.queries[0]},
    "memory projection": lambda world: {"weight": world.module.memory_projection.weight},
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_subset_of_inputs(subset: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        inputs = SUBSETS[subset](world)
        loss = sum(world.losses(world.decode()))
        first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
        loss.backward(inputs=[world.queries[0]], retain_graph=True)  # leaves nothing behind
        second = torch.autograd.grad(loss, list(inputs.values()))
        return dict(zip([f"{name} {i}" for i in (1, 2) for name in inputs], first + second, strict=True))

    both(program, "bahdanau-normalized", **MASKS["lengths"])
    assert passes == ([] if subset in ("a query", "v") else [STEPS, STEPS])


@semantics
def test_hooks(mechanism: str) -> None:
    def program(world: World) -> Grads:
        seen: Grads = {}

        def see(name: str) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                assert name not in seen
                seen[name] = grad.clone()
                return 2 * grad

            return hook

        before = world.decode()  # hooks are put on after the first steps
        for name, leaf in world.leaves().items():
            leaf.register_hook(see(name))
        world.memory.values.register_hook(see("memory.values"))
        if world.memory.keys is not world.memory.values:
            world.memory.keys.register_hook(see("memory.keys"))
            world.memory.keys.retain_grad()
        results = world.decode()
        results[1][0].register_hook(see("context"))
        sum(world.losses(before) + world.losses(results)).backward()
        kept = {} if world.memory.keys.grad is None else {"kept": world.memory.keys.grad}
        return {**world.grads(), **seen, **kept}

    both(program, mechanism)


@semantics
def test_aborted_backward(mechanism: str, passes: list[int]) -> None:
    """What an exception half-way leaves is gone, and in no later gradient."""

    def program(world: World) -> Grads:
        results = world.decode()
        loss = sum(world.losses(results))

        def fail(_: Tensor) -> None:
            raise ValueError("half-way")

        handle = results[1][0].register_hook(fail)
        for _ in range(2):
            with pytest.raises(ValueError, match="half-way"):
                loss.backward(retain_graph=True)
        handle.remove()
        for leaf in world.leaves().values():
            leaf.grad = None
        gradient = world.memory.__dict__.get("_gradient")
        assert gradient is None or not gradient._passes
        loss.backward()
        return world.grads()

    both(program, mechanism)
    assert passes == [STEPS]


@semantics
def test_backward_within_backward(mechanism: str, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        inside = sum(world.losses(world.decode()))
        results = world.decode()
        got: Grads = {}

        def hook(_: Tensor) -> None:
            (got["inside"],) = torch.autograd.grad(inside, [world.outputs], retain_graph=True)

        results[1][0].register_hook(hook)
        sum(world.losses(results)).backward()
        return {**world.grads(), **got}

    both(program, mechanism)
    assert passes == [STEPS, STEPS]


@semantics
def test_threads(mechanism: str) -> None:
    """Backward passes of several threads through the same steps at once."""

    def program(world: World) -> Grads:
        losses = world.losses(world.decode())
        got: Grads = {}

        def run(i: int) -> None:
            for _ in range(20):
                (got[f"outputs {i}"],) = torch.autograd.grad(losses[i], [world.outputs], retain_graph=True)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(STEPS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return dict(sorted(got.items()))

    both(program, mechanism)


@semantics
@pytest.mark.parametrize("written", ["keys", "values"])
def test_written_memory_is_noticed(mechanism: str, written: str) -> None:
    world = World(mechanism, "cpu")
    memory = Memory(world.memory.keys.clone(), world.memory.values.clone())
    step = world.module(world.queries[0], memory)
    getattr(memory, written).mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step.context.sum().backward()


def test_memory_written_between_steps(passes: list[int]) -> None:
    """The same Memory: its gradients flow to where keys stand in the graph when the step reads them."""

    def program(world: World) -> Grads:
        keys, values = (t.detach().clone() for t in (world.memory.keys, world.memory.values))
        memory = Memory(keys, values.requires_grad_())
        world.module(world.queries[0], memory)
        factor = torch.tensor(0.5, dtype=keys.dtype, requires_grad=True)
        keys.mul_(factor)
        steps = [world.module(query, memory) for query in world.queries]
        sum(world.losses(steps)).backward()
        return {**world.grads(), "factor": factor.grad, "values": values.grad}

    both(program, "bahdanau")
    assert passes == [STEPS]


@semantics
@pytest.mark.parametrize("whole", [True, False], ids=["all steps", "each step"])
def test_checkpoint(mechanism: str, whole: bool, passes: list[int]) -> None:
    def program(world: World) -> Grads:
        if whole:
            results = checkpoint(world.decode, use_reentrant=False)
        else:
            results = [checkpoint(world.module, query, world.memory, use_reentrant=False) for query in world.queries]
        sum(world.losses(results)).backward()
        return world.grads()

    both(program, mechanism)
    assert passes == [STEPS]


@semantics
def test_select_and_to(mechanism: str, passes: list[int]) -> None:
    """What is made of a memory between steps is another memory, and its gradient one more part of the first one's."""

    def program(world: World) -> Grads:
        results = world.decode()
        selected = world.memory.select(torch.tensor([2, 0, 0, 3]))
        sum(world.losses(results) + world.losses(world.decode(selected))).backward()
        return world.grads()

    both(program, mechanism, **MASKS["lengths"])
    assert passes == [STEPS, STEPS]


# What it does not do --------------------------------------------------------------------------------------------------


@semantics
def test_compiled(mechanism: str, passes: list[int]) -> None:
    """Compiled steps make their own gradients, beside steps that leave theirs."""
    torch._dynamo.reset()

    def program(world: World) -> Grads:
        eager = world.module(world.queries[0], world.memory)
        step = torch.compile(world.module, fullgraph=True, backend="aot_eager")
        steps = [eager, *(step(query, world.memory) for query in world.queries[1:3])]
        steps.append(world.module(world.queries[3], world.memory))
        sum(world.losses(steps)).backward()
        return world.grads()

    got, expected = program(World(mechanism, "cpu")), World(mechanism, "reference")
    sum(expected.losses([expected.module(query, expected.memory) for query in expected.queries])).backward()
    assert_same(got, expected.grads())
    assert passes == [2]


@pytest.mark.long(30)
@pytest.mark.slow
@semantics
def test_compiled_autograd(mechanism: str, passes: list[int]) -> None:
    torch._dynamo.reset()
    world, expected = World(mechanism, "cpu"), World(mechanism, "reference")
    for one in (world, expected):  # two steps: later ones are like the second, and the compiler takes seconds for each
        one.queries, one.weights = one.queries[:2], one.weights[:2]
    for _ in range(2):  # compiled, and taken from its cache
        sum(expected.losses(expected.decode(expected.module.memory(expected.outputs)))).backward()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            sum(world.losses(world.decode(world.module.memory(world.outputs)))).backward()
    assert_same(world.grads(), expected.grads())
    assert passes == [2, 2]


@semantics
def test_function_transforms(mechanism: str, passes: list[int]) -> None:
    """As without a memory: nothing of a step within torch.func is left for later."""
    world = World(mechanism, "cpu")

    def loss(query: Tensor) -> Tensor:
        return world.module(query, world.memory).context.sum()

    query = world.queries[0].detach()
    gradient = torch.func.grad(loss)(query)
    _, tangent = torch.func.jvp(loss, (query,), (torch.ones_like(query),))
    assert "_gradient" not in world.memory.__dict__ and not passes
    (expected,) = torch.autograd.grad(loss(query.requires_grad_()), query)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(tangent, expected.sum())


def test_autocast_makes_gradients_step_by_step(passes: list[int]) -> None:
    """Each step casts the memory: its gradients are of the cast."""
    world = World("bahdanau", "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = world.losses([world.module(query, world.module.memory(world.outputs)) for query in world.queries])
    sum(losses).backward()
    assert world.outputs.grad.isfinite().all()


@pytest.mark.parametrize("mechanism", ["bahdanau", "luong-general"])
def test_every_backend(mechanism: str, backend: str, passes: list[int]) -> None:
    worlds = World(mechanism, backend, torch.float32), World(mechanism, "reference")
    for world in worlds:
        sum(world.losses(world.decode())).backward()
    assert_same(worlds[0].grads(), worlds[1].grads(), 2e-5)
    assert passes == ([] if backend == "reference" else [STEPS])  # the reference differentiates twice


def test_small_memories_and_steps_without_gradients(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    world = World("bahdanau", "cpu")
    with torch.no_grad():
        world.decode()
    frozen = Memory(world.memory.keys.detach(), world.memory.values.detach())
    sum(world.losses(world.decode(frozen))).backward()
    monkeypatch.undo()  # the size that a memory must have again
    sum(world.losses(world.decode())).backward()
    assert "_gradient" not in world.memory.__dict__ and "_gradient" not in frozen.__dict__ and not passes
    keys = torch.zeros(1, 1000, 512, requires_grad=True)
    values = torch.zeros(1, 1000, 512)
    assert memory_gradient.should_defer("cpu", (torch.zeros(1, 1, 512), keys, values), None)
    assert not memory_gradient.should_defer("cpu", (torch.zeros(1, 8, 512), keys, values), None)


# Memory as a value ----------------------------------------------------------------------------------------------------


def test_copies(passes: list[int]) -> None:
    world = World("bahdanau", "cpu")
    memory = Memory(world.memory.keys.detach().requires_grad_(), world.memory.values.detach())
    world.decode(memory)
    assert "_gradient" in memory.__dict__
    for copied in (copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert "_gradient" not in copied.__dict__
        passes.clear()
        sum(world.losses(world.decode(copied))).backward()
        assert passes == [STEPS]


def test_nothing_is_kept() -> None:
    """No cycle keeps a memory or a graph alive, and nothing of a backward pass stays with its memory."""
    world = World("bahdanau", "cpu")
    gc.disable()
    try:
        results = world.decode()
        gradient = world.memory.__dict__["_gradient"]
        sum(world.losses(results)).backward(retain_graph=True)
        assert not gradient._passes
        gone = [weakref.ref(t) for t in (gradient, world.memory.keys, *(t for step in results for t in step))]
        del results, gradient, world.memory
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()


# The ops --------------------------------------------------------------------------------------------------------------

masked = pytest.mark.parametrize("op", [op for op in OPS.values() if op.masked], ids=lambda op: op.name)


def backward_arguments(op: Op, case: Case, dtype: torch.dtype, prepare: bool, backend: str) -> list[tuple[Any, ...]]:
    """With gradients of both outputs, of the context and of the alignments."""
    made = make(op, case, dtype, device_of(backend))
    tensors = list(made.tensors.values())
    if tensors[0].dim() == 2:
        tensors[0] = tensors[0][:, None]
    score = [*tensors[3:], *[None] * (len(op.inputs) - len(tensors))]
    if op.name == "additive_attention":
        score.append(kernel("additive_prepare", "cpu")(tensors[1]) if prepare else None)
    arguments = [*tensors[:3], *score, *op.options.values(), *(made.masks.get(m) for m in ("memory_lengths", "mask"))]
    _, alignments = kernel(op.name, backend)(*arguments, True)
    context, weights = (g[:, None] if g.dim() == 2 else g for g in made.grads.values())
    return [(*grads, *arguments, alignments) for grads in ((context, weights), (context, None), (None, weights))]


@slow_if(lambda fused, dtype, **_: dtype == torch.float16 or (fused != "cpu" and dtype == torch.float64))
@slow_interpreted(*CORE)
@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@masked
def test_only_needed_gradients(op: Op, fused: str, case: Case, dtype: torch.dtype) -> None:
    """Those of the whole backward, but for the order of sums; the others are empty."""
    if len(case.receives) < 2:
        pytest.skip("outputs without a gradient are part of every case here")
    if is_slow(fused) and (dtype != torch.float32 or case.B > 16 or case.pairs > 12_000):
        pytest.skip("the small cases are enough for Triton's interpreter")
    prepare = fused == "cpu" and op.name == "additive_attention" and dtype != torch.float64
    for arguments in backward_arguments(op, case, dtype, prepare, fused):
        backward = kernel(f"{op.name}_backward", fused)
        of_query, of_memory = backward(*arguments, True, False), backward(*arguments, False, True)
        whole = backward(*arguments, True, True)
        names = ("query", "keys", "values", "v", "bias")[: len(whole)]
        eps = {torch.float64: 1e-13, torch.float32: 4e-6}.get(dtype, torch.finfo(dtype).eps)
        for name, a, b, full in zip(names, of_query, of_memory, whole, strict=True):
            tensor, empty = (b, a) if name in ("keys", "values") else (a, b)
            assert empty.shape == (0,)
            assert tensor.shape == full.shape and tensor.dtype == full.dtype and tensor.is_contiguous()
            limit = eps * full.double().abs().max().item() if full.numel() else 0.0
            torch.testing.assert_close(tensor, full, rtol=eps, atol=limit, msg=lambda text, n=name: f"d{n}: {text}")


@slow_interpreted()
@pytest.mark.parametrize("case", [Case(B=3, Tq=3, Tk=5, A=4, D=3, lengths="random", mask="steps"), CASES["B = 0"]])
@masked
def test_opcheck(op: Op, case: Case, fused: str) -> None:
    every = ((True, False), (False, True), (False, False))
    for i, arguments in enumerate(backward_arguments(op, case, torch.float32, fused == "cpu", fused)):
        for needed in every if i == 0 else every[i - 1 : i]:  # half a second each
            torch.library.opcheck(kernel(f"{op.name}_backward", fused), (*arguments, *needed))
