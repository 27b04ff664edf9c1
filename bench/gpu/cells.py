"""The cells of the GPU benchmark, the most important first, and how one is measured.

Every provider is timed twice: launched by the host, call after call, and replayed in a CUDA graph. "graph" repeats one
call on the same inputs, which stay in the L2 cache if they fit. "graph, cold" cycles through copies of the inputs that
are together three times as large as the cache, so that every call reads memory. Bandwidth is judged by "graph, cold".
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attn_kernels
from attn_kernels.backends import choose
from tools.cuda_check.roofline import ADDITIVE, DOT, FEW_QUERIES

from .. import cases, eager, machine, results, timing
from ..cases import FORWARD, GPU_SHAPES, SHAPES, TRAINING, Lengths, Problem, Provider, Settings, Shape

SCORES = "additive_scores"
LAUNCHED, GRAPH, COLD = "launched", "graph", "graph, cold"
OURS = "attn_kernels"  # without backend=, as users call it
SCORES_THEN_EAGER = "scores, eager softmax"
CALLS_OF_A_GRAPH = 20  # maximum, for short calls on the same inputs
MOST_COPIES = 64

RATES = Shape(64, 100, 100, 512, 512)  # the shape for which the target rates are stated
GNMT = next(iter(GPU_SHAPES))
# Decode: at least 16 MB of keys and values, for few and many sentences; and less than 8 MB.
DECODE = (
    Shape(1, 1, 8192, 512, 512),
    Shape(8, 1, 1024, 512, 512),
    Shape(64, 1, 200, 1024, 1024),
    Shape(1280, 1, 66, 1024, 1024),
    Shape(1, 1, 1000, 512, 512),
    Shape(8, 1, 200, 512, 512),
)
BEAMS = (Shape(64, 1, 200, 1024, 1024), Shape(8, 1, 200, 512, 512))  # with 1 to 10 queries


class Row(NamedTuple):
    op: str
    shape: Shape
    passes: str
    dtype: str
    compile: bool = False
    prepared: bool = False
    beams: bool = False

    @property
    def key(self) -> str:
        marks = ["prepared"] * self.prepared + ["beams"] * self.beams
        return " ".join([self.op, f"({self.shape})", self.passes, self.dtype, *marks])


def targets() -> list[Row]:
    """The rows that the targets need. They are a stage of their own, before the tests."""
    found = [Row(ADDITIVE, shape, FORWARD, "float32", prepared=True) for shape in DECODE]
    found += [Row(SCORES, RATES, passes, "float32") for passes in (FORWARD, TRAINING)]
    found += [Row(ADDITIVE, RATES, passes, "float32") for passes in (FORWARD, TRAINING)]
    found += [Row(ADDITIVE, shape, FORWARD, "float32", prepared=True, beams=True) for shape in BEAMS]
    found += [Row(ADDITIVE, GNMT, TRAINING, dtype, compile=True) for dtype in ("bfloat16", "float16")]
    found += [Row(DOT, shape, FORWARD, dtype) for shape in (RATES, GNMT) for dtype in ("float32", "bfloat16")]
    found += [Row(DOT, shape, TRAINING, "bfloat16") for shape in (RATES, GNMT)]
    return found


def rows() -> list[Row]:
    """All rows. The targets come first, so that an interrupted run has them. torch.compile is timed for few rows."""
    found = targets()
    compiled = (Shape(64, 1, 50, 512, 512), Shape(32, 50, 50, 512, 512))
    for op in (ADDITIVE, DOT):
        for shape in [*SHAPES, *GPU_SHAPES]:
            found += [Row(op, shape, passes, "float32", shape in compiled) for passes in (FORWARD, TRAINING)]
    return list({row.key: row for row in found}.values())


# Ways -----------------------------------------------------------------------------------------------------------------


def settings_of(row: Row, device: torch.device) -> Settings:
    return Settings(getattr(torch, row.dtype), device, 0, 0, row.compile, False, Lengths.none, 0, row.prepared)


def make_problem(row: Row, device: torch.device) -> Problem:
    op = DOT if row.op == DOT else ADDITIVE
    problem = cases.make_problem(op, row.shape, settings_of(row, device))
    if row.op != SCORES:
        return problem
    inputs = {name: x for name, x in problem.inputs.items() if name != "values"}
    gradient = torch.randn(row.shape[:3], generator=torch.Generator().manual_seed(1)).to(
        device, problem.inputs["v"].dtype
    )
    return Problem(inputs, gradient, None)


def expected_results(row: Row, problem: Problem) -> dict[str, Tensor]:
    training = row.passes == TRAINING
    if row.op != SCORES:
        return cases.expected_results(row.op, problem, training=training)
    wide = {name: x.float() for name, x in problem.inputs.items()}
    return cases.compute(eager.additive_scores, wide, problem.grad_context, training=training)


def make_providers(row: Row, problem: Problem) -> list[Provider]:
    """Ours with the default backend, each backend by name, and the baselines."""
    device_type = problem.grad_context.device.type
    public = getattr(attn_kernels, row.op)
    chosen = choose(None, device_type)
    names = {OURS: None} | {
        name: name for name in ("cuda", "triton") if device_type == "cuda" if attn_kernels.backends()[name].available
    }
    providers = []
    for title, backend in names.items():
        providers.append(Provider(title, _ours(row, public, backend, problem), "" if backend else f"is {chosen}"))
    formula = getattr(eager, row.op)
    providers.append(Provider("eager", formula if row.op == SCORES else _context_of(formula)))
    if row.op == ADDITIVE:
        providers.append(Provider(SCORES_THEN_EAGER, _scores_then_eager, "additive_scores, torch.softmax, torch.bmm"))
        if row.compile:
            providers.append(_compiled(eager.additive_attention_sum, "sum as (tanh(...) * v).sum(-1)"))
    if row.op == DOT:
        providers.append(Provider("sdpa", _context_of(eager.sdpa_dot_attention), "returns no alignments"))
        if row.compile:
            providers.append(_compiled(eager.dot_attention, ""))
    return providers


def _ours(row: Row, public: Callable[..., Any], backend: str | None, problem: Problem) -> Callable[..., Tensor]:
    if row.op == SCORES:
        return functools.partial(public, backend=backend)
    keywords: dict[str, Any] = {"backend": backend, "need_weights": False}
    if row.prepared:
        keywords["prepared"] = attn_kernels.prepare_keys(problem.inputs["keys"], backend=backend)
    return lambda *tensors: public(*tensors, **keywords).context


def _context_of(formula: Callable[..., attn_kernels.Attention]) -> Callable[..., Tensor]:
    return lambda *tensors: formula(*tensors, need_weights=False).context


def _compiled(formula: Callable[..., attn_kernels.Attention], detail: str) -> Provider:
    return Provider("torch.compile", torch.compile(_context_of(formula), dynamic=False), detail)


def _scores_then_eager(query: Tensor, keys: Tensor, values: Tensor, v: Tensor) -> Tensor:
    """A fused kernel for the scores only, as in the MLPerf submissions of GNMT."""
    return torch.bmm(torch.softmax(attn_kernels.additive_scores(query, keys, v), dim=-1), values)


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    call: Callable[[], object]
    calls: int  # calls of the op in one timed call


class TooLong(Exception):
    pass


@contextmanager
def time_limit(seconds: float):
    """Raises TooLong after so many seconds, if the system has signals and this is the main thread."""
    import signal
    import threading

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong(f"took longer than {seconds:.0f} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    around, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # seconds left of an outer limit; 0: no outer limit
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(around - (time.monotonic() - start), 1e-3) if around else 0)
        signal.signal(signal.SIGALRM, before)


def measure(row: Row, gpu: Any, *, seconds: float = 1.0, compile_seconds: float = 40.0) -> dict:
    """Compares results with the eager formula, measures peak memory, then times all providers in turns.

    A provider with a wrong result is timed and marked as wrong: its time is useful, but is not published.
    """
    if row.compile:
        torch.compiler.reset()  # imports the compiler, which takes seconds
    training = row.passes == TRAINING
    problem = make_problem(row, gpu.device)
    providers = make_providers(row, problem)
    expected = expected_results(row, problem)
    wrong: dict[str, str] = {}
    for provider in providers:
        try:
            with time_limit(compile_seconds):
                cases.check(provider, problem, expected, training=training)
        except TooLong as error:
            provider.failure = str(error)
        if provider.failure is not None and provider.failure.startswith("wrong"):
            wrong[provider.name], provider.failure = provider.failure, None
    del expected
    gpu.release()
    timed: dict[str, Timed] = {}
    for provider in providers:
        if provider.failure is None:
            call = cases.bind(provider, problem, training=training)
            provider.memory_mb = machine.peak_memory(call, gpu.device)
            timed[f"{provider.name}|{LAUNCHED}"] = Timed(call, 1)
    for provider in providers:
        if provider.failure is None:
            timed |= _graphs(row, provider, problem, gpu)
    samples = timing.interleave(
        {name: t.call for name, t in timed.items()}, gpu.timer, seconds=seconds, least_rounds=5, most_rounds=50
    )
    for name, t in timed.items():
        samples[name] = [sample / t.calls for sample in samples[name]]
    cell = _as_json(row, providers, wrong, samples, problem)
    del timed, problem
    for provider in providers:
        provider.function = None
    gpu.release()
    return cell


def _graphs(row: Row, provider: Provider, problem: Problem, gpu: Any) -> dict[str, Timed]:
    """The call in CUDA graphs: repeated on the same inputs and, for decode, also on copies of them."""
    training = row.passes == TRAINING
    call = cases.bind(provider, problem, training=training)
    found = {}
    try:
        call()
        once = max(gpu.timer(call, 3), 1e-7)
        calls = max(1, min(CALLS_OF_A_GRAPH, round(2e-4 / once)))
        found[f"{provider.name}|{GRAPH}"] = Timed(gpu.capture([call] * calls), calls)
        if row.shape.Tq == 1 and not training:
            copies = _copies(row, problem, gpu)
            cold = []
            for copy in copies:
                anew = next(w for w in make_providers(row, copy) if w.name == provider.name)
                cold.append(cases.bind(anew, copy, training=False))
            found[f"{provider.name}|{COLD}"] = Timed(gpu.capture(cold), len(cold))
    except Exception as error:  # a call that cannot be captured still has its launched time
        text = str(error).splitlines()[0] if str(error) else ""
        provider.detail = "; ".join(filter(None, (provider.detail, f"no graph: {type(error).__name__}: {text}"[:160])))
        torch.cuda.synchronize() if gpu.device.type == "cuda" else None
    return found


def _copies(row: Row, problem: Problem, gpu: Any) -> list[Problem]:
    """Copies of the inputs, together three times the L2 cache; at most 64 copies and a fifth of the memory."""
    size = sum(x.nbytes for x in problem.inputs.values())
    count = min(-(-3 * gpu.l2_bytes // size), MOST_COPIES, max(1, int(gpu.memory_bytes / 5 / size)))
    return [
        Problem({name: x.clone() for name, x in problem.inputs.items()}, problem.grad_context, None)
        for _ in range(max(2, count))
    ]


def _as_json(
    row: Row, providers: list[Provider], wrong: Mapping[str, str], samples: timing.Samples, problem: Problem
) -> dict[str, Any]:
    inputs_mb = sum(x.nbytes for x in problem.inputs.values()) / 1e6

    def of_way(provider: Provider) -> dict[str, Any]:
        times, ratios = {}, {}
        for mode in (LAUNCHED, GRAPH, COLD):
            name, ours = f"{provider.name}|{mode}", f"{OURS}|{mode}"
            if name in samples:
                times[mode] = results.rounded(timing.spread([1e6 * s for s in samples[name]]))
                if ours in samples:
                    ratios[mode] = results.rounded(timing.ratios(samples, name, ours))
        return {
            "name": provider.name, "detail": provider.detail, "failure": provider.failure, "error": provider.error,
            "wrong": wrong.get(provider.name),
            "memory_mb": provider.memory_mb, "us": times, "times_ours": ratios,
        }  # fmt: skip

    return {
        "key": row.key, "op": row.op, "shape": list(row.shape), "passes": row.passes, "dtype": row.dtype,
        "prepared": row.prepared, "inputs_mb": inputs_mb, "ways": [of_way(provider) for provider in providers],
    }  # fmt: skip


def measure_beams(row: Row, gpu: Any, *, seconds: float = 1.0) -> dict[str, Any]:
    """1 to 10 queries on one memory, in CUDA graphs: each time and its ratio to the time of one query."""
    cell: dict[str, Any] = {
        "key": row.key, "op": row.op, "shape": list(row.shape), "passes": row.passes, "dtype": row.dtype,
        "prepared": row.prepared, "beams": True, "few_queries": FEW_QUERIES, "ways": [],
    }  # fmt: skip
    timed: dict[str, Timed] = {}
    for count in range(1, 11):
        one = row._replace(shape=row.shape._replace(Tq=count))
        problem = make_problem(one, gpu.device)
        provider = Provider(str(count), _ours(one, attn_kernels.additive_attention, None, problem))
        cases.check(provider, problem, expected_results(one, problem), training=False)
        if provider.failure is not None and provider.failure.startswith("wrong"):
            cell["wrong"], provider.failure = f"{count} queries: {provider.failure}", None
        if provider.failure is None:
            call = cases.bind(provider, problem, training=False)
            timed[str(count)] = Timed(gpu.capture([call] * 5), 5)
        else:
            cell["ways"].append({"name": str(count), "failure": provider.failure, "us": {}, "times_ours": {}})
    samples = timing.interleave({n: t.call for n, t in timed.items()}, gpu.timer, seconds=seconds, most_rounds=50)
    for name, t in timed.items():
        us = results.rounded(timing.spread([1e6 * s / t.calls for s in samples[name]]))
        ratio = results.rounded(timing.ratios(samples, name, "1")) if "1" in samples else None
        cell["ways"].append({"name": name, "failure": None, "us": {GRAPH: us}, "times_one": ratio})
    gpu.release()
    return cell


def run(
    gpu: Any,
    todo: list[Row],
    store: Callable[[Row, dict[str, Any] | None], None],
    *,
    until: float,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Measures row after row while there is time; returns the keys of the rows that were left out.

    Calls store(row, None) before a row and store(row, cell) after it, so that a row that kills the process is known.
    """
    for i, row in enumerate(todo):
        left = until - clock()
        if left < 3 * seconds + (20 if row.compile else 2):
            return [other.key for other in todo[i:]]
        store(row, None)
        try:
            with time_limit(left):
                if row.beams:
                    cell = measure_beams(row, gpu, seconds=seconds)
                else:
                    cell = measure(row, gpu, seconds=seconds, compile_seconds=min(40.0, left / 2))
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            cell = {"key": row.key, "failure": f"{type(error).__name__}: {text}"[:300], "ways": []}
            gpu_is_lost = gpu.device.type == "cuda" and "CUDA error" in str(error)
            store(row, cell)
            if gpu_is_lost:  # this process can measure nothing more; the next process continues
                raise SystemExit(3) from None
            gpu.release()
            continue
        store(row, cell)
    return []
