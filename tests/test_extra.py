"""extra, the addend of the keys in a step: in the kernels, one gradient for both, accumulated over a memory's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_kernels import Memory, additive_attention, memory_gradient, prepare_keys
from attn_kernels.activations import ACTIVATIONS as NUMBERS
from attn_kernels.attending import attend_with_extra
from attn_kernels.mechanisms import CoverageAttention, LocationSensitiveAttention
from attn_kernels.ops import kernel
from attn_kernels.scores import ActivatedScore, AdditiveScore
from attn_kernels.types import Masks
from conftest import available
from matrix import device_of

B, TK, A, D, Q, M, STEPS = 4, 6, 9, 5, 7, 5, 4
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "tanh": {},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
}
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "lengths": {"memory_lengths": torch.tensor([6, 0, 2, 1])},
    "mask": {"mask": torch.rand((B, TK), generator=torch.Generator().manual_seed(1)) < 0.6},
    "mask of one query": {"mask": torch.rand((B, 1, TK), generator=torch.Generator().manual_seed(1)) < 0.6},
}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
compiled_code = pytest.mark.parametrize("backend", ["cpu", "cuda"])
NONE = Masks()


def leaves(dtype: torch.dtype = torch.float64, queries: tuple[int, ...] = (3,)) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"query": (B, *queries, A), "keys": (B, TK, A), "values": (B, TK, D), "v": (A,), "bias": (A,)}
    shapes["extra"] = (B, TK, A)
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


# One tensor -----------------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """The names of the ops that return a tensor as large as the keys, and how many of them each returns."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.elements, self.found = like.numel(), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {x.data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.numel() == self.elements and x.data_ptr() not in own:
                self.found.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("queries", [(), (1,), (3,), (8,)], ids=str)
@activations
@compiled_code
def test_no_copy_of_the_keys(backend: str, activation: str, queries: tuple[int, ...]) -> None:
    """The forward makes nothing as large as the keys, the backward one gradient, of whichever it is needed."""
    device = device_of(available(backend))
    t = {name: x.detach().to(device) for name, x in leaves(torch.float32, queries).items()}
    op = ("additive" if activation == "tanh" else "activated") + "_attention_with_extra_backward"
    for needed in (("keys",), ("extra",), ("keys", "extra"), tuple(t)):
        given = {name: x.detach().requires_grad_(name in needed) for name, x in t.items()}
        with Made(t["keys"]) as forward:
            result = additive_attention(**given, **ACTIVATIONS[activation], backend=backend)
        assert forward.found == []
        loss = result.context.square().sum()
        with Made(t["keys"]) as backward:
            gradients = torch.autograd.grad(loss, [given[name] for name in needed])
        assert backward.found == [op], needed
        of = dict(zip(needed, gradients, strict=True))
        if {"keys", "extra"} <= of.keys():
            assert of["keys"].data_ptr() == of["extra"].data_ptr()
    with Made(t["keys"]) as backward:
        query = t["query"].detach().requires_grad_()
        fixed = {name: x.detach() for name, x in t.items() if name != "query"}
        result = additive_attention(query, **fixed, **ACTIVATIONS[activation], backend=backend)
        torch.autograd.grad(result.context.sum(), query)
    assert backward.found == []


