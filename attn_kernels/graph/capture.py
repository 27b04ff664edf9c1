"""Captures the forward of a class of modules with TorchDynamo, and calls the captured code.

Dynamo produces a graph of tensor operations, guards that check whether the graph is valid for a call, and code that
calls the graph with the tensors of a module and returns its results in the original's structure. A call through
``torch.compile`` costs 26 us. Here the guards are checked and the code is called directly, which costs 5 us.
A graph is captured once for all modules of a class, with dynamic sizes.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..sources import Forwards, forwards_of
from . import check
from .kept import Current, current
from .nodes import value_of
from .rewrite import Found, Outcome, rewrite

_MAX_GRAPHS = 64  # of one class, for sizes of layers, modes, dtypes, options; after that the original runs
_MAX_FAILURES = 4
_STABLE_CALLS = 8  # calls in a row without a new graph, after which no new graph is expected
_MAX_PART_GRAPHS = 8  # of one part of a forward with graph breaks
_LARGE = 1 << 18  # elements of all arguments; if there are more, only some rows and steps are compared
_capturing = threading.RLock()


def _call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ORIGINAL(module, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 - in the globals of a copy


class _Stop(Exception):
    """Raised instead of running a captured graph."""


class Graph:
    """A captured graph, rewritten. found: the attention that was rewritten. reasons: why nothing or no more was.

    branches: whether the rewritten graph may branch on elements of tensors, and cache results between calls.
    """

    def __init__(self, graph_module: torch.fx.GraphModule, branches: bool = True) -> None:
        self.found: list[Found] = []
        self.reasons: list[str] = []
        self._captured: torch.fx.GraphModule = graph_module
        self.graph_module: torch.fx.GraphModule = graph_module
        self.original: Callable[..., Any] = graph_module.forward
        self.rewritten: Callable[..., Any] = graph_module.forward
        self._install: Callable[[Any], None] = lambda function: None
        nodes = graph_module.graph.nodes
        self._placeholders = [value_of(node) for node in nodes if node.op == "placeholder"]
        self._lock = threading.Lock()
        self._is_settled = False
        try:
            copy = _copy(graph_module)
            outcome: Outcome = rewrite(copy, parameters_of(copy), branches)
        except Exception as error:  # an unexpected op in the matcher must not break the model
            self.reasons.append(f"{type(error).__name__} in the search for attention: {error}")
            return
        self.found, self.reasons = outcome
        if self.found:
            self.rewritten = copy.forward
            self.graph_module = copy

    @property
    def is_fused(self) -> bool:
        return bool(self.found)

    def why(self) -> str:
        """Why nothing was rewritten."""
        return "; ".join(self.reasons) or "no attention in what it computes"

    def settle(self, args: tuple[Any, ...]) -> None:
        """Compares the two graphs for the arguments of the first call, and keeps the original if they differ."""
        with self._lock:
            if self._is_settled:
                return
            if self.found:
                keeper, current.keeper = current.keeper, None
                try:
                    less = check.smaller(self._placeholders, args) if self._is_large(args) else None
                    reason = check.difference(self.original, self.rewritten, args, less)
                finally:
                    current.keeper = keeper
                if reason is not None:
                    self.found = []
                    self.reasons.insert(0, f"the rewritten graph is not the same: {reason}")
                    self.rewritten = self.original
            self._is_settled = True
            self._install(self.rewritten)
            # Fake tensors hold weak references to parameters, with which torch.utils.swap_tensors raises an error.
            self._placeholders = []
            for graph_module in (self._captured, self.graph_module):
                for node in graph_module.graph.nodes:
                    node.meta.clear()

    def _is_large(self, args: tuple[Any, ...]) -> bool:
        """Whether comparing the graphs on arguments of these sizes would take long."""
        return sum(x.numel() for x in args if isinstance(x, Tensor)) > _LARGE

    def first(self, *args: Any) -> Any:
        """The function that the captured code calls until the graph is settled."""
        self.settle(args)
        return self.rewritten(*args)


class Entry:
    """A captured kind of call. ``check``: whether it is valid for a call. ``run``: makes the call."""

    __slots__ = ("check", "forwards", "graph", "kept", "run")

    def __init__(self, entry: Any, graph: Graph, namespace: dict[str, Any], module: nn.Module) -> None:
        self.check: Callable[[dict[str, Any]], bool] = entry.guard_manager.check
        self.graph: Graph = graph
        self.forwards: Forwards = forwards_of(module)
        self.run: Callable[..., Any] = types.FunctionType(entry.code, namespace)
        self.kept: Current = current  # where a module stores its keeper during a run


class Parts:
    """The graphs of a forward with graph breaks; the code between the graphs runs in Python, under torch.compile.

    reason: why it is not one graph. The other members are as in :class:`Graph`, over all graphs of the calls so far.
    """

    def __init__(self, call: Callable[..., Any], reason: str) -> None:
        self.graphs: list[Graph] = []
        self._reason, self._calls_without_new = reason, 0  # calls in a row that added no graph
        self._compiled: Callable[..., Any] = torch.compile(call, backend=self._backend, dynamic=True)

    @property
    def found(self) -> list[Found]:
        return [found for graph in self.graphs for found in graph.found]

    @property
    def is_fused(self) -> bool:
        return any(graph.is_fused for graph in self.graphs)

    def why(self) -> str:
        reasons = [reason for graph in self.graphs for reason in graph.reasons]
        return "; ".join(dict.fromkeys([f"it is not one graph ({self._reason})", *reasons]))

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._calls_without_new >= _STABLE_CALLS:  # setting all options takes longer than a small call
            import torch._dynamo as dynamo

            with dynamo.config.patch(suppress_errors=True):
                return self._compiled(module, args, kwargs)
        before = len(self.graphs)
        with _options(
            recompile_limit=_MAX_PART_GRAPHS, accumulated_recompile_limit=8 * _MAX_PART_GRAPHS, suppress_errors=True
        ):
            result = self._compiled(module, args, kwargs)
        self._calls_without_new = self._calls_without_new + 1 if len(self.graphs) == before else 0
        return result

    def _backend(self, graph_module: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graph = Graph(graph_module)
        self.graphs.append(graph)
        return graph.first if graph.is_fused else graph.original


class PartsEntry:
    """A kind of call with graph breaks. TorchDynamo itself selects the graphs that are valid for a call."""

    def __init__(self, parts: Parts, module: nn.Module) -> None:
        self.graph: Parts = parts
        self.run: Callable[..., Any] = parts.run
        self.kept: Current = current
        self.forwards: Forwards = forwards_of(module)

    def check(self, given: dict[str, Any]) -> bool:
        return True


AnyEntry = Entry | PartsEntry


class Captured:
    """The captured graphs of a class's forward."""

    def __init__(self, forward: Callable[..., Any], what: str) -> None:
        self.forward = forward
        self.entries: list[AnyEntry] = []
        self.failures: list[str] = []
        self._namespace = {"ORIGINAL": forward, "__builtins__": __builtins__, "__name__": f"{__name__}.of_{what}"}
        self.call: types.FunctionType = self._call_of(what)
        self._compiled: Callable[..., Any] | None = None
        self._graph: Graph | None = None
        self._is_broken = False  # whether the last capture failed because the forward is not one graph
        self._parts: PartsEntry | None = None  # tried after all other entries

    def _call_of(self, what: str) -> types.FunctionType:
        """The forward as a separate function, so that Dynamo's cache for it contains nothing else."""
        return types.FunctionType(_call.__code__.replace(co_name=f"forward_of_{what}"), self._namespace)

    @property
    def is_open(self) -> bool:
        """Whether further kinds of calls are captured."""
        return len(self.entries) < _MAX_GRAPHS and len(self.failures) < _MAX_FAILURES

    def find(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        likely: list[AnyEntry] | None = None,
    ) -> AnyEntry | None:
        """The entry for a call. likely: entries to check first; the entry found is moved to the front of it."""
        given = {"module": module, "args": args, "kwargs": kwargs}
        for place, entry in enumerate(likely or ()):
            if entry.check(given):
                if place and likely and entry is not self._parts:
                    likely.insert(0, likely.pop(place))
                return entry
        return next((entry for entry in self.entries if entry.check(given)), None)

    def capture(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], in_parts: bool
    ) -> AnyEntry | str:
        """A new entry for a call, or the reason why there is none. in_parts: whether graph breaks are allowed."""
        with _capturing:
            entry = self.find(module, args, kwargs)
            if entry is not None:
                return entry
            if not self.is_open:
                return f"{_MAX_GRAPHS} kinds of calls were captured" if not self.failures else self.failures[-1]
            reason = self._capture(module, args, kwargs)
            if reason is None:
                entry = self.find(module, args, kwargs)
                if entry is not None:
                    return entry
                reason = "what was captured does not hold for the call that it was captured of"
            elif self._is_broken and in_parts:
                self._parts = PartsEntry(Parts(self._call_of("parts"), reason), module)
                self.entries.append(self._parts)
                return self._parts
            self.failures.append(reason)
            return reason

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        import torch._dynamo as dynamo
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        if self._compiled is None:
            self._compiled = torch.compile(self.call, backend=self._backend, dynamic=True, fullgraph=True)
        self._graph = None
        before = {id(entry.code) for entry in _debug_get_cache_entry_list(self.call.__code__)}
        self._is_broken = False
        options = {
            "recompile_limit": 2 * _MAX_GRAPHS,
            "accumulated_recompile_limit": 32 * _MAX_GRAPHS,
            "suppress_errors": False,
        }
        try:
            with _options(**options):
                self._compiled(module, args, kwargs)
        except _Stop:
            pass
        except (dynamo.exc.Unsupported, dynamo.exc.UserError) as error:
            self._is_broken = True
            return _summary(error)
        except Exception as error:
            return _summary(error)
        if self._graph is None:
            return "no tensor operations"
        for entry in _debug_get_cache_entry_list(self.call.__code__):
            if id(entry.code) in before:
                continue
            name = next((name for name in entry.code.co_names if name.startswith("__compiled_fn")), None)
            if name is None or any(name.startswith("__resume_at") for name in entry.code.co_names):
                self._is_broken = True
                return "it was not captured as one graph"
            graph = self._graph
            graph._install = lambda function, name=name: self._namespace.__setitem__(name, function)
            graph._install(graph.first)
            self.entries.insert(0, Entry(entry, graph, self._namespace, module))
            return None
        return "TorchDynamo kept nothing of it"

    def _backend(self, graph_module: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self._graph = Graph(graph_module)

        def stop(*args: Any) -> Any:
            raise _Stop

        return stop


@contextlib.contextmanager
def _options(**others: Any) -> Iterator[None]:
    """The options for a capture with TorchDynamo; options that this version does not have are left out."""
    import torch._dynamo as dynamo
    from torch.fx.experimental import _config

    options = {
        "specialize_float": True,  # a scale is a number of the graph
        "skip_nnmodule_hook_guards": False,
        "allow_rnn": True,
        **others,
    }
    known = {name: value for name, value in options.items() if hasattr(dynamo.config, name)}
    shapes: Any = _config  # its ``patch`` is created at import
    with dynamo.config.patch(known), shapes.patch(use_duck_shape=False):
        yield


def parameters_of(graph_module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """The placeholders that are parameters or buffers of modules."""
    return {
        node
        for node in graph_module.graph.nodes
        if node.op == "placeholder" and (node.type is nn.Parameter or "_buffers_" in str(node.target))
    }


def _copy(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return torch.fx.GraphModule(graph_module, graph)


def _summary(error: BaseException) -> str:
    """The first lines of an error of TorchDynamo, which say what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:200]
