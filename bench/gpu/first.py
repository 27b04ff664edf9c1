"""First contact with a GPU: compares every kernel once with the reference in float64, and continues after failures.

    python -m bench.gpu.first FOLDER                 # in the root of a checkout with its modules in place
    python -m bench.gpu.first FOLDER --device cpu    # the same on the CPU, on smaller sizes: a rehearsal

The cases are in groups. Each group has its own process, and the processes run in parallel. Each verdict is written to
FOLDER/first.jsonl at once, one per line. A case that kills its process (an illegal access) or hangs gets a verdict too,
and a new process continues its group after that case. The exit status is 1 if any verdict is not "ok" or "skipped".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FILE = "first.jsonl"
GROUP_VARIABLE = "ATTN_KERNELS_FIRST_GROUP"  # tells a process which group it is
PLANNED, BEGUN, OK, WRONG, ERROR, SKIPPED, END = "planned", "begun", "ok", "wrong", "error", "skipped", "end"
START_SECONDS = 60.0  # limit from the start of a process to its first case: all processes load PyTorch together
MOST_PROCESSES = 6  # for one group: after each crash a new process has to start
CONTEXT_LOST = 3  # exit status


class Case(NamedTuple):
    name: str
    sizes: tuple[int, int, int, int, int]  # B, Tq, Tk, A, D
    dtypes: str
    options: Mapping[str, Any] = {}


# Clusters of 1 to 16 blocks, splits that the last block combines, rows not a multiple of 16 bytes, 2 to 8 queries.
DECODE = (
    Case("cluster 1", (300, 1, 20, 64, 64), "float32 bfloat16 float16"),
    Case("cluster 2", (100, 1, 40, 64, 64), "float32 bfloat16"),
    Case("cluster 4", (60, 1, 40, 128, 64), "float32"),
    Case("cluster 8", (20, 1, 200, 64, 64), "float32 bfloat16"),
    Case("cluster 16", (2, 1, 600, 512, 512), "float32 bfloat16 float16"),
    Case("splits", (1, 1, 20000, 64, 64), "float32 bfloat16"),
    Case("splits, float64", (2, 1, 700, 40, 40), "float64"),
    Case("odd rows", (3, 1, 130, 17, 9), "float32 bfloat16 float64"),
    Case("2 queries", (4, 2, 300, 128, 96), "float32 bfloat16"),
    Case("4 queries", (4, 4, 300, 128, 96), "float32 float16"),
    Case("8 queries", (4, 8, 300, 512, 1024), "float32 bfloat16"),
    Case("8 odd queries", (3, 7, 65, 33, 31), "float32 float64"),
    Case("large inputs", (3, 1, 130, 64, 64), "float32", {"scale": 30.0}),
    Case("many units", (2, 1, 40, 5000, 64), "float32"),
)
SCORES = (
    Case("tile", (2, 9, 33, 36, 20), "float32 bfloat16 float16 float64"),
    Case("odd", (1, 33, 65, 17, 9), "float32 float64"),
    Case("wide", (1, 140, 200, 37, 39), "float32 bfloat16"),
    Case("shares", (2, 50, 50, 512, 64), "float32"),
    Case("large inputs", (2, 20, 30, 48, 16), "float32", {"scale": 30.0}),
    Case("12 queries", (4, 12, 100, 128, 64), "float32 bfloat16"),
    Case("16 queries", (4, 16, 100, 128, 64), "float32"),
    Case("GNMT", (8, 74, 75, 1024, 1024), "bfloat16 float32"),
)
DOT = (
    Case("small tile", (2, 9, 33, 36, 20), "float32 bfloat16 float16 float64"),
    Case("large", (4, 130, 200, 512, 512), "float32 bfloat16 float16"),
    Case("odd", (1, 33, 65, 17, 9), "float32 bfloat16 float64"),
    Case("GNMT", (16, 74, 75, 1024, 1024), "bfloat16 float32"),
)
MASKS = tuple(
    Case(
        f"{sizes[1]} queries, mask {mask or 'none'}, lengths {lengths}",
        sizes,
        "float32 bfloat16",
        dict(lengths=lengths, mask=mask),
    )
    for sizes in ((3, 1, 130, 64, 64), (3, 5, 70, 64, 48), (3, 17, 70, 48, 80))
    for mask in ("", "steps", "pairs")
    for lengths in (False, True)
    if mask or lengths
)
# A gate and several score vectors: the steps of a row split over programs, blocks of score vectors, matrix products for
# many score vectors, and units in several blocks.
GATED = (
    Case("pooling", (1, 1, 20000, 256, 512), "float32 bfloat16"),
    Case("10 vectors", (1, 1, 5000, 128, 64), "float32 bfloat16", {"vectors": 10, "activation": "sigmoid"}),
    Case("30 vectors, lengths", (16, 1, 300, 350, 600), "float32 bfloat16", {"vectors": 30, "lengths": True}),
    Case("3 vectors, mask", (4, 20, 70, 1100, 64), "float32 bfloat16", {"vectors": 3, "mask": "pairs"}),
    Case("leaky_relu", (3, 5, 130, 64, 33), "float32 bfloat16", {"mask": "steps", "activation": "leaky_relu"}),
)
# Packed memories: few queries, splits with empty parts, many queries, narrow rows.
PACKED = (
    Case("packed step", (16, 1, 200, 512, 512), "float32 bfloat16"),
    Case("packed splits", (3, 5, 700, 256, 64), "float32 bfloat16"),
    Case("packed many", (8, 74, 75, 256, 256), "float32 bfloat16"),
    Case("packed odd", (5, 9, 33, 17, 9), "float32"),
)
# Triton compiles each case first, so it runs only the cases with these names.
OF_TRITON = ("cluster 16", "splits", "odd rows", "8 queries", "tile", "odd", "GNMT", "small tile")
OF_TRITON += tuple(case.name for case in GATED + PACKED)
# Largest allowed error, relative to the largest value. These are coarse; the tests compare with the error of eager.
LIMITS = {"float64": 1e-9, "float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}
ADDITIVE, DOT_ATTENTION, ADDITIVE_SCORES = "additive_attention", "dot_attention", "additive_scores"


class Wrong(Exception):
    """A wrong result."""


class Contact:
    """One group in its process: runs cases and writes verdicts. ``done`` has the cases with a verdict."""

    def __init__(self, folder: Path, group: str, device: str) -> None:
        self.file, self.group, self.device = folder / FILE, group, device
        self.done = {line["case"] for line in read(folder) if line["group"] == group and line["verdict"] != BEGUN}

    @property
    def backend(self) -> str:
        return "triton" if "triton" in self.group else "cuda"

    def say(self, case: str, verdict: str, detail: object = "", seconds: float = 0.0) -> None:
        line = {"group": self.group, "case": case, "verdict": verdict, "detail": str(detail)[:600]}
        append(self.file, line | {"seconds": round(seconds, 2)})

    def attempt(self, case: str, work: Callable[[], object]) -> None:
        """Runs a case unless an earlier process ran it; an exception becomes a verdict."""
        if case in self.done:
            return
        self.say(case, BEGUN)
        start = time.monotonic()
        try:
            verdict, detail = OK, work()
        except Wrong as error:
            verdict, detail = WRONG, error
        except Exception as error:
            verdict, detail = (
                ERROR,
                f"{type(error).__name__}: {error} | {traceback.format_exc().splitlines()[-3].strip()}",
            )
        self.say(case, verdict, "" if detail is None else detail, time.monotonic() - start)
        if verdict == ERROR and ("CUDA error" in str(detail) or "illegal" in str(detail)):
            os._exit(CONTEXT_LOST)  # nothing more can run in this process

    def compare(self, op: str, cases: Iterable[Case]) -> None:
        for case in cases:
            if self.backend == "triton" and case.name not in OF_TRITON and not case.name.startswith("5 queries"):
                continue
            sizes = tuple(min(size, 40) for size in case.sizes) if self.device == "cpu" else case.sizes
            for dtype in case.dtypes.split():
                if self.backend == "triton" and dtype in ("float16", "float64"):
                    continue
                self.attempt(
                    f"{op} {','.join(map(str, sizes))} {dtype} {case.name}",
                    lambda sizes=sizes, dtype=dtype, case=case: compare(
                        op, sizes, dtype, self.backend, self.device, **case.options
                    ),
                )


def compare(
    op: str,
    sizes: Sequence[int],
    dtype: str,
    backend: str,
    device: str,
    *,
    lengths: bool = False,
    mask: str = "",
    scale: float = 1.0,
    prepared: bool = False,
    activation: str = "tanh",
    gated: bool = False,
    vectors: int | None = None,
    packed: bool = False,
) -> str:
    """Results and all gradients of one call against the reference in float64 on the same device."""
    import torch

    import attn_kernels
    from attn_kernels import reference

    rng = torch.Generator().manual_seed(0)

    def leaf(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=rng) * scale).to(device, getattr(torch, dtype)).requires_grad_()

    B, Tq, Tk, A, D = sizes
    query, keys, values = leaf(B, Tq, A, scale=scale), leaf(B, Tk, A, scale=scale), leaf(B, Tk, D)
    v, bias = leaf(*(() if vectors is None else (vectors,)), A, scale=A**-0.5), leaf(A)
    tensors = {
        ADDITIVE: [query, keys, values, v, bias],
        DOT_ATTENTION: [query, keys, values],
        ADDITIVE_SCORES: [query, keys, v, bias],
    }[op]
    keywords: dict[str, Any] = {"scale": A**-0.5} if op == DOT_ATTENTION else {"activation": activation}
    if gated:
        tensors.append(leaf(B, Tk, A))
    if lengths or packed:
        keywords["memory_lengths"] = torch.randint(0, Tk + 1, (B,), generator=rng).to(device)
    if packed:
        keywords["memory_lengths"][-1] = Tk  # so that the alignments have Tk columns
    if mask:
        shape = (B, Tk) if mask == "steps" else (B, Tq, Tk)
        keywords["mask"] = (torch.rand(shape, generator=rng) > 0.3).to(device)
    ours = {"backend": backend}
    if prepared:
        ours["prepared"] = attn_kernels.prepare_keys(keys.detach(), backend=backend)

    def results(function: Callable[..., Any], leaves: list[torch.Tensor], **more: Any) -> dict[str, torch.Tensor]:
        given, gate = (leaves[:-1], {"gate": leaves[-1]}) if gated else (leaves, {})
        out = function(*given, **gate, **keywords, **more)
        outs = list(out) if isinstance(out, tuple) else [out]
        weights = torch.Generator().manual_seed(1)
        gradients = torch.autograd.grad(
            outs, leaves, [torch.randn(t.shape, generator=weights).to(device, t.dtype) for t in outs]
        )
        named = {f"output {i}": t.detach() for i, t in enumerate(outs)}
        return named | {f"gradient {i}": t for i, t in enumerate(gradients)}

    def without_padding(query: Any, keys: Any, values: Any, *others: Any, memory_lengths: Any, **more: Any) -> Any:
        used = torch.arange(Tk, device=device) < memory_lengths[:, None]
        offsets = torch.cat((memory_lengths.new_zeros(1), memory_lengths.cumsum(0)))
        return getattr(attn_kernels, op)(query, keys[used], values[used], *others, memory_offsets=offsets, **more)

    got = results(without_padding if packed else getattr(attn_kernels, op), tensors, **ours)
    exact = results(getattr(reference, op), [t.detach().double().requires_grad_() for t in tensors])
    errors = {name: share_of_largest(got[name], t) for name, t in exact.items() if t.numel()}
    bad = [name for name, error in errors.items() if not error <= LIMITS[dtype]]
    if bad:
        raise Wrong(", ".join(f"{name} {errors[name]:.1e}" for name in bad))
    return f"{max(errors.values(), default=0.0):.1e}"


def share_of_largest(got: Any, exact: Any) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-2)).item()


# Groups ---------------------------------------------------------------------------------------------------------------


def facts(contact: Contact) -> None:
    """Reports the machine and its tools."""

    def report() -> str:
        from attn_kernels.__main__ import render, report

        found = report()
        print(render(found), flush=True)
        return json.dumps(found["backends"])

    def output(command: str) -> str:
        return subprocess.run(command, shell=True, capture_output=True, text=True).stdout.strip()

    contact.attempt("report", report)
    query = "name,driver_version,clocks.sm,clocks.max.sm,memory.total"
    contact.attempt("nvidia-smi", lambda: output(f"nvidia-smi --query-gpu={query} --format=csv,noheader"))
    tools = ("nvcc", "compute-sanitizer", "ncu", "git", "g++", "cuobjdump")
    contact.attempt("tools", lambda: " ".join(output(f"command -v {tool}") or f"no {tool}" for tool in tools))


def prepare(contact: Contact) -> None:
    """Checks only that it runs: its output is backend-specific. The "prepared" cases of decode check the results."""
    import torch

    import attn_kernels

    def one(dtype: torch.dtype) -> str:
        keys = torch.randn(2, 33, 65).to(contact.device, dtype)
        return str(tuple(attn_kernels.prepare_keys(keys, backend=contact.backend).shape))

    for dtype in (torch.float32, torch.bfloat16):
        contact.attempt(str(dtype), lambda dtype=dtype: one(dtype))


def decode(contact: Contact) -> None:
    for op in ops_of(contact, ADDITIVE, DOT_ATTENTION):
        # With "scale", scores of dot attention would be in the thousands. Softmax amplifies their rounding errors, so
        # that correct results would exceed the limits.
        contact.compare(op, [case for case in DECODE if op == ADDITIVE or "scale" not in case.options])
    if contact.backend == "cuda":
        with_prepared = [
            case._replace(name=f"{case.name}, prepared", dtypes="float32", options={"prepared": True})
            for case in DECODE[:6]
        ]
        contact.compare(ADDITIVE, with_prepared)


def scores(contact: Contact) -> None:
    contact.compare(ADDITIVE_SCORES, SCORES)
    contact.compare(ADDITIVE, SCORES)


def relu(contact: Contact) -> None:
    for activation in ("relu", "leaky_relu"):

        def activated(cases: Iterable[Case], activation: str = activation) -> list[Case]:
            # Large inputs test the guards of tanh. With relu they give large scores, and softmax only 0 and 1.
            kept = [case for case in cases if "scale" not in case.options]
            options = {"activation": activation}
            return [one._replace(name=f"{one.name}, {activation}", options={**one.options, **options}) for one in kept]

        contact.compare(ADDITIVE, activated(DECODE))
        contact.compare(ADDITIVE_SCORES, activated(SCORES))
        contact.compare(ADDITIVE, activated(SCORES + MASKS))


def gated(contact: Contact) -> None:
    cases = [case._replace(options={"gated": True, **case.options}) for case in GATED]
    contact.compare(ADDITIVE, cases)
    contact.compare(ADDITIVE_SCORES, [case for case in cases if not {"lengths", "mask"} & set(case.options)])


def packed(contact: Contact) -> None:
    for op in (ADDITIVE, DOT_ATTENTION):
        contact.compare(op, [case._replace(options={"packed": True}) for case in PACKED])


def dot(contact: Contact) -> None:
    contact.compare(DOT_ATTENTION, DOT)


def masks(contact: Contact) -> None:
    for op in ops_of(contact, ADDITIVE, DOT_ATTENTION):
        contact.compare(op, MASKS)


def graph(contact: Contact) -> None:
    """Forward and backward in a CUDA graph: 20 replays must equal a launched call bit for bit."""
    for op in (ADDITIVE, DOT_ATTENTION):
        for queries in (1, 5, 20):
            case = f"{op}, {queries} queries"
            if contact.device == "cpu":
                contact.say(case, SKIPPED, "there are no CUDA graphs on a CPU")
            else:
                contact.attempt(case, lambda op=op, queries=queries: replayed(op, queries, contact.backend))


def replayed(op: str, queries: int, backend: str) -> None:
    import torch

    import attn_kernels

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda").requires_grad_()

    leaves = [leaf(4, queries, 64), leaf(4, 300, 64), leaf(4, 300, 64), *([leaf(64)] if op == ADDITIVE else [])]

    def call() -> list[torch.Tensor]:
        out = getattr(attn_kernels, op)(*leaves, backend=backend)
        loss = out.context.sum() + out.alignments.square().sum()
        return [out.context, out.alignments, *torch.autograd.grad(loss, leaves)]

    expected = [t.clone() for t in call()]
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # the first calls compile and allocate, which a capture forbids
        call(), call()
    torch.cuda.current_stream().wait_stream(beside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = call()
    for turn in range(20):
        for t in got:
            t.detach().fill_(float("nan"))
        captured.replay()
        torch.cuda.synchronize()
        errors = [(a - b).abs().max().item() for a, b in zip(got, expected, strict=True)]
        if any(errors) or not all(t.isfinite().all() for t in got):
            raise Wrong(f"replay {turn}: {errors}")


def loop(contact: Contact) -> None:
    """The decoder's loop as CUDA graphs of several lengths, against the same model without graphs."""
    import torch

    sys.path.append(str(ROOT / "tests"))
    import test_loop_graph as tests
    from attn_kernels.seq2seq.fused import cuda_graph

    def train(cell: str) -> str:
        cuda_graph.graphs = cuda_graph.Graphs()
        made = {name: m.to(contact.device) for name, m in tests.models(cell=cell, dtype=torch.float32).items()}
        for seed, (source, steps) in enumerate([(9, 7), (10, 7), (9, 7), (20, 20), (18, 17)]):
            data = tuple(x.to(contact.device) for x in tests.batch(source=source, steps=steps, seed=seed))
            found = {name: tests.run(model, data) for name, model in made.items()}
            tests.assert_same(found["graph"], found["plain"], atol=1e-4, rtol=1e-3)
        return f"{len(cuda_graph.graphs.made)} graphs"

    for cell in ("lstm", "gru"):
        contact.attempt(cell, lambda cell=cell: train(cell))


