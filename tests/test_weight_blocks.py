"""Blocks of weights, which searches and encoders of few sentences keep: their layout, and that they are up to date."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import ops
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.fused import blocks
from attn_kernels.seq2seq.fused.blocks import Part, forms_of

OUTPUTS = 32  # of a block
DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _cpu(compiled: str) -> None:
    """All tests here are of the C++ kernels, those marked every_level of each level of them."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """What was made of weights."""
    parts: list[Part] = []
    make = blocks._make
    monkeypatch.setattr(blocks, "_make", lambda weight, part: parts.append(part) or make(weight, part))
    return parts


def model(**settings: Any) -> Seq2Seq:
    torch.manual_seed(0)
    one = Seq2Seq(11, 70, **{"embedding_size": 12, "hidden_size": 20, "units": 16, **settings}).eval()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(3)
    return one


def found(one: Seq2Seq, dtype: torch.dtype | None, beam_size: int = 2) -> list[tuple[list[int], float]]:
    source = torch.arange(3, 9).reshape(1, 6)
    given = {"beam_size": beam_size, "max_length": 6, "weight_dtype": dtype}
    (each,) = one.generate(source, torch.tensor([6]), **given)
    return [(hypothesis.tokens, hypothesis.score) for hypothesis in each]


def laid_out(weight: Tensor, is_rounded: bool) -> Tensor:
    """What csrc/decode.h says, as bits."""
    n, k = weight.shape
    padded = nn.functional.pad(weight, (0, 0, 0, -n % OUTPUTS)).reshape(-1, OUTPUTS, k).mT
    if not is_rounded:
        return padded.contiguous().view(torch.int32).flatten()
    halves = padded.bfloat16().unflatten(2, (2, OUTPUTS // 2)).mT.contiguous()  # (blocks, k, 16, 2)
    return halves.view(torch.int32).flatten()


@pytest.mark.every_level
@pytest.mark.parametrize("is_rounded", [False, True])
def test_layout(is_rounded: bool) -> None:
    """Of weights that are no whole blocks or vectors, and of columns of a wider one."""
    for n, k in ((1, 1), (31, 16), (64, 37), (33, 5)):
        wide = torch.randn(n, k + 3, generator=torch.Generator().manual_seed(n))
        for weight in (wide[:, :k], wide[:, 3:], wide[:, 3:].contiguous()):
            got = ops.kernel("lay_out_weight", "cpu")(weight, is_rounded)
            assert torch.equal(got.view(torch.int32), laid_out(weight, is_rounded))


def _in_place(one: Seq2Seq) -> None:
    with torch.no_grad():
        one.decoder.output.weight.mul_(-1)


def _through_data(one: Seq2Seq) -> None:
    """Which autograd's version counter does not see."""
    weight = one.decoder.rnn.weight_hh_l0
    version = weight._version
    weight.data.copy_(weight.detach() * -1)
    assert weight._version == version


def _through_numpy(one: Seq2Seq) -> None:
    one.decoder.attention.query_projection.weight.detach().numpy()[3:5, 2] += 10


def _other_data(one: Seq2Seq) -> None:
    weight = one.decoder.attentional.weight
    weight.data = weight.data * -1


def _replaced(one: Seq2Seq) -> None:
    one.decoder.rnn.weight_ih_l0 = nn.Parameter(one.decoder.rnn.weight_ih_l0.detach() * -1)


def _loaded(one: Seq2Seq) -> None:
    one.load_state_dict({name: -x for name, x in one.state_dict().items()})


def _optimized(one: Seq2Seq) -> None:
    optimizer = torch.optim.Adam(one.parameters(), lr=0.3, fused=True)
    logits, _ = one(torch.arange(3, 9).reshape(1, 6), torch.tensor([6]), torch.arange(3, 8).reshape(1, 5))
    nn.functional.cross_entropy(logits[0], torch.arange(3, 8)).backward()
    optimizer.step()


def _encoder(one: Seq2Seq) -> None:
    one.encoder.rnn.weight_hh_l0.data.mul_(-1)


CHANGES = [_in_place, _through_data, _through_numpy, _other_data, _replaced, _loaded, _optimized, _encoder]


