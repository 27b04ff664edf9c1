"""Search of Seq2Seq against enumeration of all outputs, a slow search of one sentence, and sampling distributions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn_kernels.seq2seq import Hypothesis, Seq2Seq, search
from attn_kernels.seq2seq.options import SearchOptions
from matrix import slow_if

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE_VOCAB, TARGET_VOCAB, HIDDEN, UNITS = 11, 9, 6, 7
PAD, BOS, EOS = 0, 1, 2
ATTENTIONS = ["bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat", "cosine"]
LENGTHS = torch.tensor([4, 7, 0, 1, 7, 2, 5, 3])
PENALTIES = [(0.0, 0.0), (0.6, 0.0), (2.5, 0.0), (0.0, 0.3), (1.0, 0.2)]


def make(target_vocab: int = TARGET_VOCAB, scale: float = 6.0, eos_bias: float = 2.0, **options: Any) -> Seq2Seq:
    """A model whose outputs vary: its sentences end at different steps, and some do not."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    model = Seq2Seq(SOURCE_VOCAB, target_vocab, 5, HIDDEN, UNITS, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
        model.decoder.output.bias[model.eos] += eos_bias
    return model


def batch(lengths: Tensor = LENGTHS, steps: int = 7) -> tuple[Tensor, Tensor]:
    source = torch.randint(3, SOURCE_VOCAB, (len(lengths), steps), generator=torch.Generator().manual_seed(1))
    return source.masked_fill(torch.arange(steps) >= lengths[:, None], PAD), lengths


def sentences() -> Iterator[tuple[Tensor, Tensor]]:
    """The sentences of ``batch``, each alone and without padding."""
    source, lengths = batch()
    for i, length in enumerate(lengths.tolist()):
        yield source[i : i + 1, :length], lengths[i : i + 1]


def length_factor(length: int, alpha: float) -> float:
    return (5 + length) ** alpha / (5 + 1) ** alpha


def coverage_term(alignments: Tensor, beta: float) -> float:
    """alignments: (T, S), those of eos included."""
    looked = alignments.sum(0).tolist()
    return beta * sum(math.log(min(total, 1.0)) for total in looked) if beta else 0.0


@torch.no_grad()
def teacher_forced(
    model: Seq2Seq, source: Tensor, length: Tensor, outputs: list[tuple[int, ...]]
) -> list[tuple[float, Tensor]]:
    """For one sentence, log-probability and alignments (T, S) of each output: tokens, with eos where there is one."""
    target = torch.full((len(outputs), max(map(len, outputs))), PAD)
    for row, output in zip(target, outputs, strict=True):
        row[: len(output)] = torch.tensor(output)
    logits, alignments = model(source.expand(len(outputs), -1), length.expand(len(outputs)), target)
    each = logits.log_softmax(-1).gather(2, target[..., None]).squeeze(2)
    return [(each[k, : len(o)].sum().item(), alignments[k, : len(o)]) for k, o in enumerate(outputs)]


def all_outputs(vocab: int, max_length: int, eos: int = EOS) -> list[tuple[int, ...]]:
    others = [token for token in range(vocab) if token != eos]
    ended = [(*tokens, eos) for length in range(max_length) for tokens in itertools.product(others, repeat=length)]
    return ended + list(itertools.product(others, repeat=max_length))


def without_eos(output: tuple[int, ...]) -> list[int]:
    return [token for token in output if token != EOS]


# Beam search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), PENALTIES)
@pytest.mark.parametrize(("cell", "input_feeding"), [("lstm", True), ("gru", False)])
def test_a_large_beam_is_exhaustive(cell: str, input_feeding: bool, alpha: float, beta: float) -> None:
    """The best of all outputs of up to four tokens, in their order, for all sentences of a batch at once."""
    model = make(target_vocab=4, eos_bias=-1.0, cell=cell, input_feeding=input_feeding)
    outputs = all_outputs(vocab=4, max_length=4)
    assert len(outputs) == 1 + 3 + 9 + 27 + 81
    options: dict[str, Any] = {"max_length": 4, "length_penalty": alpha, "coverage_penalty": beta}
    options["beam_size"] = len(outputs)
    every = model.generate(*batch(), **options)
    best = model.generate(*batch(), num_hypotheses=5, **options)
    for i, (source, length) in enumerate(sentences()):
        ranked = []
        forced = teacher_forced(model, source, length, outputs)
        for output, (log_probability, alignments) in zip(outputs, forced, strict=True):
            score = log_probability / length_factor(len(output), alpha) + coverage_term(alignments, beta)
            ranked.append((score, output, alignments))
        ranked.sort(key=lambda entry: -entry[0])
        assert len(every[i]) == len(outputs) and len(best[i]) == 5
        for hypothesis, (score, output, alignments) in zip(every[i], ranked, strict=True):
            assert hypothesis.tokens == without_eos(output)
            assert hypothesis.score == pytest.approx(score, rel=1e-10)
            torch.testing.assert_close(hypothesis.alignments, alignments[: len(hypothesis.tokens)])
        for got, expected in zip(best[i], every[i], strict=False):
            assert_same(got, expected)
    assert len({len(hypotheses[0].tokens) for hypotheses in every}) > 1


