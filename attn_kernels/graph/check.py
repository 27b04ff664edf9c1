"""Compares a rewritten graph with the original, on the arguments of its first call and on random ones.

A captured graph depends only on its arguments, so it can be run twice. If possible, the original also runs in float64.
Then the error of the rewritten graph may be four times that of the original, plus 1e-6 of the largest element. Elements
that are not finite must be at the same places. Gradients are those of a random loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_EXACT = torch.float64
_ERROR_FACTOR = 4.0  # of the original's error
_ATOL = {torch.float64: 1e-11}  # relative to the largest element; 1e-6 for other dtypes
# If there is no result in float64.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Function = Callable[..., Any]


def difference(
    original: Function, rewritten: Function, args: Sequence[Any], smaller: Sequence[Any] | None = None
) -> str | None:
    """A description of the first difference between results or gradients of two functions; None if they agree.

    Arguments are copied: the functions may write to them. Random numbers are the same for both. ``smaller``: arguments
    to use instead, unless the original refuses them.
    """
    for given in (args,) if smaller is None else (smaller, args):
        try:
            result = _compare(original, rewritten, given)
        except _Refused:
            continue
        if result is None:
            with contextlib.suppress(_Refused):  # random arguments that the original refuses prove nothing
                result = _compare(original, rewritten, _randomised(given))
        return result
    return "the original graph could not be run for a comparison"


class _Refused(Exception):
    """The original raises an error."""


def smaller(placeholders: Sequence[Any], args: Sequence[Any]) -> list[Any] | None:
    """Arguments of a graph, with dynamic sizes cut to a few elements; None if a size cannot be computed.

    placeholders: the fake tensors and SymInts of the arguments.
    """
    sizes: dict[Any, int] = {}
    for fake, arg in zip(placeholders, args, strict=True):
        for size, actual in zip(fake.shape, arg.shape, strict=True) if isinstance(fake, Tensor) else ((fake, arg),):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                sizes.setdefault(size.node.expr, min(int(actual), 3 + len(sizes) % 3))
    result: list[Any] = []
    for fake, arg in zip(placeholders, args, strict=True):
        if isinstance(fake, Tensor):
            cut = arg.detach()
            for dim, size in enumerate(fake.shape):
                length = _evaluated(size, sizes)
                if length is None or length > arg.shape[dim]:
                    return None
                cut = cut.narrow(dim, 0, length)
            cut = cut.clone().requires_grad_(arg.requires_grad)
            result.append(cut if arg.is_leaf or not arg.requires_grad else cut.view_as(cut))
        else:
            result.append(_evaluated(fake, sizes))
    return result


def _evaluated(size: Any, sizes: dict[Any, int]) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    value = size.node.expr.subs(sizes)
    return int(value) if value.is_Integer else None


def _compare(original: Function, rewritten: Function, args: Sequence[Any]) -> str | None:
    try:
        theirs = _run(original, args, None)
    except Exception as error:
        raise _Refused from error
    try:
        ours = _run(rewritten, args, None)
    except Exception as error:
        return f"the rewritten graph raises {type(error).__name__}: {error}"
    try:
        exact = _run(original, args, _EXACT)
    except Exception:
        exact = None
    if len(ours) != len(theirs):
        return "another number of results"
    # A gradient that is 0 in theory contains only rounding errors, so the scale is taken from the other gradients.
    scale = max((_largest(x) for name, x in theirs if name.startswith("gradient")), default=0.0)
    for i, (name, own, their) in enumerate((n, o, t) for (n, o), (_, t) in zip(ours, theirs, strict=True)):
        wide = None if exact is None or len(exact) != len(theirs) else exact[i][1]
        text = _differ(own, their, wide, scale if name.startswith("gradient") else 0.0)
        if text is not None:
            return f"{name} {text}"
    return None


def _run(function: Function, args: Sequence[Any], dtype: torch.dtype | None) -> list[tuple[str, Any]]:
    """Results and gradients, by name."""
    leaves = [_copy(x, dtype) for x in args]
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    # The graph may write in place to a tensor that requires gradients only if it is not a leaf.
    given = [
        x.clone() if isinstance(x, Tensor) and x.requires_grad and not old.is_leaf else x
        for x, old in zip(leaves, args, strict=True)
    ]
    with torch.random.fork_rng(devices=_cuda_devices(args)):
        torch.manual_seed(0)
        results = _tensors(function(*given))
    named: list[tuple[str, Any]] = [(f"result {i}", x.detach()) for i, x in enumerate(results)]
    named += [(f"argument {i} afterwards", x.detach()) for i, x in enumerate(given) if isinstance(x, Tensor)]
    wanted = [x for x in results if x.requires_grad]
    if inputs and wanted and torch.is_grad_enabled():
        generator = torch.Generator().manual_seed(1)
        losses = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in wanted]
        gradients = torch.autograd.grad(wanted, inputs, losses, allow_unused=True)
        named += [(f"gradient {i}", x) for i, x in enumerate(gradients)]
    return named


def _copy(x: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(x, Tensor):
        return x
    copy = x.detach().clone()
    if dtype is not None and x.is_floating_point():
        copy = copy.to(dtype)
    return copy.requires_grad_(x.requires_grad)


def _cuda_devices(args: Sequence[Any]) -> list[int]:
    return sorted({x.device.index for x in args if isinstance(x, Tensor) and x.is_cuda})


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in _tensors(part)]
    return []


def _largest(x: Any) -> float:
    if x is None or x.numel() == 0 or not x.is_floating_point():
        return 0.0
    largest: float = x.detach().abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return largest


def _differ(own: Any, their: Any, exact: Any, scale: float) -> str | None:
    if own is None or their is None:
        return None if own is their else "is None in one of them"
    if own.shape != their.shape or own.dtype != their.dtype:
        return f"is {tuple(own.shape)} {own.dtype}, not {tuple(their.shape)} {their.dtype}"
    if not own.is_floating_point():
        return None if torch.equal(own, their) else "differs"
    dtype = own.dtype
    own, their = own.to(_EXACT), their.to(_EXACT)
    finite = torch.isfinite(their)
    if not torch.equal(finite, torch.isfinite(own)):
        return "is not finite in other places"
    if not torch.equal(torch.nan_to_num(own[~finite], nan=0.5), torch.nan_to_num(their[~finite], nan=0.5)):
        return "has other infinities"
    if own.numel() == 0 or not bool(finite.any()):
        return None
    own, their = own[finite], their[finite]
    largest = max(their.abs().max().item(), scale)
    if exact is not None and exact.dtype == _EXACT and exact.shape == finite.shape:
        exact = exact[finite]
        error, theirs = (own - exact).abs().max().item(), (their - exact).abs().max().item()
        allowed = _ERROR_FACTOR * theirs + _ATOL.get(dtype, 1e-6) * largest + 1e-12
        if scale == 0 and exact.abs().max().item() < 1e-12:
            # All gradients are 0 in theory: sums of numbers of order 1 that cancel. On some processors the sums of the
            # original cancel exactly.
            allowed += torch.finfo(dtype).eps
    else:
        error, allowed = (own - their).abs().max().item(), _TOLERANCE.get(dtype, 1e-4) * (largest + 1e-3)
    return None if error <= allowed else f"is off by {error:.2g}, where {allowed:.2g} is allowed"


def _randomised(args: Sequence[Any]) -> list[Any]:
    """Arguments of the same kind: numbers with the same spread; random masks, in which some rows have one value."""
    generator = torch.Generator().manual_seed(2)
    result: list[Any] = []
    for x in args:
        if not isinstance(x, Tensor) or x.numel() == 0:
            result.append(x)
            continue
        made = _random_like(x.detach(), generator).requires_grad_(x.requires_grad)
        result.append(made if x.is_leaf or not x.requires_grad else made.view_as(made))
    return result


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    if x.dtype == torch.bool or (x.is_floating_point() and x.dim() > 1 and bool(((x == 0) | (x == 1)).all())):
        made = torch.rand(x.shape, generator=generator) < 0.6
        return made.to(x)
    if not x.is_floating_point():
        return x
    spread = x.float().std().nan_to_num(0.0).item() if x.numel() > 1 else 0.0
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x + noise * (spread if 0 < spread < 1e3 else 0.3)