@activations
def test_derivatives(compiled: str, activation: str) -> None:
    """Of first and second order, and one gradient that is used twice."""
    t = {name: x.detach()[..., :3].clone().requires_grad_() for name, x in leaves().items()}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(t, tensors, strict=True))
        return tuple(additive_attention(**given, **ACTIVATIONS[activation], **MASKS["lengths"], backend=compiled))

    assert torch.autograd.gradcheck(function, tuple(t.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(t.values()), fast_mode=True)
    both = t["keys"].detach().requires_grad_()
    others = {name: x.detach() for name, x in t.items() if name not in ("keys", "extra")}
    keywords = dict(**ACTIVATIONS[activation], backend=compiled)
    once = additive_attention(**others, keys=both, extra=both, **keywords).context.square().sum()
    doubled = additive_attention(**others, keys=2 * both, **keywords).context.square().sum()
    torch.testing.assert_close(torch.autograd.grad(once, both), torch.autograd.grad(doubled, both))


@activations
def test_forward_mode_and_transforms(compiled: str, activation: str) -> None:
    t = {name: x.detach() for name, x in leaves().items()}
    extra, tangent = t.pop("extra"), torch.randn(B, TK, A, dtype=torch.float64)

    def context(extra: Tensor, backend: str = compiled) -> Tensor:
        return additive_attention(**t, extra=extra, **ACTIVATIONS[activation], backend=backend).context

    got = torch.func.jvp(context, (extra,), (tangent,))
    expected = torch.func.jvp(lambda x: context(x, "reference"), (extra,), (tangent,))
    torch.testing.assert_close(got, expected)
    several = torch.stack((extra, tangent))
    torch.testing.assert_close(torch.vmap(context)(several), torch.stack([context(x) for x in several]))
    gradient = torch.func.grad(lambda x: context(x).square().sum())(extra)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: context(x, "reference").square().sum())(extra))


@pytest.mark.parametrize("name", ["additive", "activated"])
@compiled_code
def test_opcheck(backend: str, name: str) -> None:
    device = device_of(available(backend))
    t = {x: y.detach().to(device).requires_grad_() for x, y in leaves(torch.float32).items()}
    numbers = () if name == "additive" else (NUMBERS.index("leaky_relu"), 0.2)
    masks = (MASKS["lengths"]["memory_lengths"].to(device), None)
    op = f"{name}_attention_with_extra"
    arguments = (*t.values(), *numbers, *masks)
    torch.library.opcheck(kernel(op, backend), (*arguments, True))
    fixed = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    context, alignments = kernel(op, backend)(*fixed, True)
    backward = kernel(f"{op}_backward", backend)
    for flags in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.library.opcheck(backward, (torch.ones_like(context), None, *fixed, alignments, *flags))


def test_prepared_keys_are_accepted(backend: str, device: str) -> None:
    """On every backend, so that callers have one way to call; and with an option that takes the sum of both."""
    t = {name: x.detach().to(device, torch.float32) for name, x in leaves().items()}
    prepared = prepare_keys(t["keys"], backend=backend)
    got = additive_attention(**t, prepared=prepared, backend=backend)
    torch.testing.assert_close(got, additive_attention(**t, backend=backend))
    options = {} if backend in ("cuda", "triton") else {"dropout_p": 1e-9}
    torch.testing.assert_close(additive_attention(**t, prepared=prepared, backend=backend, **options), got)
    summed = {**t, "keys": t["keys"] + t["extra"], "extra": None}
    torch.testing.assert_close(additive_attention(**summed, backend=backend), got)


# Gathered over the steps of a memory ----------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every memory is large enough. Gives the numbers of steps of which gradients of values were made at once."""
    available("cpu")
    made: list[int] = []
    memory_gradients = memory_gradient._memory_gradients

    def counted(steps: list[Any]) -> Any:
        made.append(len(steps))
        dkeys, dvalues = memory_gradients(steps)
        assert dkeys is None  # the steps have made it
        return dkeys, dvalues

    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 0)
    monkeypatch.setattr(memory_gradient, "_memory_gradients", counted)
    return made


MECHANISMS: dict[str, Callable[..., nn.Module]] = {
    "location": lambda **k: LocationSensitiveAttention(Q, M, A, channels=3, kernel_size=3, scale=1.5, **k),
    "cumulative": lambda **k: LocationSensitiveAttention(Q, M, A, 3, 3, cumulative=True, bias=False, **k),
    "coverage": lambda **k: CoverageAttention(Q, M, A, **k),
}
mechanisms = pytest.mark.parametrize("mechanism", MECHANISMS)


