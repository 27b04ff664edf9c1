"""Matrix products of the decoder's loop: all implementations agree, and each is selected where it is intended."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_kernels import gemm


def strided(rows: int, columns: int, layout: str) -> Tensor:
    """A matrix whose elements lie in another order than it has, or apart."""
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    if layout == "columns":
        return torch.randn(rows, columns + 5)[:, 2 : columns + 2]
    if layout == "every other":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns)


LAYOUTS = ("contiguous", "transposed", "columns", "every other")


@pytest.fixture
def _wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for what is large enough, whatever the CPU is."""
    if not gemm._has_operators():
        pytest.skip("this PyTorch has no products of oneDNN")
    monkeypatch.setattr(gemm, "_has_wide_vectors", lambda: True)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The weights of products that oneDNN makes from now on."""
    shapes: list[tuple[int, ...]] = []
    call = gemm._call

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return call(x, weight, bias)

    monkeypatch.setattr(gemm, "_call", counted)
    return shapes


@pytest.mark.usefixtures("_wide_vectors")
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(monkeypatch: pytest.MonkeyPatch, of_x: str, of_weight: str, with_bias: bool) -> None:
    made = count_calls(monkeypatch)
    x, weight = strided(33, 257, of_x), strided(301, 257, of_weight)
    bias = torch.randn(301) if with_bias else None
    kept = x.clone(), weight.clone()
    got = gemm.linear(x, weight, bias)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)
    assert made == [(301, 257)]
    torch.testing.assert_close((x, weight), kept, atol=0, rtol=0)


@pytest.mark.usefixtures("_wide_vectors")
@pytest.mark.parametrize(("rows", "multiplied"), [(1, None), (33, 64), (64, 64), (130, 192)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_of_rows(monkeypatch: pytest.MonkeyPatch, rows: int, multiplied: int | None, with_bias: bool) -> None:
    """oneDNN gets a number of rows of which there are few."""
    sizes: list[int] = []
    call = gemm._call
    monkeypatch.setattr(gemm, "_call", lambda x, *others: sizes.append(x.shape[0]) or call(x, *others))
    x, weight = torch.randn(rows, 257), torch.randn(301, 257)
    bias = torch.randn(301) if with_bias else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(gemm.linear_of_rows(x, weight, bias).double(), expected, atol=1e-4, rtol=0)
    assert sizes == ([] if multiplied is None else [multiplied])


@pytest.mark.usefixtures("_wide_vectors")
@pytest.mark.parametrize("of_y", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("rows", [1183, 512, 31, 0])
def test_weight_gradient(monkeypatch: pytest.MonkeyPatch, rows: int, of_x: str, of_y: str) -> None:
    """In blocks of a few sizes, and what is left over."""
    made = count_calls(monkeypatch)
    x, y = strided(rows, 257, of_x), strided(rows, 301, of_y)
    expected = x.double().t() @ y.double()
    torch.testing.assert_close(gemm.weight_gradient(x, y).double(), expected, atol=1e-3, rtol=0)
    sizes = {1183: [512, 512, 128], 512: [512], 31: [], 0: []}[rows]
    assert [shape[1] for shape in made] == sizes


@pytest.mark.usefixtures("_wide_vectors")
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(3, 1024, torch.float32), (8, 64, torch.float32), (64, 512, torch.float64)]
)
def test_small_and_other_products_stay(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype
) -> None:
    made = count_calls(monkeypatch)
    x, weight = torch.randn(rows, columns, dtype=dtype), torch.randn(1024, columns, dtype=dtype)
    torch.testing.assert_close(gemm.linear(x, weight), x @ weight.t())
    torch.testing.assert_close(gemm.linear(x[:0], weight), x[:0] @ weight.t())
    assert made == []


@pytest.mark.usefixtures("_wide_vectors")
def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may switch oneDNN off: then nothing goes there."""
    made = count_calls(monkeypatch)
    x, weight = torch.randn(64, 512), torch.randn(512, 512)
    with torch.backends.mkldnn.flags(enabled=False):
        gemm.linear(x, weight)
        assert gemm.PackedLinear(weight, 64, 20).packed is None
    assert made == []
    gemm.linear(x, weight)
    assert made == [(512, 512)]


@pytest.mark.parametrize("is_intel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_linear(monkeypatch: pytest.MonkeyPatch, is_intel: bool, dtype: torch.dtype) -> None:
    """A weight copied into another layout, or not: the same product, of rows that lie apart, too."""
    monkeypatch.setattr(gemm, "_has_fast_mkl", lambda: is_intel)
    weight, x = torch.randn(1024, 512, dtype=dtype), torch.randn(8, 700, dtype=dtype)[:, 100:612]
    plain, packed = gemm.PackedLinear(weight, 8, 1), gemm.PackedLinear(weight, 8, 20)
    transposed = gemm.PackedLinear(weight.t().contiguous().t(), 8, 20)
    out = torch.randn(8, 1024, dtype=dtype)
    assert plain.packed is None
    assert plain.transposed is None
    for other in (plain, packed, transposed):
        if other is not plain:
            assert (other.transposed is not None) == is_intel
            expects_onednn = not is_intel and dtype == torch.float32 and gemm._has_operators()
            assert (other.packed is not None) == expects_onednn
        torch.testing.assert_close(other(x), x @ weight.t(), atol=1e-3, rtol=0)
        added = out.clone()
        assert other.add_to(added, x) is added
        torch.testing.assert_close(added, out + x @ weight.t(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_weights_count_their_bytes(dtype: torch.dtype) -> None:
    weight = torch.rand(256, 256, dtype=dtype)
    for spare in (-1, 0):
        budget = gemm.Budget(weight.nbytes + spare)
        product = gemm.PackedLinear(weight, 8, 100, budget)
        assert product.has_copy == (spare == 0 and gemm.can_copy(weight))
