"""DenseGATv2 against the formula of the paper, edge by edge and in the broadcast form."""

from __future__ import annotations

import math
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

from attn_kernels import ArgumentTypeError, ArgumentValueError
from attn_kernels.mechanisms import DenseGATv2, gat
from formulas import assert_same, check_error, gradients, in_float64

pytestmark = pytest.mark.usefixtures("one_thread")

N, F, A, H = 7, 4, 5, 3
ADJACENCY = torch.rand(N, N, generator=torch.Generator().manual_seed(1)) < 0.3
ADJACENCY[2] = False  # attends to nothing
ADJACENCY[:, 4] = False  # nothing attends to it
FORMS = {
    "heads side by side": {"heads": H},
    "mean of heads": {"heads": H, "concat": False},
    "one head": {},
    "no self loops": {"heads": H, "self_loops": False},
    "shared": {"heads": H, "share_weights": True, "negative_slope": 0.5, "bias": False},
}


@pytest.fixture(params=["kept", "made again"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of large graphs are computed again in the backward."""
    if request.param == "made again":
        monkeypatch.setattr(gat, "_LARGE", 0)


def make(form: str, **options: object) -> DenseGATv2:
    torch.manual_seed(0)
    module = DenseGATv2(F, A, **{"dtype": torch.float64, **FORMS[form], **options})
    if module.bias is not None:
        torch.nn.init.normal_(module.bias)
    return module


def nodes(*batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*batch, N, F, dtype=dtype).requires_grad_()


def by_hand(module: DenseGATv2, x: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
    """(N, *) and (H, N, N), edge by edge."""
    p = dict(module.named_parameters())
    left = p["query_projection.weight"]
    right = left if module.share_weights else p["memory_projection.weight"]
    features, rows = [], []
    for h in range(module.heads):
        own = slice(h * A, (h + 1) * A)
        for i in range(N):
            neighbours = [j for j in range(N) if adjacency[i, j] or (module.self_loops and i == j)]
            row, feature = x.new_zeros(N), x.new_zeros(A)
            if neighbours:
                scores = []
                for j in neighbours:
                    hidden = left[own] @ x[i] + right[own] @ x[j]
                    scores.append(p["a"][h] @ torch.where(hidden > 0, hidden, module.negative_slope * hidden))
                exponentials = torch.stack(scores).exp()
                row = row.index_put((torch.tensor(neighbours),), exponentials / exponentials.sum())
                feature = sum(row[j] * (right[own] @ x[j]) for j in neighbours)
            features.append(feature)
            rows.append(row)
    heads = torch.stack(features).unflatten(0, (module.heads, N))
    result = torch.cat(list(heads), dim=-1) if module.concat else heads.mean(0)
    return result + p.get("bias", 0.0), torch.stack(rows).unflatten(0, (module.heads, N))


def broadcast(module: DenseGATv2, x: Tensor, adjacency: Tensor) -> Tensor:
    """As such layers are written: with a tensor of all pairs of nodes, heads and units."""
    heads = (module.heads, module.out_size)
    left, right = module.query_projection(x).unflatten(-1, heads), module.memory_projection(x).unflatten(-1, heads)
    hidden = torch.nn.functional.leaky_relu(left[:, None] + right[None], module.negative_slope)
    scores = (hidden * module.a).sum(-1).masked_fill(~adjacency[..., None], -math.inf)
    features = torch.einsum("ijh,jha->iha", torch.softmax(scores, dim=1), right)
    return features.flatten(1) + module.bias


@pytest.mark.parametrize("form", FORMS)
def test_formula(form: str, large: None) -> None:
    module, x = make(form), nodes()
    expected = by_hand(module, x, ADJACENCY)
    got = module(x, ADJACENCY, need_weights=True)
    torch.testing.assert_close(got, expected)
    assert_same(gradients(module, got, x=x), gradients(module, expected, x=x))
    alone, expected = module(x, ADJACENCY), by_hand(module, x, ADJACENCY)
    torch.testing.assert_close(alone, expected[0])
    assert_same(gradients(module, (alone,), x=x), gradients(module, expected[:1], x=x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_broadcast_form(dtype: torch.dtype, large: None) -> None:
    module, x = make("heads side by side", dtype=dtype), nodes(dtype=dtype)
    adjacency = ADJACENCY | torch.eye(N, dtype=torch.bool)
    expected = broadcast(module, x, adjacency)
    got = module(x, adjacency)
    torch.testing.assert_close(got, expected)
    assert_same(gradients(module, (got,), x=x), gradients(module, (expected,), x=x))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, large: None) -> None:
    module, x = make(form), nodes()
    assert torch.autograd.gradcheck(lambda x: module(x, ADJACENCY), x)
    assert torch.autograd.gradcheck(lambda x: module(x, ADJACENCY, need_weights=True), x)


def test_second_derivatives(large: None) -> None:
    module, x = make("heads side by side"), nodes()
    assert torch.autograd.gradgradcheck(lambda x: module(x, ADJACENCY), x)


def test_batches(large: None) -> None:
    module, x = make("heads side by side"), nodes(2)
    adjacency = torch.stack([ADJACENCY, ADJACENCY.T])
    features, alignments = module(x, adjacency, need_weights=True)
    for b in range(2):
        one = module(x[b], adjacency[b], need_weights=True)
        torch.testing.assert_close((features[b], alignments[b]), one)
    torch.testing.assert_close(module(x, ADJACENCY)[0], module(x[0], ADJACENCY))
    torch.testing.assert_close(module(x, adjacency), features)


def test_padding_has_no_effect(large: None) -> None:
    """A node that nothing attends to and that attends to nothing holds NaN."""
    module = make("no self loops")
    adjacency = ADJACENCY.clone()
    adjacency[4] = False
    clean = nodes()
    poisoned = clean.detach().clone()
    poisoned[4] = math.nan
    poisoned.requires_grad_()
    expected, got = module(clean, adjacency), module(poisoned, adjacency)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(got[4], module.bias)
    grads = gradients(module, (got,), x=poisoned)
    assert_same(grads, gradients(module, (expected,), x=clean), rtol=0, atol=0)
    assert (grads["x"][4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    module, x = make("heads side by side", dtype=dtype), nodes(dtype=dtype)
    exact_module = in_float64(partial(make, "heads side by side"), module)
    exact = by_hand(exact_module, x.double(), ADJACENCY)
    plain = by_hand(module, x, ADJACENCY)
    for result, expected, eager in zip(module(x, ADJACENCY, need_weights=True), exact, plain, strict=True):
        check_error(result, expected, eager)


def test_autocast_compile_and_transforms(large: None) -> None:
    module, x = make("heads side by side", dtype=torch.float32), nodes(dtype=torch.float32)
    exact = module(x, ADJACENCY)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x, ADJACENCY), exact)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, ADJACENCY)
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)
    (low,) = torch.autograd.grad(got.float().square().sum(), x)
    (expected,) = torch.autograd.grad(exact.square().sum(), x)
    torch.testing.assert_close(low, expected, rtol=0.1, atol=0.2)
    made = torch.func.grad(lambda x: module(x, ADJACENCY).square().sum())(x)
    torch.testing.assert_close(made, expected)


def test_no_nodes(large: None) -> None:
    module = make("heads side by side")
    assert module(torch.randn(0, F, dtype=torch.float64), torch.ones(0, 0, dtype=torch.bool)).shape == (0, H * A)


def test_no_tensor_of_all_pairs_heads_and_units() -> None:
    """What forward and backward make for all pairs of nodes: alignments and their gradients, of a head at a time."""
    count = 1100
    module = DenseGATv2(8, 8, 8)
    x = torch.randn(count, 8, requires_grad=True)
    adjacency = torch.rand(count, count) < 0.1
    live: dict[int, int] = {}
    peak = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            result = function(*args, **(kwargs or {}))
            for y in result if isinstance(result, tuple) else (result,):
                if isinstance(y, Tensor) and y.numel() >= count * count and y.dtype != torch.bool:
                    storage = y.untyped_storage()
                    live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, live.pop, storage.data_ptr(), None)
            peak = max(peak, sum(live.values()))
            return result

    with Watch():
        module(x, adjacency).sum().backward()
    assert peak <= 3 * 4 * count * count


def test_errors() -> None:
    for options, message in (
        ({"in_size": 0}, "in_size must be a positive integer, got 0"),
        ({"heads": None}, "heads must be a positive integer, got None"),
        ({"negative_slope": math.nan}, "negative_slope must be a finite number"),
    ):
        with pytest.raises(ArgumentValueError, match=f"^DenseGATv2: {message}"):
            DenseGATv2(**{"in_size": F, "out_size": A, **options})
    module, x = make("one head"), nodes()
    for arguments, error, message in (
        ((x[:, 1:], ADJACENCY), ArgumentValueError, "x must have shape"),
        ((x, ADJACENCY.double()), ArgumentTypeError, "adjacency must be bool"),
        ((x, ADJACENCY[1:]), ArgumentValueError, r"adjacency must have shape \(7, 7\), got \(6, 7\)"),
        ((x[None], ADJACENCY.expand(2, -1, -1)), ArgumentValueError, r"adjacency must have .* or \(1, 7, 7\)"),
        ((x, None), ArgumentTypeError, "adjacency must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=f"^DenseGATv2: {message}"):
            module(*arguments)
    assert "self_loops=True" in repr(module)
