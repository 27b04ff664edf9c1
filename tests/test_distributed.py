"""Two processes against one: attention over a memory in two parts, and data-parallel training.

The processes are started once, compute all results for the tests of this file, and write them to files.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import attn_kernels
from attn_kernels import reference
from attn_kernels.distributed import joint_mean, sharded_additive_attention, sharded_dot_attention
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.types import attention_mask
from matrix import CASES, DTYPES, OPS, Arguments, Case, Op, assert_close, eager_errors, make, oracle

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch was built without gloo"
)

RANKS = 2
SECONDS = 300  # for all that the processes do, which takes about ten: a hang is an error
ROOT = Path(__file__).parent.parent
FUNCTIONS = {"additive_attention": sharded_additive_attention, "dot_attention": sharded_dot_attention}
BACKENDS = tuple(name for name in ("cpu", "reference") if attn_kernels.backends()[name].available)
F64 = torch.float64


# Cases: a problem of the matrix, and where its memory is cut ----------------------------------------------------------


class Cut(NamedTuple):
    """first: steps on rank 0. poison: NaN stands in padding. need_weights: as of the function."""

    case: Case
    first: int
    poison: bool = False
    need_weights: bool = True


LENGTHS = CASES["lengths"]  # of 8 rows, 7 steps; row 1 has length 0, row 2 length 7, others in between
CUTS = {
    "plain": Cut(CASES["plain"], 5),
    "no bias": Cut(CASES["no bias"], 4),
    "decode": Cut(CASES["decode, long"], 200),
    "lengths": Cut(LENGTHS, 3, poison=True),
    "lengths, one step first": Cut(LENGTHS, 1, poison=True),
    "lengths int32": Cut(CASES["lengths int32"], 3),
    "lengths all 0": Cut(CASES["lengths all 0"], 4, poison=True),
    "rank 0 has no steps": Cut(LENGTHS, 0, poison=True),
    "rank 1 has no steps": Cut(CASES["plain"], 9),
    "rank 1 has no steps, mask": Cut(CASES["mask (B, Tq, Tk)"], 9),
    "Tk = 0": Cut(CASES["Tk = 0"], 0),
    "Tk = 0, no mask": Cut(CASES["Tk = 0, no mask"], 0),
    "B = 0": Cut(CASES["B = 0"], 4),
    "Tq = 0": Cut(CASES["Tq = 0"], 4),
    "A = 0": Cut(CASES["A = 0"], 4),
    "D = 0": Cut(CASES["D = 0"], 4),
    "mask (B, Tk)": Cut(CASES["mask (B, Tk)"], 6, poison=True),
    "mask (B, Tq, Tk)": Cut(CASES["mask (B, Tq, Tk)"], 2, poison=True),
    "mask False": Cut(CASES["mask False"], 4, poison=True),
    "mask strided": Cut(CASES["mask strided, per query"], 4),
    "lengths and mask per query": Cut(CASES["lengths and mask per query"], 3, poison=True),
    "query 2-D": Cut(CASES["query 2-D, masked"], 5, poison=True),
    "query 2-D, mask 3-D": Cut(CASES["query 2-D, mask 3-D"], 5),
    "time-major": Cut(CASES["time-major"], 4, poison=True),
    "units strided": Cut(CASES["units strided"], 4),
    "gradient of context": Cut(CASES["gradient of context"], 4),
    "gradient of alignments": Cut(CASES["gradient of alignments"], 4),
    "gradient time-major": Cut(CASES["gradient time-major"], 4),
    "without alignments": Cut(CASES["gradient of context"], 4, need_weights=False),
}


def arguments_of(op: Op, cut: Cut, dtype: torch.dtype) -> Arguments:
    return make(op, cut.case, dtype)


def part_of(arguments: Arguments, rank: int, cut: Cut) -> Arguments:
    """What a rank is given. Of memory_lengths, what reaches into its part."""
    steps = slice(0, cut.first) if rank == 0 else slice(cut.first, None)
    tensors, masks, grads = (dict(parts) for parts in arguments)
    for name in ("keys", "values"):
        tensors[name] = tensors[name][:, steps]
    part = tensors["keys"].shape[1]
    if "memory_lengths" in masks:
        masks["memory_lengths"] = (masks["memory_lengths"] - rank * cut.first).clamp(0, part)
    if "mask" in masks:
        masks["mask"] = masks["mask"][..., steps]
    if "alignments" in grads:
        grads["alignments"] = grads["alignments"][..., steps]
    return Arguments(tensors, masks, grads)


def poisoned(arguments: Arguments) -> Arguments:
    """NaN in the steps that no query attends, in queries that attend nothing, and in gradients of such alignments."""
    tensors, masks, grads = (dict(parts) for parts in arguments)
    query = tensors["query"]
    padding = ~attention_mask(tensors["keys"], masks.get("memory_lengths"), masks.get("mask"))
    steps, queries = padding.all(1)[..., None], padding.all(2)
    for name in ("keys", "values"):
        tensors[name] = tensors[name].masked_fill(steps, math.nan)
    tensors["query"] = query.masked_fill(queries if query.dim() == 2 else queries[..., None], math.nan)
    for name, where in (("alignments", padding), ("context", queries[..., None])):
        if name in grads:
            grads[name] = grads[name].masked_fill(where[:, 0] if query.dim() == 2 else where, math.nan)
    return Arguments(tensors, masks, grads)


# What the processes do ------------------------------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    results = {job.__name__: job(rank) for job in JOBS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded(rank: int) -> dict[tuple[str, str, torch.dtype, str], dict[str, Tensor]]:
    """Results and gradients by name, of all cases."""
    results = {}
    for name, cut in CUTS.items():
        for op_name, function in FUNCTIONS.items():
            for dtype in DTYPES:
                whole = arguments_of(OPS[op_name], cut, dtype)
                arguments = part_of(poisoned(whole) if cut.poison else whole, rank, cut)
                for backend in BACKENDS if op_name == "additive_attention" else ("",):
                    results[name, op_name, dtype, backend] = run(function, op_name, arguments, cut, backend)
    return results


def run(function: Callable[..., Any], op_name: str, arguments: Arguments, cut: Cut, backend: str) -> dict[str, Tensor]:
    op = OPS[op_name]
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.tensors.items()}
    options = {**op.options, **arguments.masks, "need_weights": cut.need_weights}
    if backend:
        options["backend"] = backend
    outputs = dict(zip(op.outputs, function(*(leaves.get(name) for name in op.inputs), **options), strict=True))
    results = {name: t.detach() for name, t in outputs.items() if t is not None}
    received = [outputs[name] for name in arguments.grads]
    gradients = torch.autograd.grad(received, list(leaves.values()), list(arguments.grads.values()))
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


SPECIAL = {  # scores of one query, two steps on each rank; None: padding
    "-inf on rank 0": [-math.inf, -math.inf, 1.0, 2.0],
    "-inf on one step": [1.0, -math.inf, 1.0, 2.0],
    "-inf beside nothing": [-math.inf, 0.5, None, None],
    "-inf everywhere": [-math.inf] * 4,
    "-inf, and rank 1 has nothing": [-math.inf, -math.inf, None, None],
    "-inf and padding, finite elsewhere": [-math.inf, None, 3.0, None],
    "inf": [1.0, math.inf, 1.0, 2.0],
    "nan": [1.0, 2.0, math.nan, None],
    "far apart": [0.0, 1.0, 5000.0, 5001.0],
    "far apart, the other way": [9e4, 1.0, -9e4, 2.0],
    "nothing": [None] * 4,
}


def special_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query of ones, keys that are the scores, values, mask."""
    scores = torch.tensor([[math.nan if s is None else s for s in row] for row in SPECIAL.values()], dtype=F64)
    mask = torch.tensor([[s is not None for s in row] for row in SPECIAL.values()])
    values = torch.randn(len(SPECIAL), 4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    return torch.ones(len(SPECIAL), 1, 1, dtype=F64), scores[..., None], values, mask


def special(rank: int) -> list[Tensor]:
    query, keys, values, mask = special_arguments()
    part = slice(2 * rank, 2 * rank + 2)
    return list(sharded_dot_attention(query, keys[:, part], values[:, part], mask=mask[:, part]))


def spoiled(rank: int) -> dict[str, list[Tensor]]:
    """Gradients where all is NaN that may be: query 0 attends step 0, both NaN; query 1 and step 1 are padding."""
    mask = torch.tensor([[[True, False], [False, False]]])
    results = {}
    for name, function in FUNCTIONS.items():
        leaves = [torch.ones(1, 2, 3).index_fill(1, torch.tensor(0), math.nan).requires_grad_() for _ in range(3)]
        context, _ = function(*leaves, *([torch.ones(3)] if name == "additive_attention" else []), mask=mask)
        results[name] = list(torch.autograd.grad(context, leaves, torch.full((1, 2, 3), math.nan)))
    return results


def decode(attention: Callable[..., Any], leaves: dict[str, Tensor], part: slice) -> Tensor:
    """A decoder of three steps, whose query is made from the context of the step before; returns a loss."""
    state, loss = leaves["state"], torch.zeros((), dtype=F64)
    for _ in range(3):
        query = torch.tanh(state @ leaves["projection"])
        keys, values = leaves["memory"][:, part] @ leaves["memory_projection"], leaves["memory"][:, part]
        context, alignments = attention(query, keys, values, leaves["v"])
        state = torch.tanh(context + state)
        loss = loss + alignments.square().sum()
    return loss + state.sum()


def decoder_leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"state": (2, 6), "projection": (6, 5), "memory": (2, 7, 6), "memory_projection": (6, 5), "v": (5,)}
    return {name: torch.randn(shape, generator=generator, dtype=F64) for name, shape in shapes.items()}


