"""LayerNormBahdanauAttention against its formula, one pair at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from attn_kernels import ArgumentValueError
from attn_kernels.mechanisms import LayerNormBahdanauAttention, NormalizedAttention, layer_norm
from formulas import assert_same, check_padding, check_precision, gradients, random_sum

pytestmark = pytest.mark.usefixtures("one_thread")

B, TQ, TK, Q, M, UNITS = 3, 5, 6, 4, 5, 7
LENGTHS = torch.tensor([6, 0, 3])


@pytest.fixture(params=["one chunk", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks of two queries, the last of one."""
    if request.param == "chunks":
        monkeypatch.setattr(layer_norm, "_CHUNK_BYTES", 2 * B * TK * UNITS * 8)
    return request.param


def make(**options: object) -> LayerNormBahdanauAttention:
    torch.manual_seed(0)
    module = LayerNormBahdanauAttention(Q, M, UNITS, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        module.gain.add_(0.3 * torch.randn_like(module.gain))
        module.shift.add_(0.3 * torch.randn_like(module.shift))
    return module


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, TQ, Q, dtype=dtype).requires_grad_(), torch.randn(B, TK, M, dtype=dtype).requires_grad_()


def by_hand(module: LayerNormBahdanauAttention, query: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    p = dict(module.named_parameters())
    contexts, alignments = [], []
    for b in range(B):
        for i in range(TQ):
            scores = []
            for j in range(lengths[b]):
                x = p["query_projection.weight"] @ query[b, i] + p["memory_projection.weight"] @ memory[b, j]
                centred = x - x.sum() / UNITS
                variance = (centred**2).sum() / UNITS
                scores.append(p["v"] @ torch.tanh(p["gain"] * centred / (variance + module.eps).sqrt() + p["shift"]))
            row, context = memory.new_zeros(TK), memory.new_zeros(M)
            if scores:
                exponentials = torch.stack(scores).exp()
                row = torch.cat([exponentials / exponentials.sum(), row[len(scores) :]])
                context = sum(row[j] * memory[b, j] for j in range(lengths[b]))
            contexts.append(context)
            alignments.append(row)
    return torch.stack(contexts).unflatten(0, (B, TQ)), torch.stack(alignments).unflatten(0, (B, TQ))


def test_formula(chunks: str) -> None:
    for lengths in (LENGTHS, torch.full((B,), TK)):
        module, (query, memory) = make(), inputs()
        got = module(query, module.memory(memory, lengths if lengths is LENGTHS else None))
        expected = by_hand(module, query, memory, lengths)
        torch.testing.assert_close(tuple(got), expected)
        of = {"query": query, "memory": memory}
        assert_same(gradients(module, got, **of), gradients(module, expected, **of))


def test_gradcheck(chunks: str) -> None:
    module, (query, memory) = make(), inputs()
    assert torch.autograd.gradcheck(lambda q, m: tuple(module(q, module.memory(m, LENGTHS))), (query, memory))
    small = query[:, :3].detach().requires_grad_(), memory[:, :3].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q, m: module(q, module.memory(m)).context, small)


def test_parameters_only(chunks: str) -> None:
    """Inputs without a gradient, as of the first layer."""
    module, (query, memory) = make(), inputs()
    expected = gradients(module, module(query, module.memory(memory, LENGTHS)), query=query, memory=memory)
    module(query.detach(), module.memory(memory.detach(), LENGTHS)).context.sum().backward()
    module.zero_grad()
    random_sum(module(query.detach(), module.memory(memory.detach(), LENGTHS))).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_padding_has_no_effect(chunks: str) -> None:
    module, (query, memory) = make(), inputs()
    check_padding(module, query, memory, LENGTHS)


def test_one_query_and_no_weights(chunks: str) -> None:
    module, (query, memory) = make(), inputs()
    made = module.memory(memory, LENGTHS)
    one, alignments = module(query[:, 2], made, need_weights=False)
    assert alignments is None
    torch.testing.assert_close(one, module(query, made).context[:, 2])
    assert module(query, module.memory(memory[:, :0])).context.shape == (B, TQ, M)
    assert module(query[:, :0], made).alignments.shape == (B, 0, TK)


def test_normalizer() -> None:
    module, (query, memory) = make(normalizer="sigmoid"), inputs()
    made = module.memory(memory, LENGTHS)
    scores = module.scores(module.make_query(query), made.keys)
    expected = torch.sigmoid(scores[2, :, :3])
    torch.testing.assert_close(module(query, made).alignments[2, :, :3], expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check_precision(make, inputs, LENGTHS, partial(by_hand, lengths=LENGTHS), dtype)


def test_autocast(chunks: str) -> None:
    module, (query, memory) = make(dtype=torch.float32), inputs(torch.float32)
    exact = module(query, module.memory(memory, LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        got = module(query, module.memory(memory, LENGTHS))
    torch.testing.assert_close(got.context.float(), exact.context, rtol=0.05, atol=0.05)
    got.context.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_compile_and_transforms(chunks: str) -> None:
    module, (query, memory) = make(), inputs()
    made = module.memory(memory, LENGTHS)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, made), module(query, made))

    def loss(q: Tensor) -> Tensor:
        return module(q, made).context.square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(query), torch.autograd.grad(loss(query), query)[0])


def test_no_tensor_of_all_pairs() -> None:
    """The largest tensor of a forward and backward is a chunk, not (B, Tq, Tk, A)."""
    module = LayerNormBahdanauAttention(16, 16, 64)
    query, memory = torch.randn(1, 400, 16, requires_grad=True), torch.randn(1, 400, 16, requires_grad=True)
    assert 2 * layer_norm._CHUNK_BYTES < 400 * 400 * 64 * 4
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.nbytes for x in (result if isinstance(result, tuple) else (result,)) if type(x) is Tensor)
            return result

    with Watch():
        module(query, module.memory(memory)).context.sum().backward()
    assert max(sizes) <= layer_norm._CHUNK_BYTES


def test_errors() -> None:
    with pytest.raises(ArgumentValueError, match=r"^LayerNormBahdanauAttention: eps must be positive, got 0"):
        make(eps=0)
    with pytest.raises(ArgumentValueError, match="normalizer must be"):
        make(normalizer="max")
    module = make()
    with pytest.raises(ArgumentValueError, match="query must have shape"):
        module(torch.randn(B, TQ, Q + 1, dtype=torch.float64), module.memory(inputs()[1]))
    with pytest.raises(TypeError, match="must be one whose step is a score"):
        NormalizedAttention(module, "sigmoid")
    assert "eps=1e-05" in repr(module)
    module.reset_parameters()
    assert (module.gain == 1).all() and (module.shift == 0).all()
