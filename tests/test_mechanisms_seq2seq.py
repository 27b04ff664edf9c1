"""Seq2Seq with stateful attentions: training equals its steps, and searches keep the state of each hypothesis."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import BahdanauAttention, LuongAttention
from attn_kernels.mechanisms import (
    CoverageAttention,
    LocationState,
    MultiHeadAttention,
    NormalizedAttention,
    PointerAttention,
    StatefulAttention,
    coverage_loss,
)
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.attentions import ATTENTIONS, CALLED, STATEFUL, STATELESS
from attn_kernels.seq2seq.decoder import Decoder
from attn_kernels.seq2seq.fused import autograd
from attn_kernels.seq2seq.fused.eligibility import can_fuse_sequence, can_fuse_steps, is_called
from attn_kernels.seq2seq.fused.inference import fast_decoder
from attn_kernels.seq2seq.fused.one_call import search_in_one_call
from attn_kernels.seq2seq.options import SearchOptions
from attn_kernels.seq2seq.search import beam_search, greedy_search
from attn_kernels.seq2seq.state import DecoderState
from sentences import check_each_alone

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE, TARGET, EMBEDDING, HIDDEN, UNITS = 11, 9, 5, 6, 7
PAD, BOS, EOS = 0, 1, 2
LENGTHS = torch.tensor([4, 7, 0, 1, 7, 2])
attentions = pytest.mark.parametrize("attention", STATEFUL)
# Their alignments may sum to less than 1, or a window may have left the sentence.
LOSES = ("monotonic", "mocha", "stepwise-monotonic", "local-m", "local-p", "gmm")


def make(erratic: bool = False, eos: float = 1.0, **options: Any) -> Seq2Seq:
    """erratic: a model whose outputs vary: its sentences reach eos at different steps, and some do not."""
    torch.manual_seed(0)
    model = Seq2Seq(SOURCE, TARGET, EMBEDDING, HIDDEN, UNITS, **{"dtype": torch.float64, **options})
    if erratic:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8)
            model.decoder.output.bias[EOS] += eos
    return model


def batch(lengths: Tensor = LENGTHS, steps: int = 7, target_steps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(3, SOURCE, (len(lengths), steps), generator=generator)
    source = source.masked_fill(torch.arange(steps) >= lengths[:, None], PAD)
    return source, lengths, torch.randint(2, TARGET, (len(lengths), target_steps), generator=generator)


def gradients(model: nn.Module, logits: Tensor, alignments: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    loss = (
        torch.randn(logits.shape, generator=generator, dtype=logits.dtype) * logits
    ).sum() + alignments.square().sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def step_by_step(model: Seq2Seq, source: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    memory, state = model.encode(source, lengths)
    tokens = torch.cat([torch.full_like(target[:, :1], BOS), target[:, :-1]], dim=1)
    results = []
    for token in tokens.split(1, dim=1):
        logits, alignments, state = model.decoder.step(token, state, memory)
        results.append((logits, alignments))
    logits, alignments = (torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
    return logits, alignments


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["loop", "steps"])
@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("settings", [{}, {"cell": "gru", "num_layers": 2}], ids=["lstm", "gru"])
@attentions
def test_training_is_the_steps(attention: str, settings: dict[str, Any], input_feeding: bool, decoder: str) -> None:
    model = make(attention=attention, input_feeding=input_feeding, decoder=decoder, **settings)
    got, expected = model(*batch()), step_by_step(model, *batch())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(model, *got), gradients(model, *expected))
    assert isinstance(model.decoder.attention, StatefulAttention)
    assert not torch.allclose(got[1][:, 0], got[1][:, 1])


@pytest.mark.parametrize("input_feeding", [True, False])
@attentions
def test_a_step_reads_the_state(attention: str, input_feeding: bool) -> None:
    """The attention is called once for each step, each time with what it returned the time before."""
    model = make(attention=attention, input_feeding=input_feeding)
    given, returned = [], []

    def spy(module: nn.Module, args: Any, result: Any) -> None:
        given.append(args[2])
        returned.append(result.state)

    model.decoder.attention.register_forward_hook(spy)
    model(*batch())
    assert len(given) == 5
    assert all(a is b for a, b in zip(given[1:], returned[:-1], strict=True))


@attentions
def test_padding(attention: str) -> None:
    source, lengths, target = batch()
    _, alignments = check_each_alone(make(attention=attention), source, lengths, target)
    sums = torch.where(lengths > 0, 1.0, 0.0).double()[:, None].expand(-1, 5)
    if attention in LOSES:
        assert (alignments.sum(-1) <= sums + 1e-12).all()
    else:
        torch.testing.assert_close(alignments.sum(-1), sums)


@attentions
def test_what_is_fused(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training. No search, nor does that prepare keys to which steps add."""
    model = make(attention=attention).eval()
    monkeypatch.setattr(autograd, "decode_sequence", None)
    source, lengths, target = batch()
    with torch.no_grad():
        memory, state = model.encode(source, lengths)
        embedded = model.decoder.embedding(target)
        assert can_fuse_sequence(model.decoder, embedded, state, memory)
        assert is_called(model.decoder.attention) == (attention not in ("location", "location-cumulative", "coverage"))
        assert not can_fuse_sequence(model.decoder, embedded, state._replace(attention=None), memory)
        assert not can_fuse_steps(model.decoder, state, memory)
        assert not can_fuse_steps(model.decoder, state._replace(attention=None), memory)
        assert fast_decoder(model.decoder, state, memory, 1, 10) == (model.decoder, memory)
        stateless = make(attention="bahdanau").eval()
        memory, state = stateless.encode(source, lengths)
        assert can_fuse_sequence(stateless.decoder, embedded, state, memory)
        assert not can_fuse_sequence(stateless.decoder, embedded, state._replace(attention=()), memory)


