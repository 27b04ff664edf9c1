"""After any change to a module of Seq2Seq, the training loop, training in steps and searches compute the same model.

Each part is changed in each way that its type allows, and compared with an independent decoder that calls the modules.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from attn_kernels import BahdanauAttention, CosineAttention, LuongAttention, stock
from attn_kernels.seq2seq import Seq2Seq, decoder, search
from attn_kernels.seq2seq.decoder import Decoder
from attn_kernels.seq2seq.fused.inference import FastDecoder, fast_decoder
from attn_kernels.stock import is_stock, runs_eagerly

SOURCE, TARGET, HIDDEN = 9, 11, 6
B, S, T = 3, 5, 3
Change = Callable[[nn.Module], "nn.Module | None"]


def make(**settings: Any) -> Seq2Seq:
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": HIDDEN, "units": 7, "dtype": torch.float64}
    return Seq2Seq(SOURCE, TARGET, **{**sizes, **settings})


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, SOURCE, (B, S), generator=generator)
    return source, torch.tensor([S, 2, 3]), torch.randint(3, TARGET, (B, T), generator=generator)


# The model as its modules say it --------------------------------------------------------------------------------------


def plain(model: Seq2Seq, source: Tensor, lengths: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, alignments and tokens: those of the target, or without one the likeliest of T steps."""
    of = model.decoder
    outputs, final = model.encoder(source, lengths)
    memory = of.attention.memory(outputs, lengths)
    layers = [layer for states in final for layer in states]
    states = [torch.tanh(bridge(layer)) for bridge, layer in zip(of.bridges, layers, strict=True)]
    count = len(final[0])
    hidden, cell = torch.stack(states[:count]), torch.stack(states[count:]) if len(final) > 1 else None
    feed = torch.zeros(len(source), 1, HIDDEN, dtype=outputs.dtype)
    token = torch.full((len(source), 1), model.bos)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(T):
        embedded = of.dropout(of.embedding(token))
        inputs = torch.cat([embedded, feed], -1) if of.input_feeding else embedded
        state, after = of.rnn(inputs, hidden if cell is None else (hidden, cell))
        hidden, cell = (after, None) if cell is None else after
        context, alignments = of.attention(state, memory)
        feed = of.dropout(torch.tanh(of.attentional(torch.cat([context, state], -1))))
        logits = of.output(feed)
        token = logits.argmax(-1) if target is None else target[:, t : t + 1]
        found.append((logits, alignments, token))
    logits, alignments, tokens = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return logits, alignments, tokens


def gradients(model: Seq2Seq, logits: Tensor, alignments: Tensor) -> dict[str, Tensor | None]:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    loss = (weights * logits).sum() + alignments.square().sum()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def check(model: Seq2Seq, training: bool = True, tolerance: float = 1e-10) -> None:
    """Training, unless it cannot be trained, in both ways, and a search, against ``plain``."""
    source, lengths, target = batch()
    if training:
        expected = plain(model, source, lengths, target)[:2]
        of_expected = gradients(model, *expected)
        for loop in (True, False):
            model.decoder.loop = loop
            got = model(source, lengths, target)
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
            for name, x in gradients(model, *got).items():
                other = of_expected[name]
                assert (x is None) == (other is None), name
                if x is not None:
                    torch.testing.assert_close(x, other, atol=tolerance, rtol=1e-8, equal_nan=True, msg=name)
    model.decoder.loop = True
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        logits, alignments, tokens = plain(model, source, lengths, None)
        scores = logits.log_softmax(-1).amax(-1).sum(1)
    model.eos = TARGET  # never comes
    for i, (hypothesis,) in enumerate(model.generate(source, lengths, max_length=T)):
        assert hypothesis.tokens == tokens[i].tolist()
        assert hypothesis.score == pytest.approx(scores[i].item(), rel=1e-5)
        own = alignments[i, :, : lengths[i]]
        torch.testing.assert_close(hypothesis.alignments, own, atol=tolerance, rtol=0)
    assert [module.training for module in model.modules()] == modes