def models(contact: Contact) -> None:
    """Features built on the ops: searches, patched models, autocast, DistributedDataParallel."""
    sys.path.append(str(ROOT / "tests"))
    import test_gpu_models as tests

    for name, check in tests.CHECKS.items():
        contact.attempt(name, lambda check=check: check(contact.backend, contact.device))


def ops_of(contact: Contact, *every: str) -> list[str]:
    """The ops that the name of the group contains; all ops if it contains none."""
    named = [op for op in every if op in contact.group]
    return named or list(every)


# The most informative groups come first. The groups for Triton are smaller because they compile.
GROUPS: dict[str, Callable[[Contact], None]] = {
    "facts": facts,
    "prepare cuda": prepare,
    "decode cuda": decode,
    "scores cuda": scores,
    "relu cuda": relu,
    "dot cuda": dot,
    "masks cuda": masks,
    "graph cuda": graph,
    "loop cuda": loop,
    "models cuda": models,
    "graph triton": graph,
    **{f"{work.__name__} triton {op}": work for work in (decode, masks) for op in (ADDITIVE, DOT_ATTENTION)},
    "scores triton": scores,
    "dot triton": dot,
    "gated triton": gated,
    "packed triton": packed,
    "models triton": models,
}


# Around the groups ----------------------------------------------------------------------------------------------------


