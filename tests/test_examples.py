"""The short examples at test size: they learn their tasks, and time a step only if before and after agree."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ("typer", "rich", "matplotlib", "rapidfuzz", "sklearn"):
    pytest.importorskip(package, reason="the examples need the dependency group examples")

from typer.testing import CliRunner  # noqa: E402

from bench import timing  # noqa: E402
from examples import bags, common, dates, forecast, pronunciation, sorting, strips  # noqa: E402
from examples.__main__ import NAMES, app  # noqa: E402
from examples.g2p import data as g2p_data  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_threads")

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs/examples"


def run(name: str, folder: Path) -> tuple[dict[str, float], str]:
    """An example at test size: what it learnt, and what it printed."""
    done = CliRunner().invoke(app, ["--quick", "--only", name, "--output", str(folder)])
    assert done.exit_code == 0, done.output + str(done.exception)
    written = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for row in written["rows"]:
        assert set(row["ms"]) == {"before", "after"} and row["rounds"] >= 5
        assert f"{row['what']}: " in done.output
    return written["learnt"], done.output


# Each is far from what a model that learnt nothing, or only the frequencies, would get.
LEARNT = {
    "strips": {"strips read without an error": 0.5},
    "bags": {"accuracy": 0.85, "positive bags whose highest weight is on a nine": 0.85},
    "sorting": {"lists of 8 sorted": 0.75},
}


@pytest.mark.slow
def test_dates(tmp_path: Path) -> None:
    learnt, printed = run("dates", tmp_path)
    assert learnt["dates without an error"] > 0.8
    assert learnt["largest difference of the losses"] < 1e-4
    assert re.search(r"decoder\.attention .*fused: context", printed)


@pytest.mark.slow
def test_pronunciation(tmp_path: Path) -> None:
    try:
        g2p_data.dictionary_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    learnt, _ = run("pronunciation", tmp_path)
    assert learnt["phonemes wrong"] < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNT)
def test_share_that_is_right(name: str, tmp_path: Path) -> None:
    learnt, _ = run(name, tmp_path)
    assert all(learnt[what] > least for what, least in LEARNT[name].items()), learnt


@pytest.mark.slow
def test_forecast(tmp_path: Path) -> None:
    learnt, _ = run("forecast", tmp_path)
    assert learnt["RMSE, DA-RNN"] < 0.8 * learnt["RMSE, last value"]


def test_every_example_is_tested_and_named() -> None:
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "__main__", "common", "glyphs"}
    assert files == set(NAMES)
    assert {f"test_{name}" for name in NAMES if name not in LEARNT} <= set(globals())
    for module in (bags, dates, forecast, pronunciation, sorting, strips):
        done = CliRunner().invoke(module.app, ["--help"])
        assert done.exit_code == 0 and "--quick" in done.output


def test_an_unknown_name_is_refused() -> None:
    done = CliRunner().invoke(app, ["--only", "sortin"])
    assert done.exit_code == 2 and "sorting" in done.output and "got sortin" in done.output


# Data -----------------------------------------------------------------------------------------------------------------


def test_dates_are_read_back() -> None:
    batch = dates.make_batch(50, 3)
    for row, text in zip(batch.source, batch.texts, strict=True):
        assert dates.decode(row)[: len(text)] == text
    assert {dates.decode(row)[-1] for row in batch.target} == {"-"}
    assert dates.decode(batch.target[0])[4] == "-"


def test_bags_are_positive_where_there_is_a_nine() -> None:
    made = bags.make_bags(bags.Glyphs(test=True), 20, 12, 0)
    inside = torch.arange(12) < made.lengths[:, None]
    assert torch.equal((made.witnesses & inside).any(1).float(), made.labels)
    assert not (made.witnesses & ~inside).any()


def test_a_pointer_network_sorts_each_number_once() -> None:
    order, probabilities = sorting.Sorter(4).sort(sorting.make_numbers(6, 5, 0))
    assert torch.equal(order.sort(1).values, torch.arange(5).expand(6, 5))
    torch.testing.assert_close(probabilities.sum(2), torch.ones(6, 5))


def test_the_series_is_what_its_drivers_did() -> None:
    made = forecast.make_series(3000, 5, 0)
    for driver, lag in forecast.LAGS.items():
        now, then = made.target[lag:], made.drivers[: len(made.target) - lag]
        size = [abs(float(torch.corrcoef(torch.stack((now, x)))[0, 1])) for x in then.T]
        assert size[driver] > 0.3 > max(size[len(forecast.LAGS) :])


# The comparison -------------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.pooling, self.factor = bags.AttentionPooling(6, 4, gated=True), factor

    def forward(self, memory: Tensor) -> Tensor:
        return self.factor * self.pooling(memory).context


def loss(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))).square().sum()


@pytest.fixture
def pool(one_thread: None) -> Pool:
    torch.manual_seed(0)
    return Pool()


def test_before_and_after_are_compared_first(pool: Pool) -> None:
    eager = copy.deepcopy(pool)
    eager.pooling = bags.EagerPooling(eager.pooling)
    row = common.compare("pooling", eager, pool, loss, 0.0)
    assert row["rounds"] >= 5 and set(row["times after"]) == {"before"}
    wrong = copy.deepcopy(pool)
    wrong.factor = 1.01
    with pytest.raises(RuntimeError, match=r"pooling: loss is off by .*: nothing is timed"):
        common.compare("pooling", eager, wrong, loss, 0.0)


def test_a_wrong_gradient_is_not_timed(pool: Pool) -> None:
    wrong = copy.deepcopy(pool)
    wrong.pooling.v.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(RuntimeError, match=r"pooling\.v is off by .*: nothing is timed"):
        common.compare("pooling", pool, wrong, loss, 0.0)


@pytest.mark.parametrize(
    ("low", "median", "high", "said"),
    [(1.5, 2.0, 2.5, None), (0.9, 1.1, 1.3, "no clear gain"), (0.8, 0.9, 1.0, "NOT FASTER")],
)
def test_no_gain_is_said(low: float, median: float, high: float, said: str | None) -> None:
    ratio = timing.Spread(median, low, high)._asdict()
    row: dict[str, Any] = {
        "ms": {way: {"median": 3.0} for way in (common.BEFORE, common.AFTER)},
        "times after": {"before": ratio},
        "peak MB": {"before": 2.0, "after": 1.0},
    }
    text = common.verdict(row)
    assert f"({median:.2f}x, quartiles {low:.2f}-{high:.2f})" in text
    assert [words for words in ("no clear gain", "NOT FASTER") if words in text] == ([said] if said else [])


# What is published ----------------------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_that_of_the_files() -> None:
    done = CliRunner().invoke(app, ["--markdown", "--output", str(PUBLISHED)])
    assert done.exit_code == 0, done.output
    assert done.output.strip() in (ROOT / "docs/examples.md").read_text(encoding="utf-8")


def test_pictures_are_small() -> None:
    assert {path.stem for path in PUBLISHED.glob("*.png")} == set(NAMES)
    assert max(path.stat().st_size for path in PUBLISHED.glob("*.png")) < 80_000