def decoder(rank: int) -> dict[str, Tensor]:
    leaves = {name: t.requires_grad_() for name, t in decoder_leaves().items()}
    decode(sharded_additive_attention, leaves, slice(0, 3) if rank == 0 else slice(3, None)).backward()
    return {name: t.grad for name, t in leaves.items()}


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that are called, and of how many numbers."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "barrier")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls.append((name, args[-1].numel()))
            return originals[name](*args, **keywords)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def collectives(rank: int) -> dict[str, tuple[Any, Any]]:
    whole = arguments_of(OPS["additive_attention"], CUTS["plain"], torch.float32)
    tensors = part_of(whole, rank, CUTS["plain"]).tensors
    counts = {}
    for name, needing, need_weights in (
        ("all", tuple(tensors), True),
        ("without alignments", tuple(tensors), False),
        ("memory", ("keys", "values"), False),
        ("none", (), True),
    ):
        leaves = {key: t.detach().requires_grad_(key in needing) for key, t in tensors.items()}
        with counted() as forward:
            context, _ = sharded_additive_attention(**leaves, need_weights=need_weights)
        with counted() as backward:
            if needing:
                context.sum().backward()
        counts[name] = (forward, backward)
        assert [key for key, leaf in leaves.items() if leaf.grad is not None] == list(needing)
    return counts


