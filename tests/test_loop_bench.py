"""bench/models/loop.py measures what it claims to measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from attn_kernels.seq2seq import recurrent  # noqa: E402
from bench.models import loop  # noqa: E402

CPU = torch.device("cpu")
NAMES = [loop.EAGER, loop.STEPS, loop.LOOP]


@pytest.mark.parametrize("attention", [loop.ADDITIVE, loop.LOCATION])
def test_ways_agree(attention: str) -> None:
    variants = loop.make_variants(8, CPU, NAMES, attention)
    for lengths in (loop.FULL, loop.RAGGED):
        errors = loop.largest_error(variants, loop.make_data(loop.Shape(3, 5, 4), CPU, lengths))
        assert list(errors) == NAMES and errors[loop.EAGER] == 0
        assert max(errors.values()) < 1e-4


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop.make_variants(8, CPU, NAMES)
    with torch.no_grad():
        made[2].model.decoder.attentional.weight.mul_(1.1)
    monkeypatch.setattr(loop, "make_variants", lambda *args: made)
    with pytest.raises(RuntimeError, match=r"loss or gradients at .* are off by .*loop"):
        loop.measure(loop.Shape(2, 3, 3), 8, CPU, NAMES, 0.0)


def test_a_loss_of_its_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop.make_variants(8, CPU, NAMES)
    right = loop.training_step

    def shifted(model: torch.nn.Module, data: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        step = right(model, data)
        return lambda: step() + (model is made[2].model)

    monkeypatch.setattr(loop, "training_step", shifted)
    errors = loop.largest_error(made, loop.make_data(loop.Shape(2, 3, 3), CPU))
    assert errors[loop.STEPS] < 1e-4 and errors[loop.LOOP] > 0.1


def test_ragged_sentences_are_packed_by_eager_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = loop.make_data(loop.Shape(6, 9, 2), CPU, loop.RAGGED)
    assert data[1].min() >= 4 and data[1].max() == 9 and len(data[1].unique()) > 1
    seen: list[str] = []

    def watched(self: torch.nn.LSTM, x: object, *rest: object) -> object:
        seen.append("packed" if isinstance(x, PackedSequence) else "padded")
        return torch.nn.LSTM.forward(self, x, *rest)

    run_layer = recurrent.run_layer
    monkeypatch.setattr(loop.EagerLSTM, "forward", watched)
    monkeypatch.setattr(recurrent, "run_layer", lambda *given: seen.append("ours") or run_layer(*given))
    for name, model in loop.make_variants(8, CPU, NAMES):
        seen.clear()
        model(*data)
        assert seen[0] == ("packed" if name == loop.EAGER else "ours"), name


@pytest.mark.parametrize("attention", [loop.ADDITIVE, loop.LOCATION])
def test_ways_are_what_their_names_say(attention: str) -> None:
    """The loop makes one node of autograd, the steps one for each step of attention, eager none of ours."""
    for (name, model), ours in zip(loop.make_variants(8, CPU, NAMES, attention), (0, 4, 1), strict=True):
        logits, _ = model(*loop.make_data(loop.Shape(2, 3, 4), CPU))
        seen, left = set(), [logits.grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += [parent for parent, _ in node.next_functions]
        nodes = ("_SequenceBackward", "AdditiveAttentionBackward", "AdditiveAttentionWithExtraBackward")
        counted = [type(node).__name__ in nodes for node in seen]
        assert sum(counted) == ours, name


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    arguments = ["--quick", "--no-compiled", "--size", "8", "--shape", "2,3,4", "--cpu-time", "--output", str(tmp_path)]
    done = CliRunner().invoke(loop.app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "loop-cpu.json").read_text())
    training, *searches, located = result["rows"]
    assert training["B,S,T"] == [2, 3, 4] and set(training["ms"]) == set(NAMES)
    assert [row["kind"] for row in searches] == [
        "greedy decoding",
        "greedy decoding, encoder left out",
        "beam search of 5",
        "beam search of 5, encoder left out",
    ]
    assert (training["attention"], located["attention"]) == (loop.ADDITIVE, loop.LOCATION)
    assert located["kind"] == "training step" and set(located["ms"]) == set(located["eager / ours"]) | {loop.EAGER}
    assert set(located["MB"]) == set(NAMES)
    for row in result["rows"]:
        for parts in row["shares"].values():
            assert sum(parts.values()) == pytest.approx(1, abs=0.01) and min(parts.values()) >= 0
    for row in searches:
        assert set(row["ms"]) == {*NAMES, loop.ROUNDED}
        assert "search" in row["shares"][loop.LOOP] and "search" not in row["shares"][loop.STEPS]
        assert ("encoder" in row["shares"][loop.LOOP]) == ("left out" not in row["kind"])


def test_command_of_ragged_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.timing, "interleave", lambda calls, *_, **__: {name: [1e-3] for name in calls})
    arguments = ["--ragged", "--no-compiled", "--size", "8", "--shape", "3,5,2", "--allocator", "default"]
    done = CliRunner().invoke(loop.app, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "loop-cpu-ragged.json").read_text())["rows"]
    assert (row["kind"], row["lengths"], row["B,S,T"]) == ("training step", loop.RAGGED, [3, 5, 2])
    assert set(row["ms"]) == set(row["MB"]) == set(NAMES)


def test_command_of_an_attention(tmp_path: Path) -> None:
    arguments = ["--attention", "gmm", "--shape", "2,3,3", "--size", "8", "--quick", "--output", str(tmp_path)]
    done = CliRunner().invoke(loop.app, arguments)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert (row["attention"], row["kind"]) == ("gmm", "training step")
    assert row["ms"].keys() == row["MB"].keys() == {loop.STEPS, loop.LOOP} and row["steps / one op"]["median"] > 0


@pytest.mark.parametrize("shape", ["2,3", "2,3,x", "0,3,4"])
def test_shapes_are_checked(shape: str) -> None:
    done = CliRunner().invoke(loop.app, ["--shape", shape])
    assert done.exit_code == 2 and "B" in done.output + done.stderr
