"""The configuration of the tests: the device of Triton's kernels, the threads of a process, the backends of a test.

Tests of a backend that cannot run here are skipped with the reason from ``attn_kernels.backends()``.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import itertools
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# numpy and OpenMP fix their number of threads when they are loaded, so it is set before torch is imported.
IN_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if IN_XDIST:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# With a GPU the Triton kernels run on it. Without one they run on CPU tensors in Triton's interpreter, which must be
# selected before triton is imported. TRITON_INTERPRET (0 or 1) in the environment overrides both.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for bench.eager; appended, so that an installed package takes precedence


class _Emulated(importlib.abc.MetaPathFinder):
    """Finds the module with the CUDA kernels in an emulator, which ``make test`` builds in build/emulated."""

    def find_spec(self, name, path, target=None):
        built = sorted((ROOT / "build/emulated").glob("_C_cuda.*.so")) if name == "attn_kernels._C_cuda" else []
        return importlib.util.spec_from_file_location(name, built[0]) if built else None


if not torch.cuda.is_available():
    sys.meta_path.insert(0, _Emulated())

import attn_kernels
import triton_arithmetic
import triton_interpreter
from attn_kernels.backends import NAMES
from attn_kernels.patching import adapter
from attn_kernels.seq2seq import recurrent
from matrix import MAIN, Op, device_of, interpreted, is_left_to_another

if attn_kernels.backends()["triton"].available and interpreted("triton"):
    triton_interpreter.install()  # the same in less time
    triton_arithmetic.install()  # adds the rounding errors of GPU instructions, for the accuracy tests
if IN_XDIST:
    torch.set_num_threads(1)


# The output of programs depends on these variables. Tests and the programs that they start get the same values
# everywhere: a wide terminal without colours, English, UTC. They are set after pytest has configured its own output,
# and before bench is imported, because its console reads them once.
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
UNSET = ("LINES", "FORCE_COLOR", "CLICOLOR_FORCE", "COLORTERM", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
UNSET += ("TERMINAL_WIDTH", "GITHUB_ACTIONS", "LANGUAGE")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.pluginmanager.hasplugin("terminalreporter"):
        writer = session.config.get_terminal_writer()
        writer.fullwidth = writer.fullwidth  # keeps the width that pytest detected for its own output
    os.environ.update(ENVIRONMENT)
    for name in UNSET:
        os.environ.pop(name, None)
    time.tzset()


def pytest_report_header() -> list[str]:
    return [f"attn_kernels {b.name}: {b.detail}" for b in attn_kernels.backends().values()]


def available(name: str) -> str:
    backend = attn_kernels.backends()[name]
    if not backend.available:
        pytest.skip(f"backend {name}: {backend.detail}")
    return name


# The module of the C++ kernels if it was built and can be loaded, and the SIMD levels below its default level.
compiled_module = sys.modules.get("attn_kernels._C")
SIMD_LEVELS = () if compiled_module is None else tuple(compiled_module.simd_levels())
BEST_LEVEL = None if compiled_module is None else compiled_module.build_info()["simd"]
_AFTER_BEST = SIMD_LEVELS[SIMD_LEVELS.index(BEST_LEVEL) + 1 :] if SIMD_LEVELS else ()


def _other_forms() -> tuple[str, ...]:
    """For each level with two forms, divisions and estimates ("avx512", "avx512-estimate"), the second form."""
    levels = [level.partition("-")[0] for level in (BEST_LEVEL or "", *_AFTER_BEST)]
    return tuple(form for i, form in enumerate(_AFTER_BEST) if levels[i + 1] in levels[: i + 1])


OTHER_FORMS = _other_forms()
LOWER_LEVELS = tuple(level for level in _AFTER_BEST if level not in OTHER_FORMS)
if any(level.startswith("avx512bf16") for level in OTHER_FORMS):  # in these ops avx512 is the same code
    OTHER_FORMS = tuple(level for level in OTHER_FORMS if level not in ("avx512", "avx512-estimate"))


@contextmanager
def simd(level: str | None) -> Iterator[None]:
    """Makes the C++ kernels use this SIMD level; None: the default level."""
    before = compiled_module.use_simd(level)
    try:
        yield
    finally:
        compiled_module.use_simd(before)


def every_level(names: Sequence[str], levels: Sequence[str] = LOWER_LEVELS) -> list[str]:
    """Inserts variants of "cpu" for these SIMD levels after "cpu": "cpu-avx512", "cpu-portable"."""
    others = [f"cpu-{level}" for level in levels]
    return [variant for name in names for variant in ([name, *others] if name == "cpu" else [name])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Sets the parameters of the fixtures in BACKENDS. They depend on the test, so the fixtures cannot set them."""
    levels: tuple[str, ...] = ()
    for marker, more in (("every_level", LOWER_LEVELS), ("every_form", OTHER_FORMS)):
        levels += more if metafunc.definition.get_closest_marker(marker) is not None else ()
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    for fixture, names in BACKENDS.items():
        if fixture in metafunc.fixturenames and fixture not in own:
            metafunc.parametrize(fixture, every_level(names, levels), indirect=True)


