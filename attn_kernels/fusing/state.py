"""The state of a fused module: its captured graphs, and the choice between the original and the rewritten graph."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..patching.classes import change_class
from ..sources import are_current
from ..stock import functions_are_replaced
from .candidates import has_loops

if TYPE_CHECKING:
    from ..graph.capture import AnyEntry, Captured

# Looked up once, because it is called in every call of a module.
is_tracing: Callable[[], bool] = torch._C._is_tracing
_is_grad_enabled = torch.is_grad_enabled

_MAX_KINDS = 16  # kinds of calls of one module
SKIPPED_CALLS = 64  # at most this many calls in a row run the original without a check of their arguments
_MAX_TIME = 0.97  # of the original's time, for the rewritten graph to be chosen: a smaller gain may be noise
_TRIALS = 3  # number of timed calls, for the original and for the rewritten graph

STATE = "_attn_kernels_fused"  # in a module's __dict__
_captured: weakref.WeakKeyDictionary[type[nn.Module], Captured] = weakref.WeakKeyDictionary()


def kind_of(attributes: dict[str, Any], args: tuple[Any, ...]) -> tuple[int, bool, bool]:
    """The key of a choice: the size of the arguments rounded to a power of two, the modes of module and autograd."""
    size = 0
    for x in args:
        if isinstance(x, Tensor):
            size += x.numel()
    return size.bit_length(), attributes["training"], _is_grad_enabled()


class Trial:
    """The times of the first calls of a kind, which alternate between the original and the rewritten graph."""

    def __init__(self) -> None:
        self.original: list[float] = []
        self.rewritten: list[float] = []

    @property
    def is_for_original(self) -> bool:
        return len(self.original) < len(self.rewritten)

    @property
    def is_over(self) -> bool:
        return len(self.original) >= _TRIALS and len(self.rewritten) >= _TRIALS

    def decide(self) -> bool:
        return min(self.rewritten) < _MAX_TIME * min(self.original)


class State:
    """The state of one module. choices: by kind of call, True for rewritten, False for the original, or a Trial."""

    def __init__(self, original: type[nn.Module]) -> None:
        self.original = original
        self.always = False
        self.inner: list[Any] = []  # watched modules within this one
        self.is_parent = False  # watched only because its inner modules may return alignments
        self.choices: dict[Any, Any] = {}
        self._streak = 0
        self.rest: int = 0  # number of next calls that run the original without a check of their arguments
        self.reasons: Counter[str] = Counter()
        self.entries: list[AnyEntry] = []
        self.keeper: Any = None
        self._source: Captured | None = None  # the owner of the entries

    def __deepcopy__(self, memo: Any) -> State:
        return State(self.original)

    def __reduce__(self) -> Any:
        return State, (self.original,)

    def is_left_alone(self, attributes: dict[str, Any], args: tuple[Any, ...]) -> bool:
        """Whether the original was chosen for a kind of call. After some such calls only every 64th is checked."""
        if self.choices.get(kind_of(attributes, args)) is not False:
            self._streak = 0
            return False
        self._streak = min(self._streak + 1, SKIPPED_CALLS)
        self.rest = self._streak
        return True

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.original.forward(module, *args, **kwargs)

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Any, choice: Any) -> Any:
        reason = unsupported_mode()
        if reason is not None:
            return self._fall_back(reason, module, args, kwargs)
        captured = self._captured()
        entry = captured.find(module, args, kwargs, self.entries)
        if entry is None and len(self.entries) >= _MAX_KINDS:
            return self._fall_back(_TOO_MANY, module, args, kwargs)
        if entry is not None and not are_current(entry.forwards):
            return self._fall_back(_REPLACED, module, args, kwargs)
        if self.is_parent and entry is None and not self._may_use_alignments(module):
            return self.forward(module, *args, **kwargs)
        if entry is None:
            found = self._capture(captured, module, args, kwargs)
            if isinstance(found, str):
                if self.is_parent:
                    restore_class(module)
                    return self.forward(module, *args, **kwargs)
                if found == _LOOPS or (not captured.is_open and not any(e.graph.is_fused for e in captured.entries)):
                    self.choices[kind] = False
                return self._fall_back(found, module, args, kwargs)
            entry = found
        if self.is_parent and not any(found.kind == "context" for found in entry.graph.found):
            restore_class(module)
            return self.forward(module, *args, **kwargs)
        if entry not in self.entries:
            if self.keeper is None:
                self.keeper = _new_keeper()
            self.entries.append(entry)
            return self._run(entry, module, args, kwargs)
        if not entry.graph.is_fused:
            self.choices.setdefault(kind, False)
            return self._fall_back(entry.graph.why(), module, args, kwargs)
        if choice is True or self.always:
            return self._run(entry, module, args, kwargs)
        return self._try(entry, module, args, kwargs, kind, choice)

    def _fall_back(self, reason: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the original, and counts the reason."""
        self.reasons[reason] += 1
        return self.forward(module, *args, **kwargs)

    def _may_use_alignments(self, module: Any) -> bool:
        """Whether modules within a parent return alignments. Once none of them can, the parent's class is restored."""
        inner = [state_of(other) for other in self.inner if is_watched(other)]
        if any(not state.is_known for state in inner):
            return False
        if any(found.kind == "alignments" for state in inner for e in state.entries for found in e.graph.found):
            return True
        restore_class(module)
        return False

    def _run(self, entry: AnyEntry, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the rewritten graph with the cached results of this module."""
        kept = entry.kept
        outer, kept.keeper = kept.keeper, self.keeper
        try:
            return entry.run(module, args, kwargs)
        finally:
            kept.keeper = outer

    def _try(
        self,
        entry: AnyEntry,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Any,
        trial: Any,
    ) -> Any:
        if any(isinstance(x, Tensor) and not x.is_cpu for x in args):  # GPU calls return before they are complete
            self.choices[kind] = True
            return self._run(entry, module, args, kwargs)
        if trial is None:
            trial = self.choices[kind] = Trial()
        is_original = trial.is_for_original
        start = time.perf_counter()
        if is_original:
            result = self.forward(module, *args, **kwargs)
        else:
            captured = self._captured()
            captured.find(module, args, kwargs, self.entries)
            result = self._run(entry, module, args, kwargs)
        (trial.original if is_original else trial.rewritten).append(time.perf_counter() - start)
        if trial.is_over:
            self.choices[kind] = trial.decide()
        return result

    def _captured(self) -> Captured:
        captured = _captured.get(self.original)
        if captured is None or captured.forward is not self.original.forward:  # the forward may have been replaced
            from ..graph.capture import Captured

            captured = _captured[self.original] = Captured(self.original.forward, self.original.__name__)
        if self._source is not captured:
            self._source, self.entries = captured, []
        return captured

    def _capture(
        self, captured: Captured, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AnyEntry | str:
        inner = [state_of(other) for other in self.inner if is_watched(other)]
        if any(not state.is_known for state in inner):
            return _WAITING  # the inner modules are called within this call
        if any(state.what() for state in inner) and has_loops(module):
            return "its attention is computed by modules within it"
        if captured.entries and has_loops(module) and not any(e.graph.is_fused for e in captured.entries):
            return _LOOPS
        return captured.capture(module, args, kwargs, in_parts=not (self.is_parent or has_loops(module)))

    @property
    def is_known(self) -> bool:
        return bool(self.entries or self.reasons)

    def what(self) -> str:
        """The kinds of attention that were found; "" for none."""
        kinds = [
            found.kind + (f" in {found.where}" if found.where else "")
            for entry in self.entries
            for found in entry.graph.found
        ]
        return ", ".join(dict.fromkeys(kinds))

    def why_not(self) -> str:
        reasons = [entry.graph.why() for entry in self.entries] + [r for r in self.reasons if r != _WAITING]
        return "; ".join(dict.fromkeys(reasons)) or "it was not called yet"


_TOO_MANY = f"{_MAX_KINDS} kinds of calls were captured"
_REPLACED = "the forward of the class of a module within it was replaced after the capture"
_LOOPS = "it has loops, and no attention was found in the graph of its first call"
_WAITING = "modules within it are captured first"


def state_of(module: Any) -> State:
    state: State | None = module.__dict__.get(STATE)
    if state is None:
        state = module.__dict__[STATE] = State(module._attn_kernels_original)
    return state


def _new_keeper() -> Any:
    from ..graph.kept import Keeper

    return Keeper()


def unsupported_mode() -> str | None:
    """The reason why no captured graph may run in the current mode, for any module."""
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func"
    if forward_ad._current_level >= 0:
        return "derivatives in forward mode"
    if _has_any_global_hook():
        return "hooks on the calls of all modules"
    if functions_are_replaced():  # a graph would not call the replaced functions
        return "a function of PyTorch was replaced"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors, as activation checkpointing has"
    return None


def is_watched(module: Any) -> bool:
    return hasattr(type(module), "_attn_kernels_original")


def restore_class(module: Any) -> None:
    change_class(module, module._attn_kernels_original)
    module.__dict__.pop(STATE, None)
