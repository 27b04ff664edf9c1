"""Backends, dtypes, autocast and compilation of all stateful mechanisms; copies, parameters, errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from formulas import gradients
from stepwise import MASKS, MECHANISMS, TK, WITH_BACKEND, B, K, M, Q, decode, inputs, make

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMETERS = {
    "monotonic": {"query_projection.weight", "memory_projection.weight", "v", "g", "bias", "score_bias"},
    "monotonic-dot": {"memory_projection.weight", "score_bias"},
    "mocha": {
        *("query_projection.weight", "memory_projection.weight", "v", "score_bias", "chunk_v", "chunk_bias"),
    },
    "mocha-dot": {"memory_projection.weight", "g", "score_bias"},
    "stepwise": {"query_projection.weight", "memory_projection.weight", "v", "score_bias"},
    "local-p": {
        *("query_projection.weight", "memory_projection.weight", "v", "g", "bias"),
        *("position_projection.weight", "position_v"),
    },
    "local-m": {"memory_projection.weight"},
    "gmm-0": {"mixture.weight", "mixture.bias"},
    "gmm-2": {"hidden.weight", "hidden.bias", "mixture.weight", "mixture.bias"},
    "dynamic convolution": {
        *("filter_hidden.weight", "filter_hidden.bias", "filter_output.weight", "static_filters"),
        *("static_projection", "dynamic_projection", "bias", "v"),
    },
}


@pytest.fixture(params=list(MECHANISMS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# Backends and dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_BACKEND)
def test_backends(name: str) -> None:
    queries, outputs = inputs()
    results = [decode(make(name, backend=x), queries, outputs, **MASKS["both"]) for x in ("reference", None)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["monotonic", "mocha", "local-p", "local-m", "dynamic convolution"])
def test_every_backend(name: str, fused: str, device: str) -> None:
    """Keys of mocha are a part of wider ones, and those of dynamic convolution are made in each step."""
    module = make(name, dtype=torch.float32, backend=fused).to(device)
    queries, outputs = (x.detach() for x in inputs(torch.float32))
    lengths = torch.tensor([6, 4], device=device)
    queries, outputs = (x.to(device).requires_grad_() for x in (queries[:2, :2], outputs[:2]))
    got = decode(module, queries, outputs, memory_lengths=lengths)
    exact = make(name, backend="reference")
    exact.load_state_dict(module.state_dict())
    wide = [x.detach().double().cpu().requires_grad_() for x in (queries, outputs)]
    expected = decode(exact, *wide, memory_lengths=lengths.cpu())
    torch.testing.assert_close([x.double().cpu() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    loss, right = (results[0].square().sum() + results[1].square().sum() for results in (got, expected))
    grads = torch.autograd.grad(loss, [queries, outputs, *module.parameters()])
    rights = torch.autograd.grad(right, [*wide, *exact.parameters()])
    for grad, other in zip(grads, rights, strict=True):
        torch.testing.assert_close(grad.double().cpu(), other, rtol=1e-4, atol=1e-5)


# Errors of scores in the dtype of the inputs, of which a sigmoid, an exponential or a position is made.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module = make(name, dtype=dtype)
    queries, outputs = (x.detach() for x in inputs(dtype))
    lengths = torch.tensor([6, 0, 3, 1])
    memory = module.memory(outputs, lengths)
    state = module.initial_state(memory, K)
    assert all(x.dtype in (torch.float32, torch.int64) for x in state)
    got = decode(module, queries, outputs, memory_lengths=lengths)
    assert {x.dtype for x in (*got, *module.parameters())} == {dtype}
    state = module(queries[0], memory, state).state
    assert all(x.dtype in (torch.float32, torch.int64) for x in state)
    exact = decode(copy.deepcopy(module).double(), queries.double(), outputs.double(), memory_lengths=lengths)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=tolerance, atol=tolerance)


def test_autocast(name: str) -> None:
    module = make(name, dtype=torch.float32)
    queries, outputs = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = decode(module, queries, outputs, memory_lengths=torch.tensor([6, 0, 3, 1]))
    assert {x.dtype for x in results} == {torch.bfloat16}
    expected = decode(module, queries, outputs, memory_lengths=torch.tensor([6, 0, 3, 1]))
    for got, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(got.float(), exact, rtol=6e-2, atol=6e-2)
    for grad in gradients(module, results, queries=queries, outputs=outputs).values():
        assert grad.dtype == torch.float32 and grad.isfinite().all()


# Each mechanism with one of the masks, in turn.
@pytest.mark.left_out_if(lambda name, masks: (masks == "none") == (list(MECHANISMS).index(name) % 2 == 0))
@pytest.mark.parametrize("masks", ["none", "both"])
def test_compiles_whole(name: str, masks: str) -> None:
    torch._dynamo.reset()  # it counts how often the forward of one class was compiled
    module = make(name)
    queries, outputs = inputs()
    memory = module.memory(outputs, **MASKS[masks])
    state = module.initial_state(memory, K)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    step, other = module(queries[0], memory, state), compiled(queries[0], memory, state)
    torch.testing.assert_close(tuple(other), tuple(step))
    torch.testing.assert_close(
        tuple(compiled(queries[1], memory, other.state)), tuple(module(queries[1], memory, step.state))
    )


# As modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_names(name: str) -> None:
    assert set(make(name).state_dict()) == PARAMETERS[name]


def test_reset_parameters(name: str) -> None:
    """On the meta device, then with memory of any content, then as the constructor makes them."""
    with torch.device("meta"):
        module = MECHANISMS[name]()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    expected = MECHANISMS[name]()
    for attribute in ("named_parameters", "named_buffers"):
        for (key, a), (_, b) in zip(getattr(module, attribute)(), getattr(expected, attribute)(), strict=True):
            assert torch.equal(a, b), key


def test_copies(name: str) -> None:
    module = make(name)
    queries, outputs = inputs()
    loaded = MECHANISMS[name](dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    expected = decode(module, queries, outputs)[0]
    for other in (loaded, copy.deepcopy(module)):
        assert torch.equal(decode(other, queries, outputs)[0], expected)


def test_meta_device(name: str) -> None:
    options = {"backend": "reference"} if name in WITH_BACKEND else {}
    module = MECHANISMS[name](device="meta", **options)
    memory = module.memory(torch.empty(B, TK, M, device="meta"), torch.empty(B, dtype=torch.int64, device="meta"))
    result = module(torch.empty(B, Q, device="meta"), memory, module.initial_state(memory))
    assert result.context.shape == (B, M) and result.alignments.shape == (B, TK) and result.context.is_meta


def test_repr(name: str) -> None:
    assert "(\n  query_size=5, memory_size=7, " in repr(MECHANISMS[name]())


def test_refusals(name: str) -> None:
    module = make(name)
    kind = type(module).__name__
    queries, outputs = inputs()
    memory = module.memory(outputs)
    state = module.initial_state(memory, K)
    with pytest.raises(TypeError, match=rf"{kind}: state must be a tuple of tensors, .* got <class 'NoneType'>"):
        module(queries[0], memory, None)
    with pytest.raises(ValueError, match=rf"{kind}: state must have tensors \(B, K, \*\) = \(4, 1, \*\), got \(4, 2,"):
        module(queries[0, :, 0], memory, state)
    with pytest.raises(ValueError, match=rf"{kind}: query must have shape .* got \(4, 2, 4\)"):
        module(queries[0, ..., 1:], memory, state)
    with pytest.raises(TypeError, match=rf"{kind}.initial_state: memory must be a Memory, .* got Tensor"):
        module.initial_state(outputs)
    with pytest.raises(ValueError, match=rf"{kind}.initial_state: hypotheses must be an integer >= 0, got 1.5"):
        module.initial_state(memory, 1.5)
    masked = module.memory(outputs, mask=torch.ones(B, 3, TK, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"{kind}: mask must have shape .* or \(4, 2, 6\), got \(4, 3, 6\)"):
        module(queries[0], masked, state)
    far = module.memory(outputs, torch.full((B,), TK + 1))
    with pytest.raises(ValueError, match=rf"{kind}: memory_lengths must be in 0..Tk = 0..6, got 7..7"):
        module(queries[0], far, state)
