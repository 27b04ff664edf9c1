"""Attention over several processes: a memory that is sharded over them, and a loss that is the mean over all of them.

A memory too long for one device is cut along Tk. Each rank of a ``torch.distributed`` group holds its part of the keys
and values, and every rank has the same queries. The results of the parts are combined by log-sum-exp, like the blocks
of keys in Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.1.

For part r let top_r be the largest score of a query, total_r = sum_j exp(scores_j - top_r) and context_r the sum of the
values with those weights. One ``all_gather`` sends (top_r, total_r, context_r) to every rank, in float32 or wider, and

    top = max_r top_r,  total = sum_r exp(top_r - top) total_r,  context = sum_r exp(top_r - top) context_r / total.

A part is computed as scores (the fused ``additive_scores``, or a product), exponentials and a product with values.
``additive_attention`` would compute it in one pass, but its results are normalised within the part. Then top_r and
total_r would have to be recovered from an alignment, which is rounded to the dtype and is NaN where all scores of the
part are -Inf. Its backward also accepts no gradient of total_r. The backward here needs only the gradient of scores:

    dalignments_j += dcontext . values_j,  dscores_j = alignments_j (dalignments_j - sum_k alignments_k dalignments_k)

where the sum runs over all ranks. It is dcontext . context, which each rank knows, plus one ``all_reduce`` for the
gradients of ``alignments`` themselves. A second ``all_reduce`` sums the gradients of query, v and bias.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import checks, ops, reference
from .attending import to_result
from .backends import choose
from .types import Attention, Masks, attention_mask, autocast, upcast


def sharded_additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Attention:
    """:func:`attn_kernels.additive_attention` over a memory whose steps are sharded over the ranks of a group.

    Every rank of the group must call it with the same sizes except Tk, the same options, and the same set of tensors
    that require gradients. As with any collective, the other ranks hang if one rank does not call it or raises an
    error.

    Args:
        query: (B, Tq, A), or (B, A) for one query; the same on every rank, like ``v`` and ``bias``.
        keys: (B, Tk, A), this rank's part of the projected memory; Tk may differ between ranks and be 0.
        values: (B, Tk, D), this rank's part.
        v: (A,), score vector.
        bias: (A,), added before the tanh.
        memory_lengths: (B,) int32 or int64, valid steps of this rank's part.
        mask: (B, Tk) or (B, Tq, Tk) bool, True where a step of this rank's part may be attended.
        need_weights: False to leave out ``alignments``; the same on every rank. It saves an ``all_reduce``.
        group: the process group of the ranks that hold the memory; None for all processes.
        backend: of the scores, as for ``additive_attention``.

    Returns:
        ``Attention(context, alignments)``. context: (B, Tq, D), computed from the whole memory and bitwise equal on
        all ranks. alignments: (B, Tq, Tk), of this rank's part; their sum over the steps of all ranks is 1. A query
        with nothing to attend on any rank gets zeros.

    Gradients: every rank back-propagates the same loss, as in tensor parallelism, except that each rank has its own
    terms of ``alignments``. The gradients of ``query``, ``v`` and ``bias`` are then those of the whole loss on every
    rank, already summed over the ranks. The parameters that they depend on need no further sum. (The mean of DDP does
    not change equal gradients.) The gradients of ``keys`` and ``values`` are those of this rank's part. If a parameter
    was used to compute keys or values, such as the projection of the memory, its gradient must be summed over the
    ranks. (The mean of DDP is too small by a factor of the number of ranks.) First derivatives only.

    Collectives: one ``all_gather`` of B Tq (D + 2) numbers in the forward. In the backward, one ``all_reduce`` of B Tq
    numbers (none with ``need_weights=False``) and one of B Tq A + 2 A (none if only keys and values require gradients).

    Padding may hold NaN, as in ``additive_attention``, with one exception: if ``mask`` has an axis for queries, NaN
    and Inf in a step that one query may attend reach the other queries of the sentence. Dtypes are those of
    ``additive_attention``. For float16 and bfloat16 the part is computed on a float32 copy, which is freed after the
    call.

    Raises:
        ValueError, TypeError: as for ``additive_attention``. RuntimeError: no process group is initialized.
    """
    name = "sharded_additive_attention"
    masks = Masks(memory_lengths, mask)
    _check(name, group, (query, keys, values), masks, v=v, bias=bias)
    plan = _Plan(_Additive(choose(backend, query.device.type)), group, need_weights)
    return _attend(plan, query, keys, values, (v, bias), masks)


def sharded_dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float = 1.0,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Attention:
    """:func:`attn_kernels.dot_attention` over a memory whose steps are sharded over the ranks of a group.

    Everything else is as in :func:`sharded_additive_attention`. There is no argument ``backend``: the scores are a
    matrix product of PyTorch.
    """
    name = "sharded_dot_attention"
    checks.check_scale(name, scale)
    masks = Masks(memory_lengths, mask)
    _check(name, group, (query, keys, values), masks)
    return _attend(_Plan(_Dot(scale), group, need_weights), query, keys, values, (), masks)


def joint_mean(total: Tensor, count: Tensor | float, group: dist.ProcessGroup | None = None) -> Tensor:
    """A mean over the batches of all ranks, as a loss for data-parallel training with DistributedDataParallel.

    DDP averages gradients over the ranks. If each rank used its own mean loss, a token in a short batch would have more
    weight than a token in a long batch. So this function divides ``total``, this rank's sum of losses, by the mean of
    ``count`` over the ranks. Then the gradients, and the mean of the returned value over the ranks, are those of one
    joined batch.

    Args:
        total: a scalar with gradients, such as ``cross_entropy(..., reduction="sum")``. The batch may have no tokens.
        count: a scalar or a number: the number of terms in ``total``. One ``all_reduce`` sums it over the ranks.
        group: the process group of DDP; None for all processes.
    """
    _check_group("joint_mean", group)
    counts = torch.as_tensor(count).detach().to(total.device, torch.float64, copy=True)
    dist.all_reduce(counts, group=group)
    return total * (dist.get_world_size(group) / counts).to(total.dtype)


# Scores of the part, and their gradients: all in float32 or wider -----------------------------------------------------


class _Additive(NamedTuple):
    """scores = v . tanh(query + keys + bias) by the fused kernels. units: v, bias."""

    backend: str

    def scores(self, query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.backend == "reference":
            return reference.additive_scores(query, keys, v, bias)
        scores: Tensor = ops.call("additive_scores", self.backend, query, keys, v, bias)
        return scores

    def gradients(
        self, grad_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.backend != "reference":
            inputs = (query, keys, v, bias)
            found = ops.call("additive_scores_backward", self.backend, grad_scores, *inputs, True, True)
        else:
            leaves = [t.detach().requires_grad_() for t in (query, keys, v, bias) if t is not None]
            with torch.enable_grad():
                scores = reference.additive_scores(*leaves)
            found = torch.autograd.grad(scores, leaves, grad_scores)
        return found[0], found[1], found[2], None if bias is None else found[3]


class _Dot(NamedTuple):
    """scores = scale * query . keys."""

    scale: float

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        return self.scale * (query @ keys.mT)

    def gradients(self, grad_scores: Tensor, query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        grad_products = self.scale * grad_scores
        return grad_products @ keys, grad_products.mT @ query


# Both forms -----------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The options of a call that are the same on every rank."""

    form: _Additive | _Dot
    group: dist.ProcessGroup | None
    need_weights: bool


