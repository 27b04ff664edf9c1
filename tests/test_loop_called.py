"""Seq2Seq(decoder="loop") with attentions that it calls in each step, against decoder="steps"."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import formulas
from attn_kernels import Attention, BahdanauAttention, LuongAttention, Memory
from attn_kernels.mechanisms import (
    CoverageAttention,
    GMMAttention,
    MonotonicAttention,
    MultiHeadAttention,
    NormalizedAttention,
    StatefulAttention,
    StatefulResult,
    WindowedAttention,
)
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.attentions import ATTENTIONS, STATELESS
from attn_kernels.seq2seq.fused.eligibility import is_called
from test_loop import (
    HIDDEN,
    LOSSES,
    WITH_STATE,
    B,
    T,
    assert_same,
    batch,
    check_second_derivatives,
    looped,
    masked,
    models,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
CALLED = [name for name in ATTENTIONS if name not in (*STATELESS, *WITH_STATE)]
PARAMETERS = ("decoder.rnn.weight_hh_l0", "decoder.attentional.weight", "decoder.attention.", "decoder.bridges.0.bias")


class DecayState(NamedTuple):
    total: Tensor
    steps: Tensor


class DecayAttention(StatefulAttention):
    """A user's own mechanism: scores that decrease with the weight given before, and a number that is not float."""

    self_contained = True

    def __init__(self, **factory: Any) -> None:
        super().__init__(HIDDEN, 2 * HIDDEN, 7, backend=None, factory=factory)
        self.rate = nn.Parameter(torch.tensor(0.3, **factory))
        self.unused = nn.Parameter(torch.zeros(3, **factory))
        self.frozen = nn.Parameter(torch.ones(7, **factory), requires_grad=False)

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> DecayState:
        shape = memory.batch_size, hypotheses
        counts = torch.zeros(*shape, 1, dtype=torch.int64)
        return DecayState(memory.keys.new_zeros(*shape, memory.keys.shape[1]) + self.rate, counts)

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        scores = (self.make_query(query) * self.frozen) @ memory.keys.mT - self.rate * state.total
        weights = torch.sigmoid(scores) / (1 + state.steps)
        if memory.memory_lengths is not None:
            weights = weights * (torch.arange(weights.shape[2]) < memory.memory_lengths[:, None, None])
        after = DecayState(state.total + weights, state.steps + 1)
        return StatefulResult(weights @ memory.values, weights, after)


class HalvedAttention(BahdanauAttention):
    """A user's own mechanism without a state."""

    self_contained = True

    def forward(self, query: Tensor, memory: Memory, need_weights: bool = True) -> Attention:
        context, alignments = super().forward(query, memory)
        return Attention(context / 2, alignments)


MODULES = {
    "own": lambda: DecayAttention(dtype=F64),
    "coverage": lambda: type("Mine", (CoverageAttention,), {"self_contained": True})(HIDDEN, 12, 5, dtype=F64),
    "window": lambda: WindowedAttention(GMMAttention(HIDDEN, 12, 5, dtype=F64), 1, 2, in_training=True),
    "noise": lambda: MonotonicAttention(HIDDEN, 12, 5, noise=1.0, normalize=True, dtype=F64),
    "hard": lambda: MonotonicAttention(HIDDEN, 12, mode="hard", score="dot", dtype=F64),
    "halved": lambda: HalvedAttention(HIDDEN, 12, 5, dtype=F64),
    "clipped": lambda: BahdanauAttention(HIDDEN, 12, 5, clip=2.0, dtype=F64),
    "dot heads": lambda: MultiHeadAttention(HIDDEN, 12, 5, 3, "dot", value_size=4, tanh=True, dtype=F64),
    "smoothing": lambda: NormalizedAttention(BahdanauAttention(HIDDEN, 12, 5, dtype=F64), "sigmoid"),
    "sparsemax": lambda: NormalizedAttention(
        LuongAttention(HIDDEN, 12, dtype=F64), pytest.importorskip("entmax").sparsemax
    ),
}
CASES = [*CALLED, *MODULES]


