"""Caches between calls: a cached value is used only if recomputing it would give the same value, after any write."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attn_kernels import Attention, BahdanauAttention, LuongAttention, Memory, additive_attention, dot_attention
from attn_kernels import checksums as checking
from attn_kernels.checksums import checksums
from attn_kernels.patching import NotSupported, masks
from attn_kernels.patching.cache import cached, cached_projection, clear
from attn_kernels.patching.masks import as_original, lengths_without_empty_rows, mask_without_empty_rows
from conftest import SIMD_LEVELS, compiled_module, simd
from steps import CountLinear

# Each gives a tensor the values of another, in a way of its own; most of them autograd does not count.
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda x, y: x.copy_(y),
    "data.copy_": lambda x, y: x.data.copy_(y),
    "detach().copy_": lambda x, y: x.detach().copy_(y),
    "data =": lambda x, y: setattr(x, "data", y.clone()),
    "data = same values, then write": lambda x, y: (setattr(x, "data", x.data.clone()), x.data.copy_(y)),
    "set_": lambda x, y: x.set_(y.clone()),
    "swap_tensors": lambda x, y: torch.utils.swap_tensors(x, _like(x, y)),
    "numpy": lambda x, y: x.detach().numpy().__setitem__(..., y.numpy()),
    "storage": lambda x, y: x.untyped_storage().copy_(y.clone().untyped_storage()),
    "a view": lambda x, y: x.data.view(-1)[:].copy_(y.reshape(-1)),
}


def _like(x: Tensor, values: Tensor) -> Tensor:
    values = values.clone()
    return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


writes = pytest.mark.parametrize("write", WRITES)
writes_to_shared = pytest.mark.parametrize("write", sorted(WRITES.keys() - {"swap_tensors"}))  # torch refuses to swap


def put(write: str, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        WRITES[write](x, y)
    assert torch.equal(x, y)


# A memory -------------------------------------------------------------------------------------------------------------


def bahdanau(attention: BahdanauAttention, query: Tensor, memory: Memory) -> Tensor:
    query = attention.query_projection(query)
    return additive_attention(query, memory.keys, memory.values, attention.v, backend="reference").context


def luong(attention: LuongAttention, query: Tensor, memory: Memory) -> Tensor:
    return dot_attention(query[:, None], memory.keys, memory.values, backend="reference").context[:, 0]


SIZE = {"few": (3, 5, 8), "deferred": (4, 64, 160)}  # (B, Tk, A = D); the second has gradients that wait for all steps
MECHANISMS = {"bahdanau": (BahdanauAttention, bahdanau), "luong": (LuongAttention, luong)}


def make(mechanism: str, size: str) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Memory, Tensor]:
    batch, steps, units = SIZE[size]
    cls, formula = MECHANISMS[mechanism]
    attention = cls(units, units, units) if cls is BahdanauAttention else cls(units, units, score="general")
    outputs, query = torch.randn(batch, steps, units), torch.randn(batch, units)
    return attention, formula, query, attention.memory(outputs), outputs


@writes
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_steps_follow_writes_to_a_memory(write: str, mechanism: str, what: str) -> None:
    with torch.no_grad():
        attention, formula, query, memory, _ = make(mechanism, "few")
        attention(query, memory)
        put(write, getattr(memory, what), torch.randn_like(memory.keys))
        torch.testing.assert_close(attention(query, memory).context, formula(attention, query, memory))


@writes_to_shared
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_gradients_follow_writes_between_steps(write: str, mechanism: str, what: str) -> None:
    """Each step is as the first one on the memory."""
    attention, formula, query, made, _ = make(mechanism, "deferred")
    query = 0.1 * query
    memory = Memory(made.keys.detach().requires_grad_(), made.values.detach().requires_grad_())
    wanted = (memory.keys, memory.values)
    for values in (torch.randn_like(memory.keys), None):
        got = torch.autograd.grad(attention(query, memory).context.square().sum(), wanted)
        expected = torch.autograd.grad(formula(attention, query, memory).square().sum(), wanted)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        if values is not None:
            put(write, getattr(memory, what), values)


def halve(memory: Memory) -> Memory:
    return tree_map(lambda x: x / 2, memory)


CHANGES: dict[str, Callable[[Memory], Memory]] = {
    "replace": lambda m: dataclasses.replace(m, keys=m.keys + 1),
    "tree_map": halve,
    "tree_map twice": lambda m: halve(halve(m)),
    "tree_map in place": lambda m: tree_map(lambda x: x.mul_(2), m),
    "to": lambda m: m.to(torch.float64).to(torch.float32),
    "select": lambda m: m.select(torch.tensor([1, 0, 1])),
    "replace of selected": lambda m: dataclasses.replace(m.select(torch.tensor([2])), keys=m.keys[:1]),
    "deepcopy": copy.deepcopy,
    "state": lambda m: copy.copy(m),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_memory_made_of_another(change: str) -> None:
    with torch.no_grad():
        attention, formula, query, memory, _ = make("bahdanau", "few")
        attention(query, memory)
        memory = CHANGES[change](memory)
        query = query[: memory.batch_size]
        torch.testing.assert_close(attention(query, memory).context, formula(attention, query, memory))


def test_a_tree_of_something_else() -> None:
    """As ``torch.utils.checkpoint`` makes of its arguments in torch 2.10 and 2.11."""
    memory = BahdanauAttention(4, 4, 4).memory(torch.randn(2, 3, 4), torch.tensor([1, 3]))
    assert tree_map(lambda _: None, memory).keys is None
    assert tree_map(lambda x: x.shape, memory).memory_lengths == (2,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_memory_cast_by_a_wrapper(dtype: torch.dtype) -> None:
    """FSDP's MixedPrecision casts the tensors among a module's inputs."""
    attention, formula, query, memory, _ = make("bahdanau", "few")
    cast = tree_map(lambda x: x.to(dtype), memory)
    attention, query = attention.to(dtype), query.to(dtype)
    context = attention(query, cast).context
    assert context.dtype == dtype
    torch.testing.assert_close(context, formula(attention, query, cast))


@pytest.mark.parametrize("size", SIZE)
def test_a_step_under_autocast_on_a_memory_from_outside(size: str) -> None:
    attention, formula, query, memory, _ = make("bahdanau", size)
    expected = formula(attention, query, memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = attention(query, memory).context
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.float(), expected, atol=0.05, rtol=0.05)


# Layers of adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(6, 4)


def rows_of(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def check(layer: Any, x: Tensor, calls: int) -> None:
    """The keys are right, and took that many calls of the layer."""
    with CountLinear() as count:
        keys = cached_projection(layer, layer, x)
    torch.testing.assert_close(keys, rows_of(layer, x))
    assert count.calls == calls


def test_rows_are_projected_once(layer: nn.Linear) -> None:
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
        check(layer, x, 0)
        check(layer, x.clone(), 0)
        check(layer, x.mT.contiguous().mT, 0)  # equal, in another order in memory
        check(layer, torch.randn(3, 5, 6), 1)
        check(layer, x, 1)  # only the last are kept


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_rows_of_a_beam_are_recognised(layer: nn.Linear, steps: int) -> None:
    x = torch.randn(4, steps, 6).repeat_interleave(3, 0)
    with torch.no_grad():
        check(layer, x, 1)
        for order in ([2, 1, 0, 5, 5, 3, 6, 7, 8, 11, 9, 10], [3, 4, 5, 9, 10, 11], [0, 3], [1], [0, 0, 0]):
            x = x[order]
            check(layer, x, 0)
        other = x.clone()
        other[1, -1, 0] += 1
        check(layer, other, 1)
        check(layer, torch.cat([other, torch.randn(1, steps, 6)]), 1)


def test_rows_in_another_order_are_not_those_rows(layer: nn.Linear) -> None:
    x = torch.eye(6).repeat(2, 1, 1)
    with torch.no_grad():
        check(layer, x, 1)
        check(layer, x.flip(1), 1)
        check(layer, -0.0 * x, 1)


def test_nothing_in_common(layer: nn.Linear) -> None:
    with torch.no_grad():
        check(layer, torch.randn(3, 5, 6), 1)
        for shape in ((3, 4, 6), (0, 4, 6), (2, 4, 6), (2, 0, 6), (1, 0, 6)):
            assert cached_projection(layer, layer, torch.randn(shape)).shape == (*shape[:2], 4)
        x = torch.full((2, 3, 6), torch.nan)
        assert all(
            keys.isnan().all()
            for keys in (cached_projection(layer, layer, x), cached_projection(layer, layer, x.clone()))
        )
        assert cached_projection(layer.double(), layer, torch.randn(2, 3, 6).double()).dtype == torch.float64


@writes
@pytest.mark.parametrize("what", ["rows", "weight", "bias", "keys"])
def test_what_is_written_to_is_projected_again(layer: nn.Linear, write: str, what: str) -> None:
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        keys = cached_projection(layer, layer, x, is_shared=True)
    target = {"rows": x, "keys": keys, "weight": layer.weight, "bias": layer.bias}[what]
    put(write, target, torch.randn(target.shape))
    with torch.no_grad():
        check(layer, x, 1)
        check(layer, x, 0)


def assign(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": torch.randn(4, 6), "bias": torch.randn(4)}, assign=True)


def average(layer: nn.Linear) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(layer, avg_fn=lambda mean, new, n: mean + 1)
    averaged.update_parameters(layer), averaged.update_parameters(layer)
    for mine, other in zip(layer.parameters(), averaged.module.parameters(), strict=True):
        mine.data, other.data = other.data, mine.data


def optimise(layer: nn.Linear) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.grad, layer.bias.grad = torch.ones(4, 6), torch.ones(4)
    optimizer.step()


OTHER_WEIGHTS: dict[str, Callable[[nn.Linear], Any]] = {
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": torch.randn(4, 6), "bias": torch.randn(4)}),
    "load_state_dict(assign=True)": assign,
    "averaged weights swapped in": average,
    "an optimizer": optimise,
    "bias removed": lambda layer: setattr(layer, "bias", None),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
}


@pytest.mark.parametrize("how", OTHER_WEIGHTS)
def test_other_weights(layer: nn.Linear, how: str) -> None:
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
        OTHER_WEIGHTS[how](layer)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(cached_projection(layer, layer, x), expected)


def test_with_gradients_nothing_is_kept(layer: nn.Linear) -> None:
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
    check(layer, x, 1)
    check(layer, x, 1)


def test_vmap(layer: nn.Linear) -> None:
    x = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda rows: cached_projection(layer, layer, rows))(x), rows_of(layer, x))


@pytest.mark.parametrize("how", ["hook", "global hook", "forward"])
def test_layers_that_are_watched_are_called(layer: Any, how: str) -> None:
    x = torch.randn(3, 5, 6)
    remove = None
    if how == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif how == "forward":
        layer.forward = layer.forward
    else:
        remove = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with torch.no_grad():
            check(layer, x, 1)
            check(layer, x, 1)
    finally:
        if remove is not None:
            remove.remove()


def test_autocast_and_inference_mode(layer: nn.Linear) -> None:
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
        with torch.autocast("cpu", torch.bfloat16):
            assert cached_projection(layer, layer, x).dtype == torch.bfloat16
        check(layer, x, 1)
    with torch.inference_mode():
        y = torch.randn(3, 5, 6)
        check(layer, y, 1)
        check(layer, y, 0)
        y += 1
        check(layer, y, 1)
    with torch.no_grad():
        assert not cached_projection(layer, layer, y).is_inference()


# Anything -------------------------------------------------------------------------------------------------------------


def counter() -> tuple[nn.Module, Callable[[], int]]:
    made: list[None] = []

    def make() -> int:
        made.append(None)
        return len(made)

    return nn.Module(), make


def test_once() -> None:
    module, make = counter()
    a, b = torch.randn(2), torch.randn(2)
    assert cached(module, "x", make, read=(a, b)) == 1
    assert cached(module, "x", make, read=(a, b)) == 1
    assert cached(module, "x", make, read=(a.clone(), b)) == 1  # equal
    assert cached(module, "y", make, read=(a, b)) == 2
    assert cached(nn.Module(), "x", make, read=(a, b)) == 3
    assert cached(module, "x", make, read=(a, None)) == 4
    assert cached(module, "x", make, read=(a, b)) == 5
    assert cached(module, "x", make, read=(b, a)) == 6
    assert cached(module, "x", make, read=(b.double(), a)) == 7
    assert cached(module, "x", make, read=(b.double()[None], a)) == 8
    with torch.no_grad():
        assert cached(module, "x", make, read=(a,)) == 9
    assert cached(module, "x", make, read=(a,)) == 10
    with torch.inference_mode():
        assert cached(module, "x", make, read=(a,)) == 11
    with torch.autocast("cpu", torch.bfloat16):
        assert cached(module, "x", make, read=(a,)) == 12


@writes
def test_once_what_was_read(write: str) -> None:
    module, make = counter()
    x = torch.randn(7)
    assert cached(module, "x", make, read=(x,)) == cached(module, "x", make, read=(x,)) == 1
    put(write, x, torch.randn(7))
    assert cached(module, "x", make, read=(x,)) == cached(module, "x", make, read=(x,)) == 2


@writes_to_shared
def test_once_what_is_held(write: str) -> None:
    """The result here is a view, which is to show what the tensor itself shows."""
    module, x = nn.Module(), torch.randn(3, 4)

    def view() -> Tensor:
        return cached(module, "x", lambda: x.t(), held=(x,))

    assert view() is view() and torch.equal(view(), x.t())
    put(write, x, torch.randn(3, 4))
    assert torch.equal(view(), x.t())


def test_once_another_object_is_held() -> None:
    module, make = counter()
    x = torch.randn(3)
    assert cached(module, "x", make, held=(x,)) == cached(module, "x", make, held=(x,)) == 1
    assert cached(module, "x", make, held=(x.clone(),)) == 2
    assert cached(module, "x", make, held=(x,)) == 3
    x.requires_grad_()
    assert cached(module, "x", make, held=(x,)) == 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 200])
def test_every_element_counts(dtype: torch.dtype, size: int) -> None:
    module, make = counter()
    x = torch.zeros(size, dtype=dtype)
    cached(module, "x", make, read=(x,))
    for i in range(size):
        x.data[i] = 1
        assert cached(module, "x", make, read=(x,)) == 2 * i + 2
        x.data[i], x.data[i - 1] = 0, 1  # the same elements elsewhere
        assert cached(module, "x", make, read=(x,)) == 2 * i + 3 or size == 1
        x.data[i - 1] = 0
        cached(module, "y", make)
        make.__closure__[0].cell_contents.pop()  # type: ignore[union-attr]
        clear(module)


@pytest.mark.parametrize("size", [0, 1, 8, 255, 256, 257, 3 * 256 + 13, 2 * 2**18, 2 * 2**18 + 5])
def test_checksums_are_the_same_on_every_level(size: int) -> None:
    """Bytes of a block and beyond it; tensors that are divided among threads."""
    if compiled_module is None:
        pytest.skip("the package was built without the C++ kernels")
    x = torch.randint(256, (size,), dtype=torch.uint8)
    changed = [x]
    for i in {0, size // 2, size - 1} if size else ():
        changed.append(x.clone())
        changed[-1][i] += 1
    sums = set()
    for level in SIMD_LEVELS:
        with simd(level):
            sums.add(tuple(checksums(y, 1)[0] for y in changed))
    assert len(sums) == 1, sums
    assert len(set(*sums)) == len(changed)


@writes
@pytest.mark.parametrize("keep", [True, False])
def test_masks(write: str, keep: bool) -> None:
    module, mask = nn.Module(), torch.rand(3, 5) < 0.5
    mask[:, 0], mask[:, 1] = True, False
    make: Callable[[Tensor], Tensor] = (lambda x: x) if keep else torch.logical_not
    for other in (mask.flip(1), torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)):
        mask_without_empty_rows(module, mask, make)
        put(write, mask, other.clone())
        allowed = make(mask)
        got = mask_without_empty_rows(module, mask, make)
        if allowed.all():
            assert got is None
        elif allowed.any(1).all():
            assert torch.equal(got, allowed)
        else:
            assert got == NotSupported("a row with nothing to attend")


def test_a_mask_that_is_kept_does_not_change_with_the_callers() -> None:
    module, mask = nn.Module(), torch.tensor([[True, False], [True, True]])
    kept = mask_without_empty_rows(module, mask, lambda x: x)
    before = kept.clone()
    mask[0, 1] = True
    assert torch.equal(kept, before)
    assert mask_without_empty_rows(module, mask, lambda x: x) is None


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_a_mask_that_cannot_be_read(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: NaN in the rows that may attend nothing, in all others nothing is changed."""
    for module in (checking, masks):
        monkeypatch.setattr(module, "is_cacheable", lambda tensor: False)
    mask = torch.rand(*shape, 4) < 0.5
    mask[..., 0], mask[0] = True, False
    allowed = mask_without_empty_rows(nn.Module(), mask, lambda x: x)
    assert allowed is mask
    result = Attention(torch.randn(*shape, 5), torch.rand(*shape, 4))
    for got, given in zip(as_original(result, allowed), result, strict=True):
        assert got[0].isnan().all() and torch.equal(got[1:], given[1:])
    assert as_original(Attention(None, result.alignments), allowed).context is None
    assert mask_without_empty_rows(nn.Module(), mask, lambda x: x, wait=True) == NotSupported(
        "a row with nothing to attend"
    )
    lengths = torch.tensor([0, 3])
    assert lengths_without_empty_rows(nn.Module(), lengths) is lengths
    for got, given in zip(as_original(result, lengths), result, strict=True):
        assert got[0].isnan().all() and torch.equal(got[1:], given[1:])


def test_only_on_the_cpu() -> None:
    module, make = counter()
    x = torch.empty(2, 3, 6, device="meta")
    assert [cached(module, "x", make, read=(x,)) for _ in range(2)] == [1, 2]
    layer = nn.Linear(6, 4, device="meta")
    with torch.no_grad():
        assert cached_projection(module, layer, x) is not cached_projection(module, layer, x)


@pytest.mark.parametrize("how", ["deleted", "forgotten"])
def test_what_is_kept_goes_with_the_module(layer: Any, how: str) -> None:
    module = nn.Module()
    x: Any = torch.randn(2, 3, 6)
    with torch.no_grad():
        keys = weakref.ref(cached_projection(module, layer, x))
        cached(module, "x", lambda: x, held=(x,))
    assert keys() is not None
    x = weakref.ref(x)
    if how == "forgotten":
        clear(module)
    else:
        del module
        gc.collect()
    assert keys() is None and x() is None