def append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a") as stream:  # several processes append; a short line is written in one piece
        stream.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    file = folder / FILE
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    began: float


def go(
    folder: Path, device: str, groups: Sequence[str], command: Sequence[str], *,
    limit: float, case_limit: float, jobs: int,
) -> None:  # fmt: skip
    """Runs all groups, at most ``jobs`` at a time, within ``limit`` seconds; the limit of a case is ``case_limit``."""
    end = time.monotonic() + limit
    waiting, running, started = list(groups), dict[str, Running](), Counter[str]()
    for group in groups:
        Contact(folder, group, device).say("(group)", PLANNED)
    while waiting or running:
        while waiting and len(running) < jobs:
            group = waiting.pop(0)
            started[group] += 1
            running[group] = start(folder, group, command)
        time.sleep(0.1)
        for group, (process, began) in list(running.items()):
            lives = process.poll() is None  # polled before reading, so that all lines of an ended process are read
            open_case, since = begun(read(folder), group, began)
            over = time.monotonic() > end
            most = START_SECONDS if open_case is None else case_limit
            if lives and not over and time.monotonic() - since < most:
                continue
            if lives:
                process.kill()
                process.wait()
                why = "the time of first contact was over" if over else f"no end after {most:.0f} s"
            else:
                why = f"its process ended with status {process.returncode}"
            del running[group]
            if process.returncode == 0:
                continue
            contact = Contact(folder, group, device)
            if open_case is not None:
                contact.say(open_case, ERROR, why)
            elif process.returncode != CONTEXT_LOST:
                contact.say("(between cases)", ERROR, why)
            if not over and started[group] < MOST_PROCESSES:
                waiting.append(group)
        if time.monotonic() > end and waiting:
            for group in waiting:
                Contact(folder, group, device).say("(start)", ERROR, "no time was left")
            waiting.clear()