def test_coverage_loss() -> None:
    """What the docs say: the alignments of a whole target are enough for it."""
    model = make(attention="coverage")
    source, lengths, target = batch()
    _, alignments = model(source, lengths, target)
    loss = coverage_loss(alignments)
    assert loss.shape == target.shape and (loss[:, 0] == 0).all() and (loss[lengths > 0][:, 1:] > 0).all()
    loss.sum().backward()
    assert model.decoder.attention.coverage_weight.grad.abs().sum() > 0


@attentions
def test_float32_and_autocast(attention: str) -> None:
    model = make(attention=attention, dtype=torch.float32)
    exact = make(attention=attention)
    exact.load_state_dict(model.state_dict())
    logits, alignments = model(*batch())
    torch.testing.assert_close((logits.double(), alignments.double()), exact(*batch()), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*batch())[0]
    torch.testing.assert_close(rough.float(), logits, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("attention", ["location-cumulative", "forward-agent"])
def test_compile(attention: str) -> None:
    model = make(attention=attention, backend="reference")
    source, lengths, target = batch(target_steps=2)
    memory, state = model.encode(source, lengths)
    expected = model.decoder(target, state, memory)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model.decoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(target, state, memory), expected)
    model.decoder.attention = torch.compile(model.decoder.attention, backend="eager")  # has the methods of its own
    memory, state = model.encode(source, lengths)
    torch.testing.assert_close(model.decoder(target, state, memory), expected)


# Search ---------------------------------------------------------------------------------------------------------------


def check_hypotheses(model: Seq2Seq, source: Tensor, lengths: Tensor, found: list[Any], max_length: int) -> int:
    """Scores and alignments are those of teacher forcing. Returns how many hypotheses are of several tokens."""
    several = 0
    for i, hypotheses in enumerate(found):
        for tokens, score, alignments in hypotheses:
            output = tokens if len(tokens) == max_length else [*tokens, EOS]
            several += len(output) > 2
            logits, expected = model(source[i : i + 1], lengths[i : i + 1], torch.tensor([output]))
            torch.testing.assert_close(alignments, expected[0, : len(tokens), : lengths[i]].detach())
            log_probabilities = logits[0].log_softmax(-1).gather(1, torch.tensor(output)[:, None])
            assert score == pytest.approx(log_probabilities.sum().item())
    return several