def assert_same(got: Hypothesis, expected: Hypothesis) -> None:
    assert got.tokens == expected.tokens
    assert got.score == pytest.approx(expected.score, rel=1e-10)
    torch.testing.assert_close(got.alignments, expected.alignments)


@torch.no_grad()
def slow_search(
    model: Seq2Seq,
    source: Tensor,
    length: Tensor,
    *,
    beam_size: int,
    max_length: int,
    num_hypotheses: int | None = None,
    length_penalty: float = 0.0,
    coverage_penalty: float = 0.0,
    early_stopping: bool = False,
) -> tuple[list[Hypothesis], int]:
    """One sentence, all hypotheses computed anew in each step, to the last step even where the rest cannot win.

    Returns the hypotheses and the step after which the sentence is said to leave the batch. Only with
    ``early_stopping`` the search ends there.
    """
    wanted = beam_size if num_hypotheses is None else num_hypotheses
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Hypothesis] = []
    leaves = 0
    for step in range(1, max_length + 1):
        target = torch.tensor([[*tokens, PAD] for _, tokens in live])
        logits, alignments = model(source.expand(len(live), -1), length.expand(len(live)), target)
        log_probabilities = logits[:, -1].log_softmax(-1).tolist()
        candidates = [
            (total + log_probabilities[k][token], (*tokens, token), k)
            for k, (total, tokens) in enumerate(live)
            for token in range(logits.shape[2])
        ]
        candidates.sort(reverse=True)
        ending = [c for c in candidates[:beam_size] if c[1][-1] == EOS]
        going_on = [c for c in candidates if c[1][-1] != EOS][:beam_size]
        for total, tokens, k in ending + (going_on if step == max_length else []):
            score = total / length_factor(step, length_penalty) + coverage_term(alignments[k], coverage_penalty)
            kept = without_eos(tokens)
            finished.append(Hypothesis(kept, score, alignments[k, : len(kept)]))
        finished.sort(key=lambda hypothesis: -hypothesis.score)
        live = [(total, tokens) for total, tokens, _ in going_on]
        if not leaves:
            reach = live[0][0] / length_factor(max_length, length_penalty) if live else -math.inf
            beaten = len(finished) >= wanted and reach <= finished[wanted - 1].score
            if not live or beaten or step == max_length or (early_stopping and len(finished) >= beam_size):
                leaves = step
        if not live or (leaves and early_stopping):
            break
    return finished[:wanted], leaves