def normal(*shape: int, dtype: torch.dtype = torch.float64, rounded: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(rounded).to(dtype)


def train(
    mechanism: str, backend: str, dtype: torch.dtype = torch.float64, rounded: torch.dtype = torch.float32, **masks: Any
) -> dict[str, Tensor]:
    """Gradients of all steps, by name. rounded: every number can be represented in it."""
    torch.manual_seed(0)
    module = MECHANISMS[mechanism](backend=backend, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(normal(*parameter.shape, rounded=rounded))
    outputs = normal(B, TK, M, dtype=dtype, rounded=rounded).requires_grad_()
    queries = normal(STEPS, B, Q, dtype=dtype, rounded=rounded).requires_grad_()
    weights = normal(STEPS, B, M, dtype=dtype, rounded=rounded)
    memory = module.memory(outputs, **masks)
    state, loss = module.initial_state(memory), torch.zeros((), dtype=dtype)
    for query, weight in zip(queries, weights, strict=True):
        context, alignments, state = module(query, memory, state)
        loss = loss + (context * weight).sum() + alignments.square().sum()
    loss.backward()
    found = {**dict(module.named_parameters()), "outputs": outputs, "queries": queries}
    return {name: x.grad for name, x in found.items()}


@pytest.mark.parametrize("masks", MASKS)
@mechanisms
def test_gathered(mechanism: str, masks: str, passes: list[int]) -> None:
    got = train(mechanism, "cpu", **MASKS[masks])
    assert passes == [STEPS]
    torch.testing.assert_close(got, train(mechanism, "reference", **MASKS[masks]))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gathered_on_a_gpu(backend: str, passes: list[int]) -> None:
    device = device_of(available(backend))
    masks = {name: x.to(device) for name, x in MASKS["lengths"].items()}
    with torch.device(device):
        got = train("location", backend, **masks)
        assert passes == [STEPS]
        torch.testing.assert_close(got, train("location", "reference", **masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@mechanisms
def test_gathered_precision(
    mechanism: str, dtype: torch.dtype, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as gradients that each step makes and autograd adds up."""

    def error(got: Tensor, wide: Tensor) -> float:
        return ((got.double() - wide).abs().max() / wide.abs().max().clamp_min(1e-3)).item()

    exact = train(mechanism, "reference", rounded=dtype, **MASKS["lengths"])
    got = train(mechanism, "cpu", dtype, dtype, **MASKS["lengths"])
    assert passes == [STEPS]
    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 1 << 60)
    step_by_step = train(mechanism, "cpu", dtype, dtype, **MASKS["lengths"])
    assert passes == [STEPS]
    factor, rounding = (2, 1e-6) if dtype == torch.float32 else (3, torch.finfo(dtype).eps)
    for name, wide in exact.items():
        assert error(got[name], wide) <= factor * error(step_by_step[name], wide) + rounding, name


def steps_on(
    memory: Memory, t: dict[str, Tensor], extras: Tensor, score: AdditiveScore | ActivatedScore, masks: Masks = NONE
) -> list[Any]:
    inputs = (t["query"], memory.keys, memory.values)
    return [attend_with_extra(score, inputs, extra, masks, True, "cpu", memory) for extra in extras]


@activations
def test_gathered_passes(activation: str, passes: list[int]) -> None:
    """Several losses, a retained graph, one of the memory's tensors alone, extras without gradients, no memory."""
    t, extras = leaves(queries=(1,)), torch.randn(STEPS, B, TK, A, dtype=torch.float64).requires_grad_()
    score = AdditiveScore(t["v"], t["bias"])
    if activation != "tanh":
        slope = ACTIVATIONS[activation].get("negative_slope", 0.0)
        score = ActivatedScore(t["v"], t["bias"], NUMBERS.index(activation), slope)

    def expected(x: dict[str, Tensor], extras: Tensor) -> list[Any]:
        others = {name: y for name, y in x.items() if name != "extra"}
        return [additive_attention(**others, extra=e, **ACTIVATIONS[activation], backend="reference") for e in extras]

    memory = Memory(t["keys"], t["values"])
    got, wanted = steps_on(memory, t, extras, score), expected(t, extras)
    names = ("query", "keys", "values", "v", "bias")
    every = [*(t[name] for name in names), extras]
    for _ in range(2):  # the graph is retained
        gradients = [
            torch.autograd.grad(sum(r.context.square().sum() for r in results), every, retain_graph=True)
            for results in (got, wanted)
        ]
        torch.testing.assert_close(*gradients)
    assert passes == [STEPS] * 2
    for some in ([1], [0, 2]):  # a loss on some of the steps
        gradients = []
        for results in (got, wanted):
            loss = sum(results[i].alignments.square().sum() for i in some)
            of = torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True)
            gradients.append([torch.zeros_like(x) if g is None else g for x, g in zip(every, of, strict=True)])
        torch.testing.assert_close(*gradients)
    del passes[:]
    torch.autograd.grad(sum(r.context.sum() for r in got), [t["query"], extras], retain_graph=True)
    assert passes == []  # nothing beyond the memory is asked for
    for needed in ("keys", "values"):
        x = {name: y.detach().requires_grad_(name == needed) for name, y in t.items()}
        memory, fixed = Memory(x["keys"], x["values"]), extras.detach()
        gradients = [
            torch.autograd.grad(sum(r.context.square().sum() for r in results), x[needed])
            for results in (steps_on(memory, x, fixed, score), expected(x, fixed))
        ]
        torch.testing.assert_close(*gradients)


def test_gathered_second_derivatives(passes: list[int]) -> None:
    """The alignments of each step are differentiated by its own extra."""
    t, extras = leaves(queries=(1,)), torch.randn(2, B, TK, A, dtype=torch.float64).requires_grad_()

    def function(keys: Tensor, values: Tensor, extras: Tensor) -> Tensor:
        memory = Memory(keys, values)
        score = AdditiveScore(t["v"].detach(), None)
        given = {"query": t["query"].detach()}
        return sum(r.context for r in steps_on(memory, given, extras, score))  # type: ignore[return-value]

    assert torch.autograd.gradgradcheck(function, (t["keys"], t["values"], extras), fast_mode=True)
    assert passes


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_holds_anything(poison: float, passes: list[int]) -> None:
    """In keys, values and extras of a memory that no module has cleaned, in queries and gradients of empty rows."""
    lengths = MASKS["lengths"]["memory_lengths"]
    padding, empty = (torch.arange(TK) >= lengths[:, None])[..., None], (lengths == 0)[:, None, None]
    results = []
    for fill in (0.0, poison):
        t = leaves(queries=(1,))
        extras = torch.randn(STEPS, B, TK, A, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        given = {
            "query": t["query"].detach().masked_fill(empty, fill).requires_grad_(),
            "keys": t["keys"].detach().masked_fill(padding, fill).requires_grad_(),
            "values": t["values"].detach().masked_fill(padding, fill).requires_grad_(),
        }
        extras = extras.masked_fill(padding, fill).requires_grad_()
        memory = Memory(given["keys"], given["values"], lengths)
        steps = steps_on(memory, given, extras, AdditiveScore(t["v"], t["bias"]), Masks(lengths))
        weight = torch.full((B, 1, D), 0.3, dtype=torch.float64).masked_fill(empty, fill)
        every = [*given.values(), extras, t["v"], t["bias"]]
        gradients = torch.autograd.grad([r.context for r in steps], every, [weight] * STEPS)
        results.append((*(x for r in steps for x in r), *gradients))
    assert all(x.isfinite().all() for x in results[1])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert passes == [STEPS] * 2