@pytest.mark.parametrize("input_feeding", [True, False])
@attentions
def test_greedy_search(attention: str, input_feeding: bool) -> None:
    # How likely the end is: so that sentences finish at different steps.
    model = make(
        erratic=True,
        eos={"local-p": 3.5, "gmm": 5.0}.get(attention, 2.5),
        attention=attention,
        input_feeding=input_feeding,
    )
    source, lengths, _ = batch(torch.arange(40) % 8)
    found = model.generate(source, lengths, max_length=8)
    assert check_hypotheses(model, source, lengths, found, 8) > 0
    assert len({len(hypotheses[0].tokens) for hypotheses in found}) > 1, "sentences were to finish at different steps"
    for i, (hypothesis,) in enumerate(found):
        output = hypothesis.tokens if len(hypothesis.tokens) == 8 else [*hypothesis.tokens, EOS]
        logits, _ = model(source[i : i + 1], lengths[i : i + 1], torch.tensor([output]))
        assert logits[0].argmax(-1).tolist() == output


@torch.no_grad()
@attentions
def test_a_beam_of_one_is_greedy(attention: str) -> None:
    model = make(erratic=True, attention=attention).eval()
    memory, state = model.encode(*batch(torch.arange(12) % 8)[:2])
    options = SearchOptions(bos=BOS, eos=EOS, max_length=8, early_stopping=True).checked()
    greedy, beam = (search(model.decoder, memory, state, options) for search in (greedy_search, beam_search))
    for (a,), (b,) in zip(greedy, beam, strict=True):
        assert a.tokens == b.tokens and a.score == pytest.approx(b.score)
        torch.testing.assert_close(a.alignments, b.alignments)


