"""FLOPs as torch.utils.flop_counter counts them: the products of the formulas, whatever the backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attn_kernels
from attn_kernels import BahdanauAttention

B, TQ, TK, A, D = 2, 3, 5, 7, 4


def tensors(op: str) -> list[Tensor]:
    shapes = {"query": (B, TQ, A), "keys": (B, TK, A), "values": (B, TK, D), "v": (A,)}
    of_op = {
        "additive_attention": ("query", "keys", "values", "v"),
        "additive_scores": ("query", "keys", "v"),
        "dot_attention": ("query", "keys", "values"),
    }[op]
    return [torch.randn(shapes[name], requires_grad=True) for name in of_op]


def count(op: str, backend: str, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        result = getattr(attn_kernels, op)(*tensors(op), backend=backend)
        if backward:
            (result if isinstance(result, Tensor) else result.context).sum().backward()
    return counter.get_total_flops()


FORWARD = {
    "additive_attention": 2 * B * TQ * TK * (A + D),
    "additive_scores": 2 * B * TQ * TK * A,
    "dot_attention": 2 * B * TQ * TK * (A + D),
}


@pytest.mark.parametrize("op", FORWARD)
def test_products_of_the_formula(op: str) -> None:
    backends = ["cpu"] if attn_kernels.backends()["cpu"].available else []
    for backend in backends:
        assert count(op, backend, backward=False) == FORWARD[op]
        assert count(op, backend, backward=True) == 3 * FORWARD[op]
    if op == "dot_attention":  # which has no product with a vector
        assert count(op, "reference", backward=False) == FORWARD[op]
        assert count(op, "reference", backward=True) == 3 * FORWARD[op]


def test_options() -> None:
    """A clip, which is elementwise, counts nothing, nor do the scores that its backward makes again."""
    if not attn_kernels.backends()["cpu"].available:
        pytest.skip("the op has kernels on the CPU only")
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            context = attn_kernels.dot_attention(*tensors("dot_attention"), clip=2.0).context
            if backward:
                context.sum().backward()
        assert counter.get_total_flops() == (3 if backward else 1) * FORWARD["dot_attention"]


@pytest.mark.parametrize("vectors", [1, 3])
def test_score_vectors(vectors: int) -> None:
    if not attn_kernels.backends()["cpu"].available:
        pytest.skip("the ops have kernels on the CPU only")
    query, keys, values = tensors("dot_attention")
    v, gate = torch.randn(vectors, A, requires_grad=True), torch.randn(B, TK, A)
    for function, own in ((attn_kernels.additive_attention, (values,)), (attn_kernels.additive_scores, ())):
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                result = function(query, keys, *own, v, gate=gate)
                if backward:
                    (result if isinstance(result, Tensor) else result.context).sum().backward()
            forward = vectors * FORWARD[function.__name__]
            assert counter.get_total_flops() == (3 if backward else 1) * forward


def test_steps_on_a_memory() -> None:
    """Each step counts the gradients of its query; the pass over all steps those of the memory."""
    attention = BahdanauAttention(A, D, A)
    memory = attention.memory(torch.randn(B, TK, D))
    states = torch.randn(2, B, A)
    with FlopCounterMode(display=False) as counter:
        sum(attention(state, memory).context.sum() for state in states).backward()
    per_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert per_op["attn_kernels.additive_attention"] == 2 * 2 * B * TK * (A + D)
    assert per_op["attn_kernels.additive_attention_backward"] == 2 * 4 * B * TK * (A + D)


@pytest.mark.skipif(not attn_kernels.backends()["cpu"].available, reason="needs the CPU's kernels")
@pytest.mark.parametrize("op", ["additive_attention", "dot_attention"])
def test_packed_memories_have_no_padding(op: str) -> None:
    query, keys, values, *others = tensors(op)
    rows = [x.detach().flatten(0, 1).requires_grad_() for x in (keys, values)]
    offsets = torch.tensor([0, 1, B * TK])
    with FlopCounterMode(display=False) as counter:
        getattr(attn_kernels, op)(query, *rows, *others, memory_offsets=offsets).context.sum().backward()
    assert counter.get_total_flops() == 3 * FORWARD[op]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["attn_kernels", "torch.utils.flop_counter"])
def test_in_any_order_of_imports(first: str) -> None:
    program = f"""
import sys, {first}, torch, attn_kernels
if {first!r} == "attn_kernels":
    assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    attn_kernels.dot_attention(torch.ones(1, 2, 3), torch.ones(1, 4, 3), torch.ones(1, 4, 5))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 2 * 4 * (3 + 5)