def check_against_slow_search(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Hypotheses, and how many sentences each step had. Returns the step after which each sentence left."""
    rows = []
    step = model.decoder.step

    def spy(tokens: Tensor, state: Any, memory: Any) -> Any:
        assert tokens.shape[0] == memory.batch_size == state.hidden[0].shape[0]
        assert tokens.shape[1] <= options["beam_size"]
        rows.append(memory.batch_size)
        return step(tokens, state, memory)

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "step", spy)
        generated = model.generate(*batch(), **options)
    in_one_call = model.generate(*batch(), **options)
    leaving = []
    for hypotheses, same, (source, length) in zip(generated, in_one_call, sentences(), strict=True):
        expected, leaves = slow_search(model, source, length, **options)
        leaving.append(leaves)
        assert len(hypotheses) == len(expected)
        for got, want in zip(hypotheses, expected, strict=True):
            assert_same(got, want)
        assert len(hypotheses) == len(same)
        for got, want in zip(same, hypotheses, strict=True):
            assert_same(got, want)
    assert rows == [sum(leaves >= t for leaves in leaving) for t in range(1, max(leaving) + 1)]
    return leaving


@slow_if(lambda beam_size, alpha, **_: beam_size == 12 or (alpha == 0.6 and beam_size != 3))
@pytest.mark.parametrize(("alpha", "beta"), PENALTIES)
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5, 12])
def test_small_beams(beam_size: int, alpha: float, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    options = {"beam_size": beam_size, "max_length": 9, "length_penalty": alpha, "coverage_penalty": beta}
    leaving = check_against_slow_search(model, monkeypatch, **options)
    if alpha == beta == 0 and beam_size < 12:
        assert len(set(leaving)) > 1, "the sentences were to leave at different steps"
    check_against_slow_search(model, monkeypatch, num_hypotheses=1, **options)
    check_against_slow_search(model, monkeypatch, early_stopping=True, **options)


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize(("cell", "layers"), [("lstm", 1), ("lstm", 2), ("gru", 1), ("gru", 2)])
def test_cells(cell: str, layers: int, input_feeding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(cell=cell, num_layers=layers, input_feeding=input_feeding)
    check_against_slow_search(model, monkeypatch, beam_size=4, max_length=8, length_penalty=0.6, num_hypotheses=3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attentions(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(attention=attention)
    check_against_slow_search(
        model, monkeypatch, beam_size=4, max_length=8, length_penalty=1.0, coverage_penalty=0.1, num_hypotheses=2
    )


@pytest.mark.parametrize("beam_size", [1, 4])
def test_scores_and_alignments_are_those_of_teacher_forcing(beam_size: int) -> None:
    model = make()
    for hypotheses, (source, length) in zip(
        model.generate(*batch(), beam_size=beam_size, max_length=8), sentences(), strict=True
    ):
        assert len(hypotheses) == beam_size
        assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == beam_size
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for tokens, score, alignments in hypotheses:
            output = (*tokens, EOS) if len(tokens) < 8 else tuple(tokens)
            log_probability, expected = teacher_forced(model, source, length, [output])[0]
            assert score == pytest.approx(log_probability, rel=1e-10)
            assert alignments.shape == (len(tokens), length.item())
            torch.testing.assert_close(alignments, expected[: len(tokens)])


def test_batch_is_as_one_by_one_in_any_order() -> None:
    model = make()
    source, lengths = batch()
    options: dict[str, Any] = {"beam_size": 4, "max_length": 9, "length_penalty": 0.8, "coverage_penalty": 0.1}
    together = model.generate(source, lengths, **options)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(5))
    shuffled = model.generate(source[order], lengths[order], **options)
    for i, hypotheses in zip(order.tolist(), shuffled, strict=True):
        for got, expected in zip(hypotheses, together[i], strict=True):
            assert_same(got, expected)
    for alone, hypotheses in zip(sentences(), together, strict=True):
        for got, expected in zip(model.generate(*alone, **options)[0], hypotheses, strict=True):
            assert_same(got, expected)


def test_greedy_is_a_beam_of_one() -> None:
    model = make()
    for got, (source, length) in zip(model.generate(*batch(), max_length=9), sentences(), strict=True):
        tokens: list[int] = []
        while len(tokens) < 9:
            logits, _ = model(source, length, torch.tensor([[*tokens, PAD]]))
            token = int(logits[0, -1].argmax())
            if token == EOS:
                break
            tokens.append(token)
        assert len(got) == 1 and got[0].tokens == tokens
    memory, state = model.encode(*batch())
    options = SearchOptions(bos=model.bos, eos=EOS, max_length=9).checked()
    with torch.no_grad():
        beams = search.beam_search(model.decoder, memory, state, options)
        for got, expected in zip(search.greedy_search(model.decoder, memory, state, options), beams, strict=True):
            assert_same(got[0], expected[0])


@pytest.mark.parametrize("sample", [False, True])
def test_the_memory_is_never_tiled(sample: bool) -> None:
    """Hypotheses are queries: keys stay as they were made until a sentence leaves."""
    model = make()
    calls = []
    model.decoder.attention.register_forward_hook(lambda module, args, out: calls.append((args[0].shape, args[1])))
    choice = {"sample": True, "num_hypotheses": 5} if sample else {"beam_size": 5}
    model.generate(*batch(), max_length=9, **choice)
    sentences_left, keys = len(LENGTHS), calls[0][1].keys
    for step, (query, memory) in enumerate(calls):
        assert query == (memory.batch_size, 1 if step == 0 and not sample else 5, HIDDEN)
        assert memory.keys.shape == (memory.batch_size, 7, UNITS)
        if memory.batch_size == sentences_left:
            assert memory.keys is keys
        assert memory.batch_size <= sentences_left
        sentences_left, keys = memory.batch_size, memory.keys
    assert sentences_left < len(LENGTHS)


class _Work(TorchDispatchMode):
    """Elements of all results of the operators that run."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements += sum(
            t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if torch.is_tensor(t)
        )
        return out


