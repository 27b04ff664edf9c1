"""CUDA graphs of the decoder's loop, with a stand-in for capture if there is no GPU.

The stand-in computes again into the same tensors, like a replay. Buckets, padding, copies in and out, shared graphs and
several graphs in flight are tested. Behaviour that needs a device is not tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import formulas
import sentences
from attn_kernels import Memory
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.attentions import STATELESS as ATTENTIONS
from attn_kernels.seq2seq.fused import cuda_graph, distinct, sequence
from sentences import LOSSES, SOURCE, TARGET, Batch, random_batch


class Recorder:
    """Counts. A replay writes into the tensors that the recorded run left, which hold NaN in between."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        self.recorded += 1
        function()
        results = function()

        def replay() -> None:
            self.replayed += 1
            for into, x in zip(results, function(), strict=True):
                if into is not None:
                    into.copy_(x)

        for x in results:
            if x is not None:
                x.fill_(float("nan"))  # a capture computes nothing
        return replay, results


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    one = Recorder()
    monkeypatch.setattr(cuda_graph, "_capturer", lambda x: one)
    # Only on the CPU, where there are no graphs.
    monkeypatch.setattr(distinct, "MIN_REPEATS", math.inf)
    monkeypatch.setattr(sequence, "gains", lambda _: False)
    monkeypatch.setattr(cuda_graph, "graphs", cuda_graph.Graphs())
    return one