def errors(rank: int) -> dict[str, str]:
    query, keys, v = torch.ones(4, 3, 16), torch.ones(4, 17, 16), torch.ones(16)
    short, leaf = torch.ones(4, 17, 8), torch.ones(4, 3, 16, requires_grad=True)
    first = dist.new_group([0])  # every process has to call it

    def twice(function: Callable[..., Any], *units: Tensor) -> Callable[[], Any]:
        def call() -> None:
            (gradient,) = torch.autograd.grad(function(leaf, keys, keys, *units)[0].sum(), leaf, create_graph=True)
            assert gradient.requires_grad
            gradient.sum().backward()

        return call

    calls: dict[str, Callable[[], Any]] = {
        "keys": lambda: sharded_additive_attention(query, short, keys, v),
        "dot keys": lambda: sharded_dot_attention(query, short, keys),
        "values": lambda: sharded_dot_attention(query, keys, keys[:, 1:]),
        "v": lambda: sharded_additive_attention(query, keys, keys, v[1:]),
        "bias": lambda: sharded_additive_attention(query, keys, keys, v, v.double()),
        "query": lambda: sharded_additive_attention(None, keys, keys, v),
        "lengths": lambda: sharded_dot_attention(query, keys, keys, memory_lengths=torch.full((4,), 18)),
        "mask": lambda: sharded_dot_attention(query, keys, keys, mask=torch.ones(4, 17)),
        "scale": lambda: sharded_dot_attention(query, keys, keys, scale=math.nan),
        "backend": lambda: sharded_additive_attention(query, keys, keys, v, backend="fast"),
        "group": lambda: rank == 1 and sharded_dot_attention(query, keys, keys, group=first),
        "joint_mean group": lambda: rank == 1 and joint_mean(torch.ones(()), torch.ones(()), group=first),
        "second derivative": twice(sharded_additive_attention, v),
        "second derivative, dot": twice(sharded_dot_attention),
    }
    return {name: _message(call) for name, call in calls.items()}


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def autocast(rank: int) -> list[Tensor]:
    leaves = {name: t.float().requires_grad_() for name, t in decoder_leaves().items() if name in ("memory", "v")}
    part = leaves["memory"][:, :3] if rank == 0 else leaves["memory"][:, 3:]
    with torch.autocast("cpu", torch.bfloat16):
        context, _ = sharded_additive_attention(torch.ones(2, 5), part[..., :5], part, leaves["v"])
        context.sum().backward()
    return [context.detach(), leaves["v"].grad]


