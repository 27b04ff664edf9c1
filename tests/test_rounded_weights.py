"""Rounded weights, which searches cache: their layout, and that they are up to date."""

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
from attn_kernels.seq2seq.fused import rounded as module
from attn_kernels.seq2seq.fused.rounded import Part, rounded

OUTPUTS = 32  # of a block
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _cpu(compiled: str) -> None:
    """All tests here are of the C++ kernels, those marked every_level of each level of them."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """What was made of weights."""
    parts: list[Part] = []
    make = module._make
    monkeypatch.setattr(module, "_make", lambda weight, part: parts.append(part) or make(weight, part))
    return parts


def model(**settings: Any) -> Seq2Seq:
    torch.manual_seed(0)
    one = Seq2Seq(11, 70, **{"embedding_size": 12, "hidden_size": 20, "units": 16, **settings}).eval()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(3)
    return one


def found(one: Seq2Seq, dtype: torch.dtype | None = HALF) -> list[tuple[list[int], float]]:
    source = torch.arange(3, 9).reshape(1, 6)
    (each,) = one.generate(source, torch.tensor([6]), beam_size=2, max_length=6, weight_dtype=dtype)
    return [(hypothesis.tokens, hypothesis.score) for hypothesis in each]


def blocks_of(weight: Tensor) -> Tensor:
    """What csrc/decode.h says, as words."""
    n, k = weight.shape
    padded = nn.functional.pad(weight, (0, 0, 0, -n % OUTPUTS)).bfloat16().reshape(-1, 2, OUTPUTS // 2, k)
    return padded.permute(0, 3, 2, 1).contiguous().view(torch.int32).flatten()


@pytest.mark.every_level
def test_layout() -> None:
    """Of weights that are no whole blocks or vectors, and of columns of a wider one."""
    for n, k in ((1, 1), (31, 16), (64, 37), (33, 5)):
        wide = torch.randn(n, k + 3, generator=torch.Generator().manual_seed(n))
        for weight in (wide[:, :k], wide[:, 3:], wide[:, 3:].contiguous()):
            got = ops.kernel("rounded_blocks", "cpu")(weight)
            assert torch.equal(got.view(torch.int32), blocks_of(weight))


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


CHANGES = [_in_place, _through_data, _through_numpy, _other_data, _replaced, _loaded, _optimized]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Seq2Seq], None], made: list[Part]) -> None:
    one = model()
    first = found(one)
    assert first == found(copy.deepcopy(one))  # of a copy everything is made anew
    made.clear()
    assert found(one) == first
    assert not made
    change(one)
    after = found(one)
    assert made
    assert after == found(copy.deepcopy(one)) != first


def test_inference_tensors(made: list[Part]) -> None:
    """Which have no version counter."""
    with torch.inference_mode():
        one = model()
        first = found(one)
        made.clear()
        assert found(one) == first
        assert not made
        one.decoder.output.weight.mul_(-1)
        assert found(one) != first
        assert [part.end for part in made] == [20]


def test_kept_in_training_mode(made: list[Part]) -> None:
    """A search of a model in training mode is of a shallow copy, with the same parameters."""
    one = model(dropout=0.5)
    first = found(one)
    assert first != found(one, None)
    made.clear()
    one.train()
    assert found(one) == first
    assert not made


def test_float32_and_float64_keep_nothing(made: list[Part]) -> None:
    found(model(), None)
    found(model(dtype=torch.float64), None)
    assert not made


def test_copies_know_nothing() -> None:
    one = model()
    names, before = list(one.state_dict()), len(_pickled(one))
    first = found(one)
    assert list(one.state_dict()) == names
    data = _pickled(one)
    assert len(data) == before
    assert found(torch.load(io.BytesIO(data), weights_only=False)) == first
    assert not any(module._kept.get(x) for x in copy.deepcopy(one).parameters())


def _pickled(one: Seq2Seq) -> bytes:
    file = io.BytesIO()
    torch.save(one, file)
    return file.getvalue()


def test_freed_with_the_weight() -> None:
    one = model()
    gc.collect()
    before = len(module._kept)
    found(one)
    weights = len(module._kept) - before
    assert weights > 0
    one.decoder.output.weight = nn.Parameter(one.decoder.output.weight.detach().clone())
    found(one)
    assert len(module._kept) - before == weights
    del one
    gc.collect()
    assert len(module._kept) == before


def test_written_to_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread's write may have got into is used once, not kept."""
    weight, part, make = nn.Parameter(torch.ones(3, 4)), Part(0, 4), module._make

    def write_and_make(of: Tensor, part: Part) -> Tensor:
        of.data.add_(1)
        return make(of, part)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", write_and_make)
        rounded(weight, part)
    weight.data.sub_(1)  # the values that were there before
    (blocks,) = rounded(weight, part)
    assert torch.equal(blocks.view(torch.int32), blocks_of(weight.detach()))
    assert rounded(weight, part)[0] is blocks


def test_threads() -> None:
    one = model()
    expected = found(copy.deepcopy(one))
    with ThreadPoolExecutor(4) as pool:
        for each in pool.map(lambda _: found(one), range(12)):
            assert each == expected
