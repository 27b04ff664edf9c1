"""The ops in compilers: opcheck, torch.compile without graph breaks or recompilations, torch.export."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import attn_kernels
from attn_kernels.ops import kernel
from matrix import (
    CASES,
    OPS,
    SHAPES,
    Case,
    Op,
    assert_close,
    call,
    eager_errors,
    is_slow,
    make,
    oracle,
    slow_if,
    slow_interpreted,
)

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# opcheck --------------------------------------------------------------------------------------------------------------

# opcheck and torch.compile take a second or two each time: one case of each op and backend is in make test.
USUAL = "masked per query, strided"
OPCHECK = {
    "plain": Case(B=2, Tq=3, Tk=5, A=4, D=3),
    "no bias": Case(B=2, Tq=3, Tk=5, A=4, D=3, without=("bias",)),
    "masked": Case(B=3, Tq=3, Tk=5, A=4, D=3, lengths="random", mask="steps"),
    "masked per query, strided": Case(B=3, Tq=3, Tk=5, A=4, D=3, lengths="random32", mask="pairs", layout="transposed"),
    "empty": Case(B=0, Tq=3, Tk=5, A=4, D=3, lengths="random"),
}


def op_arguments(op: Op, case: Case, dtype: torch.dtype, device: str, requires_grad: bool) -> list[Any]:
    """In the order of the schema: query, keys, values, the other tensors, options, masks, need_alignments."""
    arguments = make(op, case, dtype, device)
    tensors = [t.requires_grad_(requires_grad) for t in arguments.tensors.values()]
    tensors += [None] * (len(op.inputs) - len(tensors))
    if not op.masked:
        return tensors
    if op.name == "additive_attention":
        tensors.append(None)  # prepared
    return [*tensors, *op.options.values(), arguments.masks.get("memory_lengths"), arguments.masks.get("mask"), True]


def skip_if_many(backend: str, name: str) -> None:
    if is_slow(backend) and name in ("no bias", "masked"):
        pytest.skip("the other cases are enough for Triton's interpreter")


@slow_if(lambda fused, name, requires_grad, **_: fused != "cpu" or name != USUAL or not requires_grad)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires grad"])
@pytest.mark.parametrize("name", OPCHECK)
@ops
def test_opcheck(op: Op, fused: str, device: str, name: str, requires_grad: bool) -> None:
    skip_if_many(fused, name)
    arguments = op_arguments(op, OPCHECK[name], torch.float32, device, requires_grad)
    torch.library.opcheck(kernel(op.name, fused), tuple(arguments))


@slow_if(lambda fused, name, dtype, **_: fused != "cpu" or name != USUAL or dtype != torch.float32)
@pytest.mark.parametrize("name", OPCHECK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ops
def test_opcheck_of_backward(op: Op, fused: str, device: str, dtype: torch.dtype, name: str) -> None:
    skip_if_many(fused, name)
    arguments = op_arguments(op, OPCHECK[name], dtype, device, requires_grad=False)
    grads = list(make(op, OPCHECK[name], dtype, device).grads.values())
    backward = kernel(f"{op.name}_backward", fused)
    if not op.masked:
        torch.library.opcheck(backward, (*grads, *arguments, True, True))
        return
    _, alignments = kernel(op.name, fused)(*arguments)
    for given in (tuple(grads), (grads[0], None), (None, grads[1]))[: 1 if is_slow(fused) else 3]:
        torch.library.opcheck(backward, (*given, *arguments[:-1], alignments, True, True))


@ops
def test_fake_kernel(op: Op, fused: str, device: str) -> None:
    """Shapes, dtypes and strides as torch.compile foresees them are those of the results, with symbolic sizes too."""
    arguments = op_arguments(op, CASES["lengths and mask"], torch.bfloat16, device, requires_grad=False)
    results = kernel(op.name, fused)(*arguments)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    foreseen = kernel(op.name, fused)(*meta)
    for real, fake in zip(*(x if isinstance(x, tuple) else (x,) for x in (results, foreseen)), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


# torch.compile --------------------------------------------------------------------------------------------------------


def compiled(op: Op, backend: str, dynamic: bool | None) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """A function around the op, as user code is; and what counts its compilations."""
    counter = CompileCounterWithBackend("aot_eager")  # everything of torch.compile but the generation of code
    public = op.function  # taken here: Dynamo of torch 2.10 does not trace the property of a tuple

    def function(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        doubled = tensors | {"query": tensors["query"] * 2}
        return call(public, op, doubled, **masks, backend=backend)

    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def check_compiled(function: Callable[..., Any], op: Op, case: Case, device: str) -> None:
    arguments = make(op, case, torch.float32, device)
    leaves = {name: t.requires_grad_() for name, t in arguments.tensors.items()}
    outputs = function(leaves, arguments.masks)
    loss = sum((outputs[name] * grad).sum() for name, grad in arguments.grads.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": g / (2 if name == "query" else 1) for name, g in zip(leaves, gradients, strict=True)}
    tensors = {name: t.detach() for name, t in leaves.items()}
    expected = arguments._replace(tensors=tensors | {"query": 2 * tensors["query"]})
    exact = oracle(op, expected)
    assert_close(outputs | named, exact, eager_errors(op, expected, exact), torch.float32)


NAMES = ("plain", "no bias", "lengths and mask", "mask (B, Tq, Tk)", "query 2-D, masked")
DYNAMIC = {None: "automatic", False: "static", True: "dynamic"}


def is_of_another_backend(backend: str, name: str, dynamic: bool | None) -> bool:
    """All cases run on the CPU's kernels; on the others each has one kind of shapes, in turn: the graph is the same."""
    return backend != "cpu" and (NAMES.index(name) + 1) % len(DYNAMIC) != list(DYNAMIC).index(dynamic)