def alone(rank: int) -> bool:
    """In groups of one rank each, with other sizes: as without ranks."""
    groups = [dist.new_group([r]) for r in range(RANKS)]
    query, keys = torch.randn(3, 2 + rank, 4), torch.randn(3, 5 + rank, 4)
    got = sharded_dot_attention(query, keys, keys, group=groups[rank])
    torch.testing.assert_close(got, attn_kernels.dot_attention(query, keys, keys))
    return True


MODELS: dict[str, dict[str, Any]] = {
    "bahdanau": {"attention": "bahdanau"},
    "bahdanau, step by step": {"attention": "bahdanau", "decoder": "steps", "cell": "gru", "num_layers": 2},
    "bahdanau, no input feeding": {"attention": "bahdanau-normalized", "input_feeding": False},
    "luong-dot": {"attention": "luong-dot", "cell": "gru"},
    "luong-general": {"attention": "luong-general", "num_layers": 2},
    "luong-concat": {"attention": "luong-concat", "input_feeding": False},
    "cosine": {"attention": "cosine"},
}
STEPS = 5


def make_model(name: str) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(11, 9, 5, 6, 7, dtype=F64, **MODELS[name])


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's sentences: others in number and length on each. In step 1 rank 1 has no source, in step 2 no target."""
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    sentences, steps, target_steps = 3 - rank, 4 + rank + step % 2, 5 - 2 * rank
    lengths = torch.randint(1, steps + 1, (sentences,), generator=generator)
    source = torch.randint(3, 11, (sentences, steps), generator=generator)
    target = torch.randint(3, 9, (sentences, target_steps), generator=generator)
    target = target.masked_fill(torch.arange(target_steps) > lengths[:, None], 0)
    if rank == 1 and step == 1:
        source, lengths = source[:, :0], lengths * 0
    if rank == 1 and step == 2:
        target = target * 0
    return source, lengths, target


def joined_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    batches = [batch_of(rank, step) for rank in range(RANKS)]
    widths = [max(batch[i].shape[1] for batch in batches) for i in (0, 2)]
    source = torch.cat([F.pad(batch[0], (0, widths[0] - batch[0].shape[1])) for batch in batches])
    target = torch.cat([F.pad(batch[2], (0, widths[1] - batch[2].shape[1])) for batch in batches])
    return source, torch.cat([batch[1] for batch in batches]), target


