"""Searches as one op on the CPU against searches with steps called from Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Memory
from attn_kernels.seq2seq import Hypothesis, Seq2Seq, search
from attn_kernels.seq2seq.attentions import STATELESS as ATTENTIONS
from attn_kernels.seq2seq.fused import one_call
from attn_kernels.seq2seq.fused.one_call import search_in_one_call
from attn_kernels.seq2seq.options import SearchOptions
from attn_kernels.seq2seq.state import DecoderState

SOURCE, TARGET = 11, 13
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"beam_size": 3},
    "penalties": {"beam_size": 4, "length_penalty": 0.6, "coverage_penalty": 0.2, "num_hypotheses": 2},
    "early": {"beam_size": 3, "length_penalty": 1.0, "early_stopping": True},
    "coverage alone": {"coverage_penalty": 0.3},
}


@pytest.fixture(autouse=True)
def _cpu(compiled: str) -> None:
    """All tests here are of the C++ kernels, those marked every_level of each level of them."""


def model(target: int = TARGET, scale: float = 6.0, **settings: Any) -> Seq2Seq:
    """Its outputs vary: sentences end at different steps, and some do not."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": 6, "units": 7, "dtype": torch.float64}
    one = Seq2Seq(SOURCE, target, **{**sizes, **settings}).eval()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(scale)
        one.decoder.output.bias[one.eos] += 2
    return one