# Ways to change a module ----------------------------------------------------------------------------------------------


def _scaled(result: Any) -> Any:
    """A result of any module here, changed."""
    if isinstance(result, Tensor):
        return result * 1.5
    if hasattr(result, "_replace"):  # Attention, PackedSequence
        return result._replace(**{result._fields[0]: result[0] * 1.5})
    return (_scaled(result[0]), *result[1:])


def subclass(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, *args: _scaled(cls.forward(self, *args))})


def forward_of_instance(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args: _scaled(original(*args))


def wrapped(module: nn.Module) -> nn.Module:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *args: Any) -> Any:
            return _scaled(self.inner(*args))

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    return Wrapper()


def forward_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, result: _scaled(result))


def forward_hook_with_kwargs(module: nn.Module) -> None:
    hook = lambda module, args, kwargs, result: _scaled(result)  # noqa: E731
    module.register_forward_hook(hook, with_kwargs=True, always_call=True)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(
        lambda module, args: (_scaled(args[0]) if args[0].is_floating_point() else (args[0] + 1) % 9, *args[1:])
    )


class LoRA(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        sizes = (2, base.in_features), (base.out_features, 2)
        self.a, self.b = (nn.Parameter(torch.randn(*size, dtype=base.weight.dtype) * 0.3) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _weight(module: nn.Module) -> str:
    return next(name for name, _ in module.named_parameters(recurse=False))


def parametrization(module: nn.Module) -> None:
    parametrize.register_parametrization(module, _weight(module), _Doubled())


def weight_norm(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module, _weight(module))
    with torch.no_grad():
        module.parametrizations[_weight_of(module)].original0.mul_(1.5)


def _weight_of(module: nn.Module) -> str:
    return next(iter(module.parametrizations))


def old_weight_norm(module: nn.Module) -> None:
    name = _weight(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)
    with torch.no_grad():
        getattr(module, f"{name}_g").mul_(1.5)


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, _weight(module), amount=0.5)


def weight_drop(module: nn.Module) -> None:
    """As in AWD-LSTM: the weight is made anew by each call."""
    name = "weight_hh_l0" if isinstance(module, nn.RNNBase) else _weight(module)
    raw = getattr(module, name)
    del module._parameters[name]
    module.register_parameter(f"{name}_raw", raw)
    setattr(module, name, raw * 1.0)
    module.register_forward_pre_hook(lambda module, args: setattr(module, name, getattr(module, f"{name}_raw") * 0.5))


class _Tagged(nn.Parameter):
    """A class of tensors whose products are its own business."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (nn.functional.linear, nn.functional.embedding, torch._VF.lstm, torch._VF.gru):
            return _scaled(result)
        return result


def parameter_of_another_class(module: nn.Module) -> None:
    name = _weight(module)
    setattr(module, name, _Tagged(getattr(module, name).data))


def tensor_for_parameter(module: nn.Module) -> None:
    name = _weight(module)
    value = getattr(module, name).detach() * 2
    delattr(module, name)
    setattr(module, name, value)


def other_bias(module: nn.Linear) -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(module.in_features, module.out_features, module.bias is None, dtype=module.weight.dtype)


def no_biases(module: nn.RNNBase) -> nn.Module:
    cls = type(module)
    options = {"batch_first": True, "bidirectional": module.bidirectional, "dtype": torch.float64}
    return cls(module.input_size, module.hidden_size, module.num_layers, bias=False, **options)


def batch_second(module: nn.RNNBase) -> nn.Module:
    module.batch_first = False
    outer = wrapped(module)
    type(outer).forward = lambda self, x, state: (lambda y, after: (y.transpose(0, 1), after))(
        *self.inner(x.transpose(0, 1), state)
    )
    type(outer).batch_first = True
    return outer


def identity(module: nn.Module) -> nn.Module:
    return nn.Identity()


def half(module: nn.Module) -> nn.Module:
    class Half(nn.Module):
        p = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.arange(x.shape[-1]) % 2 * 2.0).to(x.dtype)

    return Half()


def max_norm(module: nn.Embedding) -> None:
    module.max_norm = 0.3


def other_score_vector(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type("Mine", (cls,), {"score_vector": lambda self: 3 * cls.score_vector(self)})


def other_score_vector_of_instance(module: nn.Module) -> None:
    original = module.score_vector
    module.score_vector = lambda: 3 * original()


EVERY: list[Change] = [subclass, forward_of_instance, forward_hook, forward_hook_with_kwargs, wrapped]
WEIGHTS: list[Change] = [parametrization, pruned, old_weight_norm, parameter_of_another_class, tensor_for_parameter]
WEIGHTS += [weight_drop]
LINEAR: list[Change] = [*EVERY, *WEIGHTS, weight_norm, pre_hook, LoRA, other_bias]
WAYS: dict[str, list[Change]] = {
    "encoder.embedding": [*EVERY, *WEIGHTS, pre_hook, max_norm],
    "encoder.dropout": [*EVERY, pre_hook, identity, half],
    "encoder.rnn": [subclass, forward_of_instance, forward_hook, wrapped, *WEIGHTS, no_biases],
    "decoder.embedding": [*EVERY, *WEIGHTS, pre_hook, max_norm],
    "decoder.dropout": [*EVERY, pre_hook, identity, half],
    "decoder.bridges.0": LINEAR,
    "decoder.rnn": [*EVERY, *WEIGHTS, pre_hook, no_biases, batch_second],
    "decoder.attention": [
        *(*EVERY, parametrization, parameter_of_another_class, tensor_for_parameter, weight_drop),
        *(pre_hook, other_score_vector, other_score_vector_of_instance),
    ],
    "decoder.attention.query_projection": LINEAR,
    "decoder.attention.memory_projection": LINEAR,
    "decoder.attentional": LINEAR,
    "decoder.output": LINEAR,
}
CASES = [(part, way) for part, ways in WAYS.items() for way in ways]


def change(model: Seq2Seq, part: str, way: Change) -> None:
    torch.manual_seed(3)
    new = way(model.get_submodule(part))
    if new is not None:
        model.set_submodule(part, new)


@pytest.mark.parametrize(
    ("part", "way", "cell"),
    [(*case, cell) for case in CASES for cell in (("lstm", "gru") if case[0].endswith("rnn") else ("lstm",))],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_changed_modules(part: str, way: Change, cell: str) -> None:
    model = make(cell=cell)
    before = model(*batch())[0]
    change(model, part, way)
    same = (identity, tensor_for_parameter, batch_second, max_norm)  # or other numbers, which prove nothing
    if way not in same and (part, way) != ("decoder.attention", parameter_of_another_class):
        assert not torch.allclose(model(*batch())[0], before), "the change was to change something"
    check(model)


@pytest.mark.parametrize("attention", ["luong-concat", "luong-general", "cosine"])
@pytest.mark.parametrize("input_feeding", [True, False])
def test_changed_modules_of_other_decoders(attention: str, input_feeding: bool) -> None:
    for part, way in (("attention", subclass), ("attentional", LoRA), ("rnn", old_weight_norm)):
        model = make(attention=attention, input_feeding=input_feeding)
        change(model, f"decoder.{part}", way)
        check(model)


def test_projections_of_cells() -> None:
    """Of an LSTM whose states are larger than its outputs."""
    model = make()
    model.decoder.rnn = nn.LSTM(5 + HIDDEN, 8, batch_first=True, proj_size=HIDDEN, dtype=torch.float64)
    model.decoder.bridges[1] = nn.Linear(2 * HIDDEN, 8, dtype=torch.float64)
    check(model)


@pytest.mark.parametrize("kinds", [{nn.Linear}, {nn.LSTM}, {nn.GRU, nn.Linear}], ids=["linear", "lstm", "gru"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules(kinds: set[Any]) -> None:
    cell = "gru" if nn.GRU in kinds else "lstm"
    model = make(dtype=torch.float32, cell=cell).eval()
    try:
        model = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    except RuntimeError as error:  # no engine on this machine
        pytest.skip(f"quantization: {error}")
    check(model, training=False, tolerance=1e-6)


# Watchers -------------------------------------------------------------------------------------------------------------

STEPS = ["rnn", "attention", "attention.query_projection", "attentional"]


@pytest.mark.parametrize("part", [*STEPS, "dropout", "embedding", "output", "bridges.1"])
def test_hooks_are_called(part: str) -> None:
    """Each kind of hook, as often in the loop as in steps, and by a search in each step."""
    model = make()
    module = model.decoder.get_submodule(part)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_, **__: calls.append("forward"), with_kwargs=True)
    if part not in ("attention", "rnn"):  # whose arguments are no tensors
        module.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
    counts = []
    for loop in (True, False):
        model.decoder.loop = loop
        logits, _ = model(*batch())
        logits.sum().backward()
        counts.append(sorted(calls))
        calls.clear()
    assert counts[0] == counts[1] and {"pre", "forward"} <= set(counts[0])
    assert part in ("attention", "rnn") or {"backward", "backward pre"} <= set(counts[0])
    if part in STEPS:
        assert counts[0].count("forward") == T
    model.eos = TARGET
    model.generate(*batch()[:2], max_length=T)
    assert calls.count("forward") == calls.count("pre") == (1 if part == "bridges.1" else T * (1 + (part == "dropout")))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_are_called(kind: str) -> None:
    model, seen = make(), []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module))
    try:
        logits, _ = model(*batch())
        logits.sum().backward()
        assert seen.count(model.decoder.attentional) == T
        seen.clear()
        model.eos = TARGET
        model.generate(*batch()[:2], max_length=T)
    finally:
        handle.remove()
    if kind.startswith("forward"):  # a search has no backward
        assert len([module for module in seen if type(module) is nn.Linear and module.out_features == TARGET]) == T
        assert len([module for module in seen if type(module) is Decoder]) == T


def test_hooks_of_the_decoder_itself() -> None:
    """They change what training returns, and the steps of a search."""
    model = make()
    model.decoder.register_forward_hook(lambda module, args, result: (result[0].roll(1, -1), result[1]))
    logits, _ = model(*batch())
    token = (model.eos + 1) % TARGET
    tokens = torch.tensor([hypothesis[0].tokens[0] for hypothesis in model.generate(*batch()[:2], max_length=1)])
    assert token is not None and torch.equal(logits[:, 0].argmax(-1), tokens)


# Classes and methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.Linear, nn.LSTM, nn.Embedding, nn.Dropout, BahdanauAttention])
def test_classes_changed_after_import(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args: _scaled(forward(self, *args)))
    check(make())


def test_functionals_changed_after_import(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: 1.5 * linear(*args))
    assert not is_stock(nn.Linear(2, 3))
    model = make()
    got = model(*batch())
    torch.testing.assert_close(got, plain(model, *batch())[:2])


def _cooled(step: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: (lambda first, *rest: (first * 0.5 + 0.1, *rest))(*step(self, *args))


def _louder(state: decoder.DecoderState) -> decoder.DecoderState:
    return state._replace(hidden=tuple(x * 1.5 for x in state.hidden))


METHODS: dict[str, Callable[..., Any]] = {
    "step": _cooled(Decoder.step),
    "_step": _cooled(Decoder._step),
    "_attend": _cooled(Decoder._attend),
    "start": lambda self, states: _louder(Decoder.start(self, states)),
}


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("of", ["class", "instance"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_a_decoder(method: str, of: str, input_feeding: bool) -> None:
    """Teacher forcing is the steps of a search, whichever of them is another's."""
    model = make(input_feeding=input_feeding)
    before = model(*batch())[0]
    if of == "class":
        model.decoder.__class__ = type("Mine", (Decoder,), {method: METHODS[method]})
    else:
        setattr(model.decoder, method, functools.partial(METHODS[method], model.decoder))
    logits, alignments = model(*batch())
    assert not torch.allclose(logits, before)
    model.decoder.loop = False
    torch.testing.assert_close(model(*batch()), (logits, alignments))
    source, lengths, _ = batch()
    model.eos = TARGET
    found = model.generate(source, lengths, max_length=T)
    target = torch.tensor([hypothesis.tokens for (hypothesis,) in found])
    logits, alignments = model(source, lengths, target)
    assert torch.equal(logits.argmax(-1), target)
    for i, (hypothesis,) in enumerate(found):
        assert hypothesis.score == pytest.approx(logits[i].log_softmax(-1).amax(-1).sum().item())
        torch.testing.assert_close(hypothesis.alignments, alignments[i, :, : lengths[i]])


def test_a_forward_that_searches_do_not_call_is_said() -> None:
    model = make()
    model.decoder.__class__ = type("Mine", (Decoder,), {"forward": lambda self, *args: Decoder.forward(self, *args)})
    with pytest.warns(UserWarning, match="forward of its own"):
        model.generate(*batch()[:2], max_length=1)


# The predicate itself -------------------------------------------------------------------------------------------------


def test_stock_models_take_the_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    loops, made, found = [], [], []
    decode, one_call = decoder.decode_sequence, search.search_in_one_call
    monkeypatch.setattr(decoder, "decode_sequence", lambda *args: loops.append(1) or decode(*args))
    monkeypatch.setattr(search, "fast_decoder", lambda *args: made.append(fast_decoder(*args)) or made[-1])
    monkeypatch.setattr(search, "search_in_one_call", lambda *args: found.append(one_call(*args)) or found[-1])
    for attention in ("bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat", "cosine"):
        for cell in ("lstm", "gru"):
            model = make(attention=attention, cell=cell, num_layers=2, dropout=0.1)
            model(*batch())
            model.generate(*batch()[:2], max_length=2)
            assert found[-1] is not None
            model.generate(*batch()[:2], max_length=2, sample=True)
            assert type(made[-1][0]) is FastDecoder
            parameters = {name: x.detach() for name, x in model.named_parameters()}
            torch.func.functional_call(model, parameters, batch())
    assert len(loops) == 24 and len(found) == len(made) == 12


def test_is_stock() -> None:
    model = make()
    assert all(map(is_stock, (model.decoder, model.decoder.rnn, model.decoder.attention, model.encoder.embedding)))
    for cls in (BahdanauAttention, LuongAttention, CosineAttention):
        assert is_stock(cls(4, 4)) if cls is not BahdanauAttention else is_stock(cls(4, 4, 3))
    for other in (None, 3, torch.tanh, nn.ReLU(), model.encoder, model, nn.Linear):
        assert not is_stock(other)
    assert not is_stock(nn.Linear(2, 3, device="meta")) and not is_stock(nn.LazyLinear(3))
    assert not is_stock(nn.Bilinear(2, 2, 3))
    with torch.device("meta"):
        assert not is_stock(nn.LSTM(2, 3))
    layer = nn.Linear(2, 3)
    layer.compile(backend="eager")
    assert not is_stock(layer)


def test_where_operators_run_eagerly() -> None:
    assert runs_eagerly("cpu")
    with torch.device("cpu"):
        assert runs_eagerly("cpu")
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(runs_eagerly("cpu"))
    with torch.overrides.TorchFunctionMode():
        seen.append(runs_eagerly("cpu"))
    with torch.utils._python_dispatch.TorchDispatchMode():
        seen.append(runs_eagerly("cpu"))
    with torch.autograd.forward_ad.dual_level():
        seen.append(runs_eagerly("cpu"))
    torch.func.vmap(lambda x: (seen.append(runs_eagerly("cpu")), x)[1])(torch.ones(2))
    torch.jit.trace(lambda x: (seen.append(runs_eagerly("cpu")), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen == [False] * 6
    assert runs_eagerly("cpu")


def test_the_order_of_imports_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose forward had been replaced before it was registered."""
    monkeypatch.setattr(stock, "_classes", {})
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(nn.Linear.forward)(lambda self, x: x))
    stock.register(nn.Linear, ["weight", "bias"])
    assert not is_stock(nn.Linear(2, 3))