def train(model: torch.nn.Module, batches: Iterator[Any], loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for source, lengths, target in batches:
        logits, _ = model(source, lengths, target)
        loss = loss_of(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def joint_loss(logits: Tensor, target: Tensor) -> Tensor:
    return joint_mean(F.cross_entropy(logits, target, ignore_index=0, reduction="sum"), (target != 0).sum())


def training(rank: int) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    results = {}
    for name in MODELS:
        model = DistributedDataParallel(make_model(name))
        losses = train(model, (batch_of(rank, step) for step in range(STEPS)), joint_loss)
        results[name] = (losses, model.module.state_dict())
    return results


JOBS = (sharded, special, spoiled, decoder, collectives, errors, autocast, alone, training)


# The tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each process, by the name of the job."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(work, (str(folder),), nprocs=RANKS, join=False, start_method="spawn")
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):  # raises where a process fails
            assert time.monotonic() < end, f"the processes have not finished after {SECONDS} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(
    ("op_name", "kernels"), [*(("additive_attention", backend) for backend in BACKENDS), ("dot_attention", "")]
)
def test_sharded(ranks: list[dict[str, Any]], op_name: str, kernels: str, name: str, dtype: torch.dtype) -> None:
    """Results and all gradients of the whole memory; what every rank has is the same on each, to the bit."""
    cut, op = CUTS[name], OPS[op_name]
    first, second = (results["sharded"][name, op_name, dtype, kernels] for results in ranks)
    got = {}
    for key, result in first.items():
        if key == "alignments":
            got[key] = torch.cat([result, second[key]], -1)
        elif key in ("dkeys", "dvalues"):
            got[key] = torch.cat([result, second[key]], 1)
        else:
            assert torch.equal(result, second[key]), key
            got[key] = result
    whole = arguments_of(op, cut, dtype)
    exact = oracle(op, whole)
    errors = eager_errors(op, whole, exact)
    if not cut.need_weights:
        del exact["alignments"]
    assert_close(got, exact, errors, dtype)


def test_cases_are_what_they_are_named() -> None:
    """A row that only rank 0 has steps of, and one that nobody has."""
    lengths = arguments_of(OPS["dot_attention"], CUTS["lengths"], F64).masks["memory_lengths"]
    assert ((lengths > 0) & (lengths <= CUTS["lengths"].first)).any()
    assert (lengths == 0).any() and (lengths > CUTS["lengths"].first).any()


@pytest.mark.parametrize("name", SPECIAL)
def test_special_scores(ranks: list[dict[str, Any]], name: str) -> None:
    query, keys, values, mask = special_arguments()
    expected = reference.dot_attention(query, keys, values, mask=mask)
    row = list(SPECIAL).index(name)
    contexts, alignments = zip(*(results["special"] for results in ranks), strict=True)
    for context in contexts:
        torch.testing.assert_close(context[row], expected.context[row], equal_nan=True)
    torch.testing.assert_close(torch.cat(alignments, -1)[row], expected.alignments[row], equal_nan=True)


@pytest.mark.parametrize("op_name", FUNCTIONS)
def test_gradients_of_padding_beside_nan(ranks: list[dict[str, Any]], op_name: str) -> None:
    for results in ranks:
        for gradient in results["spoiled"][op_name]:
            assert gradient[0, 0].isnan().all() and (gradient[0, 1] == 0).all()