def longest_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """``--dist worksteal`` splits the list into one piece per worker: every piece begins with tests marked ``long``.

    A worker that starts one of them last delays the whole run.
    """

    def seconds(item: pytest.Item) -> float:
        return max((mark.args[0] for mark in item.iter_markers("long")), default=0)

    long = sorted(filter(seconds, items), key=seconds, reverse=True)
    rest = iter([item for item in items if not seconds(item)])
    pieces = []
    for worker in range(workers):
        own = long[worker::workers]
        size = len(items) * (worker + 1) // workers - sum(map(len, pieces))
        pieces.append(own + list(itertools.islice(rest, max(0, size - len(own)))))
    return [item for piece in pieces for item in piece] + list(rest)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    choose(config, items)  # before -m selects
    yield
    if IN_XDIST:
        items[:] = longest_first(items, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    for item in items:
        if any(mark.args[0](**item.callspec.params) for mark in item.iter_markers("slow_if")):
            item.add_marker("slow")
    if os.environ.get("ATTN_WHOLE_MATRIX") != "1" and not any("::" in name for name in config.args):  # all run
        rest = thinned_out(items) + without_new_pairs(items)
        config.hook.pytest_deselected(items=rest)
        gone = set(rest)
        items[:] = [item for item in items if item not in gone]


FEW, ONE_OF = 8, 6


def without_new_pairs(items: list[pytest.Item]) -> list[pytest.Item]:
    """Slow cases of variants on the CPU that add no new pair of parameter values, in tests with more than FEW of them.

    These cases are left out (pairwise testing): each value of a parameter is still combined with each value of every
    other parameter. The variant and the SIMD level are parameters too. The ops themselves run all cases.
    """
    seen: dict[str, set[Any]] = {}
    of_variants: dict[str, list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        op = parameters.get("op")
        on_cpu = not any(interpreted(parameters[fixture]) for fixture in BACKENDS if fixture in parameters)
        if isinstance(op, Op) and op not in MAIN.values() and on_cpu and item.get_closest_marker("slow"):
            of_variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    rest = []
    for test, cases in of_variants.items():
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode())) if len(cases) > FEW else ():
            values = sorted((name, repr(value)) for name, value in item.callspec.params.items())
            pairs = {
                *itertools.combinations(values, 2),
                *itertools.combinations(values, 1),
            }  # one parameter has no pair
            if pairs <= seen.setdefault(test, set()):
                rest.append(item)
            seen[test] |= pairs
    return rest


def thinned_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """The slow cases to leave out on interpreted backends, in tests with more than FEW of them.

    One case in ONE_OF stays, selected by a hash of its name. All of them would take more than half of the time of all
    tests. A GPU runs all of them.
    """
    slow: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for backend in (parameters[fixture] for fixture in BACKENDS if fixture in parameters):
            if interpreted(backend) and item.get_closest_marker("slow"):
                slow.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    many = (
        sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode())) for cases in slow.values() if len(cases) > FEW
    )
    return [item for cases in many for item in cases[math.ceil(len(cases) / ONE_OF) :]]


def _has_another_level(test: str, parameters: dict[str, Any], on: list[str]) -> bool:
    """Whether a case of a variant is left out on this lower SIMD level, because it runs on another one.

    Variants share most code with MAIN, so each case runs on the highest level and on one lower level, chosen by a hash.
    """
    op, lower = parameters.get("op"), every_level(["cpu"])[1:]
    if not isinstance(op, Op) or op in MAIN.values() or not any(name in lower for name in on):
        return False
    others = [str(value) for name, value in parameters.items() if name not in (*BACKENDS, "op")]
    return lower[zlib.crc32(f"{test} {op.name} {others}".encode()) % len(lower)] not in on


def is_left_out(item: pytest.Item) -> bool:
    """Whether a test is left out: its backend has no kernels for the op, other ops cover it, or the test requests it.

    ATTN_WHOLE_MATRIX=1 keeps the last two kinds, but not second forms of a SIMD level where variants share the code.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    op = parameters.get("op")
    lacks = getattr(op, "lacks", ())
    on = [parameters[fixture] for fixture in BACKENDS if fixture in parameters]
    if any(name in lacks for name in on):
        return True
    # Only the scores of additive attention have two forms, and variants share their code.
    if any(name in every_level(("cpu",), OTHER_FORMS)[1:] for name in on) and op is not None:
        if op not in MAIN.values() or op.name not in ("additive_attention", "additive_scores"):
            return True
    if os.environ.get("ATTN_WHOLE_MATRIX") == "1":
        return False
    if is_left_to_another(item.originalname, parameters) or _has_another_level(item.originalname, parameters, on):
        return True
    return any(mark.args[0](**parameters) for mark in item.iter_markers("left_out_if"))


def use(variant: str) -> Iterator[str]:
    """Yields the name for ``backend=``; during the test the kernels use the SIMD level in the name of the variant."""
    name, _, level = variant.partition("-")  # a level may end with "-estimate"
    available(name)
    with simd(level) if level else nullcontext():
        yield name


# The fixtures that give a backend, and their backends.
BACKENDS = {
    "backend": NAMES[::-1],
    "fused": tuple(name for name in reversed(NAMES) if name != "reference"),
    "compiled": ("cpu",),
}


@pytest.fixture
def same_threads() -> Iterator[None]:
    """Restores the number of threads after commands that change it for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(same_threads: None) -> None:
    """One thread, for tiny tensors: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def outside_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables of pytest-xdist: processes that a test starts would inherit them and act as workers."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters handle small calls too. By default the original runs them, as it is faster (test_small_calls.py)."""
    monkeypatch.setattr(adapter, "min_products", lambda module: 0)


@pytest.fixture
def encoder_nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with one element for each encoder layer that ran as one autograd node."""
    layers: list[int] = []
    run = recurrent.run_layer
    monkeypatch.setattr(recurrent, "run_layer", lambda *arguments: layers.append(1) or run(*arguments))
    return layers


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend."""
    yield from use(request.param)


@pytest.fixture
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend except the reference, which is plain PyTorch and has PyTorch's own guarantees."""
    yield from use(request.param)


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels."""
    yield from use(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors for the backend of the test."""
    name = request.getfixturevalue("fused" if "fused" in request.fixturenames else "backend")
    return device_of(name)