def source(sentences: int = 4, steps: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, SOURCE, (sentences, steps), generator=generator)
    return tokens, torch.tensor([steps, 0, 1, steps // 2])[:sentences]


def options(**choice: Any) -> SearchOptions:
    return SearchOptions(**{"bos": 1, "eos": 2, "max_length": 20, **choice}).checked()


@torch.no_grad()
def both(one: Seq2Seq, memory: Memory, state: Any, given: SearchOptions) -> tuple[Any, Any]:
    """The hypotheses by one call and by steps from Python."""
    is_greedy = given.beam_size == 1 and given.length_penalty == given.coverage_penalty == 0
    found = search_in_one_call(one.decoder, memory, state, given)
    assert found is not None
    got = search._hypotheses(memory, found.tokens, found.alignments, found.scores, found.lengths)
    return got, (search.greedy_search if is_greedy else search.beam_search)(one.decoder, memory, state, given)


def pairs(got: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> Iterator[tuple[Hypothesis, Hypothesis]]:
    assert [len(each) for each in got] == [len(each) for each in expected]
    for mine, theirs in zip(got, expected, strict=True):
        yield from zip(mine, theirs, strict=True)


def assert_same(got: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    """In float64, where likeliest tokens differ by more than what rounding makes of them."""
    for mine, theirs in pairs(got, expected):
        assert mine.tokens == theirs.tokens
        assert mine.score == pytest.approx(theirs.score, abs=1e-10)
        torch.testing.assert_close(mine.alignments, theirs.alignments, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("layers", "input_feeding"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_hypotheses(cell: str, attention: str, layers: int, input_feeding: bool) -> None:
    one = model(cell=cell, attention=attention, num_layers=layers, input_feeding=input_feeding)
    memory, state = one.encode(*source())
    for choice in CHOICES.values():
        assert_same(*both(one, memory, state, options(**choice)))
    for parameter in one.parameters():  # nothing is kept from one search to the next
        parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    assert_same(*both(one, *one.encode(*source()), options()))


@pytest.mark.every_level
@pytest.mark.parametrize("choice", ["greedy", "penalties"])
@pytest.mark.parametrize("attention", ["bahdanau", "cosine"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_float32(cell: str, attention: str, choice: str) -> None:
    """Sizes that are no whole vectors, a vocabulary in several parts, values that are projected and not."""
    settings = {"embedding_size": 33, "hidden_size": 37, "units": 50, "cell": cell, "attention": attention}
    one = model(2100, 2.0, dtype=torch.float32, **settings)
    one.decoder.output.bias[one.eos] -= 2
    exact = model(2100, 2.0, **settings)
    exact.load_state_dict(one.state_dict())
    for max_length in (3, 20):
        given = options(max_length=max_length, **CHOICES[choice])
        memory, state = one.encode(*source())
        got, _ = both(one, memory, state, given)
        expected = search.search(exact.decoder, *exact.encode(*source()), given)
        assert max(len(each[0].tokens) for each in expected) == max_length
        for mine, theirs in pairs(got, expected):
            assert mine.tokens == theirs.tokens
            assert mine.score == pytest.approx(theirs.score, abs=2e-4, rel=1e-5)
            torch.testing.assert_close(mine.alignments.double(), theirs.alignments, atol=2e-4, rtol=0)


def rounded(one: Seq2Seq) -> Seq2Seq:
    """A copy in float64 whose weights in the steps are those of ``one`` in bfloat16."""
    other = copy.deepcopy(one).double()
    decoder = other.decoder
    layers = [decoder.attentional, decoder.output, decoder.attention.query_projection]
    weights = [layer.weight for layer in layers if layer is not None]
    for weight in weights + [w for name, w in decoder.rnn.named_parameters() if name.startswith("weight")]:
        weight.copy_(weight.bfloat16())
    return other


@pytest.mark.every_level
@pytest.mark.parametrize(
    ("cell", "attention", "choice"), [("lstm", "bahdanau", "penalties"), ("gru", "luong-dot", "greedy")]
)
@torch.no_grad()
def test_weights_in_bfloat16(cell: str, attention: str, choice: str) -> None:
    """As exact as with these weights in float32, for one row and several, of sizes that are no whole vectors."""
    settings = {"embedding_size": 33, "hidden_size": 37, "units": 50, "cell": cell, "attention": attention}
    one = model(2100, 2.0, dtype=torch.float32, num_layers=2, **settings)
    exact = rounded(one)
    for sentences, max_length in ((1, 9), (4, 3), (4, 20)):
        given = options(max_length=max_length, weight_dtype=torch.bfloat16, **CHOICES[choice])
        memory, state = one.encode(*source(sentences))
        found = search.search(one.decoder, memory, state, given)
        wide = Memory(memory.keys.double(), memory.values.double(), memory.memory_lengths)
        first = DecoderState(
            tuple(x.double() for x in state.hidden),
            tuple(x.double() for x in state.cell),
            None if state.feed is None else state.feed.double(),
        )
        expected = search.search(exact.decoder, wide, first, given._replace(weight_dtype=None))
        for mine, theirs in pairs(found, expected):
            assert mine.tokens == theirs.tokens
            assert mine.score == pytest.approx(theirs.score, abs=2e-4, rel=1e-5)
            torch.testing.assert_close(mine.alignments.double(), theirs.alignments, atol=2e-4, rtol=0)
    plain = one.generate(*source(), max_length=20)
    assert any(a[0].score != b[0].score for a, b in zip(found, plain, strict=True))


@torch.no_grad()
def test_weights_are_not_rounded_silently() -> None:
    half = {"weight_dtype": torch.bfloat16}
    small = model(dtype=torch.float32)
    small.generate(*source(), **half)
    needs = "weight_dtype needs a search that is one op"
    with pytest.raises(ValueError, match=needs):
        model().generate(*source(), **half)
    with pytest.raises(ValueError, match=needs):
        small.generate(*source(), beam_size=one_call.MAX_ROWS, **half)
    with pytest.raises(ValueError, match=r"weight_dtype must be torch.bfloat16 or None, got torch.float16"):
        small.generate(*source(), weight_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"sample=True there is no use for weight_dtype"):
        small.generate(*source(), sample=True, **half)
    small.decoder.output.bias[3] = math.nan
    with pytest.raises(ValueError, match=needs):
        small.generate(*source(), **half)
    small.decoder.output.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=needs):
        small.generate(*source(), **half)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_may_hold_anything(masked: bool) -> None:
    one = model()
    with torch.no_grad():
        memory, state = one.encode(*source())
    allowed = torch.arange(9) < memory.memory_lengths[:, None]
    mask = None
    if masked:
        mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.6
        allowed = allowed & mask
    memory = replace(memory, mask=mask)
    padding = ~allowed[..., None]
    poisoned = replace(
        memory, keys=memory.keys.masked_fill(padding, math.nan), values=memory.values.masked_fill(padding, math.nan)
    )
    for choice in CHOICES.values():
        given = options(**choice)
        _, expected = both(one, memory, state, given)
        assert_same(both(one, poisoned, state, given)[0], expected)


@torch.no_grad()
def test_of_equal_tokens_the_first() -> None:
    one = model()
    one.decoder.output.weight.zero_()
    one.decoder.output.bias.zero_()
    memory, state = one.encode(*source())
    got, expected = both(one, memory, state, options(max_length=5, eos=TARGET - 1))
    assert_same(got, expected)
    assert all(each[0].tokens == [0] * 5 for each in got)
    got, _ = both(one, memory, state, options(max_length=1, beam_size=3, eos=TARGET - 1))
    assert all([h.tokens for h in each] == [[0], [1], [2]] for each in got)
    assert got[0][0].score == pytest.approx(-math.log(TARGET), rel=1e-12)


@torch.no_grad()
def test_impossible_tokens_and_no_numbers() -> None:
    """Logits of -inf are left out; where a sum is no number, Python's steps say what follows."""
    one = model(5)
    memory, state = one.encode(*source())
    one.decoder.output.bias[:2] = -math.inf
    got, expected = both(one, memory, state, options(max_length=3, beam_size=4))
    assert_same(got, expected)
    assert all({3, 4}.issuperset(h.tokens) for each in got for h in each)
    for wrong in (math.nan, math.inf):
        one.decoder.output.bias[3] = wrong
        for choice in ({}, {"beam_size": 2}):
            assert search_in_one_call(one.decoder, memory, state, options(**choice)) is None
    one.decoder.output.bias.fill_(-math.inf)
    assert search_in_one_call(one.decoder, memory, state, options()) is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype | None, same_threads: None) -> None:
    one = model(3000, 1.0, embedding_size=64, hidden_size=64, units=64, dtype=torch.float32)
    given = options(beam_size=3, weight_dtype=dtype)
    with torch.no_grad():
        memory, state = one.encode(*source())
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(search_in_one_call(one.decoder, memory, state, given))
    first, second = results
    assert torch.equal(first.scores, second.scores) and torch.equal(first.lengths, second.lengths)
    for hypothesis, length in enumerate(first.lengths.flatten().tolist()):
        for field in ("tokens", "alignments"):
            mine, theirs = (getattr(found, field).flatten(0, 1)[hypothesis, :length] for found in results)
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [0, 3])
def test_the_table_has_a_bound(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not kept of a token is computed anew."""
    monkeypatch.setattr(one_call, "MAX_TABLE_BYTES", rows * 4 * 6 * 8)
    one = model()
    with torch.no_grad():
        memory, state = one.encode(*source())
    assert_same(*both(one, memory, state, options(beam_size=3)))


def _many_rows(one: Seq2Seq, given: dict[str, Any]) -> None:
    given["beam_size"] = one_call.MAX_ROWS // 4 + 1


def _reference(one: Seq2Seq, given: dict[str, Any]) -> None:
    one.decoder.attention.backend = "reference"


def _other_embedding(one: Seq2Seq, given: dict[str, Any]) -> None:
    one.decoder.embedding = torch.nn.Embedding(TARGET + 1, 5, dtype=torch.float64)


def _columns(one: Seq2Seq, given: dict[str, Any]) -> None:
    weight = one.decoder.output.weight
    one.decoder.output.weight = torch.nn.Parameter(weight.detach().t().contiguous().t())


def _every_second(one: Seq2Seq, given: dict[str, Any]) -> None:
    bias = one.decoder.output.bias.detach()
    one.decoder.output.bias = torch.nn.Parameter(bias.repeat_interleave(2)[::2])


@pytest.mark.parametrize("change", [_many_rows, _reference, _other_embedding, _columns, _every_second])
@torch.no_grad()
def test_where_steps_are_called(change: Callable[[Seq2Seq, dict[str, Any]], None]) -> None:
    """Besides those of test_generation_steps.py."""
    one, given = model(), {}
    memory, state = one.encode(*source())
    assert search_in_one_call(one.decoder, memory, state, options()) is not None
    change(one, given)
    assert search_in_one_call(one.decoder, memory, state, options(**given)) is None
    one.generate(*source(), max_length=3, **given)


@torch.no_grad()
def test_other_states_and_masks() -> None:
    one = model()
    memory, state = one.encode(*source())
    several = state.reorder(torch.zeros(4, 2, dtype=torch.int64))
    assert search_in_one_call(one.decoder, memory, several, options()) is None
    memory = replace(memory, mask=torch.ones(4, 1, 9, dtype=torch.bool))
    assert search_in_one_call(one.decoder, memory, state, options()) is None