def test_decoder(ranks: list[dict[str, Any]]) -> None:
    """Gradients of what lies before the query are whole on every rank; before the memory, those of its part."""
    leaves = {name: t.requires_grad_() for name, t in decoder_leaves().items()}
    decode(attn_kernels.additive_attention, leaves, slice(None)).backward()
    for name, leaf in leaves.items():
        parts = [results["decoder"][name] for results in ranks]
        if name in ("memory", "memory_projection"):
            torch.testing.assert_close(parts[0] + parts[1], leaf.grad, msg=lambda text, name=name: f"{name}: {text}")
        else:
            for part in parts:
                torch.testing.assert_close(part, leaf.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_collectives(ranks: list[dict[str, Any]]) -> None:
    B, Tq, _, A, D = CUTS["plain"].case[:5]
    forward = [("all_gather", B * Tq * (2 + D))]
    mean, shared = ("all_reduce", B * Tq), ("all_reduce", B * Tq * A + 2 * A)
    expected = {
        "all": (forward, [mean, shared]),
        "without alignments": (forward, [shared]),
        "memory": (forward, []),
        "none": (forward, []),
    }
    assert [results["collectives"] for results in ranks] == [expected] * RANKS


MESSAGES = {
    "keys": "ValueError: sharded_additive_attention: keys must have shape (B, Tk, A) = (4, *, 16), got (4, 17, 8)",
    "dot keys": "ValueError: sharded_dot_attention: keys must have shape (B, Tk, A) = (4, *, 16), got (4, 17, 8)",
    "values": "ValueError: sharded_dot_attention: values must have shape (B, Tk, D) = (4, 17, *), got (4, 16, 16)",
    "v": "ValueError: sharded_additive_attention: v must have shape (A,) = (16,), got (15,)",
    "bias": "TypeError: sharded_additive_attention: bias must have the dtype of query, torch.float32, got ",
    "query": "TypeError: sharded_additive_attention: query must be a tensor, got NoneType",
    "lengths": "ValueError: sharded_dot_attention: memory_lengths must be in 0..Tk = 0..17, got 18..18",
    "mask": "TypeError: sharded_dot_attention: mask must be bool (True = attend), got torch.float32",
    "scale": "ValueError: sharded_dot_attention: scale must be a finite number, got nan",
    "backend": "ValueError: attn_kernels: backend must be one of",
    "second derivative": "RuntimeError: sharded attention has no second derivative",
    "second derivative, dot": "RuntimeError: sharded attention has no second derivative",
}


def test_errors(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        for name, message in MESSAGES.items():
            error = results["errors"][name].removeprefix("Argument")  # ArgumentValueError is a ValueError
            assert error.startswith(message), error
    outside = "group must contain this process"
    assert ranks[1]["errors"]["group"] == f"ValueError: sharded_dot_attention: {outside}"
    assert ranks[1]["errors"]["joint_mean group"] == f"ValueError: joint_mean: {outside}"


@pytest.mark.parametrize(
    "call",
    [
        lambda x: sharded_additive_attention(x, x, x, x[0, 0]),
        lambda x: sharded_dot_attention(x, x, x),
        lambda x: joint_mean(x.sum(), x.sum()),
    ],
)
def test_without_a_group(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        RuntimeError, match=r"^\w+: no process group is initialized: call torch.distributed.init_process_group"
    ):
        call(torch.ones(1, 1, 1))


def test_autocast(ranks: list[dict[str, Any]]) -> None:
    leaves = {name: t.float().requires_grad_() for name, t in decoder_leaves().items() if name in ("memory", "v")}
    memory, v = leaves["memory"], leaves["v"]
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = attn_kernels.additive_attention(torch.ones(2, 5), memory[..., :5], memory, v)
    expected.sum().backward()
    for results in ranks:
        context, grad_v = results["autocast"]
        assert context.dtype == torch.bfloat16 and grad_v.dtype == torch.float32
        torch.testing.assert_close(context, expected.detach())
        torch.testing.assert_close(grad_v, v.grad, rtol=2e-2, atol=2e-2)


def test_alone_in_a_group(ranks: list[dict[str, Any]]) -> None:
    assert all(results["alone"] for results in ranks)


@pytest.mark.parametrize("name", MODELS)
def test_training(ranks: list[dict[str, Any]], name: str) -> None:
    """The losses and parameters of one process with the joined batch."""
    model = make_model(name)

    def loss_of(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=0)

    losses = train(model, (joined_batch(step) for step in range(STEPS)), loss_of)
    assert losses[-1] != losses[0]
    by_rank, parameters = zip(*(results["training"][name] for results in ranks), strict=True)
    assert [sum(pair) / RANKS for pair in zip(*by_rank, strict=True)] == pytest.approx(losses, rel=1e-10)
    start = make_model(name).state_dict()
    for key, expected in model.state_dict().items():
        assert torch.equal(parameters[0][key], parameters[1][key]), key
        torch.testing.assert_close(
            parameters[0][key], expected, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
        )
        assert not torch.equal(expected, start[key]), f"{key} has not been trained"


@pytest.mark.long(20)
@pytest.mark.slow
def test_example_of_the_documents(tmp_path: Path) -> None:
    """Under torchrun, as it stands there: the model learns, and one process writes one file."""
    page = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    # Without the interpreter's end: there PyTorch aborts now and then when it takes down Gloo under DDP, as it does
    # with two Linear layers and nothing of this package ("terminate called without an active exception").
    blocks.append("import sys\nsys.stdout.flush()\nos._exit(0)\n")
    (tmp_path / "train.py").write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "train.py"]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout
    first, last = (float(figure) for figure in re.findall(r"\d+\.\d+", lines[0]))
    assert last < first
    Seq2Seq(30, 40, 32, 32, 32).load_state_dict(torch.load(tmp_path / "model.pt"))


def test_joint_mean_of_a_number_of_terms() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        total = torch.tensor(3.0, requires_grad=True)
        for count in (4, 4.0, torch.tensor(4)):
            loss = joint_mean(total, count)
            assert loss.item() == 0.75 and loss.requires_grad
    finally:
        dist.destroy_process_group()
