"""patch(model) on test classes: what changes, what stays, which calls run the original, and unpatch."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import json
import pickle
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from attn_kernels import Memory, additive_attention, patch, patched, patching, unpatch
from attn_kernels.patching import Fused, NotSupported, Report, adapter, adapts, digest, registry
from attn_kernels.patching.cache import cached_projection

B, T, SIZE = 3, 5, 8


class Additive(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.W, self.U, self.v = (nn.Linear(SIZE, n, bias=False) for n in (SIZE, SIZE, 1))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(()))
        self.dropped_by_design = False

    def forward(self, state: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory)))[..., 0]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        alignments = self.dropout(scores.softmax(1))
        return (alignments[:, None] @ memory)[:, 0], alignments


CALLS: list[None] = []  # a global, since Dynamo of torch 2.10 and 2.11 traces no assignment to a class


class FusedAdditive(Fused):
    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return "left alone by design" if module.dropped_by_design else None

    def attend(self, state: Tensor, memory: Tensor, mask: Tensor | None = None) -> Any:
        CALLS.append(None)
        if self.training and self.dropout.p > 0:
            return NotSupported("dropout of the alignments")
        v = self.v.weight[0]
        return tuple(additive_attention(self.W(state), self.U(memory), memory, v, mask=mask))


class Derived(Additive):
    pass


class SelfAttention(nn.Module):
    """Nothing knows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(SIZE, SIZE)
        self.attention = Additive(**options)

    def forward(self, state: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        context, alignments = self.attention(self.project(state), memory, mask)
        return context + alignments.sum(1, keepdim=True)


@pytest.fixture(autouse=True)
def _adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    patching.adapters()  # files of libraries register once, when imported: not in the copy, which is lost
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    adapts(Additive)(FusedAdditive)
    CALLS.clear()
    torch.manual_seed(0)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, SIZE), torch.randn(B, T, SIZE), torch.arange(T) < torch.tensor([5, 3, 1])[:, None]


def assert_fused(module: nn.Module, expected: Tensor, given: tuple[Any, ...]) -> None:
    before = len(CALLS)
    torch.testing.assert_close(module(*given), expected)
    assert len(CALLS) > before


# What it does ---------------------------------------------------------------------------------------------------------


