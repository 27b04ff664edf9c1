"""Triton's kernels for packed memories: tiles and splits of sentences, and unchecked offsets."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Attention, BahdanauAttention, Memory, additive_attention, packing
from conftest import available
from matrix import device_of, slow_if
from test_packed import attend, attend_padded, make, offsets_of, used
from test_padding import poisoned_empty
from test_triton import launches_of_decode, splitting

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'attn_kernels[triton]'"
    ),
]

Sizes = tuple[int, int, int]
CASES: dict[str, tuple[list[int], Sizes]] = {  # lengths; queries, units and columns
    "one step": ([1], (1, 1, 1)),
    "one query": ([7, 3, 0, 12], (1, 33, 17)),
    "beams": ([0, 19, 2], (5, 9, 7)),
    "many queries": ([35, 0, 3, 40], (18, 13, 6)),
    "wide values": ([4, 0, 21], (3, 5, 1030)),
    "many sentences": ([i % 4 for i in range(23)], (9, 5, 3)),
    "all empty": ([0, 0], (2, 8, 8)),
    "no sentences": ([], (2, 8, 8)),
    "no queries": ([3, 2], (0, 8, 8)),
    "no units": ([3, 2], (2, 0, 8)),
    "no values": ([3, 2], (2, 8, 0)),
}
# With those in a test of every score and dtype a run takes minutes: each case has the score whose kernels it is about.
QUICK = {("one query", "tanh"), ("many queries", "tanh"), ("many queries", "dot"), ("wide values", "relu")}


def check(score: str, tensors: list[Tensor], lengths: list[int], need_weights: bool = True, **keywords: Any) -> None:
    """Results and gradients against the reference in float64."""
    device, dtype = tensors[0].device, tensors[0].dtype
    offsets = offsets_of(lengths, torch.int32, str(device))
    packed = attend(score, tensors, memory_offsets=offsets, need_weights=need_weights, backend="triton", **keywords)
    outputs = [t for t in packed if t is not None]
    assert len(outputs) == 1 + need_weights
    grads = [torch.randn_like(t) for t in outputs]
    of_packed = torch.autograd.grad(outputs, used(score, tensors), grads)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = [
        t for t in attend_padded(score, wide, lengths, need_weights=need_weights, backend="reference") if t is not None
    ]
    of_exact = torch.autograd.grad(exact, used(score, wide), [g.double() for g in grads], allow_unused=True)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    for found, right in zip((*outputs, *of_packed), (*exact, *of_exact), strict=True):
        right = torch.zeros_like(found).double() if right is None else right
        peak = right.abs().max().item() if right.numel() else 0.0
        torch.testing.assert_close(found.double(), right, rtol=0, atol=bound * max(1.0, peak))


@slow_if(lambda name, score, **_: (name, score) not in QUICK)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("score", ["tanh", "relu", "dot"])
def test_cases(name: str, score: str) -> None:
    """With alignments and without, which are packed then."""
    device = device_of(available("triton"))
    lengths, sizes = CASES[name]
    for need_weights in (True, False):
        check(score, make(torch.float32, lengths, sizes, device), lengths, need_weights)


@slow_if(lambda dtype, score: (dtype, score) != (torch.bfloat16, "tanh"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["tanh", "leaky_relu", "dot"])
def test_dtypes(dtype: torch.dtype, score: str) -> None:
    device, lengths = device_of(available("triton")), [17, 0, 33]
    for queries in (1, 17):
        check(score, make(dtype, lengths, (queries, 9, 6), device), lengths)


@slow_if(lambda score: score != "dot")
@pytest.mark.parametrize("score", ["tanh", "dot"])
def test_splits(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sentence is cut in as many parts, some of which have no step, by a decoding step and by sums over steps."""
    device, lengths = device_of(available("triton")), [1, 0, 90, 3]
    launched = launches_of_decode(monkeypatch, programs=20)
    for module in ("products", "softmax"):
        module = importlib.import_module(f"attn_kernels.triton.{module}")
        monkeypatch.setattr(module, "split", lambda programs, steps, block: (block, 3 if steps == 24 else 1))
    with splitting():
        for need_weights in (True, False):
            check(score, make(torch.float32, lengths, (1, 7, 5), device), lengths, need_weights)
    assert "combine_kernel" in launched
    if score == "dot":
        check(score, make(torch.float32, lengths, (9, 7, 5), device), lengths)