def models(**settings: Any) -> dict[str, Seq2Seq]:
    """The same model twice, with graphs and without."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": 6, "units": 7, "dtype": torch.float64}
    made = {name: Seq2Seq(SOURCE, TARGET, **{**sizes, **settings}, cuda_graph=name == "graph") for name in NAMES}
    made["graph"].load_state_dict(made["plain"].state_dict())
    return made


NAMES = ("plain", "graph")


def batch(size: int = 4, source: int = 9, steps: int = 7, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, source + 1, (size,), generator=generator)
    return random_batch(lengths, source, steps, generator)


def run(model: Seq2Seq, data: Batch, loss: str = "both") -> dict[str, Tensor | None]:
    torch.manual_seed(3)  # of dropout
    return sentences.run(model, data, LOSSES[loss])


def assert_same(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], atol: float = 1e-12, rtol: float = 1e-9
) -> None:
    formulas.assert_same(got, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize(
    "settings",
    [
        *({"attention": attention} for attention in (*ATTENTIONS, "location", "location-cumulative", "coverage")),
        {"cell": "gru"},
        {"num_layers": 2, "dropout": 0.5},
        {"cell": "gru", "num_layers": 3, "dropout": 0.2, "attention": "luong-general"},
        {"backend": "reference"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_results_and_gradients(recorder: Recorder, settings: dict[str, Any]) -> None:
    """Of batches of all sizes that share a bucket, in both orders: none reads what another left."""
    made = models(**settings)
    sizes = [(9, 7), (10, 7), (9, 7), (10, 7), (9, 7)]
    for seed, (source, steps) in enumerate(sizes):
        data = batch(source=source, steps=steps, seed=seed)
        assert_same(run(made["graph"], data), run(made["plain"], data))
    assert recorder.recorded == 2  # one forward and one backward, from the second batch on
    assert recorder.replayed == 2 * (len(sizes) - 1)


def test_padding_on_both_axes(recorder: Recorder) -> None:
    made = models()
    for source, steps in [(20, 20), (20, 20), (17, 18), (18, 17), (17, 17), (20, 20)]:
        data = batch(source=source, steps=steps, seed=source + steps)
        assert_same(run(made["graph"], data), run(made["plain"], data))
    assert recorder.recorded == 2


def test_float32(recorder: Recorder) -> None:
    made = models(dtype=torch.float32)
    for seed in range(3):
        data = batch(steps=9, seed=seed)  # padded to 10
        assert_same(run(made["graph"], data), run(made["plain"], data), atol=1e-5, rtol=1e-4)
    assert recorder.replayed == 4


@pytest.mark.parametrize("order", [LOSSES, reversed(LOSSES)], ids=["forwards", "backwards"])
def test_losses(recorder: Recorder, order: Any) -> None:
    """A backward is recorded for each set of results that have gradients."""
    made = models()
    run(made["graph"], batch())
    for loss in order:
        assert_same(run(made["graph"], batch(), loss), run(made["plain"], batch(), loss))
    assert recorder.recorded == 1 + len(LOSSES)


def test_a_bad_batch_leaves_nothing_behind(recorder: Recorder) -> None:
    """What was NaN in the padding of the next, smaller batch would be NaN times 0 in its gradients."""
    made = models()
    large, small = batch(source=10, steps=10), batch(source=9, steps=9)
    run(made["graph"], large)
    embedding = made["graph"].decoder.embedding.weight
    kept = embedding.detach().clone()
    with torch.no_grad():
        embedding.fill_(float("nan"))
    assert run(made["graph"], large)["logits"].isnan().all()
    with torch.no_grad():
        embedding.copy_(kept)
    assert_same(run(made["graph"], small), run(made["plain"], small))
    assert recorder.recorded == 2


def test_several_in_flight(recorder: Recorder) -> None:
    """Forwards of one graph before their backwards, which come in another order, one of them twice."""
    made = models()
    data = [batch(seed=seed) for seed in range(4)]
    gradients = {}
    for name in NAMES:
        model = made[name]
        model(*data[0])
        losses = [LOSSES["both"](*model(*one)) for one in data]
        found = []
        for i in (1, 3, 0, 2, 1):
            model.zero_grad()
            losses[i].backward(retain_graph=True)
            found.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
        gradients[name] = found
    for got, expected in zip(gradients["graph"], gradients["plain"], strict=True):
        assert_same(got, expected)
    assert recorder.replayed == 4 + 5


def test_parameters_that_change(recorder: Recorder) -> None:
    """Training: a graph reads the weights that there are, wherever they lie; and models of one shape may share it."""
    made = models()
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in made.items()}
    for seed in range(5):
        for name in NAMES:
            run(made[name], batch(seed=seed))
            optimizers[name].step()
    for (name, expected), got in zip(made["plain"].named_parameters(), made["graph"].parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9, msg=name)
    torch.manual_seed(5)
    another = Seq2Seq(SOURCE, TARGET, 5, 6, 7, dtype=torch.float64)
    recorded = recorder.recorded
    got = run(another, batch())
    another.decoder.cuda_graph = False
    assert_same(got, run(another, batch()))
    assert recorder.recorded == recorded


def test_without_gradients(recorder: Recorder) -> None:
    made = models()
    with torch.no_grad():
        for _ in range(3):
            logits, alignments = made["graph"](*batch())
        expected = made["plain"](*batch())
    torch.testing.assert_close((logits, alignments), expected, atol=1e-12, rtol=1e-9)
    assert recorder.recorded == 1


def test_memory_without_lengths_or_with_a_mask(recorder: Recorder) -> None:
    made = models()
    source, lengths, target = batch(source=9)
    for mask in (None, torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) > 0.4):
        found = {}
        for name in NAMES:
            model = made[name]
            for _ in range(2):
                encoded, state = model.encode(source, lengths)
                memory = Memory(encoded.keys, encoded.values, None, mask)
                logits, alignments = model.decoder(target, state, memory)
                model.zero_grad()
                LOSSES["both"](logits, alignments).backward()
            gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
            found[name] = {"logits": logits.detach(), "alignments": alignments.detach(), **gradients}
        assert_same(found["graph"], found["plain"])
    assert recorder.recorded == 4


def test_results_are_the_callers(recorder: Recorder) -> None:
    """They may be written to, and a later replay does not change them."""
    model = models()["graph"]
    model(*batch())
    logits, alignments = model(*batch())
    kept = alignments.detach().clone()
    model(*batch(seed=9))
    torch.testing.assert_close(alignments, kept, atol=0, rtol=0)
    with torch.no_grad():
        alignments.zero_()
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_inputs_changed_in_place_are_noticed(recorder: Recorder) -> None:
    model = models()["graph"]
    for _ in range(2):
        logits, _ = model(*batch())
    with torch.no_grad():
        model.decoder.attentional.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
    assert recorder.recorded == 1


def test_threads_share_a_graph(recorder: Recorder) -> None:
    made = models()
    run(made["graph"], batch())
    data = [batch(seed=seed) for seed in range(8)]

    def gradient(model: Seq2Seq, one: tuple[Tensor, ...]) -> Tensor:
        loss = LOSSES["both"](*model(*one))
        return torch.autograd.grad(loss, model.decoder.attentional.weight)[0]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda one: gradient(made["graph"], one), data))
    for one, found in zip(data, got, strict=True):
        torch.testing.assert_close(found, gradient(made["plain"], one), atol=1e-12, rtol=1e-9)


def test_buckets() -> None:
    assert [cuda_graph.bucket(n) for n in range(18)] == [*range(9), 10, 10, 12, 12, 14, 14, 16, 16, 20]
    for n in range(1, 3000):
        size = cuda_graph.bucket(n)
        assert n <= size <= 1.25 * n
        assert cuda_graph.bucket(size) == size
    octave = {cuda_graph.bucket(n) for n in range(65, 129)}
    assert octave == {80, 96, 112, 128}


class TestWhichGraphsAreKept:
    def test_the_second_call_makes_one(self) -> None:
        graphs = cuda_graph.Graphs()
        made: list[str] = []
        found = [graphs.find("a", lambda: made.append("a") or "graph") for _ in range(4)]
        assert found == [None, "graph", "graph", "graph"]
        assert made == ["a"]

    def test_a_full_house_changes_slowly(self) -> None:
        """The one used longest ago goes, and only for shapes that come often."""
        graphs = cuda_graph.Graphs()
        for key in range(graphs.capacity):
            for _ in range(graphs.min_calls):
                graphs.find(key, lambda key=key: key)
        graphs.find(0, lambda: pytest.fail("is there"))
        for _ in range(graphs.min_calls_to_replace - 1):
            assert graphs.find("new", lambda: pytest.fail("too early")) is None
        assert graphs.find("new", lambda: "new") == "new"
        assert list(graphs.made) == [*range(2, graphs.capacity), 0, "new"]

    def test_counts_do_not_grow_without_end(self) -> None:
        graphs = cuda_graph.Graphs()
        for key in range(5000):
            graphs.find(key, lambda: pytest.fail("seen once"))
        assert len(graphs.calls) <= 1025

    def test_an_error_leaves_no_graph(self) -> None:
        graphs = cuda_graph.Graphs()

        def fail() -> Any:
            raise RuntimeError("no memory")

        graphs.find("a", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            graphs.find("a", fail)
        assert graphs.find("a", lambda: "graph") == "graph"


def test_none_on_a_cpu() -> None:
    """Without the stand-in nothing is recorded there, whatever the setting."""
    made = models()
    before = len(cuda_graph.graphs.made), dict(cuda_graph.graphs.calls)
    for _ in range(3):
        run(made["graph"], batch())
    assert (len(cuda_graph.graphs.made), dict(cuda_graph.graphs.calls)) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU was found")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_captured_on_cuda(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = cuda_graph.Graphs()
    monkeypatch.setattr(cuda_graph, "graphs", graphs)
    made = {name: model.cuda() for name, model in models(cell=cell, dtype=torch.float32).items()}
    for seed, (source, steps) in enumerate([(9, 7), (10, 7), (9, 7), (20, 20), (18, 17)]):
        data = tuple(x.cuda() for x in batch(source=source, steps=steps, seed=seed))
        found = {name: run(made[name], data) for name in NAMES}
        assert_same(found["graph"], found["plain"], atol=1e-4, rtol=1e-3)
    assert len(graphs.made) == 2
