"""Steps of a search on the CPU against ``Decoder.step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import gemm
from attn_kernels.seq2seq import Seq2Seq, search
from attn_kernels.seq2seq.attentions import STATELESS as ATTENTIONS
from attn_kernels.seq2seq.fused import inference
from attn_kernels.seq2seq.fused.inference import FastDecoder, fast_decoder
from attn_kernels.seq2seq.options import SearchOptions

SOURCE, TARGET = 11, 13


def model(**settings: Any) -> Seq2Seq:
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": 6, "units": 7, "dtype": torch.float64}
    return Seq2Seq(SOURCE, TARGET, **{**sizes, **settings}).eval()


def source(sentences: int = 4, steps: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, SOURCE, (sentences, steps), generator=generator)
    return tokens, torch.tensor([steps, 0, 1, steps // 2])[:sentences]


@pytest.mark.parametrize("length", [1, 100], ids=["short", "long"])
@pytest.mark.parametrize("hypotheses", [1, 3])
@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_steps(cell: str, attention: str, layers: int, input_feeding: bool, hypotheses: int, length: int) -> None:
    """Several in a row, each on what the one before made, for short searches and long ones, which have a table."""
    decoder = (one := model(cell=cell, attention=attention, num_layers=layers, input_feeding=input_feeding)).decoder
    memory, state = one.encode(*source())
    state = state.reorder(torch.zeros(4, hypotheses, dtype=torch.int64))
    steps, projected = fast_decoder(decoder, state, memory, hypotheses, length)
    assert isinstance(steps, FastDecoder)
    assert (steps.table is not None) == (length == 100)
    before = [x.clone() for x in (*state.hidden, *state.cell)]
    expected_state = state
    for n in range(3):
        tokens = (torch.arange(4 * hypotheses).view(4, hypotheses) * (n + 1)) % TARGET
        logits, alignments, new = steps.step(tokens, state, projected)
        expected = decoder.step(tokens, expected_state, memory)
        torch.testing.assert_close((logits, alignments), expected[:2], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(tuple(new), tuple(expected[2]), atol=1e-12, rtol=1e-9)
        if n == 0:  # nothing is written to
            torch.testing.assert_close([*state.hidden, *state.cell], before, atol=0, rtol=0)
        state, expected_state = new, expected[2]
        chosen = torch.tensor([3, 0, 2])  # as where a sentence has ended
        if n == 1:
            memory, projected = memory.select(chosen), projected.select(chosen)
            state, expected_state = state.select(chosen), expected_state.select(chosen)
            break
    tokens = torch.full((3, hypotheses), 5)
    got, expected = steps.step(tokens, state, projected), decoder.step(tokens, expected_state, memory)
    torch.testing.assert_close(got[:2], expected[:2], atol=1e-12, rtol=1e-9)


@torch.no_grad()
def test_weights_in_packed_form() -> None:
    one = model(embedding_size=256, hidden_size=256, units=256, dtype=torch.float32)
    memory, state = one.encode(*source())
    steps, projected = fast_decoder(one.decoder, state, memory, 1, 50)
    tokens = torch.tensor([[3], [4], [5], [6]])
    got, expected = steps.step(tokens, state, projected), one.decoder.step(tokens, state, memory)
    torch.testing.assert_close(got[:2], expected[:2], atol=2e-5, rtol=0)
    torch.testing.assert_close(tuple(got[2]), tuple(expected[2]), atol=2e-5, rtol=0)


def searched(one: Seq2Seq, choice: dict[str, Any]) -> list[list[tuple[list[int], float, Tensor]]]:
    if "sample" in choice:
        choice = {**choice, "generator": torch.Generator().manual_seed(2)}
    return [[tuple(found) for found in each] for each in one.generate(*source(), max_length=20, **choice)]


@pytest.mark.parametrize(
    "choice",
    [{}, {"beam_size": 3, "length_penalty": 0.6, "coverage_penalty": 0.2}, {"sample": True, "num_hypotheses": 3}],
    ids=["greedy", "beam", "sample"],
)
@pytest.mark.parametrize("training", [False, True])
def test_searches(choice: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hypotheses, of which some are shorter than others; after a change of the weights, too."""
    one = model(dropout=0.5).train(training)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(6)  # far from uniform, so that sentences end at different times
        one.decoder.output.bias[one.eos] += 2
    made = []
    monkeypatch.setattr(search, "search_in_one_call", lambda *_: None)

    def spy(*arguments: Any) -> Any:
        steps, memory = fast_decoder(*arguments)
        made.append(steps)
        return steps, memory

    for change in (0.0, 0.05):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(change * torch.randn(parameter.shape, dtype=parameter.dtype))
        monkeypatch.setattr(search, "fast_decoder", spy)
        got = searched(one, choice)
        assert isinstance(made[-1], FastDecoder)
        monkeypatch.setattr(search, "fast_decoder", lambda decoder, state, memory, *_: (decoder, memory))
        expected = searched(one, choice)
        assert len({len(found[0]) for each in expected for found in each}) > 1
        for mine, theirs in zip(got, expected, strict=True):
            for (tokens, score, alignments), other in zip(mine, theirs, strict=True):
                assert tokens == other[0]
                assert score == pytest.approx(other[1], abs=1e-10)
                torch.testing.assert_close(alignments, other[2], atol=1e-12, rtol=0)
    assert one.training == training


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hook(one: Seq2Seq) -> None:
    one.decoder.attention.register_forward_hook(lambda *_: None)


