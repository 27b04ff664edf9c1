"""Packed and jagged memories: invalid arguments and their error messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_kernels
from attn_kernels import additive_attention, dot_attention

LENGTHS = [5, 0, 17, 1, 9, 0]
B, TQ, A, D = len(LENGTHS), 4, 21, 13
N, LONGEST = sum(LENGTHS), max(LENGTHS)


def jagged(rows: Tensor, lengths: list[int] = LENGTHS) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, *lengths]).cumsum(0))


OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
MUST = f"memory_offsets must start with 0, not decrease and end with N = {N}"
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "first": (dict(memory_offsets=torch.tensor([1, *OFFSETS[1:]])), ValueError, f"{MUST}, got 1 to {N}"),
    "last": (dict(memory_offsets=torch.tensor([*OFFSETS[:-1], N - 1])), ValueError, f"{MUST}, got {N} before {N - 1}"),
    "decreasing": (dict(memory_offsets=torch.tensor([0, 9, 5, *OFFSETS[3:]])), ValueError, f"{MUST}, got 9 before 5"),
    "offsets' dtype": (dict(memory_offsets=torch.tensor(OFFSETS).float()), TypeError, "must be int32 or int64, got"),
    "offsets' axes": (dict(memory_offsets=torch.tensor([OFFSETS])), ValueError, "must have shape (B + 1,), got (1, 7)"),
    "no offsets": (dict(memory_offsets=torch.tensor([], dtype=torch.int64)), ValueError, "shape (B + 1,), got (0,)"),
    "list": (dict(memory_offsets=OFFSETS), TypeError, "memory_offsets must be a tensor, got list"),
    "batch": (
        dict(query=torch.zeros(B + 1, TQ, A)),
        ValueError,
        "query must have shape (B, Tq, A) or (B, A) = (6, *, 21)",
    ),
    "units": (
        dict(query=torch.zeros(B, TQ, A + 1)),
        ValueError,
        "query must have shape (B, Tq, A) or (B, A) = (6, *, 21)",
    ),
    "keys": (
        dict(keys=torch.zeros(B, LONGEST, A)),
        ValueError,
        "keys must have shape (N, A) with memory_offsets, got (6",
    ),
    "values": (dict(values=torch.zeros(N + 1, D)), ValueError, f"values must have shape (N, D) = ({N}, *), got"),
    "dtype": (dict(values=torch.zeros(N, D).double()), TypeError, "values must have the dtype of query, torch.float32"),
    "lengths": (
        dict(memory_lengths=torch.tensor(LENGTHS)),
        ValueError,
        "memory_lengths is not for jagged keys, nor with",
    ),
    "mask": (dict(mask=torch.ones(B, LONGEST).bool()), ValueError, "mask is not for jagged keys, nor with memory_off"),
    "dropout": (dict(dropout_p=0.5), ValueError, "dropout_p is not for jagged keys, nor with memory_offsets; pad keys"),
    "normalizer": (dict(normalizer="sigmoid"), ValueError, "normalizer is not for jagged keys"),
    "clip": (dict(clip=2.0), ValueError, "clip is not for jagged keys, nor with memory_offsets; pad keys"),
    "log total": (dict(need_log_total=True), ValueError, "need_log_total is not for jagged keys"),
    "bias": (dict(score_bias=torch.zeros(B, TQ, LONGEST)), ValueError, "score_bias is not for jagged keys"),
    "nested query": (
        dict(query=jagged(torch.zeros(N, A))),
        TypeError,
        "query must be a padded tensor, got a nested one",
    ),
    "nested keys": (dict(keys=jagged(torch.zeros(N, A))), ValueError, "memory_offsets must be None with jagged keys"),
    "backend": (dict(backend="none"), ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, backend: str, device: str) -> None:
    changes, kind, message = ERRORS[name]
    tensors = dict(query=torch.zeros(B, TQ, A), keys=torch.zeros(N, A), values=torch.zeros(N, D))
    arguments: dict[str, Any] = tensors | dict(memory_offsets=torch.tensor(OFFSETS), backend=backend) | changes
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    if message.startswith(MUST) and device != "cpu":
        pytest.skip("offsets on a GPU are not read")
    with pytest.raises(attn_kernels.ArgumentError, match=re.escape(message)) as caught:
        dot_attention(**arguments)
    assert isinstance(caught.value, kind)
    arguments["v"] = torch.zeros(A, device=device)
    with pytest.raises(kind, match=re.escape(message)):
        additive_attention(**arguments)


def test_errors_of_jagged_tensors() -> None:
    query, keys, values, v = (torch.randn(shape) for shape in ((B, TQ, A), (N, A), (N, D), (A,)))
    with pytest.raises(TypeError, match=r"values must be jagged, as keys are, got a tensor of shape \(32, 13\)"):
        dot_attention(query, jagged(keys), values)
    with pytest.raises(ValueError, match="values must have the lengths of keys"):
        dot_attention(query, jagged(keys), jagged(values, LENGTHS[::-1]))
    starts, lengths = torch.arange(3), torch.tensor([1, 2, 2])
    holes = torch.nested.narrow(torch.zeros(3, 5, A), 1, starts, lengths, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"no holes between sentences: call keys.contiguous\(\)"):
        additive_attention(query[:3], holes, holes, v)
    assert additive_attention(query[:3], holes.contiguous(), holes.contiguous(), v).alignments.shape == (3, TQ, 2)
    with pytest.raises(ValueError, match=r"keys must have shape \(B, j, A\), got \(6, 21, j"):
        dot_attention(query, jagged(keys).transpose(1, 2), jagged(values))
    for argument, given in (("extra", keys), ("prepared", keys[None])):
        with pytest.raises(ValueError, match=f"{argument} is not for jagged keys, nor with memory_offsets"):
            additive_attention(query, jagged(keys), jagged(values), v, **{argument: given})