def pair(attention: str, **settings: Any) -> dict[str, Seq2Seq]:
    """The same model twice, with steps and with the loop."""
    made = models(attention=attention if attention in CALLED else "bahdanau", **settings)
    if attention in MODULES:
        torch.manual_seed(1)
        for model in made.values():
            model.decoder.attention = MODULES[attention]()
        made["loop"].load_state_dict(made["steps"].state_dict())
    return made


def seeded(model: Seq2Seq, data: tuple[Tensor, ...], loss: str = "both") -> dict[str, Any]:
    torch.manual_seed(5)
    return run(model, data, LOSSES[loss])


def large_batch() -> tuple[Tensor, Tensor, Tensor]:
    """A memory large enough for gradients that are computed once for all steps."""
    return batch(steps=3, source=500)


def close(made: dict[str, Seq2Seq], data: tuple[Tensor, ...], loss: str = "both") -> None:
    found = (seeded(made[name], data, loss) for name in ("loop", "steps"))
    formulas.assert_same(*found, atol=1e-12, rtol=1e-9)


# Results and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", CASES)
def test_results_and_gradients(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pair(attention)
    calls = looped(made, monkeypatch)
    close(made, batch())
    assert calls == [1] and is_called(made["loop"].decoder.attention)


@pytest.mark.parametrize("attention", CASES)
def test_large_memory(attention: str) -> None:
    close(pair(attention, cell="gru", num_layers=2), large_batch())


@pytest.mark.parametrize("attention", CALLED)
def test_float32(attention: str) -> None:
    assert_same(models(attention=attention, dtype=torch.float32), batch(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("attention", ["forward-agent", "own", "hard"])
def test_losses(attention: str, loss: str) -> None:
    made = pair(attention)
    if (attention, loss) == ("hard", "alignments"):
        assert not any(model(*batch())[1].requires_grad for model in made.values())
        return
    loop, steps = (seeded(made[name], batch(), loss) for name in ("loop", "steps"))
    for name, expected in steps.items():
        got, expected = (torch.zeros(()) if x is None else x for x in (loop[name], expected))
        torch.testing.assert_close(got, expected.expand_as(got), atol=1e-12, rtol=1e-9, check_dtype=False)


@pytest.mark.parametrize("attention", ["mocha", "own", "multi-head"])
def test_frozen_parts(attention: str) -> None:
    for frozen in ("encoder", "decoder.attention", "decoder.rnn"):
        made = pair(attention)
        for model in made.values():
            model.get_submodule(frozen).requires_grad_(False)
        close(made, batch())
        close(made, large_batch())


def test_mask_and_no_gradients() -> None:
    made, found = pair("monotonic"), {}
    for name, model in made.items():
        memory, state = masked(model)
        logits, alignments = model.decoder(batch()[2], state, memory)
        gradients = torch.autograd.grad(LOSSES["both"](logits, alignments), list(model.decoder.attention.parameters()))
        with torch.no_grad():
            found[name] = logits, alignments, *gradients, model.decoder(batch()[2], state, memory)[0]
        assert not found[name][-1].requires_grad
    torch.testing.assert_close(found["loop"], found["steps"], atol=1e-12, rtol=1e-9)


# Several backward passes, and derivatives of gradients ----------------------------------------------------------------


@pytest.mark.parametrize("data", [batch(), large_batch()], ids=["small", "large"])
@pytest.mark.parametrize("attention", ["forward-agent", "stepwise-monotonic", "multi-head"])
def test_backward_twice(attention: str, data: tuple[Tensor, ...]) -> None:
    model = pair(attention)["loop"]
    logits, alignments = model(*data)
    parameters = list(model.parameters())
    both = LOSSES["both"](logits, alignments)
    first = torch.autograd.grad(both, parameters, retain_graph=True)
    torch.autograd.grad(alignments.square().sum(), parameters[:1], retain_graph=True)
    second = torch.autograd.grad(both, parameters)
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(both, parameters)


@pytest.mark.parametrize(
    "attention", ["forward-agent", "monotonic", "gmm", "local-p", "own", "noise", "multi-head", "layer-norm"]
)
def test_second_derivatives(attention: str) -> None:
    model = pair(attention, num_layers=2, dropout=0.3)["loop"]
    source, _, target = batch(steps=2, source=3)
    lengths = torch.tensor([3, 2, 3, 1])
    names = [name for name, x in model.named_parameters() if name.startswith(PARAMETERS) and x.requires_grad]

    check_second_derivatives(model, names, (source, lengths, target))


@pytest.mark.parametrize("data", [batch(steps=3), large_batch()], ids=["small", "large"])
@pytest.mark.parametrize("attention", ["forward-agent", "monotonic", "own", "multi-head"])
def test_gradient_penalty(attention: str, data: tuple[Tensor, ...]) -> None:
    made, found = pair(attention), {}
    for name, model in made.items():
        value = LOSSES["both"](*model(*data))
        parameters = [x for x in model.parameters() if x.requires_grad]
        gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        sum(gradient.square().sum() for gradient in gradients if gradient is not None).backward()
        found[name] = {key: x.grad for key, x in model.named_parameters()}
    for name, expected in found["steps"].items():
        got, expected = (torch.zeros(()) if x is None else x for x in (found["loop"][name], expected))
        torch.testing.assert_close(got, expected.expand_as(got), atol=1e-9, rtol=1e-7, msg=name, check_dtype=False)


@pytest.mark.parametrize("attention", ["gmm", "own", "multi-head"])
def test_batches_of_gradients(attention: str) -> None:
    model = pair(attention)["loop"]
    each = model(*batch())[0].sum((1, 2))
    parameters = [model.decoder.attentional.weight, *(x for x in model.decoder.attention.parameters() if x.ndim == 2)]
    expected = [torch.autograd.grad(x, parameters, retain_graph=True) for x in each]
    rows = torch.eye(B, dtype=F64)
    batched = torch.autograd.grad(each, parameters, rows, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda row: torch.autograd.grad(each, parameters, row, retain_graph=True))(rows)
    for n, of_row in enumerate(expected):
        torch.testing.assert_close(tuple(x[n] for x in batched), of_row)
        torch.testing.assert_close(tuple(x[n] for x in mapped), of_row)


# What autograd does around it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_parameters_see_whole_gradients(before: bool) -> None:
    """Also hooks that are registered after the forward. With one before it, single steps compute the target."""
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 2 * gradient

    found = []
    for model in pair("forward-agent").values():
        v = model.decoder.attention.v
        if before:
            v.register_hook(hook)
        loss = LOSSES["both"](*model(*batch()))
        if not before:
            v.register_hook(hook)
        loss.backward()
        found.append(v.grad)
    assert len(seen) == 2
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    made = pair("noise")
    expected = seeded(made["steps"], batch())
    model = made["loop"]
    with torch.no_grad():
        memory, state = model.encode(*batch()[:2])
    keys = memory.keys.requires_grad_()
    target = batch()[2]
    torch.manual_seed(5)
    tokens = torch.cat([torch.full_like(target[:, :1], model.bos), target[:, :-1]], dim=1)

    def function(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return model.decoder(tokens, state, Memory(keys, values, memory.memory_lengths))

    checkpoint = torch.utils.checkpoint.checkpoint
    results = checkpoint(function, keys, memory.values, use_reentrant=use_reentrant)
    LOSSES["both"](*results).backward()
    name = "decoder.attention.query_projection.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, expected[name], atol=1e-12, rtol=1e-9)


def test_anomaly_mode() -> None:
    made = pair("gmm")
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        close(made, batch())


@pytest.mark.parametrize("data", [batch(), large_batch()], ids=["small", "large"])
def test_memory_is_released_after_backward(data: tuple[Tensor, ...]) -> None:
    """The graphs of the steps are released by the backward, or with the results if there is none; without gc."""
    model = pair("own")["loop"]
    inside: list[weakref.ref[Any]] = []
    step = DecayAttention._step

    def spy(self: DecayAttention, *args: Any) -> StatefulResult:
        result = step(self, *args)
        inside.append(weakref.ref(result.context.untyped_storage()))
        return result

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecayAttention, "_step", spy)
            logits, _ = model(*data)
            assert sum(x() is not None for x in inside) == len(inside) == data[2].shape[1]
            loss = logits.sum()
            loss.backward()
            assert not any(x() is not None for x in inside), "loss and logits still exist"
            inside.clear()
            results = model(*data)
            assert any(x() is not None for x in inside)
            del results
            assert not any(x() is not None for x in inside)
    finally:
        gc.enable()


# What the loop does not call ------------------------------------------------------------------------------------------


def test_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pair("gmm")
    calls, decoder = looped(made, monkeypatch), made["loop"].decoder

    def is_looped() -> bool:
        calls.clear()
        close(made, batch())
        return calls == [1]

    assert is_looped()
    kept: list[Tensor] = []
    handle = decoder.attention.mixture.register_forward_hook(lambda module, args, result: kept.append(result))
    assert not is_looped() and len(kept) == T
    kept.clear()
    made["loop"](*batch())
    of_hook = torch.autograd.grad(sum(x.square().sum() for x in kept), decoder.rnn.weight_hh_l0)[0]
    assert of_hook.any(), "a hook may use tensors of the steps in a loss"
    handle.remove()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not is_looped()
    for name, module in (("own", DecayAttention), ("coverage", None)):
        made.update(pair(name))
        decoder = made["loop"].decoder
        assert is_looped()
        if module is not None:
            for model in made.values():
                model.decoder.attention.__class__ = type("Sub", (module,), {})
            assert not is_looped(), "a subclass does not inherit the declaration"
    made.update(pair("smoothing"))
    decoder = made["loop"].decoder
    assert is_looped()
    temperature = torch.ones((), dtype=F64, requires_grad=True)
    for model in made.values():
        model.decoder.attention.normalizer = lambda scores: torch.softmax(temperature * scores, -1)
    assert not is_looped(), "a function may read a tensor that requires a gradient"
    assert temperature.grad is not None
    made.update(pair("own"))
    decoder = made["loop"].decoder
    handle = decoder.attention.unused.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.zero_())
    assert not is_looped(), "the parameter is not used, so the hook must not run"
    handle.remove()
    for model in made.values():  # a projection that is computed from its parameters, in each step
        nn.utils.parametrizations.weight_norm(model.decoder.attention.query_projection)
    assert is_looped()


class CutAttention(DecayAttention):
    self_contained = True

    def _step(self, *args: Any) -> StatefulResult:
        result = super()._step(*args)
        return result._replace(context=result.context[:, :, :5])


class RoundedAttention(DecayAttention):
    self_contained = True

    def _step(self, *args: Any) -> StatefulResult:
        result = super()._step(*args)
        return result._replace(context=result.context.float())


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (CutAttention, ValueError, r"context must have shape .* = \(4, 1, 12\), got \(4, 1, 5\)"),
        (RoundedAttention, TypeError, "context must have dtype torch.float64, got torch.float32"),
    ],
)
def test_errors(made: Any, error: type[Exception], words: str) -> None:
    model = pair("own")["loop"]
    model.decoder.attention.__class__ = made
    model.decoder.attention._name = made.__name__
    with pytest.raises(error, match=f"^{made.__name__}: {words}"):
        model(*batch())


@pytest.mark.slow
def test_compiled_autograd_is_refused() -> None:
    """It would lose the graphs of the steps, and with them gradients."""
    model = Seq2Seq(9, 9, attention="gmm", decoder="loop")
    loss = model(torch.randint(3, 9, (2, 5)), torch.tensor([5, 4]), torch.randint(3, 9, (2, 3)))[0].square().sum()
    with (
        pytest.raises(RuntimeError, match="use decoder='steps'"),
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        loss.backward()
