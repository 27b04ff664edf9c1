"""Times a dense layer of GATv2 on a graph of Cora's size: ``python -m bench.cpu.gat --help``.

It compares ``DenseGATv2`` with the broadcast form in eager PyTorch, which allocates a tensor (N, N, heads, units). It
measures the time of forward, the time of forward and backward, and peak memory. The graph is random, with as many nodes
and edges as Cora. Features are as wide as in a hidden layer. Heads and units are from the paper's models for such
graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.func import functional_call

from attn_kernels.mechanisms import DenseGATv2

from .. import cases, machine, report, results, timing
from ..cases import FORWARD, SHORT, TRAINING, Problem, Provider
from ..cli import rows_application
from ..machine import Allocator

OURS, EAGER = "ours", "eager, broadcast"
HEADS, UNITS = 8, 8
FEATURES = HEADS * UNITS


class Graph(NamedTuple):
    nodes: int
    edges: int  # directed, without self-loops


CORA, SMALL = Graph(2708, 10556), Graph(200, 800)


def random_adjacency(graph: Graph, generator: torch.Generator) -> Tensor:
    """(N, N) bool, True for ``edges`` different pairs off the diagonal."""
    nodes, edges = graph
    places = torch.randperm(nodes * (nodes - 1), generator=generator)[:edges]
    row, column = places // (nodes - 1), places % (nodes - 1)
    adjacency = torch.zeros(nodes, nodes, dtype=torch.bool)
    adjacency[row, column + (column >= row)] = True
    return adjacency


def broadcast_layer(layer: DenseGATv2, x: Tensor, adjacency: Tensor) -> Tensor:
    """The layer as written without this package, with the same parameters."""
    assert layer.memory_projection is not None and layer.bias is not None
    allowed = adjacency | torch.eye(len(adjacency), dtype=torch.bool)
    queries = layer.query_projection(x).unflatten(-1, (layer.heads, layer.out_size))
    keys = layer.memory_projection(x).unflatten(-1, (layer.heads, layer.out_size))
    hidden = torch.nn.functional.leaky_relu(queries[:, None] + keys[None], layer.negative_slope)  # (N, N, H, A)
    scores = (hidden * layer.a).sum(-1).masked_fill(~allowed[..., None], float("-inf"))  # faster than einsum
    return torch.einsum("ijh,jha->iha", torch.softmax(scores, 1), keys).flatten(1) + layer.bias


class Broadcast(torch.nn.Module):
    """``broadcast_layer`` as a module with the same parameters. Their names begin with ``layer``."""

    def __init__(self, layer: DenseGATv2) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return broadcast_layer(self.layer, x, adjacency)


def make_problem(graph: Graph) -> tuple[Problem, dict[str, Provider]]:
    """The inputs are features and parameters. Both implementations take them and the same graph."""
    generator = torch.Generator().manual_seed(0)
    adjacency = random_adjacency(graph, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = DenseGATv2(FEATURES, UNITS, HEADS)
    inputs = {"x": torch.randn(graph.nodes, FEATURES, generator=generator)}
    inputs |= {name: weight.detach() for name, weight in layer.named_parameters()}
    gradient = torch.randn(graph.nodes, HEADS * UNITS, generator=generator)

    def make(module: torch.nn.Module, prefix: str) -> Callable[..., Tensor]:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            names = [prefix + name for name in inputs if name != "x"]
            result: Tensor = functional_call(module, dict(zip(names, weights, strict=True)), (x, adjacency))
            return result

        return run

    ways = {OURS: make(layer, ""), EAGER: make(Broadcast(layer), "layer.")}
    return Problem(inputs, gradient, None), {name: Provider(name, way) for name, way in ways.items()}


def calls_of(graph: Graph, passes: str) -> dict[str, Callable[[], object]]:
    problem, providers = make_problem(graph)
    return {name: cases.bind(way, problem, training=passes == TRAINING) for name, way in providers.items()}


def measure(graph: Graph, passes: str, seconds: float) -> dict[str, Any]:
    """Times both, after a check that they give the same features and gradients."""
    problem, providers = make_problem(graph)
    ours, broadcast = providers[OURS], providers[EAGER].function
    assert broadcast is not None
    training = passes == TRAINING
    cases.check(ours, problem, cases.compute(broadcast, *problem[:2], training=training), training=training)
    if ours.failure is not None:
        raise RuntimeError(f"gat: {passes} of {tuple(graph)}: {ours.failure}: nothing is timed")
    calls = calls_of(graph, passes)
    samples = timing.interleave(calls, timing.WallTimer(), seconds=seconds, least_rounds=5, most_rounds=100)
    return {
        "graph": graph._asdict(),
        "heads": HEADS,
        "units": UNITS,
        "passes": passes,
        **results.comparison(samples, OURS),
    }


def add_memory(row: dict[str, Any]) -> None:
    """Adds the peak memory of each implementation: saved tensors, scratch and gradients, without the inputs."""
    row["MB"] = {}
    for name, call in calls_of(Graph(**row["graph"]), row["passes"]).items():
        call()
        row["MB"][name] = machine.peak_memory(call, torch.device("cpu"))


def table(rows: list[dict[str, Any]]) -> Table:
    title = "A dense layer of GATv2: ms, MB at the peak, and how many times those of ours"
    shown = report.table(
        title, "", "nodes", "edges", *(f"{name}, {unit}" for unit in ("ms", "MB") for name in (OURS, EAGER))
    )
    for row in rows:
        ours, theirs = row["MB"][OURS], row["MB"][EAGER]
        milliseconds = report.figure(row["ms"][EAGER]["median"])
        cells = [
            report.figure(row["ms"][OURS]["median"]),
            f"{milliseconds}  {report.times(row[f'times {OURS}'][EAGER]['median'])}",
            report.megabytes(ours),
            report.megabytes(theirs) + (f"  {theirs / ours:.1f}x" if ours and theirs else ""),
        ]
        shown.add_row(SHORT[row["passes"]], *map(str, row["graph"].values()), *cells)
    return shown


def measure_all(quick: bool, seconds: float, allocator: Allocator) -> list[dict[str, Any]]:
    rows = [measure(SMALL if quick else CORA, passes, seconds) for passes in (FORWARD, TRAINING)]
    machine.set_allocator_for_memory(allocator)
    for row in rows:
        add_memory(row)
    return rows


PURPOSE = "Times DenseGATv2 on a random graph of Cora's size, and measures its memory, against the broadcast form."
app = rows_application("gat", PURPOSE, measure_all, table, quick_help="A small graph and few rounds.")


if __name__ == "__main__":
    app()
