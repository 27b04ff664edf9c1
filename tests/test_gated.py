"""A gate and several score vectors: equal to one vector at a time; options, derivatives, errors, memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import additive_attention, additive_scores, backends, reference
from attn_kernels.ops import kernel
from conftest import available
from matrix import DTYPES, OPS, Case, assert_bit_equal, check, device_of, interpreted, make, run, slow_if

pytestmark = pytest.mark.usefixtures("one_thread")

B, TQ, TK, A, D = 3, 4, 11, 9, 5
ACTIVATIONS = ("tanh", "relu", "leaky_relu", "sigmoid")
MASKS: dict[str, dict[str, Tensor]] = {
    "all": {},
    "lengths": {"memory_lengths": torch.tensor([TK, 0, 6])},
    "pairs": {"mask": torch.rand((B, TQ, TK), generator=torch.Generator().manual_seed(1)) < 0.6},
}
SHAPES = {"query": (B, TQ, A), "keys": (B, TK, A), "values": (B, TK, D), "v": (A,), "bias": (A,), "gate": (B, TK, A)}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
masks = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
vectors = pytest.mark.parametrize("vectors", [None, 1, 3, 10])


def tensors(vectors: int | None = None, dtype: torch.dtype = torch.float64, **others: tuple[int, ...]) -> Any:
    """By name, as leaves."""
    rng = torch.Generator().manual_seed(0)
    shapes = SHAPES | ({} if vectors is None else {"v": (vectors, A)}) | others
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def finite(result: Any) -> list[Tensor]:
    context, alignments, log_total = result
    return [context, alignments, log_total.masked_fill(log_total == -torch.inf, 0.0)]


@activations
@masks
@pytest.mark.parametrize("vectors", [1, 3, 10, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vectors_one_by_one(vectors: int, masks: dict, activation: str, dtype: torch.dtype) -> None:
    """Results and gradients of one call, and those of a call for each score vector."""
    given = tensors(vectors, dtype)
    options: dict[str, Any] = {"activation": activation, "negative_slope": 0.3, "scale": 0.7, "backend": "cpu"} | masks
    together = additive_attention(**given, **options)
    single = [additive_attention(**(given | {"v": v}), **options) for v in given["v"]]
    apart = [torch.stack(parts, 2) for parts in zip(*single, strict=True)]
    grads = [torch.randn_like(x) for x in apart]
    leaves = list(given.values())
    gradients = [torch.autograd.grad(results, leaves, grads) for results in (together, apart)]
    bound = {"rtol": 0, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(tuple(together), tuple(apart), **bound)
    for name, one, other in zip(given, *gradients, strict=True):
        torch.testing.assert_close(one, other, **bound, msg=lambda m, name=name: f"{name}: {m}")


@activations
@vectors
def test_formula(vectors: int | None, activation: str, backend: str, device: str) -> None:
    """Pair by pair, without a query, and as scores alone."""
    if backend == "cuda":
        pytest.skip("there are no CUDA kernels for it yet")
    given = {name: t.detach().to(device) for name, t in tensors(vectors).items()}
    query, keys, v, bias, gate = (given[name] for name in ("query", "keys", "v", "bias", "gate"))
    act = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}.get(
        activation, lambda x: torch.where(x > 0, x, 0.3 * x)
    )
    hidden = act(query[:, :, None] + keys[:, None] + bias) / (1 + torch.exp(-gate))[:, None]
    expected = torch.einsum("bija,ra->birj", hidden, v.view(-1, A))
    options: dict[str, Any] = {"activation": activation, "negative_slope": 0.3, "gate": gate, "backend": backend}
    scores = additive_scores(query, keys, v, bias, **options)
    torch.testing.assert_close(scores, expected[:, :, 0] if vectors is None else expected)
    one_query = additive_scores(query[:, 0], keys, v, bias, **options)
    torch.testing.assert_close(one_query, scores[:, 0])
    lengths = torch.tensor([TK, 0, 6], device=device)
    pooled = additive_attention(None, keys, given["values"], v, bias, memory_lengths=lengths, **options)
    zero = additive_attention(
        torch.zeros_like(query), keys, given["values"], v, bias, memory_lengths=lengths, **options
    )
    assert pooled.context.shape == (B, D) if vectors is None else (B, vectors, D)
    torch.testing.assert_close(tuple(pooled), tuple(x[:, 0] for x in zero))
    assert (pooled.context[1] == 0).all() and (pooled.alignments[1] == 0).all()


@activations
@masks
@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_options(activation: str, masks: dict, own_bias: bool, normalizer: str) -> None:
    """A score bias for all vectors or each, dropout, a normalizer and log_total, against the formula."""
    shape = (B, TQ, 3, TK) if own_bias else (B, TQ, TK)
    given = tensors(3, score_bias=shape)
    options: dict[str, Any] = dict(dropout_p=0.4, normalizer=normalizer, need_log_total=True, activation=activation)
    options["clip"] = 1.5 if own_bias else None
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(3)
        found.append(additive_attention(**given, **options, **masks, backend=backend))
    assert found[0].log_total.shape == (B, TQ, 3)
    grads = [torch.randn_like(t) for t in finite(found[0])]
    gradients = [torch.autograd.grad(finite(result), list(given.values()), grads) for result in found]
    for ours, exact in zip((*finite(found[0]), *gradients[0]), (*finite(found[1]), *gradients[1]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11 * max(1.0, exact.abs().max().item()))


def test_options_of_a_2d_query() -> None:
    given = {name: t.detach() for name, t in tensors(3, score_bias=(B, TQ, 3, TK)).items()}
    query, score_bias = given.pop("query"), given.pop("score_bias")
    many = additive_attention(query, **given, score_bias=score_bias, need_log_total=True)
    one = additive_attention(query[:, 0], **given, score_bias=score_bias[:, 0], need_log_total=True)
    torch.testing.assert_close(tuple(one), tuple(x[:, 0] for x in many))
    without = additive_attention(query, **given, score_bias=score_bias, need_weights=False)
    assert without.alignments is None
    torch.testing.assert_close(without.context, many.context)


@activations
@pytest.mark.parametrize("vectors", [None, 2])
def test_derivatives(activation: str, vectors: int | None) -> None:
    given = tensors(vectors)
    names = list(given)

    def attend(*leaves: Tensor) -> Any:
        arguments = dict(zip(names, leaves, strict=True))
        options = {"activation": activation, "negative_slope": 0.3, "need_log_total": True, "backend": "cpu"}
        return finite(additive_attention(**arguments, **options, **MASKS["lengths"]))

    def scores(*leaves: Tensor) -> Tensor:
        arguments = dict(zip([name for name in names if name != "values"], leaves, strict=True))
        return additive_scores(**arguments, activation=activation, negative_slope=0.3, backend="cpu")

    for function, skipped in ((attend, ""), (scores, "values")):
        leaves = [t for name, t in given.items() if name != skipped]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("mapped", [("gate",), ("keys", "gate", "values"), ("v",), ("query", "bias")])
def test_vmap(mapped: tuple[str, ...]) -> None:
    given = {name: t.detach() for name, t in tensors(3).items()}
    batches = {name: torch.stack([t, t.flip(0), 2 * t]) if name in mapped else t for name, t in given.items()}

    def function(*arguments: Tensor) -> Tensor:
        return additive_attention(**dict(zip(given, arguments, strict=True)), backend="cpu").context

    axes = tuple(0 if name in mapped else None for name in given)
    found = torch.vmap(function, axes)(*batches.values())
    for i in range(3):
        expected = function(*(t[i] if name in mapped else t for name, t in batches.items()))
        torch.testing.assert_close(found[i], expected)


@slow_if(lambda dtype, **_: dtype != torch.float32)
@pytest.mark.every_level
@pytest.mark.parametrize("vectors", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_long_bag(dtype: torch.dtype, vectors: int | None, compiled: str) -> None:
    """More steps than a chunk of the backward, whatever the number of threads."""
    if compiled.startswith("cuda"):
        pytest.skip("there are no CUDA kernels for it yet")
    op = OPS["additive_attention"]._replace(
        inputs=(*OPS["additive_attention"].inputs, "gate"), by_name=("gate",), vectors=vectors
    )
    for case in (Case(1, 1, 3000, 33, 7, query_2d=True), Case(2, 3, 1500, 20, 5, lengths="random", mask="pairs")):
        arguments = make(op, case, dtype)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check(op, case, dtype, "cpu", arguments=arguments)
            first = run(op.function, op, arguments, backend="cpu")
            assert_bit_equal(run(op.function, op, arguments, backend="cpu"), first)
        torch.set_num_threads(1)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["keys", "gate", "query", "v"])
@activations
def test_special_values_are_where_the_formula_has_them(activation: str, name: str, special: float) -> None:
    given = {name: t.detach() for name, t in tensors(3, torch.float32).items()}
    given[name].view(-1)[3] = special
    got, expected = (
        additive_attention(**given, activation=activation, backend=backend) for backend in ("cpu", "reference")
    )
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.mark.parametrize("op", ["gated_additive_attention", "gated_additive_scores"])
@pytest.mark.parametrize("with_gate", [False, True])
def test_opcheck(op: str, with_gate: bool) -> None:
    available("cpu")
    given = tensors(3, torch.float32)
    gate = given["gate"] if with_gate else None
    own, extra = [given["v"], given["bias"], gate], given["keys"].detach().flip(0) if with_gate else None
    if op == "gated_additive_scores":
        arguments: list[Any] = [given["query"], given["keys"], *own, extra, 3, 0.0]
        grads = [torch.randn(B, TQ * 3, TK)]
    else:
        lengths = MASKS["lengths"]["memory_lengths"]
        memory = [given["query"], given["keys"], given["values"]]
        arguments = [*memory, *own, None, extra, 2, 0.3, 0.0, 0, 1.5, None, lengths, None, True]
        grads = [torch.randn(B, TQ * 3, D), torch.randn(B, TQ * 3, TK), None]
    torch.library.opcheck(kernel(op, "cpu"), tuple(arguments))
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    results = kernel(op, "cpu")(*detached)
    if isinstance(results, tuple):
        detached[-1:] = results[1:]
    torch.library.opcheck(kernel(f"{op}_backward", "cpu"), (*grads, *detached, True, True))


@slow_if(lambda vectors, **_: vectors is None)
@pytest.mark.parametrize("vectors", [None, 3])
def test_compile(vectors: int | None) -> None:
    given = tensors(vectors)

    def attend(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        context, alignments = additive_attention(**arguments, memory_lengths=MASKS["lengths"]["memory_lengths"])
        without = {name: t for name, t in arguments.items() if name != "values"}
        return context, alignments + additive_scores(**without)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected = attend(**given)
    found = compiled(**given)
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(x) for x in expected]
    leaves = list(given.values())
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grads), torch.autograd.grad(expected, leaves, grads))


def test_autocast() -> None:
    given = tensors(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        context, alignments = additive_attention(**given)
    assert context.dtype == alignments.dtype == torch.bfloat16
    exact = additive_attention(**given)
    torch.testing.assert_close(context.float(), exact.context, rtol=0.05, atol=0.05)
    context.sum().backward()
    assert given["gate"].grad.dtype == torch.float32


MEMORY = """
import resource, torch
from attn_kernels import additive_attention
torch.set_num_threads(1)
def call(Tq, Tk, A):
    given = [torch.randn(1, n, A) for n in (Tq, Tk, Tk)] + [torch.randn(5, A)]
    given = [t.requires_grad_() for t in given]
    gate = torch.randn(1, Tk, A, requires_grad=True)
    additive_attention(*given, gate=gate, backend="cpu").context.sum().backward()