@pytest.mark.parametrize("input_feeding", [True, False])
@attentions
def test_beam_search(attention: str, input_feeding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypotheses change places, so that a state left behind would give other alignments and scores."""
    model = make(erratic=True, attention=attention, input_feeding=input_feeding)
    moved = []
    reorder = DecoderState.reorder

    def spy(state: DecoderState, parents: Tensor) -> DecoderState:
        moved.append((parents != torch.arange(parents.shape[1])).any(1) & (parents != parents[:, :1]).any(1))
        return reorder(state, parents)

    monkeypatch.setattr(DecoderState, "reorder", spy)
    source, lengths, _ = batch(torch.arange(8))
    found = model.generate(source, lengths, beam_size=4, max_length=8)
    assert check_hypotheses(model, source, lengths, found, 8) > 8
    assert sum(rows.sum().item() for rows in moved) > 8
    alone = model.generate(source[5:6, :5], lengths[5:6], beam_size=4, max_length=8)[0]
    assert [h.tokens for h in alone] == [h.tokens for h in found[5]]


@attentions
def test_sampling(attention: str) -> None:
    model = make(erratic=True, attention=attention)
    source, lengths, _ = batch()
    generator = torch.Generator().manual_seed(0)
    found = model.generate(source, lengths, sample=True, num_hypotheses=3, max_length=8, generator=generator)
    assert check_hypotheses(model, source, lengths, found, 8) > 3


# Models ---------------------------------------------------------------------------------------------------------------


@attentions
def test_parameters_are_those_of_the_attention(attention: str) -> None:
    model = make(attention=attention)
    expected = model(*batch())
    other = make(attention=attention)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    other.load_state_dict(model.state_dict())
    prefix = "decoder.attention."
    own = {name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)}
    assert own == set(model.decoder.attention.state_dict())
    for one in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(*batch()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("attention", STATELESS)
def test_others_have_no_state(attention: str) -> None:
    """Nor do pickles of states that were made before there was one miss it."""
    _, state = make(attention=attention).encode(*batch()[:2])
    assert state.attention is None and state.select(torch.tensor([1])).attention is None
    assert state.reorder(torch.zeros(6, 2, dtype=torch.int64)).attention is None
    assert DecoderState(*state[:3]).attention is None


def test_names() -> None:
    tables = (STATELESS, STATEFUL, CALLED)
    assert len(ATTENTIONS) == sum(map(len, tables)) and ATTENTIONS.keys() == set().union(*tables)
    assert make(attention="milk").decoder.attention.chunk_size is None
    assert make(attention="location-cumulative").decoder.attention.cumulative
    assert make(attention="forward").decoder.attention.transition is None
    with pytest.raises(ValueError, match=r"attention must be one of 'bahdanau', .*'forward-agent'.*, got 'locations'"):
        make(attention="locations")


# Attentions that no fused form has, and modules -----------------------------------------------------------------------

F64 = torch.float64
MODULES = {
    "multi-head": lambda: MultiHeadAttention(HIDDEN, 2 * HIDDEN, UNITS, 3, dtype=F64),
    "relu": lambda: BahdanauAttention(HIDDEN, 2 * HIDDEN, UNITS, activation="relu", dtype=F64),
    "hardmax": lambda: NormalizedAttention(LuongAttention(HIDDEN, 2 * HIDDEN, dtype=F64), "hardmax"),
    "sum of directions": lambda: LuongAttention(HIDDEN, HIDDEN, score="dot", dtype=F64),
}


def check_search(model: Seq2Seq) -> None:
    """Alignments and score of the best hypotheses are those of training, whichever form of search found them."""
    source, lengths, _ = batch()
    for options in ({}, {"beam_size": 3}):
        found = [hypotheses[0] for hypotheses in model.generate(source, lengths, max_length=6, **options)]
        for i, best in enumerate(found):
            ended = len(best.tokens) < 6
            target = torch.tensor([[*best.tokens, *([EOS] if ended else [])]])
            with torch.no_grad():
                logits, alignments = model.eval()(source[i : i + 1], lengths[i : i + 1], target)
            of_tokens = logits.log_softmax(-1).gather(2, target[..., None]).sum()
            assert best.score == pytest.approx(of_tokens.item(), abs=1e-9)
            torch.testing.assert_close(best.alignments, alignments[0, : len(best.tokens), : lengths[i]])


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("attention", [*CALLED, *MODULES])
def test_modules_and_other_names(attention: str, input_feeding: bool) -> None:
    made = MODULES[attention]() if attention in MODULES else attention
    model = make(erratic=True, eos=0.0, attention=made, input_feeding=input_feeding)
    got, expected = model(*batch()), step_by_step(model, *batch())
    assert got[1].shape == (6, 5, 7)
    torch.testing.assert_close(got, expected)
    found, right = (
        torch.autograd.grad(logits.cos().sum() + alignments.square().sum(), list(model.parameters()), allow_unused=True)
        for logits, alignments in (got, expected)
    )
    torch.testing.assert_close(found, right)
    assert attention == "hardmax" or all(x is not None for x in found)
    check_search(model)


def test_multi_head_in_the_place_of_another() -> None:
    """Its alignments are the mean over the heads."""
    model = make(input_feeding=False)
    model.decoder.attention = module = MODULES["multi-head"]()
    of_heads = []
    module.register_forward_hook(lambda module, args, result: of_heads.append((args, result)))
    _, alignments = model(*batch())
    (((queries, memory), (_, averaged)),) = of_heads
    assert torch.equal(alignments, averaged)
    torch.testing.assert_close(alignments, MultiHeadAttention.forward(module, queries, memory).alignments.mean(1))


def test_what_of_activations_is_fused() -> None:
    """The op of training and the steps of a search have them; the search that is one op has tanh only."""
    model = make(attention=MODULES["relu"]()).eval()
    source, lengths, target = batch()
    with torch.no_grad():
        memory, state = model.encode(source, lengths)
        assert can_fuse_sequence(model.decoder, model.decoder.embedding(target), state, memory)
        assert can_fuse_steps(model.decoder, state, memory)
        options = SearchOptions(BOS, EOS, 5, 1).checked()
        assert search_in_one_call(model.decoder, memory, state, options) is None
        model.decoder.attention.activation = "tanh"
        assert search_in_one_call(model.decoder, memory, state, options) is not None


@pytest.mark.parametrize(
    ("attention", "options", "error", "words"),
    [
        (nn.Linear(2, 2), {}, TypeError, "attention must be a name, a mechanism .*got Linear"),
        (PointerAttention(HIDDEN, 2 * HIDDEN, 3), {}, TypeError, "got PointerAttention"),
        (BahdanauAttention(5, 12, 3), {}, ValueError, "query_size = hidden_size = 6, got BahdanauAttention with 5"),
        (BahdanauAttention(6, 11, 3), {}, ValueError, "memory_size = 2 hidden_size = 12, or 6 .*with 11"),
        (MultiHeadAttention(6, 12, 3, output_size=4), {}, ValueError, "output_size = memory_size = 12, got .*with 4"),
        (BahdanauAttention(6, 12, 3), {"backend": "cpu"}, ValueError, "backend must be None with a module.*'cpu'"),
        (
            "gmm",
            {"backend": "triton"},
            ValueError,
            "backend must be None or 'reference' with attention='gmm'.*'triton'",
        ),
        ("layer-norm", {"backend": "cpu"}, ValueError, "None or 'reference' with attention='layer-norm'.*'cpu'"),
    ],
)
def test_errors(attention: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^Seq2Seq: .*{words}"):
        make(attention=attention, **options)
    assert isinstance(make(attention="gmm", backend="reference"), Seq2Seq)


def _cooled(self: Decoder, *args: Any) -> Any:
    attentional, *rest = Decoder._attend(self, *args)
    return attentional * 0.5 + 0.1, *rest


def _begun_uniform(self: Decoder, states: Any) -> DecoderState:
    state = Decoder.start(self, states)
    batch = state.hidden[0].shape[0]
    return state._replace(attention=LocationState(torch.full((batch, 1, 7), 1 / 7, dtype=torch.float64)))


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("method", [{"_attend": _cooled}, {"start": _begun_uniform}], ids=["_attend", "start"])
def test_methods_of_a_decoder(method: dict[str, Any], input_feeding: bool) -> None:
    """A decoder's own methods are called with the state, and may begin with another one."""
    model = make(erratic=True, attention="location", input_feeding=input_feeding)
    before = model(*batch())[0]
    model.decoder.__class__ = type("Mine", (Decoder,), method)
    logits, alignments = model(*batch())
    assert not torch.allclose(logits, before)
    torch.testing.assert_close((logits, alignments), step_by_step(model, *batch()))
    source, lengths, _ = batch(torch.arange(32) % 7 + 1)
    found = model.generate(source, lengths, beam_size=3, max_length=5)
    assert check_hypotheses(model, source, lengths, found, 5) > 3


def test_an_attention_put_in_later() -> None:
    """Made by hand, in the place of another one."""
    model = make(attention="bahdanau")
    model.decoder.attention = CoverageAttention(
        HIDDEN, 2 * HIDDEN, 4, scale=2.0, initial="uniform", dtype=torch.float64
    )
    got, expected = model(*batch()), step_by_step(model, *batch())
    torch.testing.assert_close(got, expected)
    _, state = model.encode(*batch()[:2])
    torch.testing.assert_close(state.attention.coverage.sum(-1).flatten(), (LENGTHS > 0).double())
