"""Pooling without a query against the formulas of the papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attn_kernels import ArgumentTypeError, ArgumentValueError
from attn_kernels.mechanisms import AttentionPooling, AttentiveStatisticsPooling

pytestmark = pytest.mark.usefixtures("one_thread")

B, TK, D, UNITS = 4, 6, 5, 7
LENGTHS = torch.tensor([6, 0, 3, 1])
MASK = torch.rand(B, TK, generator=torch.Generator().manual_seed(1)) < 0.6
MASKS = {
    "none": {},
    "lengths": {"memory_lengths": LENGTHS},
    "mask": {"mask": MASK},
    "both": {"memory_lengths": LENGTHS.int(), "mask": MASK},
}
FORMS = {
    "one head": {},
    "heads": {"heads": 3},
    "gated": {"gated": True},
    "gated heads": {"heads": 2, "gated": True},
    **{
        f"{activation}, {heads} heads": {"activation": activation, "heads": heads, "negative_slope": 0.3}
        for activation, heads in itertools.product(("relu", "leaky_relu", "sigmoid"), (1, 2))
    },
}
POOLINGS = {"mean": AttentionPooling, "statistics": AttentiveStatisticsPooling}


def make(kind: str, form: str, **options: object) -> AttentionPooling:
    torch.manual_seed(0)
    return POOLINGS[kind](D, UNITS, **{"dtype": torch.float64, **FORMS[form], **options})


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, TK, D, dtype=dtype)


def allowed(masks: dict[str, Tensor]) -> Tensor:
    result = torch.ones(B, TK, dtype=torch.bool)
    if "memory_lengths" in masks:
        result &= torch.arange(TK) < masks["memory_lengths"][:, None]
    return result & masks["mask"] if "mask" in masks else result


def activate(name: str, x: Tensor) -> Tensor:
    if name == "tanh":
        return (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())
    if name == "sigmoid":
        return 1 / (1 + (-x).exp())
    return torch.where(x > 0, x, x * (0.3 if name == "leaky_relu" else 0.0))


def by_hand(module: AttentionPooling, memory: Tensor, allow: Tensor) -> tuple[Tensor, Tensor]:
    """(B, R, D or 2 D) and (B, R, Tk), head by head and step by step."""
    p = dict(module.named_parameters())
    contexts, alignments = [], []
    for b, r in itertools.product(range(len(memory)), range(module.heads)):
        steps = allow[b].nonzero().flatten().tolist()
        row, context = memory.new_zeros(memory.shape[1]), memory.new_zeros(D)
        std = memory.new_zeros(D)
        if steps:
            scores = []
            for j in steps:
                hidden = activate(
                    module.activation, p["memory_projection.weight"] @ memory[b, j] + p["memory_projection.bias"]
                )
                if module.gated:
                    gate = p["gate_projection.weight"] @ memory[b, j] + p["gate_projection.bias"]
                    hidden = hidden * activate("sigmoid", gate)
                scores.append(p["v"][r] @ hidden)
            exponentials = torch.stack(scores).exp()
            row = row.index_put((torch.tensor(steps),), exponentials / exponentials.sum())
            context = sum(row[j] * memory[b, j] for j in steps)
            variance = sum(row[j] * (memory[b, j] - context) ** 2 for j in steps)
            std = variance.clamp(min=1e-5).sqrt()
        statistics = isinstance(module, AttentiveStatisticsPooling)
        contexts.append(torch.cat([context, std]) if statistics else context)
        alignments.append(row)
    shape = (len(memory), module.heads)
    return torch.stack(contexts).unflatten(0, shape), torch.stack(alignments).unflatten(0, shape)


def gradients(module: AttentionPooling, memory: Tensor, outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    loss = sum((torch.randn(out.shape, generator=generator, dtype=torch.float64) * out).sum() for out in outputs)
    tensors = {**dict(module.named_parameters()), "memory": memory}
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, grads, strict=True))


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS)
def test_formula(kind: str, form: str, masks: str) -> None:
    module, memory = make(kind, form), inputs().requires_grad_()
    context, alignments = module(memory, **MASKS[masks])
    expected = by_hand(module, memory, allowed(MASKS[masks]))
    if module.heads == 1:
        expected = (expected[0][:, 0], expected[1][:, 0])
    torch.testing.assert_close(context, expected[0])
    torch.testing.assert_close(alignments, expected[1])
    got, exact = (gradients(module, memory, outputs) for outputs in ((context, alignments), expected))
    for name, gradient in exact.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    alone = module(memory, **MASKS[masks], need_weights=False)
    assert alone.alignments is None
    torch.testing.assert_close(alone.context, context)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", FORMS)
def test_features_without_a_gradient(kind: str, form: str) -> None:
    """Of which the op makes none: the gradients of the parameters are the same."""
    module, memory = make(kind, form), inputs()
    weights = torch.randn(module(memory).context.shape, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        context, alignments = module(x, **MASKS["both"])
        return (weights * context).sum() + alignments.square().sum()

    got = torch.autograd.grad(loss(memory), list(module.parameters()))
    expected = torch.autograd.grad(loss(memory.requires_grad_()), list(module.parameters()))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "gated heads"])
def test_backends(kind: str, form: str, backend: str, device: str) -> None:
    module, memory = make(kind, form, backend=backend, dtype=torch.float32), inputs(torch.float32)
    exact = make(kind, form)
    exact.load_state_dict(module.state_dict())
    expected = exact(memory.double(), **MASKS["both"])
    got = module.to(device)(memory.to(device), **{name: x.to(device) for name, x in MASKS["both"].items()})
    torch.testing.assert_close(tuple(x.double().cpu() for x in got), tuple(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(kind: str, form: str) -> None:
    module, memory = make(kind, form), inputs().requires_grad_()
    # One step has no spread: its standard deviation is the least one, which is constant.
    assert torch.autograd.gradcheck(lambda x: tuple(module(x, LENGTHS)), memory)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "gated", "heads"])
def test_second_derivatives(kind: str, form: str) -> None:
    module, memory = make(kind, form), inputs()[:2, :3].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x).context, memory)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", FORMS)
def test_padding_has_no_effect(kind: str, form: str) -> None:
    module, clean = make(kind, form), inputs().requires_grad_()
    poisoned = clean.detach().masked_fill(~allowed(MASKS["both"])[..., None], math.nan).requires_grad_()
    results = [module(memory, **MASKS["both"]) for memory in (clean, poisoned)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert (results[1].context[1] == 0).all()
    assert (results[1].alignments[1] == 0).all()
    expected, got = (gradients(module, m, r) for m, r in zip((clean, poisoned), results, strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert (got["memory"][~allowed(MASKS["both"])] == 0).all()


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "gated", "heads"])
def test_empty_bags(kind: str, form: str) -> None:
    module = make(kind, form)
    memory = torch.randn(B, 0, D, dtype=torch.float64, requires_grad=True)
    context, alignments = module(memory)
    assert (context == 0).all()
    assert alignments.numel() == 0
    for gradient in gradients(module, memory, (context, alignments)).values():
        assert (gradient == 0).all()
    assert module(torch.randn(0, TK, D, dtype=torch.float64)).context.shape[0] == 0
    assert module(torch.randn(0, D, dtype=torch.float64)).context.shape == context.shape[1:]


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "heads"])
def test_a_bag_without_a_batch(kind: str, form: str) -> None:
    module, memory = make(kind, form), inputs()
    torch.testing.assert_close(
        module(memory[0], mask=MASK[0]), type(module(memory))(*(x[0] for x in module(memory, mask=MASK)))
    )
    with pytest.raises(ArgumentValueError, match="memory_lengths must be None"):
        module(memory[0], LENGTHS[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "gated", "heads"])
def test_dtypes(kind: str, form: str, dtype: torch.dtype) -> None:
    """At most twice the error of the eager formula in that dtype, and its rounding."""
    module, memory = make(kind, form, dtype=dtype), inputs(dtype)
    exact_module = make(kind, form)
    exact_module.load_state_dict(module.state_dict())
    exact = exact_module(memory.double(), LENGTHS)
    eager = by_hand(module, memory, allowed(MASKS["lengths"]))
    got = module(memory, LENGTHS)
    for name in ("context", "alignments"):
        result, expected = getattr(got, name), getattr(exact, name)
        assert result.dtype == dtype
        plain = eager[name == "alignments"].double().reshape(expected.shape)
        allow = 2 * (plain - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
        assert (result.double() - expected).abs().max() <= allow, name


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "gated", "heads"])
def test_autocast(kind: str, form: str) -> None:
    module, memory = make(kind, form, dtype=torch.float32), inputs(torch.float32).requires_grad_()
    exact = module(memory, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(memory, LENGTHS)
    torch.testing.assert_close(got.context.float(), exact.context, rtol=0.03, atol=0.03)
    got.context.sum().backward()
    assert memory.grad.isfinite().all()


def test_statistics_of_numbers_far_from_0() -> None:
    """The mean of squares less the square of the mean has no correct digit in float32 here."""
    module = make("statistics", "one head", dtype=torch.float32)
    with torch.no_grad():
        module.memory_projection.weight.mul_(1e-4)
    exact_module = make("statistics", "one head")
    exact_module.load_state_dict(module.state_dict())
    memory = 4096 + inputs(torch.float32)
    exact = by_hand(exact_module, memory.double(), allowed({}))[0][:, 0]
    torch.testing.assert_close(module(memory).context.double()[:, D:], exact[:, D:], rtol=0.001, atol=0)


def test_memory_of_a_gated_bag() -> None:
    """Of N rows: two projections to (N, A), and nothing else."""
    module = AttentionPooling(D, 16, gated=True)
    memory = torch.randn(1, 1000, D)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor) and x.numel() >= 1000 * D:
                    made.append((x.untyped_storage().data_ptr(), function))
            return result

    with Watch():
        module(memory)
    storages = {pointer for pointer, _ in made} - {memory.untyped_storage().data_ptr()}
    assert len(storages) == 2, made


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("form", ["one head", "gated", "heads"])
def test_compile(kind: str, form: str) -> None:
    module, memory = make(kind, form), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(memory, LENGTHS), module(memory, LENGTHS))


@pytest.mark.parametrize("form", ["one head", "gated", "heads"])
def test_gradients_per_sample(form: str) -> None:
    module, memory = make("mean", form), inputs()
    parameters = dict(module.named_parameters())

    def loss(p: dict[str, Tensor], bag: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (bag,)).context.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, memory)
    for b in range(B):
        for name, gradient in torch.func.grad(loss)(parameters, memory[b]).items():
            torch.testing.assert_close(each[name][b], gradient)


@pytest.mark.parametrize("kind", POOLINGS)
def test_errors(kind: str) -> None:
    name = POOLINGS[kind].__name__
    module, memory = make(kind, "one head"), inputs()
    for arguments, error, message in (
        ((memory[..., 1:],), ArgumentValueError, r"memory must have shape \(B, Tk, memory_size\)"),
        (([1.0],), ArgumentTypeError, "memory must be a tensor, got list"),
        ((memory, LENGTHS + 1), ArgumentValueError, "memory_lengths must be in 0..Tk"),
        ((memory, LENGTHS[1:]), ArgumentValueError, "memory_lengths must have shape"),
        ((memory, None, MASK.float()), ArgumentTypeError, "mask must be bool"),
        ((memory, None, MASK[:, 1:]), ArgumentValueError, "mask must have shape"),
    ):
        with pytest.raises(error, match=f"^{name}: {message}"):
            module(*arguments)
    for options, message in (
        ({"units": 0}, "units must be a positive integer, got 0"),
        ({"heads": 1.5}, "heads must be a positive integer, got 1.5"),
        ({"activation": "gelu"}, "activation must be .*got 'gelu'"),
        ({"gated": True, "activation": "relu"}, "activation must be 'tanh' with gated=True"),
    ):
        with pytest.raises(ArgumentValueError, match=f"^{name}: {message}"):
            POOLINGS[kind](D, **{"units": UNITS, **options})
    assert repr(module).startswith(f"{name}(")
    before = module.v.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.v)


def test_least_variance_is_positive() -> None:
    with pytest.raises(ArgumentValueError, match="eps must be positive, got 0"):
        AttentiveStatisticsPooling(D, UNITS, eps=0)
