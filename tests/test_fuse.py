"""fuse(model): the attention that it finds, equal results, and no costs for models that it does not change."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_kernels
from attn_kernels import fuse, fused, unfuse
from attn_kernels.fusing import state as fuse_state
from attn_kernels.fusing import watched
from attn_kernels.graph import check as checking
from attn_kernels.graph import rewrite
from fuse_zoo import CASES, A, Draw, H, M, Sizes
from fuse_zoo.run import MORE_SIZES, assert_same, check, results, tensors

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PyTorch writes every step of a capture into a log that pytest would collect."""
    logger = logging.getLogger("torch.__trace")
    before, logger.propagate = logger.propagate, False
    disabled, logger.disabled = logger.disabled, True
    yield
    logger.propagate, logger.disabled = before, disabled


# One of each way of writing; the others are slow.
CORE = (
    "HeadsOfSelfAttention-two",
    "LinearPooling",
    "Classifier",
    "HiddenFill",
    "FilledByIndex",
    "Location",
    "HeadsInBatch-three",
    "MapOfFeatures",
    "ClippedLogits",
    "Loop",
    "CausalSelf",
    "Pooling",
    "TanhIsUsedTwice",
    "WrittenThroughAView",
    "DropsTanh",
)


@pytest.mark.parametrize("name", CORE)
def test_core(name: str) -> None:
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in CORE])
def test_all_ways_of_writing(name: str) -> None:
    if CASES[name].module.endswith("spellings"):
        check(CASES[name], sizes_of=MORE_SIZES, calls=2)
    else:
        check(CASES[name])