@DTYPES
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Seq2Seq], None], dtype: torch.dtype | None, made: list[Part]) -> None:
    one = model()
    first = found(one, dtype)
    assert first == found(copy.deepcopy(one), dtype)  # of a copy everything is made anew
    made.clear()
    assert found(one, dtype) == first
    assert not made
    change(one)
    after = found(one, dtype)
    assert made
    assert after == found(copy.deepcopy(one), dtype) != first


@DTYPES
def test_inference_tensors(dtype: torch.dtype | None, made: list[Part]) -> None:
    """Which have no version counter."""
    with torch.inference_mode():
        one = model()
        first = found(one, dtype)
        made.clear()
        assert found(one, dtype) == first
        assert not made
        one.decoder.output.weight.mul_(-1)
        assert found(one, dtype) != first
        assert [part.end for part in made] == [20]


def test_kept_for_both_dtypes_and_in_training_mode(made: list[Part]) -> None:
    """A search of a model in training mode is of a shallow copy, with the same parameters."""
    one = model(dropout=0.5)
    first = found(one, None), found(one, torch.bfloat16)
    assert first[0] != first[1]
    made.clear()
    one.train()
    assert (found(one, None), found(one, torch.bfloat16)) == first
    assert not made


@DTYPES
def test_copies_know_nothing(dtype: torch.dtype | None) -> None:
    one = model()
    names, before = list(one.state_dict()), len(_pickled(one))
    first = found(one, dtype)
    assert list(one.state_dict()) == names
    data = _pickled(one)
    assert len(data) == before
    assert found(torch.load(io.BytesIO(data), weights_only=False), dtype) == first
    assert not any(blocks._kept.get(x) for x in copy.deepcopy(one).parameters())


def _pickled(one: Seq2Seq) -> bytes:
    file = io.BytesIO()
    torch.save(one, file)
    return file.getvalue()


def test_freed_with_the_weight() -> None:
    one = model()
    gc.collect()
    before = len(blocks._kept)
    found(one, torch.bfloat16)
    assert len(blocks._kept) > before
    one.decoder.output.weight = nn.Parameter(one.decoder.output.weight.detach().clone())
    found(one, torch.bfloat16)
    del one
    gc.collect()
    assert len(blocks._kept) == before


def test_written_to_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread's write may have got into is used once, not kept."""
    weight, part, make = nn.Parameter(torch.ones(3, 4)), Part(0, 4, "blocks"), blocks._make

    def write_and_make(of: Tensor, part: Part) -> Tensor:
        of.data.add_(1)
        return make(of, part)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_make", write_and_make)
        forms_of(weight, part)
    weight.data.sub_(1)  # the values that were there before
    (form,) = forms_of(weight, part)
    assert torch.equal(form.view(torch.int32), laid_out(weight.detach(), False))
    assert forms_of(weight, part)[0] is form


def test_threads() -> None:
    one = model()
    expected = found(copy.deepcopy(one), torch.bfloat16)
    with ThreadPoolExecutor(4) as pool:
        for each in pool.map(lambda _: found(one, torch.bfloat16), range(12)):
            assert each == expected


def test_what_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 in large weights, and float64."""
    weight, part = torch.randn(40, 6), Part(1, 6, "blocks")
    assert forms_of(weight, part)[0].numel() == 64 * 5
    assert forms_of(weight.double(), part)[0].numel() == 0
    monkeypatch.setattr(blocks, "MAX_COPIED_BYTES", 40 * 5 * 4 - 1)
    nothing, rounded = forms_of(weight, part, Part(1, 6, "rounded blocks"))
    assert nothing.numel() == 0
    assert rounded.numel() == 32 * 5
    one = model()
    as_it_lies = found(one, None)
    monkeypatch.undo()
    in_blocks = found(one, None)
    assert [tokens for tokens, _ in in_blocks] == [tokens for tokens, _ in as_it_lies]
    assert [score for _, score in in_blocks] == pytest.approx([score for _, score in as_it_lies], rel=1e-5)


def test_blocks_of_another_weight() -> None:
    steps = ops.kernel("recurrent_steps", "cpu")
    gates, weight, lengths = torch.zeros(1, 2, 8), torch.zeros(8, 2), torch.tensor([2])
    hidden, cell, out = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, 2)
    for wrong in (torch.zeros(32), torch.zeros(64, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="weight is laid out as another weight"):
            steps(gates, weight, wrong, None, lengths, False, hidden, cell, out)