def start(folder: Path, group: str, command: Sequence[str]) -> Running:
    """Starts a process. CUDA launches block, so that errors appear at their launch, except in graph and loop groups."""
    blocking = "0" if group.startswith(("graph", "loop")) else "1"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, GROUP_VARIABLE: group, "PYTHONPATH": path, "CUDA_LAUNCH_BLOCKING": blocking}
    with open(folder / f"first-{group.replace(' ', '-')}.log", "ab") as log:
        process = subprocess.Popen(list(command), env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return Running(process, time.monotonic())


_seen: dict[tuple[str, str], float] = {}  # the time when this process first saw that a case had begun


def begun(lines: Sequence[dict[str, Any]], group: str, began: float) -> tuple[str | None, float]:
    """The current case of a group and its start time. If there is none: None and the start time of the process."""
    own = [line for line in lines if line["group"] == group and line["verdict"] != PLANNED]
    if not own:
        return None, began
    seen = _seen.setdefault((group, f"{len(own)}"), time.monotonic())
    return (own[-1]["case"] if own[-1]["verdict"] == BEGUN else None), max(began, seen)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by group, and every verdict that is neither ok nor skipped."""
    groups = [line["group"] for line in lines if line["verdict"] == PLANNED]
    final = [line for line in lines if line["verdict"] not in (PLANNED, BEGUN, END)]
    counts = {group: dict(Counter(line["verdict"] for line in final if line["group"] == group)) for group in groups}
    ended = {line["group"] for line in lines if line["verdict"] == END}
    return {
        "counts": counts,
        "not complete": [group for group in groups if group not in ended],
        "bad": [line for line in final if line["verdict"] not in (OK, SKIPPED)],
    }


def text(found: dict[str, Any]) -> str:
    lines = [
        f"  {group:34} "
        + "  ".join(f"{verdict} {counts.get(verdict, 0):3}" for verdict in (OK, WRONG, ERROR, SKIPPED))
        + ("  NOT COMPLETE" if group in found["not complete"] else "")
        for group, counts in found["counts"].items()
    ]
    lines += [f"  {one['verdict']}: {one['group']}: {one['case']}: {one['detail'][:240]}" for one in found["bad"][:60]]
    return "\n".join(lines)


def run_group(folder: Path, group: str, device: str) -> None:
    contact = Contact(folder, group, device)
    GROUPS[group](contact)
    contact.say("(end)", END)


def main(arguments: Sequence[str] | None = None, command: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.first", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder for first.jsonl and the output of the groups")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal on small sizes")
    parser.add_argument("--group", action="append", choices=tuple(GROUPS), help="run this group; may be repeated")
    parser.add_argument("--limit", type=float, default=110, help="seconds for everything (%(default)s)")
    parser.add_argument("--case-limit", type=float, default=30, help="seconds for one case (%(default)s)")
    parser.add_argument("--jobs", type=int, default=max(2, (os.cpu_count() or 2) - 2), help="parallel groups")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(arguments)
    if group := os.environ.get(GROUP_VARIABLE):
        run_group(options.folder, group, options.device)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / FILE).unlink(missing_ok=True)
    begin, groups = time.monotonic(), options.group or list(GROUPS)
    command = [*(command or (sys.executable, "-m", "bench.gpu.first")), *arguments]
    go(
        options.folder, options.device, groups, command,
        limit=options.limit, case_limit=options.case_limit, jobs=options.jobs,
    )  # fmt: skip
    found = summary(read(options.folder))
    print(text(found))
    print(f"first contact: {time.monotonic() - begin:.0f} s")
    return 1 if found["bad"] or found["not complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