@slow_if(lambda score, queries: (score, queries) != ("tanh", 9))
@pytest.mark.parametrize("queries", [1, 9, 17])
@pytest.mark.parametrize("score", ["tanh", "relu", "dot"])
def test_neighbours_do_not_matter(score: str, queries: int) -> None:
    """What the sentences before and behind hold, huge numbers and NaN, changes no bit; nor does other memory."""
    device, lengths = device_of(available("triton")), [3, 11, 2]
    found = []
    for fill in (0.5, math.nan, 1e30):
        tensors = [t.detach() for t in make(torch.float32, lengths, (queries, 9, 6), device)]
        for rows in tensors[1:3]:
            rows[:3] = rows[14:] = fill
        for i in (1, 2):  # with other memory between and around the rows
            room = torch.full((2 * 16 + 3, 2 * tensors[i].shape[1] + 3), fill, device=device)
            view = room[1:33:2, 1 : 1 + 2 * tensors[i].shape[1] : 2]
            tensors[i] = view.copy_(tensors[i])
        tensors = [t.requires_grad_() for t in tensors]
        offsets = offsets_of(lengths, device=device)[:, None].repeat(1, 2)[:, 0]
        with poisoned_empty():
            results = attend(score, tensors, memory_offsets=offsets, backend="triton")
            loss = results.context[1].square().sum() + results.alignments[1].square().sum()
            of_query, of_keys, of_values, *_ = torch.autograd.grad(loss, used(score, tensors))
        found.append((results.context[1], results.alignments[1], of_query[1], of_keys[3:14], of_values[3:14]))
        assert all(t.isfinite().all() for t in found[-1])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert torch.equal(one, expected)


@slow_if(lambda queries: queries == 9)
@pytest.mark.parametrize("queries", [1, 9])
def test_offsets_that_are_wrong(queries: int) -> None:
    """A GPU does not check them: what is not of the memory is not read. Nor has each step of alignments a column."""
    device = device_of(available("triton"))
    kernels = importlib.import_module("attn_kernels.triton.packed_attention").KERNELS
    query, keys, values, v, bias = (t.detach() for t in make(torch.float32, [9, 20], (queries, 9, 6), device))
    room = torch.full((400, 9), math.nan, device=device)
    room[100:129] = keys
    for given in ([0, 9, 1000], [-50, 20, 29], [25, 3, 29]):
        offsets = torch.tensor(given, device=device)
        inputs = (query, room[100:129], values, v, bias, 7, offsets)
        context, alignments = kernels["additive_attention_packed"](*inputs, True)
        assert context.isfinite().all() and alignments.isfinite().all()
        if given[0] == 0:
            rows = [packing.pad(x, offsets.clamp(max=29), 7) for x in (keys, values)]
            expected = additive_attention(query, *rows, v, bias, backend="reference")
            torch.testing.assert_close(Attention(context, alignments), expected, rtol=1e-5, atol=1e-5)
        of_inputs = kernels["additive_attention_packed_backward"](context, None, *inputs, alignments, True, True)
        assert of_inputs[0].isfinite().all()


def test_no_offset_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values take the launchers to their end, forward and backward."""
    available("triton")
    launched = []
    modules = [importlib.import_module(f"attn_kernels.triton.{name}") for name in ("decode", "products", "softmax")]
    modules.append(importlib.import_module("attn_kernels.triton.additive_attention"))
    for module in modules:
        monkeypatch.setattr(module, "launch", lambda kernel, *_: launched.append(kernel.__name__))
    kernels = importlib.import_module("attn_kernels.triton.packed_attention").KERNELS
    empty = torch.empty
    with torch.device("meta"):
        for op, own in (("additive", (empty(9), empty(9))), ("activated", (empty(9), None, 1, 0.1)), ("dot", (0.5,))):
            for queries, columns in ((1, 0), (20, 30)):
                memory = (empty(3, queries, 9), empty(50, 9), empty(50, 6))
                inputs = (*memory, *own, columns, empty(4, dtype=torch.int64))
                context, alignments = kernels[f"{op}_attention_packed"](*inputs, True)
                assert alignments.shape == ((3, queries, 30) if columns else (queries * 50,))
                of_inputs = kernels[f"{op}_attention_packed_backward"](context, None, *inputs, alignments, True, True)
                assert [g.shape for g in of_inputs[:3]] == [t.shape for t in memory]
    assert {"decode_kernel", "tiled_scores_kernel", "backward_kernel", "_attend_kernel"} < set(launched)


def test_steps_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is packed; its largest length is read once, and again when offsets were written to."""
    device = device_of(available("triton"))
    read, longest = [], packing.longest
    monkeypatch.setattr(packing, "longest", lambda offsets: read.append(0) or longest(offsets))
    module = BahdanauAttention(4, 5, 6, backend="triton").to(device)
    offsets = offsets_of([3, 0, 4], device=device)
    memory = module.memory(torch.randn(7, 5, device=device), memory_offsets=offsets)
    assert memory.memory_offsets is offsets
    for steps in (4, 5):
        before = len(read)
        for _ in range(2):
            _, alignments = module(torch.randn(3, 4, device=device), memory)
            assert alignments.shape == (3, steps)
        assert len(read) == before + 1
        offsets.copy_(offsets_of([2, 0, 5], device=device))


def test_named_backends_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has no kernels for packed memories: modules make a padded one."""
    module = BahdanauAttention(4, 5, 6, backend="reference")
    memory = module.memory(torch.randn(7, 5), memory_offsets=offsets_of([3, 0, 4]))
    assert isinstance(memory, Memory) and memory.memory_offsets is None