@pytest.mark.left_out_if(lambda backend, name, dynamic, **_: is_of_another_backend(backend, name, dynamic))
@slow_if(lambda name, dynamic, **_: name != "lengths and mask" or dynamic is not None)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", DYNAMIC, ids=DYNAMIC.get)
@ops
def test_compile(op: Op, backend: str, device: str, dynamic: bool | None, name: str) -> None:
    function, counter = compiled(op, backend, dynamic)
    check_compiled(function, op, CASES[name], device)
    first = counter.frame_count
    check_compiled(function, op, CASES[name], device)
    assert counter.frame_count == first <= 2  # 2 where a dynamic scale is found out to be a constant


@slow_if(lambda backend, **_: backend != "cpu")
@ops
def test_no_recompilation(op: Op, backend: str, device: str) -> None:
    """Ten lengths of the memory, in batches and with numbers of queries that change too: two compilations at most."""
    function, counter = compiled(op, backend, dynamic=None)
    for i, steps in enumerate((7, 12, 5, 33, 18, 21, 9, 40, 11, 28)[: 5 if is_slow(backend) else 10]):
        check_compiled(function, op, Case(B=2 + i % 3, Tq=3 + i % 2, Tk=steps, A=8, D=6, lengths="random"), device)
        if i == 1:
            before = counter.frame_count
    assert counter.frame_count == before <= 2


@slow_interpreted()
@ops
def test_compile_without_gradients(op: Op, backend: str, device: str) -> None:
    function, counter = compiled(op, backend, dynamic=None)
    arguments = make(op, CASES["lengths"], torch.float32, device)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            outputs = function(arguments.tensors, arguments.masks)
            doubled = arguments.tensors | {"query": 2 * arguments.tensors["query"]}
            expected = call(op.reference, op, doubled, **arguments.masks)
            for key, t in expected.items():
                torch.testing.assert_close(outputs[key], t)
    assert counter.frame_count <= 2