call(4, 4, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(300, 400, 256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory() -> None:
    """Queries, steps and units would make 123 MB; that much and more is what eager PyTorch takes."""
    available("cpu")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"v": torch.zeros(2, A + 1)}, ValueError, r"v must have shape \(A,\) or \(R, A\) = \(9,\) or \(>= 1, 9\)"),
        ({"v": torch.zeros(0, A)}, ValueError, r"v must have shape \(A,\) or \(R, A\) .* got \(0, 9\)"),
        ({"v": torch.zeros(2, 1, A)}, ValueError, r"v must have shape"),
        ({"v": torch.zeros(2, A).double()}, TypeError, "v must have the dtype of query"),
        ({"gate": torch.zeros(B, TK, A + 1)}, ValueError, r"gate must have shape \(B, Tk, A\) = \(3, 11, 9\)"),
        ({"gate": torch.zeros(B, TK, A).double()}, TypeError, "gate must have the dtype of query"),
        ({"gate": 1.0}, TypeError, "gate must be a tensor, got float"),
        ({"gate": torch.zeros(B, TK, A, device="meta")}, ValueError, "gate must be on the device of query, cpu"),
        ({"bias": torch.zeros(A + 1)}, ValueError, r"bias must have shape \(A,\)"),
        ({"activation": "gelu"}, ValueError, "activation must be 'tanh', 'relu', 'leaky_relu' or 'sigmoid'"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {name: t.detach().float() for name, t in tensors(2).items()} | changed
    with pytest.raises(error, match=f"^additive_attention: {words}"):
        additive_attention(**given)
    del given["values"]
    with pytest.raises(error, match=f"^additive_scores: {words}"):
        additive_scores(**given)


def test_what_does_not_go_together() -> None:
    given = {name: t.detach().float() for name, t in tensors(2).items()}
    prepared = torch.zeros(B, TK, A)
    with pytest.raises(ValueError, match="prepared must be None with a gate or several score vectors"):
        additive_attention(**given, prepared=prepared)
    with pytest.raises(ValueError, match=r"score_bias must have shape \(B, Tq, Tk\) = .* or \(B, Tq, R, Tk\) = "):
        additive_attention(**given, score_bias=torch.zeros(B, TQ, 3, TK))


@pytest.mark.parametrize("function", [additive_attention, additive_scores])
def test_backends_without_kernels_refuse(function: Any, fused: str, device: str) -> None:
    if fused != "cuda":
        pytest.skip("which has kernels")
    given = {name: t.detach().float().to(device) for name, t in tensors(2).items()}
    if function is additive_scores:
        del given["values"]
    words = f"backend '{fused}' has no kernels for a gate or several score vectors yet"
    with pytest.raises(ValueError, match=words):
        function(**given, backend=fused)
    if not interpreted(fused):  # the default is the reference there
        found = function(**given)
        exact = getattr(reference, function.__name__)(**given)
        torch.testing.assert_close(found, exact)


def test_default_backend() -> None:
    """The kernels of the CPU where there are some."""
    given = {name: t.detach() for name, t in tensors(2).items()}
    best = "cpu" if backends()["cpu"].available else "reference"
    assert device_of(best) == "cpu"
    for one, other in zip(additive_attention(**given), additive_attention(**given, backend=best), strict=True):
        assert torch.equal(one, other)