def _attend(
    plan: _Plan, query: Tensor, keys: Tensor, values: Tensor, units: tuple[Tensor | None, ...], masks: Masks
) -> Attention:
    allowed = attention_mask(keys, *masks)
    padding = None if allowed is None else ~allowed
    q, k, x, *u = autocast(query, keys, values, *units)
    if q.dim() == 2:
        q = q.unsqueeze(1)
    result = _Sharded.apply(plan, padding, q, k, x, *u)  # type: ignore[no-untyped-call]  # torch has no types for it
    return to_result(result, query.dim(), plan.need_weights)


class _Sharded(torch.autograd.Function):
    """Saves its inputs and results, and nothing else of the size of the memory: a decoder has many steps."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        padding: Tensor | None,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *units: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            q, k, x, *u = upcast(query, keys, values, *units)
            context, alignments = _forward(plan, padding, q, k, x, u)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(padding, context, alignments, query, keys, values, *units)
        context = context.to(query.dtype)
        return (context, alignments.to(query.dtype)) if plan.need_weights else context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_alignments: Tensor | None = None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        given = ctx.plan, needed, grad_context, grad_alignments, *ctx.saved_tensors
        gradients = _ShardedBackward.apply(*given)  # type: ignore[no-untyped-call]  # torch has no types for it
        return None, None, *gradients


class _ShardedBackward(torch.autograd.Function):
    """A separate function, so that differentiating its results again raises an error."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        needed: tuple[bool, ...],
        grad_context: Tensor | None,
        grad_alignments: Tensor | None,
        *saved: Any,
    ) -> tuple[Tensor | None, ...]:
        padding, context, alignments, *inputs = saved
        with torch.autocast(context.device.type, enabled=False):
            of_context = context.new_zeros(()).expand_as(context) if grad_context is None else grad_context
            of_context, of_alignments, *widened = upcast(of_context, grad_alignments, *inputs)
            sums = (of_context * context).sum(-1, keepdim=True)
            if plan.need_weights:  # not "if alignments have a gradient": all ranks must take the same branch
                own = torch.zeros_like(sums)
                if of_alignments is not None:
                    own = _fill(alignments * of_alignments, padding).sum(-1, keepdim=True)
                dist.all_reduce(own, group=plan.group)
                sums = sums + own
            gradients = _backward(plan.form, of_context, of_alignments, sums, padding, alignments, *widened)
            own_part = (1, 2)  # keys and values
            shared = {i: g for i, g in enumerate(gradients) if needed[i] and g is not None and i not in own_part}
            for i, gradient in zip(shared, _all_reduce(list(shared.values()), plan.group), strict=True):
                gradients[i] = gradient
        of_inputs = zip(gradients, inputs, needed, strict=True)
        return tuple(g.to(t.dtype) if need and g is not None else None for g, t, need in of_inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise RuntimeError("sharded attention has no second derivative: it cannot be differentiated twice")


def _forward(
    plan: _Plan,
    padding: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    units: list[Any],
) -> tuple[Tensor, Tensor]:
    """The context of all ranks and the alignments of this one."""
    scores = _fill(plan.form.scores(query, keys, *units), padding, -math.inf)
    top = scores.amax(-1, keepdim=True) if keys.shape[1] else scores.new_full((*query.shape[:2], 1), -math.inf)
    weights = _fill(torch.exp(scores - top), padding)  # NaN if steps are attended and all their scores are -Inf
    part = torch.cat([top, weights.sum(-1, keepdim=True), weights @ _blank_steps(values, padding)], -1)
    parts = _all_gather(part, plan.group)

    tops, sums = parts[..., :1], parts[..., 1:]
    factors = torch.exp(tops - tops.amax(0))  # NaN if no rank has a score above -Inf
    # Ranks with nothing to attend are left out, and ranks with a maximum of -Inf if other ranks have a larger one.
    counted = (factors != 0) & (sums[..., :1] != 0)
    joined = torch.where(counted, factors * sums, 0.0).sum(0)
    total, context = joined[..., :1], joined[..., 1:]
    context = torch.where(total == 0, 0.0, context / total)  # total is at least 1 if anything is attended

    rank = dist.get_rank(plan.group)
    alignments = torch.where(counted[rank] | total.isnan(), weights * (factors[rank] / total), 0.0)
    return context, _fill(alignments, padding)


def _backward(
    form: _Additive | _Dot,
    grad_context: Tensor,
    grad_alignments: Tensor | None,
    sums: Tensor,
    padding: Tensor | None,
    alignments: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *units: Any,
) -> list[Tensor | None]:
    """This rank's gradients for query, keys, values and units. sums: (B, Tq, 1), over all ranks, as in the softmax."""
    grad_weights = grad_context @ values.mT
    if grad_alignments is not None:
        grad_weights = grad_weights + grad_alignments
    grad_scores = _fill(alignments * (grad_weights - sums), padding)
    grad_values = alignments.mT @ _blank_queries(grad_context, padding)
    # Padding is set to 0, and so are its gradients: they are sums over queries that may be NaN.
    blanked = (_blank_queries(query, padding), _blank_steps(keys, padding))
    grad_query, grad_keys, *grad_units = form.gradients(grad_scores, *blanked, *units)
    if padding is not None:
        grad_query.masked_fill_(_unused_queries(padding), 0.0)
        grad_keys.masked_fill_(_unused_steps(padding), 0.0)
        grad_values.masked_fill_(_unused_steps(padding), 0.0)
    return [grad_query, grad_keys, grad_values, *grad_units]


def _unused_queries(padding: Tensor) -> Tensor:
    """(B, Tq or 1, 1): queries that attend no step of this part."""
    return padding.all(2)[..., None]


def _unused_steps(padding: Tensor) -> Tensor:
    """(B, Tk, 1): steps that no query attends."""
    return padding.all(1)[..., None]


def _blank_queries(x: Tensor, padding: Tensor | None) -> Tensor:
    """x, (B, Tq, *), with 0 for queries that attend nothing: 0 * NaN would be NaN."""
    return x if padding is None else x.masked_fill(_unused_queries(padding), 0.0)


def _blank_steps(x: Tensor, padding: Tensor | None) -> Tensor:
    """x, (B, Tk, *), with 0 in steps that no query attends: 0 * NaN would be NaN.

    This copies the memory. On the CPU the copy is made only if x has NaN or Inf: that check costs far less. On a GPU
    the check would wait for the device.
    """
    if padding is None or (x.is_cpu and not is_compiling() and math.isfinite(x.sum())):
        return x
    return x.masked_fill(_unused_steps(padding), 0.0)


def _fill(x: Tensor, padding: Tensor | None, value: float = 0.0) -> Tensor:
    """Writes to x, (B, Tq, Tk)."""
    return x if padding is None else x.masked_fill_(padding, value)


def _all_gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(ranks, *part.shape)"""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return torch.stack(parts)


def _all_reduce(tensors: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each summed over the ranks, in one call."""
    if not tensors:
        return []
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


# Checks ---------------------------------------------------------------------------------------------------------------


def _check(
    name: str,
    group: dist.ProcessGroup | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    masks: Masks,
    **units: Tensor | None,
) -> None:
    query, keys, values = inputs
    checks.check_query_keys(name, query, keys)
    checks.check_values(name, query, keys, values)
    for argument, unit in units.items():
        checks.check_units(name, query, argument, unit)
    checks.check_masks(name, query, keys, *masks)
    query, keys, values, *cast = autocast(query, keys, values, *units.values())
    checks.check_dtypes(name, query, keys=keys, values=values, **dict(zip(units, cast, strict=True)))
    _check_group(name, group)


def _check_group(name: str, group: dist.ProcessGroup | None) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{name}: no process group is initialized: call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name}: group must contain this process")