def _replace_step(one: Seq2Seq) -> None:
    one.decoder.step = one.decoder.step


def _replace_attention(one: Seq2Seq) -> None:
    one.decoder.attention.__class__ = type("Mine", (type(one.decoder.attention),), {})


def _replace_output(one: Seq2Seq) -> None:
    one.decoder.output.__class__ = _Doubled


def _replace_query_projection(one: Seq2Seq) -> None:
    one.decoder.attention.query_projection.__class__ = _Doubled


def _append_to_output(one: Seq2Seq) -> None:
    one.decoder.output = nn.Sequential(one.decoder.output, nn.Tanh()).eval()


def _limit_embeddings(one: Seq2Seq) -> None:
    one.decoder.embedding.max_norm = 0.3


def _remove_biases_of_cells(one: Seq2Seq) -> None:
    one.decoder.rnn = nn.LSTM(11, 6, batch_first=True, bias=False, dtype=torch.float64).eval()


CHANGES = [_hook, _replace_step, _replace_attention, _replace_output, _replace_query_projection, _append_to_output]
CHANGES += [_limit_embeddings, _remove_biases_of_cells, Seq2Seq.train, Seq2Seq.bfloat16]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_decoder_itself(change: Callable[[Seq2Seq], object]) -> None:
    one = model()
    memory, state = one.encode(*source())
    options = SearchOptions(bos=1, eos=2, max_length=10).checked()
    assert isinstance(fast_decoder(one.decoder, state, memory, 1, 10)[0], FastDecoder)
    assert search.search_in_one_call(one.decoder, memory, state, options) is not None
    change(one)
    steps, same = fast_decoder(one.decoder, state, memory, 1, 10)
    assert steps is one.decoder and same.keys is memory.keys and same.values is memory.values
    assert search.search_in_one_call(one.decoder, memory, state, options) is None


def test_the_decoder_itself_elsewhere() -> None:
    one = model()
    memory, state = one.encode(*source())
    options = SearchOptions(bos=1, eos=2, max_length=10).checked()
    for grad, autocast in ((True, False), (False, True)):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert fast_decoder(one.decoder, state, memory, 1, 10)[0] is one.decoder
            assert search.search_in_one_call(one.decoder, memory, state, options) is None


@torch.no_grad()
def test_output_without_bias() -> None:
    one = model()
    one.decoder.output.bias = None
    memory, state = one.encode(*source())
    steps, projected = fast_decoder(one.decoder, state, memory, 1, 100)
    assert isinstance(steps, FastDecoder)
    tokens = torch.full((4, 1), 5)
    got, expected = steps.step(tokens, state, projected), one.decoder.step(tokens, state, memory)
    torch.testing.assert_close(got[:2], expected[:2], atol=1e-12, rtol=1e-9)


@torch.no_grad()
def test_what_is_prepared_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary a search that ends early makes nothing, a long one a table and a packed weight, later."""
    one = model(embedding_size=256, hidden_size=256, units=256, dtype=torch.float32)
    vocabulary = 1 << 15
    one.decoder.embedding = nn.Embedding(vocabulary, 256)
    one.decoder.output = nn.Linear(256, vocabulary)
    one.eval()
    memory, state = one.encode(*source())
    monkeypatch.setattr(gemm, "_LARGE_WEIGHT", vocabulary * 256)
    monkeypatch.setattr(inference, "MAX_BYTES", 1 << 28)
    steps, projected = fast_decoder(one.decoder, state, memory, 1, vocabulary)
    tokens = torch.full((4, 1), 5)
    expected = one.decoder.step(tokens, state, memory)
    made = []
    steps.rows_read += vocabulary - 4 * 20  # as after many steps
    for _ in range(24):
        got = steps.step(tokens, state, projected)
        made.append((steps.table is not None, steps.output.product.has_copy))
    torch.testing.assert_close(got[:2], expected[:2], atol=2e-5, rtol=0)
    first = [[flags[i] for flags in made].index(True) for i in (0, 1)] if gemm.can_copy(steps.embedding) else [15, 12]
    assert first == [15, 12]


@torch.no_grad()
def test_what_is_prepared_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(embedding_size=256, hidden_size=256, units=256, dtype=torch.float32)
    memory, state = one.encode(*source())
    monkeypatch.setattr(inference, "MAX_BYTES", 13 * 4 * 256 * 4 + 4 * 256 * 256 * 4)
    steps, projected = fast_decoder(one.decoder, state, memory, 1, 50)
    assert steps.table is not None and steps.table.shape == (13, 1024)
    packed = [x for x in (steps.layers[0].of_inputs, steps.layers[0].of_state, steps.of_state) if x.product.has_copy]
    assert len(packed) == (1 if gemm.can_copy(steps.embedding) else 0)
    tokens = torch.full((4, 1), 5)
    got, expected = steps.step(tokens, state, projected), one.decoder.step(tokens, state, memory)
    torch.testing.assert_close(got[:2], expected[:2], atol=2e-5, rtol=0)
