"""Seq2Seq against the formulas of its papers, sentence by sentence; its guarantees for batches, search and modes."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels.seq2seq import Hypothesis, Seq2Seq
from formulas import assert_same
from matrix import interpreted, slow_if
from sentences import check_each_alone

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE_VOCAB, TARGET_VOCAB, EMBEDDING, HIDDEN, UNITS = 11, 9, 5, 6, 7
PAD, BOS, EOS = 0, 1, 2
ATTENTIONS = ["bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat", "cosine"]
LENGTHS = torch.tensor([4, 7, 0, 1, 7, 2])


def make(**options: Any) -> Seq2Seq:
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    return Seq2Seq(SOURCE_VOCAB, TARGET_VOCAB, EMBEDDING, HIDDEN, UNITS, **options)


def erratic(**options: Any) -> Seq2Seq:
    """A model whose outputs vary: its sentences reach eos at different steps, and some do not."""
    model = make(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
        model.decoder.output.bias[EOS] += 2
    return model


def batch(
    lengths: Tensor = LENGTHS, steps: int = 7, target_steps: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, SOURCE_VOCAB, (len(lengths), steps), generator=generator)
    source = source.masked_fill(torch.arange(steps) >= lengths[:, None], PAD)
    return source, lengths, torch.randint(2, TARGET_VOCAB, (len(lengths), target_steps), generator=generator)


def gradients(model: nn.Module, logits: Tensor, alignments: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    loss = (weights * logits).sum() + alignments.square().sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# The formulas, one sentence at a time ---------------------------------------------------------------------------------


def lstm(p: dict[str, Tensor], suffix: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h, c = state
    gates = p["weight_ih" + suffix] @ x + p["bias_ih" + suffix] + p["weight_hh" + suffix] @ h + p["bias_hh" + suffix]
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(p: dict[str, Tensor], suffix: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    xr, xz, xn = (p["weight_ih" + suffix] @ x + p["bias_ih" + suffix]).chunk(3)
    hr, hz, hn = (p["weight_hh" + suffix] @ state[0] + p["bias_hh" + suffix]).chunk(3)
    z = (xz + hz).sigmoid()
    return ((1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * state[0],)


CELLS = {"lstm": (lstm, 2), "gru": (gru, 1)}


def encode_by_hand(model: Seq2Seq, source: Tensor, cell: str, layers: int) -> tuple[Tensor, list[list[Tensor]]]:
    """Memory (S, 2 * hidden) and, for each kind of state, the final ones of each layer, (2 * hidden,)."""
    formula, kinds = CELLS[cell]
    p = dict(model.encoder.rnn.named_parameters())
    outputs = list(model.encoder.embedding.weight[source])
    final: list[list[Tensor]] = [[] for _ in range(kinds)]
    for layer in range(layers):
        directions = []
        for suffix, order in ((f"_l{layer}", 1), (f"_l{layer}_reverse", -1)):
            state = (torch.zeros(HIDDEN, dtype=torch.float64),) * kinds
            hidden = []
            for x in outputs[::order]:
                state = formula(p, suffix, x, state)
                hidden.append(state[0])
            directions.append((hidden[::order], state))
        outputs = [torch.cat(pair) for pair in zip(directions[0][0], directions[1][0], strict=True)]
        for kind in range(kinds):
            final[kind].append(torch.cat([directions[0][1][kind], directions[1][1][kind]]))
    return torch.stack(outputs) if outputs else torch.zeros(0, 2 * HIDDEN, dtype=torch.float64), final


def decode_by_hand(
    model: Seq2Seq, source: Tensor, target: Tensor, cell: str, layers: int, input_feeding: bool
) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and alignments (T, S) of one sentence with Bahdanau attention."""
    formula, kinds = CELLS[cell]
    memory, final = encode_by_hand(model, source, cell, layers)
    decoder = model.decoder
    p = dict(decoder.rnn.named_parameters())
    attention = dict(decoder.attention.named_parameters())
    bridges = iter(decoder.bridges)
    started = [[torch.tanh(bridge.weight @ x + bridge.bias) for x, bridge in zip(kind, bridges)] for kind in final]  # noqa: B905
    states = [tuple(started[kind][layer] for kind in range(kinds)) for layer in range(layers)]
    feed = torch.zeros(HIDDEN, dtype=torch.float64)
    logits, alignments = [], []
    for token in [BOS, *target[:-1].tolist()]:
        x = decoder.embedding.weight[token]
        if input_feeding:
            x = torch.cat([x, feed])
        for layer in range(layers):
            states[layer] = formula(p, f"_l{layer}", x, states[layer])
            x = states[layer][0]
        context, row = torch.zeros(2 * HIDDEN, dtype=torch.float64), torch.zeros(len(source), dtype=torch.float64)
        if len(source) > 0:
            query = attention["query_projection.weight"] @ x
            scores = [attention["v"] @ (query + attention["memory_projection.weight"] @ m).tanh() for m in memory]
            row = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            context = row @ memory
        feed = torch.tanh(decoder.attentional.weight @ torch.cat([context, x]))
        logits.append(decoder.output.weight @ feed + decoder.output.bias)
        alignments.append(row)
    return torch.stack(logits), torch.stack(alignments)


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_formula(cell: str, layers: int, input_feeding: bool) -> None:
    model = make(cell=cell, num_layers=layers, input_feeding=input_feeding)
    source, lengths, target = batch()
    got = model(source, lengths, target)
    rows = []
    for i, length in enumerate(lengths.tolist()):
        if length > 0:
            logits, alignments = decode_by_hand(model, source[i, :length], target[i], cell, layers, input_feeding)
            rows.append((logits, F.pad(alignments, (0, source.shape[1] - length))))
    full = lengths > 0
    expected = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    torch.testing.assert_close(got[0][full], expected[0])
    torch.testing.assert_close(got[1][full], expected[1])
    assert_same(gradients(model, got[0][full], got[1][full]), gradients(model, *expected))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_empty_sentence(cell: str, layers: int) -> None:
    """Its memory has no steps and the final states of its encoder are 0, whatever fills the batch up."""
    model = make(cell=cell, num_layers=layers)
    source, lengths, target = batch()
    empty = int((lengths == 0).nonzero())
    zeros = [torch.zeros(layers, 1, 2 * HIDDEN, dtype=torch.float64)] * CELLS[cell][1]
    memory = model.decoder.attention.memory(torch.zeros(1, 0, 2 * HIDDEN, dtype=torch.float64))
    tokens = torch.cat([torch.tensor([[BOS]]), target[empty : empty + 1, :-1]], dim=1)
    expected, _ = model.decoder(tokens, model.decoder.start(tuple(zeros)), memory)
    logits, alignments = model(source, lengths, target)
    torch.testing.assert_close(logits[empty], expected[0])
    assert (alignments[empty] == 0).all()
    only, nothing = model(source[empty : empty + 1, :0], lengths[empty : empty + 1], target[empty : empty + 1])
    torch.testing.assert_close(only, expected)
    assert nothing.shape == (1, target.shape[1], 0)
    source[empty] = 3
    torch.testing.assert_close(model(source, lengths, target)[0][empty], expected[0])
    assert all(grad.isfinite().all() for grad in gradients(model, *model(source, lengths, target)).values())


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding(attention: str, input_feeding: bool) -> None:
    """A sentence has the same logits alone and in a batch, and whatever tokens fill the batch up."""
    model = make(attention=attention, input_feeding=input_feeding, num_layers=2)
    source, lengths, target = batch()
    logits, alignments = check_each_alone(model, source, lengths, target)
    assert logits.shape == (6, 5, TARGET_VOCAB) and alignments.shape == (6, 5, 7)
    sums = torch.where(lengths > 0, 1.0, 0.0).double()[:, None].expand(-1, 5)
    torch.testing.assert_close(alignments.sum(-1), sums)
    padding = torch.arange(9) >= lengths[:, None]
    wider = torch.cat([source, source.new_zeros(6, 2)], dim=1).masked_fill(padding, 5)
    longer = torch.cat([target, target.new_full((6, 3), PAD)], dim=1)
    got = model(wider, lengths, longer)
    torch.testing.assert_close(got[0][:, :5], logits)
    torch.testing.assert_close(got[1][:, :5, :7], alignments)
    expected, same = gradients(model, logits, alignments), gradients(model, got[0][:, :5], got[1][:, :5, :7])
    assert_same(same, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_full_batch(dtype: torch.dtype) -> None:
    """Without padding the encoder does not pack; the numbers are the same."""
    model = make(num_layers=2)
    source, lengths, target = batch(torch.full((3,), 7))
    got = model(source.to(dtype), lengths.to(dtype), target.to(dtype))
    with_a_short_one = batch(torch.tensor([7, 7, 7, 2]))
    source_4 = torch.cat([source, with_a_short_one[0][3:]])
    target_4 = torch.cat([target, with_a_short_one[2][3:]])
    expected = model(source_4, torch.tensor([7, 7, 7, 2]), target_4)
    torch.testing.assert_close(got[0], expected[0][:3])
    torch.testing.assert_close(got[1], expected[1][:3])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_all_steps_are_one_call_without_input_feeding(attention: str) -> None:
    for input_feeding, calls in ((True, 5), (False, 1)):
        model = make(attention=attention, input_feeding=input_feeding)
        queries = []
        model.decoder.attention.register_forward_hook(lambda module, args, out, q=queries: q.append(args[0].shape[1]))
        model(*batch())
        assert len(queries) == calls and sum(queries) == 5


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_steps_of_several_hypotheses(cell: str, input_feeding: bool) -> None:
    """K hypotheses of one sentence step as K copies of the sentence would, on one memory."""
    model = make(cell=cell, input_feeding=input_feeding, num_layers=2)
    source, lengths, _ = batch()
    memory, state = model.encode(source, lengths)
    tokens = torch.randint(3, TARGET_VOCAB, (2, 6, 4))
    wide = type(state)(*(_repeat(part, 4) for part in state))
    first, first_alignments, wide = model.decoder.step(tokens[0], wide, memory)
    second, second_alignments, wide = model.decoder.step(tokens[1], wide, memory)
    assert first.shape == (6, 4, TARGET_VOCAB) and wide.hidden[0].shape == (6, 4, HIDDEN)
    for k in range(4):
        logits, alignments, one = model.decoder.step(tokens[0][:, k : k + 1], state, memory)
        torch.testing.assert_close(first[:, k], logits[:, 0])
        torch.testing.assert_close(first_alignments[:, k], alignments[:, 0])
        logits, alignments, one = model.decoder.step(tokens[1][:, k : k + 1], one, memory)
        torch.testing.assert_close(second[:, k], logits[:, 0])
        torch.testing.assert_close(second_alignments[:, k], alignments[:, 0])


def _repeat(part: Any, times: int) -> Any:
    if isinstance(part, tuple):
        return tuple(_repeat(state, times) for state in part)
    return None if part is None else part.expand(-1, times, -1)


# Search ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_is_the_likeliest_token_of_teacher_forcing(attention: str, input_feeding: bool) -> None:
    model = erratic(attention=attention, input_feeding=input_feeding)
    source, lengths, _ = batch(torch.arange(12) % 8, seed=3)
    generated = model.generate(source, lengths, max_length=10)
    assert len(generated) == 12
    finished_after = set()
    for i, hypotheses in enumerate(generated):
        assert len(hypotheses) == 1
        tokens, score, alignments = hypotheses[0]
        assert alignments.shape == (len(tokens), lengths[i]) and EOS not in tokens
        output = tokens if len(tokens) == 10 else [*tokens, EOS]
        finished_after.add(len(output))
        logits, expected = model(source[i : i + 1], lengths[i : i + 1], torch.tensor([output]))
        assert logits[0].argmax(-1).tolist() == output
        torch.testing.assert_close(alignments, expected[0, : len(tokens), : lengths[i]].detach())
        log_probabilities = logits[0].log_softmax(-1).gather(1, torch.tensor(output)[:, None])
        assert score == pytest.approx(log_probabilities.sum().item())
    assert len(finished_after) > 1, "the sentences were to finish at different steps"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_finished_sentences_leave_the_batch(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = erratic(cell=cell, num_layers=2)
    source, lengths, _ = batch(torch.arange(12) % 8, seed=3)
    rows = []
    step = model.decoder.step

    def spy(tokens: Tensor, state: Any, memory: Any) -> Any:
        assert tokens.shape == (memory.batch_size, 1)
        rows.append(memory.batch_size)
        return step(tokens, state, memory)

    monkeypatch.setattr(model.decoder, "step", spy)
    together = model.generate(source, lengths, max_length=12)
    outputs = [min(len(hypotheses[0].tokens) + 1, 12) for hypotheses in together]
    assert len(set(outputs)) > 1
    assert rows == [sum(output > t for output in outputs) for t in range(max(outputs))]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    shuffled = model.generate(source[order], lengths[order], max_length=12)
    for i, hypotheses in zip(order.tolist(), shuffled, strict=True):
        assert_same_hypothesis(hypotheses[0], together[i][0])
    for i in range(12):
        alone = model.generate(source[i : i + 1, : lengths[i]], lengths[i : i + 1], max_length=12)
        assert_same_hypothesis(alone[0][0], together[i][0])


def assert_same_hypothesis(got: Hypothesis, expected: Hypothesis) -> None:
    assert got.tokens == expected.tokens
    assert got.score == pytest.approx(expected.score)
    torch.testing.assert_close(got.alignments, expected.alignments)


def test_generate_of_empty_sentences() -> None:
    model = erratic()
    hypotheses = model.generate(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), max_length=3)
    assert [h[0].alignments.shape[1] for h in hypotheses] == [0, 0]
    assert hypotheses[0][0].tokens == hypotheses[1][0].tokens


def test_generate_without_dropout_and_modes_untouched() -> None:
    model = erratic(dropout=0.5, num_layers=2)
    model.encoder.eval()  # a mixture of modes stays one
    modes = [module.training for module in model.modules()]
    source, lengths, _ = batch()
    training = model.generate(source, lengths, max_length=6)
    assert [module.training for module in model.modules()] == modes
    assert not training[0][0].alignments.requires_grad
    for got, expected in zip(training, model.eval().generate(source, lengths, max_length=6), strict=True):
        assert_same_hypothesis(got[0], expected[0])
    model.train()
    with pytest.raises(IndexError):
        model.generate(source + SOURCE_VOCAB, lengths)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_switches_no_mode(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains beside it keeps its dropout, at every moment of the search: modes are read, and never written."""
    model = erratic(dropout=0.5, num_layers=2, attention=attention, backend="reference")
    model.eos, written = TARGET_VOCAB, []  # an end that does not come
    monkeypatch.setattr(
        nn.Module,
        "__setattr__",
        lambda self, name, x, set=nn.Module.__setattr__: (written.append(name), set(self, name, x))[1],
    )
    seen = []
    model.decoder.attention.register_forward_hook(lambda *_: seen.append(all(m.training for m in model.modules())))
    source, lengths, _ = batch()
    with torch.no_grad():
        model.generate(source, lengths, max_length=3, beam_size=2)
        model.generate(source, lengths, max_length=3, sample=True)
    assert len(seen) == 6 and all(seen)
    assert "training" not in written


def test_generate_beside_training() -> None:
    """A thread that trains while others search has dropout in every forward; searches have none."""
    model = erratic(dropout=0.5)
    source, lengths, target = batch()
    expected = copy.deepcopy(model).eval().generate(source, lengths, max_length=6)
    plain = copy.deepcopy(model).eval()(source, lengths, target)[0]
    stop = threading.Event()
    found = []

    def search() -> None:
        while not stop.is_set():
            found.append(model.generate(source, lengths, max_length=6))

    with ThreadPoolExecutor(2) as pool:
        searches = [pool.submit(search) for _ in range(2)]
        try:
            logits = [model(source, lengths, target)[0] for _ in range(40)]
        finally:
            stop.set()
        for one in searches:
            one.result()
    assert not any(torch.allclose(x, plain) for x in logits)
    assert found
    for generated in found:
        for got, other in zip(generated, expected, strict=True):
            assert_same_hypothesis(got[0], other[0])


class _Noisy(nn.Module):
    """A layer of a user's own that is another while training."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []  # shared with a shallow copy
        self.register_buffer("scale", torch.full((), 2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.scale * (x + torch.randn_like(x) if self.training else x)


def test_generate_with_modules_that_know_their_mode() -> None:
    model = erratic()
    model.decoder.dropout, model.encoder.dropout = _Noisy(), nn.Sequential(_Noisy(), nn.Dropout(0.5))
    model.decoder.output.forward = model.decoder.output.forward  # bound to the instance
    source, lengths, _ = batch()
    training = model.generate(source, lengths, max_length=4)
    assert model.decoder.dropout.modes and not any(model.decoder.dropout.modes)
    for got, other in zip(training, model.eval().generate(source, lengths, max_length=4), strict=True):
        assert_same_hypothesis(got[0], other[0])


def test_generate_with_compiled_modules() -> None:
    model = erratic(dropout=0.5)
    expected = model.generate(*batch()[:2], max_length=4)
    model.decoder.output.compile(backend="eager")
    model.decoder.dropout = torch.compile(model.decoder.dropout, backend="eager")
    for got, other in zip(model.generate(*batch()[:2], max_length=4), expected, strict=True):
        assert_same_hypothesis(got[0], other[0])


# Learning -------------------------------------------------------------------------------------------------------------


@slow_if(lambda attention, **_: attention not in ("bahdanau", "luong-general"))
@pytest.mark.parametrize(
    ("attention", "cell", "layers", "input_feeding"),
    [
        ("bahdanau", "lstm", 1, True),
        ("bahdanau-normalized", "gru", 1, False),
        ("luong-dot", "lstm", 1, False),
        ("luong-general", "gru", 2, True),
        ("luong-concat", "lstm", 2, False),
        ("cosine", "gru", 1, True),
    ],
)
def test_learns_to_reverse(attention: str, cell: str, layers: int, input_feeding: bool) -> None:
    """A few sentences of different lengths by heart, and then written out by ``generate``."""
    torch.manual_seed(0)
    model = Seq2Seq(10, 10, 16, 32, 32, attention, cell, layers, dropout=0.0, input_feeding=input_feeding)
    lengths = torch.tensor([5, 3, 4, 1, 2, 5, 4, 3])
    source = torch.randint(3, 10, (8, 5)).masked_fill(torch.arange(5) >= lengths[:, None], PAD)
    reversed_ = [row[:length].flip(0).tolist() for row, length in zip(source, lengths.tolist(), strict=True)]
    target = torch.tensor([[*row, EOS, *[PAD] * (5 - len(row))] for row in reversed_])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        logits, _ = model(source, lengths, target)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert [hypotheses[0].tokens for hypotheses in model.generate(source, lengths)] == reversed_


def test_dropout() -> None:
    """On while training, also between the layers of the decoder's steps, and off in evaluation."""
    source, lengths, target = batch()
    for input_feeding in (True, False):
        model = make(dropout=0.5, num_layers=2, input_feeding=input_feeding)
        assert not torch.equal(model(source, lengths, target)[0], model(source, lengths, target)[0])
        model.eval()
        torch.testing.assert_close(model(source, lengths, target), model(source, lengths, target), rtol=0, atol=0)
        plain = make(num_layers=2, input_feeding=input_feeding)
        torch.testing.assert_close(model(source, lengths, target), plain(source, lengths, target))
    model = make(dropout=1.0, num_layers=2, decoder="steps")
    model.decoder.dropout.p = 0.0
    expected = model(source, lengths, target)[0]
    dropped = []
    model.decoder.dropout.register_forward_hook(lambda module, args, out: dropped.append(args[0].shape))
    torch.testing.assert_close(model(source, lengths, target)[0], expected)
    assert dropped == [(6, 5, EMBEDDING), *[(6, HIDDEN), (6, 1, HIDDEN)] * 5]


# As a module ----------------------------------------------------------------------------------------------------------


@slow_if(
    lambda fused, attention, input_feeding: interpreted(fused) and (attention, input_feeding) != ("bahdanau", True)
)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("input_feeding", [True, False])
def test_backends_agree(attention: str, input_feeding: bool, fused: str, device: str) -> None:
    source, lengths, target = (tensor.to(device) for tensor in batch())
    results = []
    for backend in (fused, "reference"):
        model = make(attention=attention, input_feeding=input_feeding, backend=backend, device=device)
        logits, alignments = model(source, lengths, target)
        results.append({"logits": logits, "alignments": alignments, **gradients(model, logits, alignments)})
    assert_same(*results)


def test_copies() -> None:
    source, lengths, target = batch()
    model = make(num_layers=2)
    expected, _ = model(source, lengths, target)
    loaded = make(num_layers=2)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(source, lengths, target)[0], expected)
    assert pickle.loads(pickle.dumps(model.generate(source, lengths, max_length=3)))[0][0].tokens


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_low_precision(cell: str, input_feeding: bool) -> None:
    source, lengths, target = batch()
    model = make(cell=cell, input_feeding=input_feeding, dtype=torch.float32)
    expected, _ = model(source, lengths, target)
    with torch.autocast("cpu", torch.bfloat16):
        logits, alignments = model(source, lengths, target)
        model.generate(source, lengths, max_length=3)
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)
    grads = gradients(model, logits.float(), alignments.float())
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    logits, _ = model.bfloat16()(source, lengths, target)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)


# Errors ---------------------------------------------------------------------------------------------------------------

MODEL = Seq2Seq(SOURCE_VOCAB, TARGET_VOCAB, EMBEDDING, HIDDEN, UNITS)
SOURCE, _, TARGET = batch()

ERRORS = [
    (
        lambda: make(attention="luong"),
        ValueError,
        "attention must be one of 'bahdanau', 'bahdanau-normalized', 'luong-dot'",
    ),
    (lambda: make(cell="rnn"), ValueError, "cell must be one of 'lstm', 'gru', got 'rnn'"),
    (lambda: make(decoder="scan"), ValueError, "Seq2Seq: decoder must be one of 'loop', 'steps', got 'scan'"),
    (lambda: make(eos=9), ValueError, "eos must be in 0..8, the vocabulary, got 9"),
    (lambda: make(bos=-1), ValueError, "bos must be in 0..8, the vocabulary, got -1"),
    (lambda: make(padding_idx=10), ValueError, "padding_idx must be in 0..8"),
    (lambda: MODEL([[3]], LENGTHS, TARGET), TypeError, "Seq2Seq: source must be an int32 or int64 tensor, got list"),
    (lambda: MODEL(SOURCE.float(), LENGTHS, TARGET), TypeError, "source must be an int32 or int64 tensor, got torch.f"),
    (lambda: MODEL(SOURCE[0], LENGTHS, TARGET), ValueError, "source must have shape (B, S), got (7,)"),
    (lambda: MODEL(SOURCE[:0], LENGTHS[:0], TARGET[:0]), ValueError, "(B, S) with B >= 1, got (0, 7)"),
    (lambda: MODEL(SOURCE, [7] * 6, TARGET), TypeError, "source_lengths must be an int32 or int64 tensor, got list"),
    (
        lambda: MODEL(SOURCE, LENGTHS.float(), TARGET),
        TypeError,
        "source_lengths must be an int32 or int64 tensor, got t",
    ),
    (lambda: MODEL(SOURCE, LENGTHS[:5], TARGET), ValueError, "must have shape (B,) = (6,), got (5,)"),
    (lambda: MODEL(SOURCE, LENGTHS + 1, TARGET), ValueError, "source_lengths must be in 0..S = 0..7, got 1..8"),
    (lambda: MODEL(SOURCE, LENGTHS - 1, TARGET), ValueError, "source_lengths must be in 0..S = 0..7, got -1..6"),
    (
        lambda: MODEL(SOURCE, LENGTHS, TARGET[:5]),
        ValueError,
        "target must have shape (B, T) = (6, 1 or more), got (5, 5)",
    ),
    (lambda: MODEL(SOURCE, LENGTHS, TARGET[:, :0]), ValueError, "= (6, 1 or more), got (6, 0)"),
    (lambda: MODEL(SOURCE, LENGTHS, TARGET[0]), ValueError, "target must have shape (B, T), got (5,)"),
    (
        lambda: MODEL(SOURCE, LENGTHS, TARGET.bool()),
        TypeError,
        "target must be an int32 or int64 tensor, got torch.bool",
    ),
    (lambda: MODEL.generate(SOURCE, LENGTHS, max_length=0), ValueError, "max_length must be a positive integer, got 0"),
    (lambda: make(backend="fast")(SOURCE, LENGTHS, TARGET), ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