@slow_interpreted()
@ops
def test_compile_autocast(op: Op, backend: str, device: str) -> None:
    function, _ = compiled(op, backend, dynamic=False)
    arguments = make(op, CASES["lengths"], torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = function(arguments.tensors, arguments.masks)
    assert all(t.dtype == torch.bfloat16 for t in outputs.values())


@pytest.mark.long(25)
@pytest.mark.slow
def test_compile_generates_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once through Inductor with the default backend, between other operations."""
    # PyTorch keeps compiled graphs on the disk, also those that call an op as it was in another version of the package.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        context, alignments = attn_kernels.additive_attention(query.relu(), keys, keys, v, memory_lengths=lengths)
        return context.tanh().sum() + alignments.square().sum()

    query, keys, v = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True), torch.randn(4)
    lengths = torch.tensor([5, 2])
    expected = function(query, keys, v, lengths)
    actual = torch.compile(function, fullgraph=True)(query, keys, v, lengths)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, (query, keys)), torch.autograd.grad(expected, (query, keys))
    torch.testing.assert_close(*gradients)


@slow_if(lambda backend, **_: backend != "cpu")
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp"])
def test_compile_transforms(backend: str, device: str, transform: str) -> None:
    """Transforms of torch.func inside torch.compile: there ops are their formulas, so one backend shows for all."""
    x, v = torch.randn(2, 3, 4, device=device), torch.randn(4, device=device)

    def loss(x: Tensor) -> Tensor:
        lengths = torch.full(x.shape[:1], 2, device=device)
        return attn_kernels.additive_attention(x, x, x, v, memory_lengths=lengths, backend=backend).context.sum()

    def jvp(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(loss, (x,), (2 * x,))

    per_sentence = torch.vmap(torch.func.grad(lambda x: loss(x[None])))
    function = {"grad": torch.func.grad(loss), "vmap of grad": per_sentence, "jvp": jvp}[transform]
    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


@ops
def test_fake_tensors(op: Op, backend: str, device: str) -> None:
    """Without torch.compile, and with lengths that have no values to be checked."""
    arguments = make(op, CASES["lengths"], torch.float32, device)
    expected = call(op.function, op, arguments.tensors, **arguments.masks, backend=backend)
    for mode in (FakeTensorMode(), FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=True))):
        if mode.shape_env is not None and backend == "reference" and not symbolic_products_work():
            continue
        with mode:
            tensors = {name: mode.from_tensor(t) for name, t in arguments.tensors.items()}
            masks = {name: mode.from_tensor(t) for name, t in arguments.masks.items()}
            outputs = call(op.function, op, tensors, **masks, backend=backend)
        assert {n: t.shape for n, t in outputs.items()} == {n: t.shape for n, t in expected.items()}


# torch.export ---------------------------------------------------------------------------------------------------------


@functools.cache
def symbolic_products_work() -> bool:
    """Whether PyTorch's own product takes such tensors: that of torch 2.11 does not."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x, y = mode.from_tensor(torch.ones(2, 3, 4)), mode.from_tensor(torch.ones(4))
    with mode:
        try:
            torch.tanh(x[:, :, None] + x[:, None]) @ y
        except RuntimeError as error:
            assert "symbolic sizes" in str(error), error
            return False
    return True


@slow_interpreted()
@ops
def test_export(op: Op, backend: str, device: str) -> None:
    """Exported with the sizes of batch and memory free, and run with others."""
    public = op.function

    class Model(nn.Module):
        def forward(self, tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
            return call(public, op, tensors, **masks, backend=backend)

    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    axes = {"B": batch, "Tk": steps}
    case = Case(B=4, Tq=3, Tk=7, lengths="random")
    arguments = make(op, case, torch.float32, device)
    shapes = {
        "tensors": {n: {i: axes[a] for i, a in enumerate(SHAPES[n]) if a in axes} for n in arguments.tensors},
        "masks": {name: {0: batch} for name in arguments.masks},
    }
    program = torch.export.export(Model(), (arguments.tensors, arguments.masks), dynamic_shapes=shapes)
    for other in (case, case._replace(B=9, Tk=33)):
        arguments = make(op, other, torch.float32, device)
        outputs = program.module()(arguments.tensors, arguments.masks)
        expected = call(op.reference, op, arguments.tensors, **arguments.masks)
        for name, t in expected.items():
            torch.testing.assert_close(outputs[name], t)


def test_exported_program_is_saved(tmp_path: Path) -> None:
    """With Memory and Attention in its signature; loaded in another process."""
    torch.manual_seed(0)
    attention = attn_kernels.BahdanauAttention(8, 8, 8)
    memory = attention.memory(torch.randn(4, 5, 8), torch.tensor([5, 3, 0, 1]))
    query = torch.randn(4, 8)
    program = torch.export.export(attention, (query, memory))
    torch.export.save(program, tmp_path / "attention.pt2")
    torch.save((query, memory.keys, memory.values, memory.memory_lengths), tmp_path / "inputs.pt")
    script = """
import sys, torch, attn_kernels
query, keys, values, lengths = torch.load(sys.argv[2])
memory = attn_kernels.Memory(keys, values, lengths)
result = torch.export.load(sys.argv[1]).module()(query, memory)
assert type(result) is attn_kernels.Attention, type(result)
torch.save(tuple(result), sys.argv[3])
"""
    files = [str(tmp_path / name) for name in ("attention.pt2", "inputs.pt", "outputs.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), tuple(attention(query, memory)))


# torch.jit and ONNX ---------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Encoder outputs and decoder states to contexts and alignments: memory() and steps in one graph."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, outputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        context, alignments = self.attention(query, self.attention.memory(outputs, lengths))
        return context, alignments


MODULES = {
    "bahdanau": lambda **kw: attn_kernels.BahdanauAttention(8, 8, 6, normalize=True, **kw),
    "luong general": lambda **kw: attn_kernels.LuongAttention(8, 8, scale=True, **kw),
    "luong concat": lambda **kw: attn_kernels.LuongAttention(8, 8, 6, score="concat", **kw),
    "cosine": lambda **kw: attn_kernels.CosineAttention(8, 8, 6, **kw),
}


def inputs_of(batch: int, queries: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(batch)
    lengths = torch.arange(batch) % (steps + 1)
    return torch.randn(batch, queries, 8), torch.randn(batch, steps, 8), lengths


@pytest.mark.parametrize("needs_gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(name: str, backend: str, device: str, needs_gradients: bool) -> None:
    decoder = Decoder(MODULES[name](backend=backend, device=device)).requires_grad_(needs_gradients)
    traced = torch.jit.trace(decoder, tuple(x.to(device) for x in inputs_of(2, 3, 5)))
    inputs = tuple(x.to(device) for x in inputs_of(4, 2, 7))
    torch.testing.assert_close(traced(*inputs), decoder(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_says_why_not() -> None:
    with pytest.raises(RuntimeError, match=r"BahdanauAttention: torch\.jit\.script .* torch\.export"):
        torch.jit.script(Decoder(attn_kernels.BahdanauAttention(8, 8, 6)))


def test_fx_says_why_not() -> None:
    with pytest.raises(TypeError, match=r"memory must be a tensor, got Proxy: .* torch\.export"):
        torch.fx.symbolic_trace(Decoder(attn_kernels.BahdanauAttention(8, 8, 6)))


@slow_if(lambda name, fused, **_: fused != "cpu" or name not in ("bahdanau", "luong general"))
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_onnx(name: str, fused: str, device: str, tmp_path: Path) -> None:
    """The formula of the reference in opset 18, with all sizes free, as onnxruntime computes it."""
    if device != "cpu" or (fused != "cpu" and name != "bahdanau"):
        pytest.skip("the decomposition is the same on every backend")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    decoder = Decoder(MODULES[name](backend=fused)).eval()
    batch, queries, steps = (torch.export.Dim(n, min=1, max=1024) for n in ("batch", "queries", "steps"))
    path = str(tmp_path / "decoder.onnx")
    torch.onnx.export(
        decoder,
        inputs_of(2, 3, 5),
        path,
        dynamo=True,
        verbose=False,
        opset_version=18,
        dynamic_shapes=({0: batch, 1: queries}, {0: batch, 1: steps}, {0: batch}),
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for sizes in ((2, 3, 5), (4, 1, 9), (1, 6, 1)):
        inputs = inputs_of(*sizes)
        named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        for actual, expected in zip(session.run(None, named), decoder(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), expected.detach(), rtol=1e-4, atol=1e-5)


def test_export_keeps_the_op() -> None:
    """Decompositions are for ONNX: those that torch.export runs by default leave the kernels in."""
    available = attn_kernels.backends()["cpu"]
    if not available.available:
        pytest.skip(available.detail)
    program = torch.export.export(Decoder(MODULES["bahdanau"](backend="cpu")), inputs_of(2, 3, 5))
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes}
    assert "attn_kernels.additive_attention.cpu" in targets