def test_same_results_and_gradients() -> None:
    model, given = Model(), inputs()
    leaves = list(model.parameters())
    expected = model(*given)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    assert patch(model).replaced == [("attention", Additive)]
    assert_fused(model, expected, given)
    for got, right in zip(torch.autograd.grad(model(*given).square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(got, right)


def test_report() -> None:
    model = nn.ModuleDict({"a": Model(), "b": Derived(), "c": SelfAttention(), "d": nn.MultiheadAttention(4, 2)})
    model["e"] = nn.ModuleList([Additive(), Additive()])
    model["e"][1].dropped_by_design = True
    model["f"] = nn.Linear(2, 2)
    report = patch(model)
    assert report.replaced == [("a.attention", Additive), ("e.0", Additive)]
    assert [(name, cls) for name, cls, _ in report.skipped] == [
        ("b", Derived),
        ("c", SelfAttention),
        ("d", nn.MultiheadAttention),
        ("e.1", Additive),
    ]
    reasons = [reason for _, _, reason in report.skipped]
    assert reasons[0].startswith("a subclass of ") and reasons[1:] == [
        "no adapter for its class",
        "PyTorch fuses it",
        "left alone by design",
    ]
    shown = str(report)
    for text in ("module", "a.attention", "replaced", "skipped: PyTorch fuses it", "SelfAttention"):
        assert text in shown


def test_nothing_to_report() -> None:
    assert str(patch(nn.Linear(2, 2))) == "attn_kernels.patch: nothing in this model looks like attention"
    assert patch(Additive()).replaced == [("", Additive)] and "(model)" in str(patch(Additive()))


def test_what_falls_through_is_counted() -> None:
    model, given = Model(dropout=0.5), inputs()
    report = patch(model)
    torch.manual_seed(1)
    got = model(*given)
    unpatch(model)
    torch.manual_seed(1)
    assert torch.equal(got, model(*given))
    assert report.fallbacks == []  # forgotten with the patch
    report = patch(model)
    model(*given), model(*given)
    assert [tuple(row) for row in report.fallbacks] == [("attention", Additive, "dropout of the alignments", 2)]
    assert "own forward, 2 calls: dropout of the alignments" in str(report)
    expected = model.eval()(*given)
    assert_fused(model, expected, given)
    assert report.fallbacks[0].calls == 2


def test_what_the_ops_refuse_is_for_the_original() -> None:
    model, (state, memory, mask) = Model(), inputs()
    report = patch(model)
    expected = unpatched(model)(state, memory, mask[:1])  # a mask for all rows: the ops take none of that shape
    torch.testing.assert_close(model(state, memory, mask[:1]), expected)
    assert "mask must have shape" in report.fallbacks[0].reason
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # the original's own words
        model.attention(torch.randn(B, 3), memory)


def test_small_calls_are_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are not counted: nothing is missing in them."""
    monkeypatch.setattr(FusedAdditive, "min_products", B * T * SIZE)
    model, (state, memory, mask) = Model(), inputs()
    expected = model(state, memory[:, :-1], mask[:, :-1])
    report = patch(model)
    assert torch.equal(model(state, memory[:, :-1], mask[:, :-1]), expected)
    assert len(CALLS) == 0 and report.fallbacks == []
    model(state, memory, mask)
    assert len(CALLS) == 1


def test_patching_twice_changes_nothing() -> None:
    model = Model()
    first = patch(model)
    cls = type(model.attention)
    assert patch(model).replaced == first.replaced and type(model.attention) is cls


def test_other_instances_are_not_touched() -> None:
    one, other = Model(), Model()
    patch(one)
    assert type(other.attention) is Additive and type(one.attention) is not Additive
    assert isinstance(one.attention, Additive) and repr(one) == repr(other)


def test_shared_modules() -> None:
    model = nn.ModuleDict({"a": Additive()})
    model["b"] = model["a"]
    assert patch(model).replaced == [("a", Additive)] and unpatch(model) == [("a", Additive)]


def test_a_forward_that_was_replaced_is_left_alone() -> None:
    model = Model()
    model.attention.forward = lambda *_: (torch.ones(1), torch.ones(1, 1))
    ((_, _, reason),) = patch(model).skipped
    assert reason == "its forward was replaced"


def test_an_attribute_that_an_adapter_would_hide() -> None:
    """The original's forward, which serves what the adapter does not, would find the adapter's."""
    module = Additive()
    module.attend = nn.Linear(SIZE, SIZE)
    ((_, _, reason),) = patch(module).skipped
    assert reason == "its attribute 'attend' has the name of one of the adapter's" and type(module) is Additive


def test_another_source_is_left_alone() -> None:
    adapts(Additive, library="mine", versions="1.0", sources=("000000000000",))(FusedAdditive)
    ((_, _, reason),) = patch(Model()).skipped
    assert reason == "its source is not that of mine 1.0, which the adapter was written for"
    adapts(Additive, library="mine", versions="1.1", sources=("000000000000", digest(Additive)))(FusedAdditive)
    assert len(patch(Model()).replaced) == 1


def test_a_class_without_source_has_no_digest() -> None:
    assert digest(type("Made", (nn.Module,), {})) is None and len(digest(Additive)) == 12


# What stays -----------------------------------------------------------------------------------------------------------


def unpatched(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    unpatch(other)
    return other


def test_state_dict_both_ways() -> None:
    model, other = Model(), Model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    patch(model)
    assert list(model.state_dict()) == list(before)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    model.load_state_dict(Model().state_dict())
    unpatch(model)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_are_patched(way: str, tmp_path: Path) -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    if way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    elif way == "copy":
        other = Model()
        other.project, other.attention = model.project, copy.copy(model.attention)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(other.attention) is type(model.attention) and other.attention is not model.attention
    assert_fused(other, expected, given)
    unpatch(other)
    assert isinstance(model.attention, Fused) and type(other.attention) is Additive


def test_a_pickle_whose_adapter_is_gone() -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    data = pickle.dumps(model)
    registry.notes_of(Additive).adapter = None
    other = pickle.loads(data)
    assert type(other.attention) is Additive
    torch.testing.assert_close(other(*given), expected)


def test_a_pickle_read_with_another_version_of_its_library() -> None:
    model = Model()
    patch(model)
    data = pickle.dumps(model)
    adapts(Additive, library="mine", versions="1.0", sources=("000000000000",))(FusedAdditive)
    assert type(pickle.loads(data).attention) is Additive


class Reduced(Additive):
    def __reduce__(self) -> Any:
        return Reduced, ()


def test_a_class_with_a_reduce_of_its_own() -> None:
    adapts(Reduced)(FusedAdditive)
    module = Reduced()
    patch(module)
    for make in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="Reduced: its class has a __reduce__ of its own; unpatch it to pickle it"):
            make(module)
    unpatch(module)
    assert type(pickle.loads(pickle.dumps(module))) is Reduced


def test_dtype_and_mode() -> None:
    model, given = Model(dropout=0.3), inputs()
    patch(model)
    assert model.double().eval().attention.W.weight.dtype == torch.float64 and not model.attention.training
    given = tuple(x.double() if x.is_floating_point() else x for x in given)
    assert_fused(model, unpatched(model)(*given), given)
    assert model.train().attention.training


def test_autocast() -> None:
    model, given = Model(), inputs()
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = unpatched(model)(*given)
        got = model(*given)
    assert len(CALLS) == 1
    torch.testing.assert_close(got.float(), expected.float(), atol=0.05, rtol=0.05)


def test_hooks_fire_once() -> None:
    model, given = Model(), inputs()
    seen: list[str] = []
    model.attention.register_forward_pre_hook(lambda *_: seen.append("before"))
    patch(model)
    model.attention.register_forward_hook(lambda *_: seen.append("after"))
    model.attention.register_full_backward_hook(lambda *_: seen.append("back"))
    model(*given).sum().backward()
    assert seen == ["before", "after", "back"]
    unpatch(model)
    model(*given)
    assert seen[3:] == ["before", "after"]


def test_a_hook_may_change_the_result() -> None:
    model, given = Model(), inputs()
    patch(model)
    model.attention.register_forward_hook(lambda module, _, result: (result[0] * 0, result[1]))
    torch.testing.assert_close(model(*given), torch.ones(B, SIZE))


@pytest.mark.parametrize("when", ["before", "after"])
def test_compile(when: str) -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    if when == "before":
        patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if when == "after":
        torch.testing.assert_close(compiled(*given), expected)
        assert patch(compiled).replaced == [("_orig_mod.attention", Additive)]
    assert_fused(compiled, expected, given)
    unpatch(compiled)
    CALLS.clear()
    torch.testing.assert_close(compiled(*given), expected)
    assert not CALLS


def test_compile_what_falls_through() -> None:
    model, given = Model(dropout=0.5), inputs()
    report = patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    got = compiled(*given)
    torch.manual_seed(1)
    torch.testing.assert_close(got, unpatched(model)(*given))
    assert len(CALLS) > 0 and report.fallbacks == []  # a graph counts nothing


@pytest.mark.filterwarnings("ignore:While compiling")  # the count of calls is a side effect
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    exported = torch.export.export(model, given, strict=strict)
    assert any("attn_kernels" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*given), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripts_are_the_original() -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(*given), expected)
    assert len(CALLS) == 0
    assert patch(model).replaced == [("attention", Additive)]  # PyTorch has put the original into the model
    assert_fused(model, expected, given)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_traces_are_of_the_original(tmp_path: Path) -> None:
    """They can be saved, and run where this package is not."""
    model, given = Model(), inputs()
    report = patch(model)
    traced = torch.jit.trace(model, given)  # its check also calls the model as it is
    assert {fallback.reason for fallback in report.fallbacks} == {"torch.jit.trace"}
    assert "attn_kernels" not in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    other = torch.randn(2, SIZE), torch.randn(2, T + 2, SIZE), torch.ones(2, T + 2, dtype=torch.bool)
    for script in (traced, torch.jit.load(tmp_path / "traced.pt")):
        assert_fused(model, script(*other), other)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_a_script_already() -> None:
    ((_, _, reason),) = patch(torch.jit.script(nn.Sequential(SelfAttention()))).skipped
    assert reason == "it is a script: patch the model before torch.jit.script is called"


def test_checkpointing() -> None:
    model, given = Model(), inputs()
    patch(model)
    expected = torch.autograd.grad(model(*given).square().sum(), model.attention.W.weight)
    saved = checkpoint(model, *given, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(saved.square().sum(), model.attention.W.weight), expected)


def test_functional_call_and_vmap() -> None:
    model, (state, memory, _) = Model(), inputs()
    patch(model)
    weights = {name: 2 * x.detach() for name, x in model.named_parameters()}
    changed = unpatched(model)
    changed.load_state_dict({**weights, "attention.seen": torch.zeros(())})
    got = torch.func.functional_call(model, weights, (state, memory))
    torch.testing.assert_close(got, changed(state, memory))
    report = patch(model)
    many = torch.func.vmap(lambda s: model(s, memory))(torch.stack([state, state + 1]))
    torch.testing.assert_close(many[1], model(state + 1, memory))
    assert [fallback.reason for fallback in report.fallbacks] == ["transforms of torch.func"]


@pytest.fixture
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_distributed_data_parallel() -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    parallel = nn.parallel.DistributedDataParallel(model)
    assert patch(parallel).replaced == [("module.attention", Additive)]
    assert_fused(parallel, expected, given)
    parallel(*given).square().sum().backward()
    for parameter, right in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, right)


def test_parametrized_parts() -> None:
    model, given = Model(), inputs()
    parametrizations.weight_norm(model.attention.W)
    expected = model(*given)
    patch(model)
    assert_fused(model, expected, given)


# The way back ---------------------------------------------------------------------------------------------------------


def test_unpatch() -> None:
    model = Model()
    patch(model)
    assert unpatch(model) == [("attention", Additive)]
    assert type(model.attention) is Additive and unpatch(model) == []
    assert model.attention not in adapter.fallbacks


def test_unpatch_after_another_hand() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = Model()
    model.attention.own = nn.Parameter(torch.ones(1))
    patch(model)
    parametrize.register_parametrization(model.attention, "own", Halved())
    with pytest.raises(ValueError, match="unpatch: attention was patched and then made a Parametrized"):
        unpatch(model)
    parametrize.remove_parametrizations(model.attention, "own")
    assert unpatch(model) == [("attention", Additive)]


def test_with_patched_and_another_hand() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    module = Additive()
    module.own = nn.Parameter(torch.ones(1))
    words = "patched: model was patched and then made a ParametrizedAdditive: undo that first"
    with pytest.raises(ValueError, match=words), patched(module):
        parametrize.register_parametrization(module, "own", Halved())
    assert module.own == 0.5  # not lost with the class that reads it
    parametrize.remove_parametrizations(module, "own")
    unpatch(module)
    parametrize.register_parametrization(module, "own", Halved())
    assert "a subclass of" in patch(module).skipped[0].reason


def _fail_if(right: bool) -> None:
    assert right
    raise ZeroDivisionError


def test_with_patched() -> None:
    model = nn.ModuleDict({"a": Additive(), "b": Additive()})
    patch(model["b"])
    with pytest.raises(ZeroDivisionError), patched(model) as report:
        _fail_if(report.replaced == [("a", Additive), ("b", Additive)] and isinstance(model["a"], Fused))
    assert type(model["a"]) is Additive and isinstance(model["b"], Fused)


# Which class an adapter is for ----------------------------------------------------------------------------------------


def make_class(factor: float) -> type[nn.Module]:
    """Two calls give two classes of one name, with one source."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.ones(SIZE))

        def forward(self, state: Tensor, memory: Tensor) -> Tensor:
            scores = factor * (torch.tanh(state[:, None] + memory) @ self.v)
            return (scores.softmax(1)[:, None] @ memory)[:, 0]

    return Attention


class FusedPlain(Fused):
    def attend(self, state: Tensor, memory: Tensor) -> Any:
        return additive_attention(state, memory, memory, self.v).context


ANOTHER = "an adapter was given for another class of this name, defined at another time or place"


def test_two_classes_of_one_name() -> None:
    plain, sharp = make_class(1.0), make_class(3.0)
    adapts(plain)(FusedPlain)
    model = nn.ModuleDict({"plain": plain(), "sharp": sharp()})
    expected = {name: module(*inputs()[:2]) for name, module in model.items()}
    torch.manual_seed(0)
    state, memory, _ = inputs()
    expected = {name: module(state, memory) for name, module in model.items()}
    report = patch(model)
    assert report.replaced == [("plain", plain)] and report.skipped == [("sharp", sharp, ANOTHER)]
    for name, module in model.items():
        torch.testing.assert_close(module(state, memory), expected[name])
    other = type("Fused3", (FusedPlain,), {"attend": lambda self, *a: additive_attention(*a, a[1], 3 * self.v).context})
    adapts(sharp)(other)  # each has its own
    assert patch(model).skipped == [] and len(unpatch(model)) == 2
    patch(model)
    for name, module in model.items():
        torch.testing.assert_close(module(state, memory), expected[name], atol=1e-4, rtol=1e-4)
        assert type(copy.deepcopy(module)) is type(module)


def test_a_class_that_is_defined_anew() -> None:
    """As in a notebook: the first definition has an adapter, the second is another class, with other source or not."""
    first = make_class(1.0)
    adapts(first)(FusedPlain)
    second = make_class(1.0)
    second.__module__, second.__qualname__ = first.__module__, first.__qualname__
    model = nn.ModuleList([first(), second()])
    report = patch(model)
    assert report.replaced == [("0", first)] and report.skipped == [("1", second, ANOTHER)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a class ``Attention`` that has an adapter by name, and its source."""
    module: Any = types.ModuleType("library_of_tests")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Attention = make_class(1.0)
    module.Attention.__module__, module.Attention.__qualname__ = module.__name__, "Attention"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__file__ = __file__
    adapts("library_of_tests:Attention")(FusedPlain)
    return module


def test_an_adapter_by_name_is_for_the_class_that_is_there(library: Any) -> None:
    first = library.Attention
    assert patch(first()).replaced == [("", first)]
    library.Attention = make_class(3.0)  # as importlib.reload does
    library.Attention.__module__, library.Attention.__qualname__ = first.__module__, "Attention"
    ((_, _, reason),) = patch(first()).skipped
    assert reason == "it is not the class that library_of_tests.Attention is now, but another of this name"
    del library.Attention
    assert patch(first()).replaced == [("", first)]  # as of a file that was executed without an import


def test_an_adapter_by_name_of_classes_that_a_function_makes() -> None:
    cls = make_class(1.0)
    adapts(f"{cls.__module__}:{cls.__qualname__}")(FusedPlain)
    ((_, _, reason),) = patch(make_class(3.0)()).skipped
    assert reason == "its class was made by a function, which may make others of this name"


def test_subclasses_of_a_class_with_an_adapter_by_name(library: Any) -> None:
    derived = type("Derived", (library.Attention,), {})
    ((_, _, reason),) = patch(derived()).skipped
    assert reason == "a subclass of library_of_tests.Attention may compute something else"


def test_a_later_adapter_replaces_an_earlier_one(library: Any) -> None:
    class Second(FusedPlain):
        pass

    class Third(FusedPlain):
        pass

    for original, fused in ((library.Attention, Second), ("library_of_tests:Attention", Third)):
        adapts(original)(fused)
        module = library.Attention()
        patch(module)
        assert isinstance(module, fused)


def twice(forward: Any) -> Any:
    return functools.wraps(forward)(lambda self, *given: 2 * forward(self, *given))


def test_a_forward_of_the_class_that_is_replaced_before_patch() -> None:
    cls = make_class(1.0)
    adapts(cls)(FusedPlain)
    cls.forward = twice(cls.forward)
    ((_, _, reason),) = patch(cls()).skipped
    assert reason == "the forward of its class was replaced after its adapter was given"
    adapts(cls)(FusedPlain)  # for what it is now
    assert len(patch(cls()).replaced) == 1


def test_a_forward_of_the_class_that_is_replaced_after_patch() -> None:
    cls, (state, memory, _) = make_class(1.0), inputs()
    adapts(cls)(FusedPlain)
    module = cls()
    report = patch(module)
    expected = module(state, memory)
    cls.forward = twice(cls.forward)
    torch.testing.assert_close(module(state, memory), 2 * expected)
    assert report.fallbacks[0].reason == "the forward of its class was replaced"


class Sourced(Additive):
    """Its methods are looked for in its source."""

    def forward(self, state: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.helper(state, memory, mask)

    @torch.no_grad()
    def decorated(self) -> None:
        pass

    def helper(self, *given: Any) -> Any:
        return super().forward(*given)


@pytest.mark.parametrize("name", ["forward", "helper", "decorated", "added"])
def test_methods_of_a_class_that_were_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.notes_of(Sourced), "adapter", None)
    adapts(Sourced, sources=(digest(Sourced),))(FusedAdditive)
    assert len(patch(Sourced()).replaced) == 1
    monkeypatch.setattr(Sourced, name, lambda *_: None, raising=False)
    adapts(Sourced, sources=(digest(Sourced),))(FusedAdditive)
    ((_, _, reason),) = patch(Sourced()).skipped
    assert reason == f"the method {name!r} of its class was replaced"


@pytest.mark.parametrize("when", ["before", "after"])
def test_methods_of_a_module_that_were_replaced(when: str) -> None:
    adapts(Sourced)(FusedAdditive)
    module, given = Sourced(), inputs()
    report = patch(module) if when == "after" else None
    module.helper = lambda *_: "mine"
    report = report or patch(module)
    assert module(*given) == "mine"
    what = report.fallbacks if when == "after" else report.skipped
    assert what[0].reason == "its method 'helper' was replaced"


@pytest.mark.parametrize(("owner", "name"), [(torch, "tanh"), (torch, "softmax"), (nn.functional, "linear")])
def test_functions_of_pytorch_that_were_replaced(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, given = Additive(), inputs()
    module = copy.deepcopy(original)
    report = patch(module)
    with monkeypatch.context() as context:
        function = getattr(owner, name)
        context.setattr(owner, name, lambda *args, **kwargs: function(*args, **kwargs) / 2)
        assert torch.equal(module(*given)[0], original(*given)[0])
    assert report.fallbacks[0].reason == "a function of PyTorch was replaced"
    assert_fused(module, original(*given), given)


def test_methods_that_a_library_wraps_in_its_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Keras does: they are the class's own, unlike a wrapper of anyone else."""
    package = tmp_path / "wrapping_library"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(WRAPPING_LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    layers = importlib.import_module("wrapping_library.layers")
    adapts(layers.Attention, sources=(digest(layers.Attention),))(FusedPlain)
    module = layers.Attention()
    assert patch(module).replaced == [("", layers.Attention)]
    state, memory, _ = inputs()
    report = patch(other := layers.Attention())
    torch.testing.assert_close(module(state, memory), layers.Attention()(state, memory))
    assert other(state, memory) is not None and report.fallbacks == []
    other.build = functools.wraps(other.build)(lambda: None)
    torch.testing.assert_close(other(state, memory), module(state, memory))
    assert report.fallbacks[0].reason == "its method 'build' was replaced"
    for name in [name for name in sys.modules if name.startswith("wrapping_library")]:
        del sys.modules[name]


WRAPPING_LIBRARY = """
import functools, torch

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.v = torch.nn.Parameter(torch.ones(8))
        build = self.build
        self.build = functools.wraps(build)(lambda: build())

    def build(self):
        pass

    def forward(self, state, memory):
        scores = torch.tanh(state[:, None] + memory) @ self.v
        return (scores.softmax(1)[:, None] @ memory)[:, 0]
"""


def test_classes_and_modules_are_not_kept_alive() -> None:
    cls = make_class(1.0)
    adapts(cls)(FusedPlain)
    module = cls()
    patch(module)
    module(*inputs()[:2])
    fused = type(module)
    unpatch(module)
    patch(module)
    assert type(module) is fused  # not made anew: torch.compile would compile for it
    references = [weakref.ref(x) for x in (cls, module, fused)]
    del cls, module, fused
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


# Errors within a call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, KeyError, patching.ArgumentError])
@pytest.mark.parametrize("where", ["pre-hook", "hook", "submodule", "its own pre-hook", "its own hook"])
def test_what_fails_in_a_module_fails_once(where: str, error: type[Exception]) -> None:
    model, calls = Model(), []

    def fail(*_: Any) -> None:
        calls.append(None)
        raise error("mine")

    layer = model.attention if where.startswith("its own") else model.attention.U
    if where.endswith("pre-hook"):
        layer.register_forward_pre_hook(fail)
    elif where.endswith("hook"):
        layer.register_forward_hook(fail)
    else:
        layer.forward = fail
    report = patch(model)
    with pytest.raises(error, match="mine"):
        model(*inputs())
    assert len(calls) == 1 and report.fallbacks == []


def test_a_refusal_within_a_submodule_is_no_refusal_of_the_call() -> None:
    """A hook that uses this package, too."""
    model, calls = Model(), []

    def fail(*_: Any) -> None:
        calls.append(None)
        additive_attention(*[torch.zeros(1)] * 4)

    model.attention.U.register_forward_hook(fail)
    patch(model)
    with pytest.raises(ValueError, match="query must have shape"):
        model(*inputs())
    assert len(calls) == 1


class MistakenAdapter(Fused):
    mistake = ""

    def attend(self, state: Tensor, memory: Tensor, mask: Tensor | None = None) -> Any:
        if self.mistake == "value":
            return int("no number")
        if self.mistake == "type":
            return additive_attention(state)
        if self.mistake == "torch":
            return torch.cat(3)
        return self.W[0]


@pytest.mark.parametrize(("mistake", "error"), [("value", ValueError), ("type", TypeError), ("torch", TypeError)])
def test_mistakes_of_an_adapter_are_raised(mistake: str, error: type[Exception], monkeypatch: Any) -> None:
    monkeypatch.setattr(MistakenAdapter, "mistake", mistake)
    adapts(Additive)(MistakenAdapter)
    model = Model()
    report = patch(model)
    with pytest.raises(error):
        model(*inputs())
    assert report.fallbacks == []


def test_arguments_that_only_the_original_takes() -> None:
    class Narrow(FusedAdditive):
        def attend(self, state: Tensor, memory: Tensor) -> Any:
            return super().attend(state, memory)

    adapts(Additive)(Narrow)
    model, (state, memory, mask) = Model(), inputs()
    patch(model)
    with pytest.raises(TypeError, match="attend"):  # a mistake of the adapter
        model.attention(state, memory, mask)
    with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional argument: 'memory'"):
        model.attention(state)


def test_compile_what_the_ops_refuse() -> None:
    model, (state, memory, mask) = Model(), inputs()
    expected = model(state, memory, mask[:1])
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(state, memory, mask[:1]), expected)


# What others put around a forward -------------------------------------------------------------------------------------


def by_wraps(module: Any) -> None:
    forward = module.forward
    module.forward = functools.wraps(forward)(lambda *given: forward(*given))


def by_accelerate(module: Any) -> None:
    """As its hooks: the old forward is another attribute, and goes back where it was not when they are removed."""

    def new_forward(module: Any, *given: Any) -> Any:
        return module._old_forward(*given)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


def by_accelerate_and_removed(module: Any) -> None:
    by_accelerate(module)
    module.forward = module._old_forward
    del module._old_forward


def by_a_profiler(module: Any) -> None:
    """As a context manager around the call."""
    forward = module.forward

    def profiled(*given: Any, **named: Any) -> Any:
        with torch.profiler.record_function("forward"):
            return forward(*given, **named)

    module.forward = profiled


def by_method_type(module: Any) -> None:
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, *given: forward(self, *given), module)


def by_compile(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def by_compile_of_the_module(module: Any) -> None:
    module.compile(backend="eager")


def twice_wrapped(module: Any) -> None:
    by_wraps(module)
    by_accelerate(module)


WRAPPERS = [
    by_wraps,
    by_accelerate,
    by_accelerate_and_removed,
    by_a_profiler,
    by_method_type,
    by_compile,
    by_compile_of_the_module,
    twice_wrapped,
]


def additive_call() -> tuple[Additive, tuple[Tensor, ...], Tensor]:
    """A module, its arguments, and the context of the original."""
    module, given = Additive(), inputs()
    return module, given, module(*given)[0]


def check_call(module: nn.Module, given: tuple[Tensor, ...], expected: Tensor, fused: bool) -> None:
    CALLS.clear()
    torch.testing.assert_close(module(*given)[0], expected)
    assert bool(CALLS) == fused


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_while_patched(wrap: Any) -> None:
    module, given, expected = additive_call()
    patch(module)
    wrap(module)
    check_call(module, given, expected, fused=True)
    assert patch(module).replaced == [("", Additive)]
    for _ in range(2):
        assert unpatch(module) == [("", Additive)] and type(module) is Additive
        check_call(module, given, expected, fused=False)
        report = patch(module)
        check_call(module, given, expected, fused=not report.skipped)
        if report.skipped:
            assert report.skipped == [("", Additive, "its forward was replaced")] and type(module) is Additive
            return


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_before_patch_and_unwrapped(wrap: Any) -> None:
    module, given, expected = additive_call()
    wrap(module)
    patch(module)
    torch.testing.assert_close(module(*given)[0], expected)
    vars(module).pop("forward", None)
    torch.testing.assert_close(module(*given)[0], expected)
    patch(module)
    check_call(module, given, expected, fused=True)
    unpatch(module)
    torch.testing.assert_close(module(*given)[0], expected)
    assert type(module) is Additive


def test_methods_that_were_stored_elsewhere() -> None:
    class Stateful(Additive):
        def start(self) -> str:
            return "original"

    class FusedStateful(FusedAdditive):
        def start(self) -> str:
            return "fused, " + super().start()

    adapts(Stateful)(FusedStateful)
    module, given = Stateful(), inputs()
    expected = module(*given)
    before = module.forward, module.start
    patch(module)
    patched_ones = module.forward, module.start, functools.partial(module.start)
    assert [f() for f in (before[1], *patched_ones[1:])] == ["original", "fused, original", "fused, original"]
    unpatch(module)
    assert [f() for f in (before[1], *patched_ones[1:])] == ["original", "original", "original"]
    for forward in (before[0], patched_ones[0]):
        torch.testing.assert_close(forward(*given), expected)
    assert copy.deepcopy(module).start() == pickle_free(module).start() == "original"
    patch(module)
    assert patched_ones[1]() == "fused, original"


def pickle_free(module: nn.Module) -> nn.Module:
    return copy.copy(module)


class Unpatches:
    """Where a copy of a module has got to this attribute, the module is unpatched."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: Any) -> None:
        unpatch(self.module)


@pytest.mark.parametrize("counted", [False, True])
def test_unpatch_in_the_middle_of_a_copy(counted: bool) -> None:
    model, (state, memory, mask) = Model(), inputs()
    expected = model(state, memory, mask)
    model.attention.extra = Unpatches(model)
    patch(model)
    if counted:
        model(state, memory, mask[:1])  # a fallback
    other = copy.deepcopy(model)
    assert type(model.attention) is Additive and isinstance(other.attention, Fused)
    for one in (model, other):
        torch.testing.assert_close(one(state, memory, mask), expected)


def test_a_copy_that_was_begun_before_unpatch() -> None:
    module = Additive()
    patch(module)
    reduce = module.__reduce_ex__
    unpatch(module)
    assert reduce(4)[1][0] is Additive


@pytest.mark.parametrize("wrap", [by_accelerate, by_accelerate_and_removed])
def test_copies_of_wrapped_modules(wrap: Any) -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    wrap(model.attention)
    other = copy.deepcopy(model)
    assert other.attention.forward.__self__ is other.attention if wrap is by_accelerate_and_removed else True
    for unpatched_one in (model, other):
        unpatch(unpatched_one)
        torch.testing.assert_close(model(*given), expected)
        torch.testing.assert_close(other(*given), expected)


def test_a_pickle_of_a_module_whose_wrapper_was_removed() -> None:
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    by_accelerate_and_removed(model.attention)
    other = pickle.loads(pickle.dumps(model))
    assert_fused(other, expected, given)
    unpatch(other)
    torch.testing.assert_close(other(*given), expected)


# Errors and the list --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [patch, unpatch])
def test_no_model(function: Any) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got dict"):
        function({})
    with pytest.raises(TypeError, match="patched: model must be"), patched(3):
        pass


def test_adapts_refuses() -> None:
    with pytest.raises(TypeError, match="original must be a class of modules"):
        adapts(int)
    with pytest.raises(TypeError, match="must be a subclass of Fused, got <class 'int'>"):
        adapts(Additive)(int)


def test_an_adapter_without_attend() -> None:
    adapts(Additive)(type("Empty", (Fused,), {}))
    model = Model()
    patch(model)
    with pytest.raises(NotImplementedError, match="Additive: its adapter has no attend"):
        model(*inputs())


def test_every_shipped_adapter_says_what_it_is_for() -> None:
    shipped = [one for one in patching.adapters() if one.fused.__module__.startswith("attn_kernels.")]
    assert len(shipped) > 20
    for one in shipped:
        assert one.library and one.versions and one.sources, one
        assert all(len(source) == 12 for source in one.sources) and one.fused.__doc__, one


@pytest.mark.slow
def test_patch_list() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "attn_kernels", "patch-list", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    shown = run()
    for text in ("library", "versions", "class", "arabic-diacritizer", "joeynmt.attention.BahdanauAttention", "202511"):
        assert text in shown
    listed = json.loads(run("--json"))
    assert {"library": "JoeyNMT", "versions": "2.3.0", "class": "joeynmt.attention.LuongAttention"} in listed


def test_reports_may_be_made_empty() -> None:
    assert Report().fallbacks == [] and Report().replaced == []


# Names of earlier versions --------------------------------------------------------------------------------------------


def test_a_pickle_of_an_earlier_version() -> None:
    """They name ``attn_kernels.patching._rebuild``."""
    model, given = Model(), inputs()
    expected = model(*given)
    patch(model)
    now, before = b"cattn_kernels.patching.classes\nrebuild\n", b"cattn_kernels.patching\n_rebuild\n"
    data = pickle.dumps(model, protocol=2)
    assert now in data
    assert_fused(pickle.loads(data.replace(now, before)), expected, given)


def test_earlier_names() -> None:
    with pytest.warns(DeprecationWarning, match=r"Uncovered is attn_kernels.patching.adapter.NotSupported now"):
        assert patching.Uncovered is NotSupported
    with pytest.warns(DeprecationWarning, match=r"Adapter is attn_kernels.patching.registry.AdapterSpec now"):
        assert patching.Adapter is patching.AdapterSpec
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        patching.Other  # noqa: B018
    from attn_kernels import sentence

    with pytest.warns(DeprecationWarning, match=r"sentence.project is attn_kernels.patching.cache.cached_projection"):
        assert sentence.project is cached_projection
    memory = Memory(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    with pytest.warns(DeprecationWarning, match=r"Memory.meeting is Memory.gradient now") as warned:
        assert memory.meeting() is memory.gradient()
    assert warned[0].filename == __file__


def test_earlier_names_with_other_arguments() -> None:
    from attn_kernels import sentence

    module, mask = Additive(), torch.tensor([[True, False], [True, True]])
    with pytest.warns(DeprecationWarning, match=r"sentence.once is attn_kernels.patching.cache.cached now"):
        once = sentence.once
    sums = [once(module, "sum", (mask, None), lambda: mask.sum()) for _ in range(2)]
    assert sums[0] is sums[1] and sums[0] == 3
    with pytest.warns(DeprecationWarning, match=r"sentence.keeps is attn_kernels.checksums.is_cacheable now"):
        assert sentence.keeps(mask)
    with pytest.warns(DeprecationWarning, match=r"sentence.forget is attn_kernels.patching.cache.clear now"):
        sentence.forget(module)
    assert once(module, "sum", (mask, None), lambda: mask.sum()) is not sums[0]
    with pytest.warns(
        DeprecationWarning, match=r"attended_steps is attn_kernels.patching.masks.mask_without_empty_rows"
    ):
        attended_steps = sentence.attended_steps
    assert torch.equal(attended_steps(module, mask, True), mask)
    assert attended_steps(module, mask, False) is None


def test_earlier_modules_of_libraries() -> None:
    with pytest.warns(DeprecationWarning, match=r"attn_kernels.patches is attn_kernels.patching.libraries now"):
        old = importlib.import_module("attn_kernels.patches.joeynmt")
    assert old is importlib.import_module("attn_kernels.patching.libraries.joeynmt")
    from attn_kernels.patches import espnet, tacotron2

    with pytest.warns(DeprecationWarning, match=r"FusedAttForwardTA is attn_kernels.patching.libraries.espnet.forward"):
        assert espnet.FusedAttForwardTA is espnet.forward.FusedAttForwardTA
    with pytest.warns(DeprecationWarning, match=r"wrapped is .*tacotron2.linear_within now"):
        assert tacotron2.wrapped is tacotron2.linear_within
    for name in [name for name in sys.modules if name.startswith("attn_kernels.patches")]:
        del sys.modules[name]


def test_an_adapter_with_earlier_names() -> None:
    class Old(Fused):
        attend = FusedAdditive.attend
        least_elements = B * T * SIZE

        @classmethod
        def covers(cls, module: Any) -> str | None:
            return "left alone by design" if module.dropped_by_design else None

    with pytest.warns(DeprecationWarning, match="Old.(covers|least_elements): the name is ") as warned:
        adapts(Additive)(Old)
    assert len(warned) == 2
    module, (state, memory, mask) = Additive(), inputs()
    patch(module)
    module(state, memory[:, 1:], mask[:, 1:])
    assert len(CALLS) == 0
    module(state, memory, mask)
    assert len(CALLS) == 1
    other = Additive()
    other.dropped_by_design = True
    assert patch(other).skipped[0].reason == "left alone by design"
