"""Helpers for tests of modules against their formulas: masks, the steps that these allow, gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree

Masks = dict[str, Tensor]  # memory_lengths, mask, both or none of them


def every_kind(memory_lengths: Tensor, mask: Tensor) -> dict[str, Masks]:
    """All combinations of the mask arguments. memory_lengths: (B,); mask: (B, Tq, Tk)."""
    return {
        "none": {},
        "lengths": {"memory_lengths": memory_lengths},
        "mask": {"mask": mask[:, 0]},
        "mask per query": {"mask": mask},
        "both": {"memory_lengths": memory_lengths, "mask": mask},
    }


# Defaults for tests without their own sizes. One sentence is empty.
B, TQ, TK = 4, 3, 6
LENGTHS = torch.tensor([6, 0, 3, 1])
MASK = torch.rand(B, TQ, TK, generator=torch.Generator().manual_seed(1)) < 0.6
MASKS = every_kind(LENGTHS, MASK)


def allowed(masks: Masks, shape: tuple[int, int, int] = (B, TQ, TK)) -> Tensor:
    """A bool tensor of the given shape (B, Tq, Tk): which steps each query may attend."""
    result = torch.ones(shape, dtype=torch.bool)
    if "memory_lengths" in masks:
        result &= torch.arange(shape[2]) < masks["memory_lengths"][:, None, None]
    if "mask" in masks:
        result &= masks["mask"] if masks["mask"].dim() == 3 else masks["mask"][:, None]
    return result


def randomize(module: nn.Module, scale: float = 0.4) -> nn.Module:
    """Sets all parameters to random values: initial values such as 0 could hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def random_sum(results: Sequence[Tensor]) -> Tensor:
    """A fixed loss whose gradient differs for every result."""
    generator = torch.Generator().manual_seed(4)
    return sum((torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * x).sum() for x in results)


def gradients(module: nn.Module, results: Sequence[Tensor], **inputs: Tensor) -> dict[str, Tensor]:
    """The gradients of one loss on all results, by name of parameter or input; 0 if the loss does not depend on it."""
    tensors = {**dict(module.named_parameters()), **inputs}
    loss = random_sum(results)
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    grads = torch.autograd.grad(
        loss, list(tensors.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(tensors, grads, strict=True))


def assert_same(
    got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], **tolerance: float | None
) -> None:
    """tolerance: keywords of ``torch.testing.assert_close``. A value that is None in one must be None in the other."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check_formula(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor],
    masks: Masks,
    by_hand: Callable[..., object],
    gradients: Callable[..., dict[str, Tensor]] = gradients,
) -> None:
    """Compares results and gradients. inputs: query, memory. by_hand(module, query, memory, allowed): the formula."""
    query, memory = inputs
    got = module(query, module.memory(memory, **masks))
    expected = by_hand(module, query, memory, allowed(masks))
    torch.testing.assert_close(got if isinstance(got, Tensor) else tuple(got), expected)
    of = {"query": query, "memory": memory}
    assert_same(gradients(module, got, **of), gradients(module, expected, **of))


def check_padding(module: nn.Module, query: Tensor, memory: Tensor, memory_lengths: Tensor) -> None:
    """NaN beyond the lengths and in fully masked queries must not change any bit of results and gradients."""
    padding = torch.arange(memory.shape[1]) >= memory_lengths[:, None]
    empty = memory_lengths == 0
    clean = {"query": query, "memory": memory}
    poisoned = {
        "query": query.detach().masked_fill(empty[:, None, None], torch.nan).requires_grad_(),
        "memory": memory.detach().masked_fill(padding[..., None], torch.nan).requires_grad_(),
    }
    expected, got = (module(x["query"], module.memory(x["memory"], memory_lengths)) for x in (clean, poisoned))
    assert empty.any() and (got.context[empty] == 0).all()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert_same(gradients(module, got, **poisoned), gradients(module, expected, **clean), rtol=0, atol=0)


def in_float64(make: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
    """``make()`` with its defaults (float64) and the parameters of ``module``."""
    exact = make()
    exact.load_state_dict(module.state_dict())
    return exact


def check_error(got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The error must be at most twice that of the eager formula in the dtype of the result, plus one rounding."""
    assert got.dtype == eager.dtype
    limit = 2 * (eager.double() - exact).abs().max() + torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= limit


def check_backend(
    make: Callable[..., nn.Module], inputs: Callable[..., tuple[Tensor, Tensor]], lengths: Tensor, **place: str
) -> None:
    """Compares a float32 step on place["device"], with kernels of place["backend"], with the module in float64."""
    module, (query, memory) = make(backend=place["backend"], dtype=torch.float32), inputs(torch.float32)
    exact = in_float64(make, module)
    expected = exact(query.double(), exact.memory(memory.double(), lengths))
    module, query, memory, lengths = (x.to(place["device"]) for x in (module, query, memory, lengths))
    got = _pytree.tree_map(lambda x: x.double().cpu(), module(query, module.memory(memory, lengths)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def check_precision(
    make: Callable[..., nn.Module],
    inputs: Callable[..., tuple[Tensor, Tensor]],
    lengths: Tensor,
    by_hand: Callable[..., Sequence[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Compares the error of a step with the error of the formula by_hand(module, query, memory) in that dtype."""
    module, (query, memory) = make(dtype=dtype), inputs(dtype)
    exact = in_float64(make, module)
    expected = exact(query.double(), exact.memory(memory.double(), lengths))
    got, plain = module(query, module.memory(memory, lengths)), by_hand(module, query, memory)
    for result, x, eager in zip(*map(_pytree.tree_leaves, (got, expected, plain)), strict=True):
        finite = x.isfinite()
        assert torch.equal(result[~finite].double(), x[~finite])
        check_error(result[finite], x[finite], eager[finite])