@pytest.mark.slow
@pytest.mark.left_out_if(lambda name: name not in CORE and list(CASES).index(name) % 3)  # the rewriting is the same
@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    check(CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["ChoiceByValue", pytest.param("PackedBefore", marks=pytest.mark.slow)])
def test_several_graphs_in_one_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph with the attention is fused, the rest runs as it is, over ten lengths with one capture more."""
    torch.manual_seed(0)
    original = CASES[name].build().double()
    module = copy.deepcopy(original)
    calls = calls_of_op(monkeypatch)
    report = fuse(module, always=True)
    counts = []
    for seed in range(10):
        args = [CASES[name].arguments(Sizes(2 + seed % 3, 1, 3 + seed), Draw(seed)) for _ in range(2)]
        assert_same(results(module, args[0]), results(original, args[1]), 1e-12)
        assert calls
        calls.clear()
        (entry,) = fuse_state.state_of(module).entries
        counts.append(len(entry.graph.graphs))
    assert counts[-1] == counts[1], counts
    assert report.fused[0].what == "context in v"


def test_the_zoo_is_large() -> None:
    fusible = {name.partition("-")[0] for name, case in CASES.items() if case.expected is not None}
    assert len(fusible) >= 40
    assert sum(case.expected is None for case in CASES.values()) >= 10


# A model for the rest -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, fill: float = -torch.inf, dropout: float = 0.0) -> None:
        super().__init__()
        self.W, self.U, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1)
        self.fill, self.dropout = fill, nn.Dropout(dropout)

    def forward(self, state: Tensor, memory: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        e = self.v(torch.tanh(self.W(state).unsqueeze(1) + self.U(memory))).squeeze(-1)
        if padding is not None:
            e = e.masked_fill(padding, self.fill)
        a = F.softmax(e, dim=1)
        return torch.bmm(a.unsqueeze(1), memory).squeeze(1), a


class Decoder(nn.Module):
    """A module with the attention in it, so that hooks and names have somewhere to be."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.cell = Attention(**options), nn.GRUCell(M, H)

    def forward(self, state: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        context, _ = self.attention(state, memory, padding)
        return self.cell(context, state)


SIZES = Sizes()


def arguments(seed: int = 0, sizes: Sizes = SIZES, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    draw = Draw(seed, dtype)
    return draw(sizes.B, H), draw(sizes.B, sizes.Tk, M), draw.padding(sizes.B, sizes.Tk)


def pair(**options: Any) -> tuple[Decoder, Decoder]:
    torch.manual_seed(0)
    original = Decoder(**options).double()
    return copy.deepcopy(original), original


def assert_alike(ours: nn.Module, theirs: nn.Module, args: tuple[Any, ...], tolerance: float = 1e-12) -> None:
    assert_same(results(ours, args), results(theirs, args), tolerance)


def calls_of_op(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every call of the op from a rewritten graph."""
    from attn_kernels.graph import runtime

    calls: list[Any] = []
    for name in ("additive_attention", "attend", "additive_scores"):
        function = getattr(runtime, name)
        wrapped = lambda *args, function=function, **kwargs: (calls.append(1), function(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(runtime, name, wrapped)
    return calls


# The public surface ---------------------------------------------------------------------------------------------------


def test_import_stays_light() -> None:
    code = "import sys, attn_kernels; assert 'attn_kernels.fusing' not in sys.modules; attn_kernels.fuse; "
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        attn_kernels.fuze  # noqa: B018
    assert set(attn_kernels.__all__) >= {"fuse", "fused", "unfuse"}


def test_refuses_what_is_no_module() -> None:
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got int"):
            function(3)
    with pytest.raises(TypeError, match=r"fused: model must be"), fused(3):
        pass


def test_report() -> None:
    model = nn.ModuleDict({"decoder": Decoder().double(), "pool": nn.Sequential(nn.Linear(M, M), nn.Tanh())})
    model["own"] = Attention()
    model["own"].forward = lambda *args: None
    report = fuse(model, always=True)
    assert not report.fused
    assert "not called yet" in str(report)
    model["decoder"](*arguments())
    assert [(f.name, f.cls, f.what) for f in report.fused] == [("decoder.attention", Attention, "context in v")]
    assert [(s.name, s.reason) for s in report.skipped] == [("own", "its forward was replaced")]
    assert "decoder.attention" in str(report)
    assert "nothing in this model looks like attention" in str(fuse(nn.Linear(2, 2)))
    again = fuse(model, always=True)
    assert [f.name for f in again.fused] == ["decoder.attention"]


def test_a_module_keeps_its_names() -> None:
    class Named(Attention):
        """Has methods with the names of an adapter's."""

        def attend(self, *args: Any) -> Any:
            return super().forward(*args)

        def covers(self) -> str:
            return "mine"

        def forward(self, *args: Any) -> Any:
            return self.attend(*args)

    torch.manual_seed(0)
    original = Named().double()
    module = copy.deepcopy(original)
    report = fuse(module, always=True)
    assert_alike(module, original, arguments())
    assert report.fused and module.covers() == "mine"
    assert isinstance(module, Named) and type(module).__name__ == "Named"


def test_unfuse_and_context_manager() -> None:
    ours, theirs = pair()
    state = ours.state_dict()
    with fused(ours, always=True) as report:
        assert_alike(ours, theirs, arguments())
        assert report.fused
        assert list(ours.state_dict()) == list(state)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
    assert type(ours.attention) is Attention and "_attn_kernels_fused" not in ours.attention.__dict__
    fuse(ours)
    with fused(ours):
        pass
    assert type(ours.attention) is not Attention, "was fused before"
    assert [r.name for r in unfuse(ours)] == ["attention"]
    assert type(ours.attention) is Attention
    fuse(ours)


def test_a_pickle_of_an_earlier_version() -> None:
    """They name ``attn_kernels.fusing._rebuild``."""
    ours, theirs = pair()
    fuse(ours)
    now, before = b"cattn_kernels.fusing.watched\nrebuild\n", b"cattn_kernels.fusing\n_rebuild\n"
    data = pickle.dumps(ours, protocol=2)
    assert now in data
    other = pickle.loads(data.replace(now, before))
    assert type(other.attention) is type(ours.attention)
    assert_alike(other.attention, theirs.attention, arguments())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_fused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    assert_alike(ours, theirs, arguments())
    other = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert type(other.attention) is type(ours.attention)
    calls = calls_of_op(monkeypatch)
    report = fuse(other, always=True)
    assert_alike(other, theirs, arguments(1))
    assert calls and report.fused
    unfuse(other)
    assert type(other.attention) is Attention and type(ours.attention) is not Attention


# Kinds of calls -------------------------------------------------------------------------------------------------------


def test_no_recompilation_over_lengths() -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    captured = fuse_state.state_of(ours.attention)._captured()
    counts = []
    for seed in range(10):
        args = arguments(seed, Sizes(2 + seed % 4, 1, 3 + seed))
        assert_alike(ours, theirs, args)
        counts.append(len(captured.entries))
    assert counts[-1] == counts[1], counts


def test_every_kind_of_call() -> None:
    """With and without a mask, by keyword, one row, one step, without gradients, other dtypes, other strides."""
    ours, theirs = pair()
    report = fuse(ours, always=True)
    state, memory, padding = arguments()
    assert_alike(ours, theirs, (state, memory))
    assert_alike(ours, theirs, (state, memory, padding))
    torch.testing.assert_close(ours(state, memory, padding=padding), theirs(state, memory, padding=padding))
    assert_alike(ours, theirs, arguments(1, Sizes(1, 1, 5)))
    assert_alike(ours, theirs, arguments(1, Sizes(3, 1, 1)))
    with torch.no_grad():
        assert_alike(ours, theirs, (state, memory, padding))
    with torch.inference_mode():
        assert_alike(ours, theirs, (state, memory, padding))
    turned = memory.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_alike(ours, theirs, (state, turned, padding))
    ours.float(), theirs.float()
    assert_alike(ours, theirs, arguments(dtype=torch.float32), 1e-5)
    assert not report.fallbacks, str(report)


def test_autocast() -> None:
    ours, theirs = pair()
    ours.float(), theirs.float()
    report = fuse(ours, always=True)
    args = arguments(dtype=torch.float32)
    exact = results(theirs, args)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(*args), theirs(*args)
    assert got.dtype == expected.dtype
    assert (got - exact[0]).abs().max() <= 4 * (expected - exact[0]).abs().max() + 1e-3
    assert report.fused or report.skipped


@pytest.mark.parametrize("fill", [-torch.inf, -1e9])
def test_rows_with_nothing_to_attend(fill: float) -> None:
    """What the original gives: NaN, or a mean over the padding."""
    ours, theirs = pair(fill=fill)
    report = fuse(ours, always=True)
    state, memory, padding = arguments()
    assert_alike(ours, theirs, (state, memory, padding))
    padding = padding.clone()
    padding[1] = True
    assert_alike(ours, theirs, (state, memory, padding))
    assert report.fused[0].what == "context in v"


def test_a_fill_that_is_not_low_keeps_the_softmax() -> None:
    ours, theirs = pair(fill=-3.0)
    report = fuse(ours, always=True)
    assert_alike(ours, theirs, arguments())
    assert report.fused[0].what == "scores in v"


class Added(Attention):
    """Its mask is numbers that are added to the scores."""

    def forward(self, state: Tensor, memory: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        e = self.v(torch.tanh(self.W(state).unsqueeze(1) + self.U(memory))).squeeze(-1)
        a = F.softmax(0.5 * e + added, dim=1)
        return torch.bmm(a.unsqueeze(1), memory).squeeze(1), a


class AddedToProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.U = nn.Linear(M, H)

    def forward(self, state: Tensor, memory: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        a = F.softmax(torch.bmm(self.U(memory), state.unsqueeze(2)).squeeze(2) + added, dim=1)
        return torch.bmm(a.unsqueeze(1), memory).squeeze(1), a


@pytest.mark.parametrize("cls", [Added, AddedToProducts])
def test_added_masks_are_told_by_their_values(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """0 and far below: one op. Anything else, NaN and rows with nothing to attend too: as it is written."""
    from attn_kernels.graph import runtime

    torch.manual_seed(0)
    original = cls().double()
    module = copy.deepcopy(original)
    report = fuse(module, always=True)
    formulas: list[Any] = []
    by_formula = runtime._by_formula
    monkeypatch.setattr(runtime, "_by_formula", lambda *args: (formulas.append(1), by_formula(*args))[1])
    state, memory, padding = arguments()
    masked = padding.double()
    below = -1e4 if cls is Added else -1e10  # products have no bound
    full = masked * -1e9
    full[1] = -1e9
    one = masked * below
    one[0, 0] = 0.25
    cases = [
        (masked * below, False),
        (torch.zeros_like(masked).masked_fill(padding, -torch.inf), False),
        (torch.zeros_like(masked), False),
        (masked * -3.0, True),
        (full, True),
        (full * torch.inf, True),
        (one, True),
        (one.masked_fill(padding, torch.nan), True),
        ((masked * -1e12).requires_grad_(), True),
        (masked.log(), True),
    ]
    assert_alike(module, original, (state, memory, masked))  # captured and compared
    for added, is_formula in cases:
        for _ in range(3):  # the third time with what is kept
            formulas.clear()
            # Where a whole row is masked, scores are rounded as numbers of the size of the mask.
            assert_alike(module, original, (state, memory, added), 1e-6 if added is full else 1e-12)
            assert bool(formulas) == is_formula, added
    assert report.fused[0].what.startswith("context")


def test_steps_of_general_attention() -> None:
    """The projected memory is kept from step to step, and made anew after a write."""
    torch.manual_seed(0)
    original = AddedToProducts().double()
    module = copy.deepcopy(original)
    fuse(module, always=True)
    memory, added = Draw(5)(3, 8, M), torch.zeros(3, 8, dtype=torch.float64)
    keeper = None
    for change in (lambda: memory.data[1, 2].add_(0.1), lambda: memory.data.copy_(memory.detach().flip(0))):
        for seed in range(4):
            assert_alike(module, original, (Draw(seed)(3, H), memory, added))
        keeper = fuse_state.state_of(module).keeper
        assert sum(slot._held.hits for slot in keeper._slots.values() if slot._held is not None) > 0
        change()
    losses = []
    for model in (module, original):
        total = sum(model(Draw(seed)(3, H), memory, added)[0].square().sum() for seed in range(4))
        losses.append(torch.autograd.grad(total, [memory, *model.parameters()]))
    assert_same(list(losses[0]), list(losses[1]), 1e-12)


def test_loops_without_attention_are_captured_once() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(M, H), nn.Linear(H, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.size(0), H)
            for t in range(x.size(1)):
                state = self.cell(x[:, t], state)
            return F.softmax(self.out(state), -1)

    model = Classifier()
    report = fuse(model)
    for steps in (2, 3, 4, 5):
        model(torch.randn(2, steps, M))
    assert len(fuse_state.state_of(model)._captured().entries) == 1
    assert "loops" in report.skipped[0].reason


def test_score_bias_has_a_gradient_of_zero() -> None:
    ours, _ = pair()
    fuse(ours, always=True)
    ours(*arguments()).sum().backward()
    assert ours.attention.v.bias.grad is not None
    assert ours.attention.v.bias.grad.abs().max() < 1e-12


# What a user changes is honoured --------------------------------------------------------------------------------------


def test_hooks_on_inner_layers() -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    assert_alike(ours, theirs, arguments())
    seen: list[str] = []
    for model in (ours, theirs):
        model.attention.U.register_forward_hook(lambda *_: seen.append("hook"))
        model.attention.W.register_forward_hook(lambda m, args, out: 2 * out)
    assert_alike(ours, theirs, arguments())
    assert len(seen) == 2


def test_hooks_on_the_module_itself() -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    for model in (ours, theirs):
        model.attention.register_forward_hook(lambda m, args, out: (2 * out[0], out[1]))
    assert_alike(ours, theirs, arguments())


def test_replaced_layers() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    ours, theirs = pair()
    fuse(ours, always=True)
    assert_alike(ours, theirs, arguments())
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.attention.U = Twice(M, A).double()
    assert_alike(ours, theirs, arguments())
    for model in (ours, theirs):
        model.attention.W.forward = lambda x: x.new_ones(x.shape[0], A)
    assert_alike(ours, theirs, arguments())
    for model in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(model.attention.v)
    assert_alike(ours, theirs, arguments())


def test_forward_of_the_class_replaced() -> None:
    class Other(Attention):
        pass

    torch.manual_seed(0)
    original = Other().double()
    module = copy.deepcopy(original)
    fuse(module, always=True)
    assert_alike(module, original, arguments())
    forward = Other.forward
    Other.forward = lambda self, *args: tuple(2 * x for x in forward(self, *args))
    assert_alike(module, original, arguments())


def test_changed_options() -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    assert_alike(ours, theirs, arguments())
    for model in (ours, theirs):
        model.attention.fill = -1e8
    state, memory, padding = arguments()
    padding[:] = True
    assert_alike(ours, theirs, (state, memory, padding))


# What is kept from step to step ---------------------------------------------------------------------------------------


class Steps:
    """Decoding steps of a fused model and of the original on one memory."""

    def __init__(self) -> None:
        self.memory = Draw(5)(3, 8, M)
        self.padding = Draw(6).padding(3, 8)
        # TorchDynamo keeps weak references to the parameters that it captures a graph with, and a tensor that has some
        # cannot be swapped: other parameters than those of this test.
        captured, _ = pair()
        fuse(captured, always=True)
        captured(Draw(1)(3, H), self.memory, self.padding)
        self.ours, self.theirs = pair()
        fuse(self.ours, always=True)
        self.seed = 10

    def step(self) -> None:
        """Results and gradients are the same."""
        self.seed += 1
        assert_alike(self.ours, self.theirs, (Draw(self.seed)(3, H), self.memory, self.padding))

    def models(self) -> tuple[Decoder, Decoder]:
        return self.ours, self.theirs

    def hits(self) -> int:
        keeper = fuse_state.state_of(self.ours.attention).keeper
        return sum(slot._held.hits for slot in keeper._slots.values() if slot._held is not None)


def _write_data(steps: Steps) -> None:
    steps.memory.data.copy_(torch.randn_like(steps.memory))


def _permute_rows(steps: Steps) -> None:
    steps.memory.data.copy_(steps.memory.detach()[[1, 2, 0]])


def _write_one_element(steps: Steps) -> None:
    steps.memory.data[1, 2, 3] += 0.1


def _set_storage(steps: Steps) -> None:
    steps.memory.data.set_(torch.randn_like(steps.memory))


def _assign_data(steps: Steps) -> None:
    steps.memory.data = torch.randn_like(steps.memory)


def _write_counted(steps: Steps) -> None:
    with torch.no_grad():
        steps.memory.mul_(2.0)


def _weights_by_data(steps: Steps) -> None:
    for model in steps.models():
        model.attention.U.weight.data.mul_(1.5)


def _optimiser(steps: Steps) -> None:
    for model in steps.models():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        torch.optim.SGD(model.parameters(), 0.5).step()


def _swap(steps: Steps) -> None:
    torch.manual_seed(9)
    new = torch.randn(A, M, dtype=torch.float64)
    for model in steps.models():
        torch.utils.swap_tensors(model.attention.U.weight, nn.Parameter(new.clone()))


def _assign_state(steps: Steps) -> None:
    torch.manual_seed(9)
    new = {name: torch.randn_like(x) for name, x in steps.theirs.state_dict().items()}
    for model in steps.models():
        model.load_state_dict({name: x.clone() for name, x in new.items()}, assign=True)


def _other_mask(steps: Steps) -> None:
    steps.padding.logical_and_(torch.arange(8) > 6)


def _other_memory(steps: Steps) -> None:
    steps.memory = Draw(77)(3, 8, M)


WRITES = (
    _write_data,
    _permute_rows,
    _write_one_element,
    _set_storage,
    _assign_data,
    _write_counted,
    _weights_by_data,
    _optimiser,
    _swap,
    _assign_state,
    _other_mask,
    _other_memory,
)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no_grad"])
def test_steps_after_any_write(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        steps = Steps()
        for write in WRITES:
            for _ in range(4):
                steps.step()
            assert steps.hits() > 0, f"nothing was kept before {write.__name__}"
            write(steps)
            steps.step()


def test_large_memories_are_compared_by_sums() -> None:
    from attn_kernels.graph.kept import Sources

    x = torch.randn(7, 50, 33).transpose(0, 1)
    sources = Sources((x,))
    assert sources.match((x,))
    for change in (lambda: x.data[3, 4, 5].add_(0.01), lambda: x.data[-1, -1, -1].add_(1.0)):
        change()
        assert not sources.match((x,))
        sources = Sources((x,))
    x.data.copy_(x.flip(0).clone())
    assert not sources.match((x,))
    spread = torch.randn(60, 2, 80)[:, 0]
    assert Sources((spread,)).match((spread,))


@pytest.mark.parametrize("order", ["together", "one by one", "between steps"])
def test_gradients_over_steps(order: str) -> None:
    """Losses of several steps on one memory, differentiated in any order."""
    gradients = []
    ours, theirs = pair()
    fuse(ours, always=True)
    for _ in range(2):  # the second time it is known that keeping pays
        gradients = []
        for model in (ours, theirs):
            memory, padding = Draw(5)(3, 8, M), Draw(6).padding(3, 8)
            state = Draw(7)(3, H)
            losses = []
            for _ in range(4):
                state = model(state if order != "one by one" else state.detach(), memory, padding)
                losses.append(state.square().sum())
                if order == "between steps":
                    losses.pop().backward()
                    state = state.detach()
            if order == "together":
                sum(losses).backward()
            for loss in losses if order == "one by one" else ():
                loss.backward()
            gradients.append([memory.grad, *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
        assert_same(gradients[0], gradients[1], 1e-11)


def test_memory_made_by_an_encoder() -> None:
    """The memory is no leaf, its view is made anew in each step, and a hook sees its gradient once."""
    ours, theirs = pair()
    fuse(ours, always=True)
    for _ in range(2):
        gradients = []
        for model in (ours, theirs):
            torch.manual_seed(0)
            encoder = nn.Linear(M, M).double()
            memory = encoder(Draw(5)(8, 3, M))
            seen: list[int] = []
            memory.register_hook(lambda g, seen=seen: seen.append(1))
            state, total = Draw(7)(3, H), torch.zeros((), dtype=torch.float64)
            for _ in range(4):
                state = model(state, memory.transpose(0, 1))
                total = total + state.square().sum()
            total.backward()
            gradients.append([p.grad for p in (*encoder.parameters(), *model.parameters())])
            assert len(seen) == 1
            model.zero_grad()
        assert_same([g.clone() for g in gradients[0]], gradients[1], 1e-11)


def test_nothing_is_held_of_memories_that_are_used_once() -> None:
    import weakref

    ours, _ = pair()
    fuse(ours, always=True)
    alive = []
    for seed in range(12):
        state, memory, padding = arguments(seed)
        memory = memory * 1.0
        ours(state, memory, padding).sum().backward()
        alive.append(weakref.ref(memory))
    del memory
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 1


def test_what_is_returned_is_not_kept() -> None:
    """The caller writes to projected keys that a module returned."""

    class Returns(Attention):
        def forward(self, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            keys = self.U(memory)
            a = F.softmax(self.v(torch.tanh(self.W(state).unsqueeze(1) + keys)).squeeze(-1), 1)
            return torch.bmm(a.unsqueeze(1), memory), keys

    torch.manual_seed(0)
    original = Returns().double()
    module = copy.deepcopy(original)
    fuse(module, always=True)
    state, memory, _ = arguments()
    with torch.no_grad():
        for _ in range(4):
            (ours, keys), (theirs, expected) = module(state, memory), original(state, memory)
            torch.testing.assert_close((ours, keys), (theirs, expected))
            keys.zero_()


# Trust ----------------------------------------------------------------------------------------------------------------


def test_a_wrong_rewrite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    score_vector = rewrite.score_vector

    def wrong(emit: Any, scores: Any, scale: float, *rest: Any) -> Any:
        return score_vector(emit, scores, 1.01 * scale, *rest)

    monkeypatch.setattr(rewrite, "score_vector", wrong)

    class Other(Attention):
        pass

    torch.manual_seed(0)
    original = Other().double()
    module = copy.deepcopy(original)
    report = fuse(module, always=True)
    assert_alike(module, original, arguments())
    assert not report.fused
    assert "is not the same" in report.skipped[0].reason


def test_an_error_in_the_search_is_no_error_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite._Writer, "run", lambda self: 1 / 0)

    class Other(Attention):
        pass

    module = Other().double()
    report = fuse(module, always=True)
    module(*arguments())
    assert "ZeroDivisionError" in report.skipped[0].reason


def test_errors_of_the_call_are_those_of_the_original() -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    state, memory, _ = arguments()
    for args in ((state[:, :3], memory), (state, memory[..., :2]), (state,)):
        errors = []
        for model in (ours, theirs):
            with pytest.raises((RuntimeError, TypeError)) as raised:
                model(*args)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]
    assert_alike(ours, theirs, arguments())


def test_differences_are_found() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    mask = torch.rand(4, 5) > 0.5

    def original(x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask, -torch.inf).softmax(1)

    assert checking.difference(original, original, (x, mask)) is None
    for wrong in (
        lambda x, mask: original(x, ~mask),
        lambda x, mask: original(x * 1.01, mask),
        lambda x, mask: original(x, mask).nan_to_num(0.0),
        lambda x, mask: original(x.detach(), mask),
        lambda x, mask: original(x, mask).double(),
        lambda x, mask: original(x, mask) + 0 * x.data.add_(1.0),
    ):
        full = mask.clone()
        full[0] = True
        assert checking.difference(original, wrong, (x, full)) is not None


# Where the original is faster, it runs --------------------------------------------------------------------------------


def test_the_faster_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(fuse_state.time, "perf_counter", lambda: clock[0])
    for slower in ("original", "rewritten"):
        model = Decoder().double()
        fuse(model)
        state = fuse_state.state_of(model.attention)
        forward, run = state.forward, state._run

        def timed(function: Any, seconds: float) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                clock[0] += seconds
                return function(*args, **kwargs)

            return call

        state.forward = timed(forward, 2.0 if slower == "original" else 1.0)
        state._run = timed(run, 1.0 if slower == "original" else 2.0)
        for _ in range(9):
            model(*arguments())
        assert set(state.choices.values()) == {slower == "original"}


def _hook_all(patch: pytest.MonkeyPatch) -> Any:
    def halved(module: nn.Module, _: Any, result: Any) -> Any:
        return result / 2 if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(halved)


def _hook_all_before(patch: pytest.MonkeyPatch) -> Any:
    def halved(module: nn.Module, given: Any) -> Any:
        return (given[0] / 2,) if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_pre_hook(halved)


def _replace(owner: Any, name: str) -> Any:
    def replace(patch: pytest.MonkeyPatch) -> None:
        function = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: function(*args, **kwargs) / 2)

    return replace


REPLACED = {
    "hooks of all modules": (_hook_all, "hooks on the calls of all modules"),
    "hooks before all modules": (_hook_all_before, "hooks on the calls of all modules"),
    "forward of a layer's class": (
        _replace(nn.Linear, "forward"),
        "the forward of the class of a module within it was replaced after the capture",
    ),
    "a functional": (_replace(F, "softmax"), "a function of PyTorch was replaced"),
    "a function": (_replace(torch, "tanh"), "a function of PyTorch was replaced"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_for_all_modules(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the capture: the guards of TorchDynamo do not look there."""
    change, reason = REPLACED[what]
    ours, theirs = pair()
    report = fuse(ours, always=True)
    args = arguments()
    for _ in range(2):
        assert_alike(ours, theirs, args)
    before = theirs(*args)
    calls = calls_of_op(monkeypatch)
    with monkeypatch.context() as patch:
        hook = change(patch)
        assert (theirs(*args) - before).abs().max() > 1e-3
        for _ in range(2):
            assert_alike(ours, theirs, args)
        if hook is not None:
            hook.remove()
    assert not calls and {fallback.reason for fallback in report.fallbacks} == {reason}
    assert_alike(ours, theirs, args)
    assert calls


def test_small_calls_do_not_hide_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the original was chosen for many calls, few are looked at; hooks are honoured, another kind is found."""
    ours, theirs = pair()
    fuse(ours)
    attention, args = ours.attention, arguments()
    state = fuse_state.state_of(attention)
    state.choices[fuse_state.kind_of(attention.__dict__, args)] = False
    looks = []
    kind = fuse_state.kind_of
    for module in (fuse_state, watched):
        monkeypatch.setattr(module, "kind_of", lambda *args: (looks.append(1), kind(*args))[1])
    for _ in range(2000):
        attention(*args)
    assert 0 < len(looks) < 150
    seen: list[int] = []
    hook = attention.register_forward_hook(lambda *_: seen.append(1))
    attention(*args)
    assert seen == [1]
    hook.remove()
    with monkeypatch.context() as patch:
        call = nn.Module.__call__
        patch.setattr(nn.Module, "__call__", lambda self, *args: (seen.append(2), call(self, *args))[1])
        attention(*args)
    assert seen[:2] == [1, 2]
    calls = calls_of_op(monkeypatch)
    state.always = True
    large = arguments(1, Sizes(16, 1, 9))
    for _ in range(fuse_state.SKIPPED_CALLS + 1):
        torch.testing.assert_close(attention(*large), theirs.attention(*large))
    assert calls


def test_kinds_that_are_not_rewritten_cost_nothing() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * x

    model = Gate()
    report = fuse(model)
    for _ in range(3):
        model(torch.randn(3, 4))
    assert set(fuse_state.state_of(model).choices.values()) == {False}
    assert "no attention" in report.skipped[0].reason


# Among other tools ----------------------------------------------------------------------------------------------------


def test_within_torch_compile() -> None:
    ours, theirs = pair()
    fuse(ours, always=True)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments()), theirs(*arguments()))
    assert any("tanh" in str(graph.code) for graph in graphs), "the outer graph has the plain operations"
    torch._dynamo.reset()
    assert_alike(ours, theirs, arguments(1))


def test_as_a_backend_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_kernels import compile as module

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, _, **options: graph.forward)
    calls = calls_of_op(monkeypatch)
    _, theirs = pair()
    compiled = torch.compile(theirs, backend=module.attn_kernels_backend, dynamic=True)
    for seed, padded in ((0, False), (1, True)):
        args = arguments(seed)[: 3 if padded else 2]
        torch.testing.assert_close(compiled(*args), theirs(*args))
        assert calls
        calls.clear()
    torch._dynamo.reset()


def test_the_backend_is_declared() -> None:
    """``backend="attn_kernels"``: TorchDynamo looks for entry points of this group."""
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    module, _, name = declared["torch_dynamo_backends"]["attn_kernels"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.long(25)
@pytest.mark.slow
def test_an_installed_package_has_the_backend(tmp_path: Path) -> None:
    """A fresh install, without the C++ kernels, in an interpreter that imports nothing of this package by itself."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "build", "bench", "tests", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)
    environment = {**os.environ, "ATTN_KERNELS_CPU": "0", "ATTN_KERNELS_CUDA": "0", "PYTHONPATH": str(site)}
    subprocess.run([*map(str, pip), str(source)], check=True, env=environment, cwd=tmp_path)
    subprocess.run([sys.executable, "-c", _BY_NAME, str(site)], check=True, env=environment, cwd=tmp_path)


_BY_NAME = """
import sys
import torch
import torch._inductor.compile_fx as inductor
assert "attn_kernels" in torch.compiler.list_backends(), torch.compiler.list_backends()
graphs = []
inductor.compile_fx = lambda graph, _, **options: graphs.append(graph.code) or graph.forward
q, k, v = torch.randn(2, 3), torch.randn(2, 4, 3), torch.randn(3)
def scores(q, k, v):
    return torch.softmax(torch.tanh(q[:, None] + k) @ v, 1)
expected = scores(q, k, v)
torch.testing.assert_close(torch.compile(scores, backend="attn_kernels")(q, k, v), expected)
assert sys.modules["attn_kernels"].__file__.startswith(sys.argv[1]), sys.modules["attn_kernels"].__file__
assert any("attention" in code for code in graphs), graphs
"""


@pytest.mark.slow
def test_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_kernels.compile import attn_kernels_backend

    monkeypatch.setenv("CI", "true")  # where Inductor is stricter with ops that have a decomposition
    # Caches that no other process writes to, and no pool of processes that compile: it may outlive its time.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    # Not by monkeypatch, which takes the option away afterwards instead of setting it back.
    known = hasattr(torch._inductor.config, "cpp_cache_precompile_headers")
    precompiling = torch._inductor.config.patch(cpp_cache_precompile_headers=False) if known else nullcontext()
    theirs = pair()[1].attention.float()
    args = arguments(dtype=torch.float32)
    compiled = torch.compile(theirs, backend=attn_kernels_backend)
    with precompiling:
        assert_same(results(compiled, args), results(theirs, args), 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    ours, theirs = pair()
    fuse(ours, always=True)
    assert_alike(ours, theirs, arguments())
    for _ in range(3):
        gradients = []
        for model in (ours, theirs):
            args = arguments()
            checkpoint(model, *args, use_reentrant=reentrant).square().sum().backward()
            gradients.append([args[1].grad, *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
        assert_same(gradients[0], gradients[1], 1e-12)


def test_torch_func_within_torch_compile() -> None:
    """The outer graph has the plain operations, which torch.func differentiates."""
    ours, theirs = pair()
    fuse(ours, always=True)
    args = arguments()
    assert_alike(ours, theirs, args)

    def gradient(state: Tensor) -> Tensor:
        return torch.func.grad(lambda s: ours(s, *args[1:]).sum())(state)

    got = torch.compile(gradient, backend="eager")(args[0].detach())
    expected = torch.autograd.grad(theirs(*args).sum(), args[0])[0]
    torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


def test_torch_func_and_tracing() -> None:
    ours, theirs = pair()
    report = fuse(ours, always=True)
    args = arguments()
    assert_alike(ours, theirs, args)
    gradient = [torch.func.grad(lambda s, m=m: m(s, *args[1:]).sum())(args[0]) for m in (ours, theirs)]
    torch.testing.assert_close(gradient[0], gradient[1])
    assert any("torch.func" in fallback.reason for fallback in report.fallbacks)
    traced = torch.jit.trace(ours, args)
    torch.testing.assert_close(traced(*arguments(1)), theirs(*arguments(1)))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = pair()
        fuse(ours, always=True)
        wrapped = nn.parallel.DistributedDataParallel(ours)
        for _ in range(3):
            wrapped(*arguments()).square().sum().backward()
            theirs(*arguments()).square().sum().backward()
        assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()], 1e-11)
    finally:
        dist.destroy_process_group()


def test_double_use_and_threads() -> None:
    """One module on two memories in turn, and in two threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    ours, theirs = pair()
    fuse(ours, always=True)
    both = [arguments(seed) for seed in (1, 2)]
    for _ in range(3):
        for args in both:
            assert_alike(ours, theirs, args)

    def many(args: Any) -> list[Tensor]:
        with torch.no_grad():
            return [ours(*args) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for args, got in zip(both, pool.map(many, both), strict=True):
            for result in got:
                torch.testing.assert_close(result, theirs(*args))


def test_where_the_original_is_faster_nothing_else_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair()
    fuse(ours)
    args = arguments()
    state = fuse_state.state_of(ours.attention)
    state.choices[sum(x.numel() for x in args).bit_length(), True, True] = False
    monkeypatch.setattr(state, "run", None)
    torch.testing.assert_close(ours.attention(*args), theirs.attention(*args))


def test_results_are_tensors_of_their_own() -> None:
    ours, _ = pair()
    fuse(ours, always=True)
    args = arguments()
    with torch.no_grad():
        first = [x.clone() for x in tensors(ours.attention(*args))]
        for x in tensors(ours.attention(*args)):
            x.zero_()
        for x, expected in zip(tensors(ours.attention(*args)), first, strict=True):
            torch.testing.assert_close(x, expected)