@pytest.mark.parametrize("choice", [{"beam_size": 4, "coverage_penalty": 0.1}, {"sample": True, "num_hypotheses": 4}])
def test_a_step_costs_the_same_however_long_the_hypotheses(
    choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(eos_bias=-1000.0, backend="reference")
    step, work, marks = model.decoder.step, _Work(), []

    def spy(*args: Any) -> Any:
        marks.append(work.elements)
        return step(*args)

    monkeypatch.setattr(model.decoder, "step", spy)
    with work:
        model.generate(*batch(), max_length=30, **choice)
    costs = [after - before for before, after in itertools.pairwise(marks)]
    assert len(costs) == 29 and costs[1] > 0 and set(costs[1:]) == {costs[1]}


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_tiny_vocabularies_have_fewer_hypotheses(vocab: int) -> None:
    model = make(target_vocab=vocab, padding_idx=0, bos=0, eos=0)
    generated = model.generate(*batch(), beam_size=50, max_length=3)
    outputs = [[t for t in output if t != 0] for output in all_outputs(vocab, 3, eos=0)]
    assert len(outputs) == {1: 1, 2: 4, 3: 1 + 2 + 4 + 8}[vocab]
    for hypotheses in generated:
        assert sorted(h.tokens for h in hypotheses) == sorted(outputs)
        assert sum(math.exp(h.score) for h in hypotheses) == pytest.approx(1.0)


def test_impossible_tokens_are_not_generated() -> None:
    """Also not to fill the places of a beam."""
    model = make(target_vocab=5)
    with torch.no_grad():
        model.decoder.output.bias[[PAD, BOS]] = -math.inf
    for choice in ({"beam_size": 40}, {"sample": True, "num_hypotheses": 40}, {"beam_size": 40, "coverage_penalty": 1}):
        for hypotheses in model.generate(*batch(), max_length=3, **choice):
            assert all({3, 4}.issuperset(h.tokens) and math.isfinite(h.score) for h in hypotheses)
            assert "sample" in choice or len(hypotheses) == 1 + 2 + 4 + 8


def test_a_step_that_no_token_looks_at_keeps_scores_finite() -> None:
    """Alignments of float32 may be 0, and log(0) would make all scores the same."""
    model = make(attention="cosine", scale=20.0, dtype=torch.float32)
    generated = model.generate(*batch(), beam_size=3, max_length=4, coverage_penalty=0.5)
    zeros = 0
    for hypotheses, (source, length) in zip(generated, sentences(), strict=True):
        for tokens, score, _ in hypotheses:
            output = (*tokens, EOS) if len(tokens) < 4 else tuple(tokens)
            log_probability, alignments = teacher_forced(model, source, length, [output])[0]
            looked = alignments.double().sum(0)
            zeros += int((looked == 0).sum())
            smallest = torch.finfo(torch.float32).tiny
            expected = log_probability + 0.5 * looked.clamp(smallest, 1.0).log().sum().item()
            assert score == pytest.approx(expected, rel=1e-4)
    assert zeros > 0


def test_a_model_of_nan() -> None:
    """Nothing to be had, but an answer for each sentence, and an end."""
    model = make()
    with torch.no_grad():
        model.decoder.output.bias.fill_(math.nan)
    for choice in ({"beam_size": 2}, {"sample": True, "num_hypotheses": 2}):
        for hypotheses in model.generate(*batch(), max_length=3, **choice):
            assert hypotheses and all(math.isnan(h.score) for h in hypotheses)


def test_max_length_of_one() -> None:
    for hypotheses, (source, length) in zip(
        make().generate(*batch(), max_length=1, beam_size=TARGET_VOCAB), sentences(), strict=True
    ):
        forced = teacher_forced(make(), source, length, [(token,) for token in range(TARGET_VOCAB)])
        ranked = sorted(range(TARGET_VOCAB), key=lambda token: -forced[token][0])
        assert [h.tokens for h in hypotheses] == [without_eos((token,)) for token in ranked]


@pytest.mark.parametrize("choice", [{"beam_size": 3}, {"sample": True, "num_hypotheses": 3}])
def test_empty_sentences(choice: dict[str, Any]) -> None:
    model = make()
    source, lengths = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    first, second = model.generate(source, lengths, max_length=4, **choice)
    assert len(first) == len(second) == 3
    assert all(h.alignments.shape == (len(h.tokens), 0) for h in first + second)
    if "sample" not in choice:
        assert first[0].tokens == second[0].tokens


@pytest.mark.parametrize("choice", [{"beam_size": 3, "coverage_penalty": 0.1}, {"sample": True, "num_hypotheses": 3}])
def test_low_precision(choice: dict[str, Any]) -> None:
    """Scores are sums of float32 log-probabilities in float64, whatever the dtype of the model."""
    for model, autocast in ((make(dtype=torch.float32), True), (make(dtype=torch.bfloat16), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            generated = model.generate(*batch(), max_length=4, **choice)
        assert all(math.isfinite(h.score) and len(hs) == 3 for hs in generated for h in hs)


def test_inputs_are_not_written() -> None:
    model = make(dropout=0.5)
    source, lengths = batch()
    before = source.clone(), lengths.clone()
    model.generate(source, lengths, beam_size=3, max_length=5)
    model.generate(source, lengths, sample=True, num_hypotheses=3, max_length=5)
    assert torch.equal(source, before[0]) and torch.equal(lengths, before[1]) and model.training


# Sampling -------------------------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_samples_repeat_with_their_seed() -> None:
    model = make()
    options: dict[str, Any] = {"sample": True, "num_hypotheses": 4, "max_length": 8}
    first, again, other = (model.generate(*batch(), generator=seeded(s), **options) for s in (1, 1, 2))
    for got, expected in zip(itertools.chain(*again), itertools.chain(*first), strict=True):
        assert got.tokens == expected.tokens and got.score == expected.score
        assert torch.equal(got.alignments, expected.alignments)
    assert [h.tokens for hs in first for h in hs] != [h.tokens for hs in other for h in hs]
    torch.manual_seed(3)
    without = model.generate(*batch(), **options)
    torch.manual_seed(3)
    repeated = model.generate(*batch(), **options)
    assert [h.tokens for hs in without for h in hs] == [h.tokens for hs in repeated for h in hs]
    state = torch.get_rng_state()
    model.generate(*batch(), generator=seeded(1), **options)
    assert torch.equal(torch.get_rng_state(), state), "a generator was given: the default one is not touched"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("input_feeding", [True, False])
def test_scores_and_alignments_of_samples(cell: str, input_feeding: bool) -> None:
    """Those of the model, not of the distribution that temperature and top_k make of it."""
    model = make(cell=cell, input_feeding=input_feeding)
    generated = model.generate(
        *batch(), sample=True, num_hypotheses=3, temperature=1.7, top_k=5, max_length=6, generator=seeded(0)
    )
    ends = set()
    for hypotheses, (source, length) in zip(generated, sentences(), strict=True):
        assert len(hypotheses) == 3
        for tokens, score, alignments in hypotheses:
            ends.add(len(tokens))
            output = (*tokens, EOS) if len(tokens) < 6 else tuple(tokens)
            log_probability, expected = teacher_forced(model, source, length, [output])[0]
            assert score == pytest.approx(log_probability, rel=1e-10)
            assert alignments.shape == (len(tokens), length.item())
            torch.testing.assert_close(alignments, expected[: len(tokens)])
    assert len(ends) > 2


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"temperature": 1e-30}, {"temperature": 1e-300, "top_k": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limits_that_are_greedy(choice: dict[str, Any], dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    greedy = model.generate(*batch(), max_length=8)
    for samples, expected in zip(
        model.generate(*batch(), sample=True, num_hypotheses=3, max_length=8, **choice), greedy, strict=True
    ):
        assert len(samples) == 3
        for sample in samples:
            assert sample.tokens == expected[0].tokens
            assert sample.score == pytest.approx(expected[0].score, rel=1e-5)
            torch.testing.assert_close(sample.alignments, expected[0].alignments)


def chi_square_bound(degrees: int) -> float:
    """What a chi-square variable exceeds once in ten thousand times: Wilson and Hilferty 1931."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_frequencies(drawn: Counter[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]) -> None:
    """Chi-square test; what is expected less than ten times is counted together."""
    total = sum(drawn.values())
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert all(probabilities.get(output, 0.0) > 0 for output in drawn)
    common = [output for output, p in probabilities.items() if p * total >= 10]
    cells = [(drawn[output], probabilities[output] * total) for output in common]
    cells.append((total - sum(n for n, _ in cells), total - sum(e for _, e in cells)))
    cells = [(n, expected) for n, expected in cells if expected > 1e-6]
    assert len(cells) > 3
    chi_square = sum((n - expected) ** 2 / expected for n, expected in cells)
    assert chi_square < chi_square_bound(len(cells) - 1)


def draw(model: Seq2Seq, source: Tensor, length: Tensor, max_length: int, **options: Any) -> Counter[tuple[int, ...]]:
    hypotheses = model.generate(source, length, sample=True, max_length=max_length, generator=seeded(7), **options)[0]
    return Counter((*h.tokens, EOS) if len(h.tokens) < max_length else tuple(h.tokens) for h in hypotheses)


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (0.6, None), (2.5, None), (1.0, 2), (0.7, 3), (1.0, 100)]
)
def test_the_distribution_of_samples(temperature: float, top_k: int | None) -> None:
    """5000 samples of one sentence, all of them queries on one memory, and the probability of every output."""
    model = make(target_vocab=4, scale=2.0, eos_bias=0.0)
    source, length = next(sentences())
    probabilities = {}
    for output in all_outputs(vocab=4, max_length=3):
        logits, _ = model(source, length, torch.tensor([output]))
        probability = 1.0
        for row, token in zip(logits[0].tolist(), output, strict=True):
            eligible = sorted(row, reverse=True)[:top_k]
            weight = math.exp(row[token] / temperature) if row[token] in eligible else 0.0
            probability *= weight / sum(math.exp(x / temperature) for x in eligible)
        probabilities[output] = probability
    drawn = draw(model, source, length, 3, num_hypotheses=5000, temperature=temperature, top_k=top_k)
    assert_frequencies(drawn, probabilities)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_no_random_number_draws_an_impossible_token(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest one, where the first and the last token have no probability."""
    model = make(dtype=torch.float32, scale=2.0)
    with torch.no_grad():
        model.decoder.output.bias[[0, TARGET_VOCAB - 1]] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **options: torch.full(shape, number, **options))
    for hypotheses in model.generate(*batch(), sample=True, max_length=5):
        assert math.isfinite(hypotheses[0].score)
        assert hypotheses[0].tokens == [1 if number == 0 else TARGET_VOCAB - 2] * 5


def test_a_high_temperature_is_uniform() -> None:
    drawn = draw(make(), *next(sentences()), 1, num_hypotheses=5000, temperature=1e30)
    assert_frequencies(drawn, {(token,): 1 / TARGET_VOCAB for token in range(TARGET_VOCAB)})


def test_samples_of_a_batch_are_independent() -> None:
    """The same sentence 1000 times: as 1000 samples of it."""
    model = make(target_vocab=4, scale=2.0, eos_bias=0.0)
    source, length = next(sentences())
    outputs = all_outputs(vocab=4, max_length=2)
    forced = teacher_forced(model, source, length, outputs)
    probabilities = {output: math.exp(p) for output, (p, _) in zip(outputs, forced, strict=True)}
    generated = model.generate(
        source.expand(1000, -1), length.expand(1000), sample=True, num_hypotheses=2, max_length=2, generator=seeded(3)
    )
    for k in range(2):
        kth = [hypotheses[k].tokens for hypotheses in generated]
        assert_frequencies(Counter((*t, EOS) if len(t) < 2 else tuple(t) for t in kth), probabilities)
    pairs = Counter(tuple(map(len, (hypotheses[0].tokens, hypotheses[1].tokens))) for hypotheses in generated)
    lengths = {n: sum(p for o, p in probabilities.items() if len(without_eos(o)) == n) for n in range(3)}
    assert_frequencies(pairs, {(a, b): lengths[a] * lengths[b] for a in lengths for b in lengths})


def test_sentences_whose_samples_have_ended_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    step, rows = model.decoder.step, []

    def spy(tokens: Tensor, state: Any, memory: Any) -> Any:
        assert tokens.shape == (memory.batch_size, 2)
        rows.append(memory.batch_size)
        return step(tokens, state, memory)

    monkeypatch.setattr(model.decoder, "step", spy)
    generated = model.generate(*batch(), sample=True, num_hypotheses=2, max_length=9, generator=seeded(0))
    steps = [max(min(len(h.tokens) + 1, 9) for h in hypotheses) for hypotheses in generated]
    assert len(set(steps)) > 1
    assert rows == [sum(n > t for n in steps) for t in range(max(steps))]


@pytest.mark.parametrize(
    "choice",
    [
        {"beam_size": 3, "length_penalty": 0.5, "coverage_penalty": 0.25, "num_hypotheses": 2, "max_length": 6},
        {"sample": True, "temperature": 0.5, "top_k": 3, "max_length": 6},
    ],
    ids=["beam", "sample"],
)
def test_numbers_of_numpy(choice: dict[str, Any]) -> None:
    model = make(padding_idx=np.int64(PAD), bos=np.int32(BOS), eos=np.int64(EOS))
    assert type(model.eos) is int
    of_numpy = {
        name: x if isinstance(x, bool) else np.float32(x) if isinstance(x, float) else np.int64(x)
        for name, x in choice.items()
    }
    torch.manual_seed(1)
    expected = model.generate(*batch(), **choice)
    torch.manual_seed(1)
    for got, other in zip(model.generate(*batch(), **of_numpy), expected, strict=True):
        for one, another in zip(got, other, strict=True):
            assert_same(one, another)


# Errors ---------------------------------------------------------------------------------------------------------------

MODEL = make()


def failing(error: type[Exception], message: str, **options: Any) -> tuple[Callable[[], Any], type[Exception], str]:
    return lambda: MODEL.generate(*batch(), **options), error, message


ERRORS = [
    failing(ValueError, "beam_size must be a positive integer, got 0", beam_size=0),
    failing(ValueError, "beam_size must be a positive integer, got 2.0", beam_size=2.0),
    failing(ValueError, "max_length must be a positive integer, got 0", max_length=0),
    failing(ValueError, "num_hypotheses must be a positive integer, got 0", num_hypotheses=0),
    failing(ValueError, "num_hypotheses must be at most beam_size = 3, got 4", beam_size=3, num_hypotheses=4),
    failing(ValueError, "length_penalty must be a number of at least 0, got -0.5", length_penalty=-0.5),
    failing(ValueError, "length_penalty is too large for 50 tokens: 400.0", length_penalty=400.0, max_length=50),
    failing(ValueError, "length_penalty must be a number of at least 0, got nan", length_penalty=math.nan),
    failing(ValueError, "coverage_penalty must be a number of at least 0, got inf", coverage_penalty=math.inf),
    failing(ValueError, "coverage_penalty must be a number of at least 0, got '1'", coverage_penalty="1"),
    failing(ValueError, "temperature must be a number above 0, got 0", sample=True, temperature=0),
    failing(ValueError, "temperature must be a number above 0, got nan", sample=True, temperature=math.nan),
    failing(ValueError, "top_k must be a positive integer, got 0", sample=True, top_k=0),
    failing(TypeError, "generator must be a torch.Generator or None, got int", sample=True, generator=5),
    failing(ValueError, "with sample=True there is no use for beam_size", sample=True, beam_size=2),
    failing(ValueError, "with sample=True there is no use for length_penalty", sample=True, length_penalty=1.0),
    failing(ValueError, "with sample=True there is no use for coverage_penalty", sample=True, coverage_penalty=1.0),
    failing(ValueError, "with sample=True there is no use for early_stopping", sample=True, early_stopping=True),
    failing(ValueError, "with sample=False there is no use for temperature, top_k", temperature=0.5, top_k=3),
    failing(ValueError, "with sample=False there is no use for generator", generator=torch.Generator()),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == f"Seq2Seq.generate: {message}"
