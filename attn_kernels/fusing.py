"""``fuse(model)``: the ops in any model, whatever class computes its attention.

Modules of known libraries are patched (patching.py). Of all others, those whose code can compute attention are
watched: the first call of each kind is captured as a graph (graph/capture.py), attention in it is replaced by the ops
(graph/rewrite.py), the new graph is compared with the old one (graph/check.py), and both are timed. From then on the
faster one runs. A module keeps its parameters, buffers, hooks and state; only its class changes, as ``patch`` does it.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from . import patching
from .patching import Fallback, Replaced, Report, Skipped
from .patching.classes import change_class
from .patching.report import MODULE_HEAD, fallback_text, module_row
from .sources import are_current
from .stock import functions_are_replaced

if TYPE_CHECKING:
    from .graph.capture import AnyEntry, Captured

# Looked up once: they are called in every call of a module.
_is_tracing, _is_grad_enabled = torch._C._is_tracing, torch.is_grad_enabled
_module_call = nn.Module._wrapped_call_impl  # what nn.Module.__call__ is, unless a tracer has replaced it

_MOST = 16  # kinds of calls of one module
_UNSEEN = 64  # at most so many calls run as they were before one is looked at
_CLEARLY = 0.97  # a smaller gain may be one of the clock
_TRIALS = 3  # timed calls of each of the two ways


class FusedModule(NamedTuple):
    """A module whose attention runs as an op of this package: its qualified name, its class, and what was found."""

    name: str
    cls: type[nn.Module]
    what: str


class FuseReport:
    """What :func:`fuse` did and what came of it; complete once the model was called, in training and in evaluation.

    fused: modules whose attention was found, with what: "context" (scores, softmax and weighted sum in one op),
    "alignments" (scores and softmax), "scores", or the library's adapter. skipped: modules that may compute attention
    and run as they are, with the reason. fallbacks: calls of fused modules that their own forward served.
    ``print(report)`` shows all as a table.
    """

    def __init__(self, patched: Report, watched: list[tuple[str, Any]]) -> None:
        self._patched = patched
        self._watched = [(name, weakref.ref(module)) for name, module in watched]

    @property
    def fused(self) -> list[FusedModule]:
        found = [FusedModule(name, cls, "adapter") for name, cls in self._patched.replaced]
        for name, module, state in self._states():
            what = state.what()
            if what:
                found.append(FusedModule(name, module._attn_kernels_original, what))
        return found

    @property
    def skipped(self) -> list[Skipped]:
        watched = {name for name, _, _ in self._states()}
        found = [
            skipped._replace(reason=_NO_WORDS) if skipped.reason == "no adapter for its class" else skipped
            for skipped in self._patched.skipped
            if skipped.name not in watched
        ]
        for name, module, state in self._states():
            if not state.what() and not state.is_parent:
                found.append(Skipped(name, module._attn_kernels_original, state.why_not()))
        return found

    @property
    def fallbacks(self) -> list[Fallback]:
        found = list(self._patched.fallbacks)
        for name, module, state in self._states():
            if state.what():
                found += [
                    Fallback(name, module._attn_kernels_original, reason, calls)
                    for reason, calls in state.reasons.items()
                ]
        return found

    def _states(self) -> list[tuple[str, Any, _State]]:
        states = []
        for name, reference in self._watched:
            module = reference()
            if isinstance(module, Watched):
                states.append((name, module, _state_of(module)))
        return states

    def __str__(self) -> str:
        rows = [module_row(name, cls, f"fused: {what}") for name, cls, what in self.fused]
        rows += [module_row(name, cls, f"as it was: {reason}") for name, cls, reason in self.skipped]
        rows += [module_row(*fallback[:2], fallback_text(fallback)) for fallback in self.fallbacks]
        if not rows:
            return "attn_kernels.fuse: nothing in this model looks like attention"
        return patching.table(MODULE_HEAD, rows)

    __repr__ = __str__


class Watched:
    """The mixin of modules whose calls are captured. Its names are such as no module has: they come first."""

    _attn_kernels_original: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As PyTorch's, but without its steps where the original was chosen, and nothing hooks into the call: so that
        such a call, which may be one of thousands of small ones, is no slower than it was before.
        """
        if not (is_compiling() or _is_tracing()) and _module_call is nn.Module.__call__:
            attributes = self.__dict__
            state = attributes.get(_STATE)
            if (
                state is not None
                and (state.rest > 0 or state.is_left_alone(attributes, args))
                and not (
                    attributes["_forward_hooks"]
                    or attributes["_forward_pre_hooks"]
                    or attributes["_backward_hooks"]
                    or attributes["_backward_pre_hooks"]
                    or "forward" in attributes
                    or "_compiled_call_impl" in attributes
                    or _has_any_global_hook()
                )
            ):
                state.rest -= 1
                return self._attn_kernels_original.forward(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # An outer torch.compile has the original's operations, and may rewrite them itself; a trace has plain ones.
        if is_compiling() or _is_tracing():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        state = self.__dict__.get(_STATE)
        if state is None:
            state = _state_of(self)
        kind = _kind(self.__dict__, args)
        choice = state.choices.get(kind)
        if choice is False:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return state.run(self, args, kwargs, kind, choice)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as its original class and the wish to be fused: the class of its own has no name."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *rest = reduced
        if not arguments or arguments[0] is not type(self):
            raise TypeError(f"{type(self).__name__}: its class has a __reduce__ of its own; unfuse it to pickle it")
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != _STATE}
        return (_rebuild, (self._attn_kernels_original, function, *arguments[1:]), *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the original, and puts it into the model in this module's place."""
        original = copy.copy(self)
        _restore(original)
        return original  # type: ignore[return-value]


def fuse(model: nn.Module, *, always: bool = False) -> FuseReport:
    """Computes the attention of any model with this package's ops: same parameters, same results, no adapter.

    Attention is recognised by what is computed, not by names: additive, dot or general, batch- or time-major, one query
    or many, any mask, conv or linear projections, joined or added. Modules are changed in place, by their class:
    parameters, ``state_dict``, hooks and attributes stay as they are, and ``isinstance`` still holds. What depends on
    the memory and on weights alone is made once for all steps on that memory. :func:`patch` is called first, for the
    libraries that it knows.

    The first call of each kind (train or eval, mask or none, dtype) takes about a second: it is captured, and compared
    with the original on its arguments and on random ones, in values and gradients. A module whose rewritten graph is
    not the same to within rounding runs as it is, and the report says so. The next calls are timed; where the original
    is faster, it runs.

    Args:
        model: any module.
        always: True to run what was rewritten even where the original is faster, so that a result does not depend on
            times that were measured.

    Returns:
        :class:`FuseReport`: ``fused``, ``skipped`` and ``fallbacks``, complete after the first calls.

    Raises:
        TypeError: model is no module.
    """
    patching.check_model("fuse", model)
    patched = patching.patch(model)
    watched: list[tuple[str, Any]] = []
    for name, module in patching.named_modules(model):
        if isinstance(module, Watched):
            watched.append((name, module))
        elif not isinstance(module, patching.Fused) and _may_attend(module):
            if "forward" in module.__dict__:
                patched.skipped = [skipped for skipped in patched.skipped if skipped.name != name]
                patched.skipped.append(Skipped(name, type(module), "its forward was replaced by another hand"))
                continue
            change_class(module, _watched_class(type(module)))
            watched.append((name, module))
    watched += [(name, _watch_parent(parent)) for name, parent in _parents(model, [m for _, m in watched])]
    for _, module in watched:
        state = _state_of(module)
        state.always = always
        state.inner = [other for _, other in watched if other is not module and _contains(module, other)]
    return FuseReport(patched, watched)


def _parents(model: nn.Module, modules: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules that hold others, and may make a context of the alignments that those return."""
    found = []
    for name, parent in patching.named_modules(model):
        if isinstance(parent, (Watched, patching.Fused)) or "forward" in parent.__dict__ or not _is_foreign(parent):
            continue
        if any(child is module for child in _layers(parent) for module in modules) and not _has_loops(parent):
            found.append((name, parent))
    return found


def _watch_parent(parent: nn.Module) -> nn.Module:
    change_class(parent, _watched_class(type(parent)))
    _state_of(parent).is_parent = True
    return parent


def unfuse(model: nn.Module) -> list[Replaced]:
    """Gives every module that :func:`fuse` or :func:`patch` changed its own class again, and returns which they were.

    Raises ValueError where :func:`unpatch` would.
    """
    patching.check_model("unfuse", model)
    return _unfuse("unfuse", model, set())


@contextlib.contextmanager
def fused(model: nn.Module, *, always: bool = False) -> Iterator[FuseReport]:
    """``with fused(model) as report:`` the model is fused within; modules fused or patched before stay so after."""
    patching.check_model("fused", model)
    swapped = (Watched, patching.Fused)
    before = {id(module) for _, module in patching.named_modules(model) if isinstance(module, swapped)}
    report = fuse(model, always=always)
    try:
        yield report
    finally:
        _unfuse("fused", model, before)


def _unfuse(function: str, model: nn.Module, keep: set[int]) -> list[Replaced]:
    """Of all changed modules but those whose ids are in ``keep``."""
    modules = [(n, m) for n, m in patching.named_modules(model) if isinstance(m, Watched) and id(m) not in keep]
    for name, module in modules:
        if type(module) is not _watched_class(module._attn_kernels_original):
            changed = type(module).__name__
            raise ValueError(f"{function}: {name or 'model'} was fused and then made a {changed}: undo that first")
    replaced = patching.unpatch_modules(function, model, keep)
    for name, module in modules:
        state = _state_of(module)
        if state.entries or not state.is_parent:
            replaced.append(Replaced(name, module._attn_kernels_original))
        _restore(module)
    return replaced


def _restore(module: Any) -> None:
    change_class(module, module._attn_kernels_original)
    module.__dict__.pop(_STATE, None)


def _watched_class(original: type[nn.Module]) -> type[Any]:
    cls = _watched_classes.get(original)
    if cls is None:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        names["_attn_kernels_original"] = original  # type: ignore[assignment]
        bases = (Watched, original)
        cls = types.new_class(original.__name__, bases, {}, lambda space: space.update(names))
        _watched_classes[original] = cls
    return cls


# What a module knows of its calls -------------------------------------------------------------------------------------

_STATE = "_attn_kernels_fused"  # in a module's __dict__
_watched_classes: weakref.WeakKeyDictionary[type[nn.Module], type[Any]] = weakref.WeakKeyDictionary()
_captured: weakref.WeakKeyDictionary[type[nn.Module], Captured] = weakref.WeakKeyDictionary()


def _kind(attributes: dict[str, Any], args: tuple[Any, ...]) -> tuple[int, bool, bool]:
    """What a choice is made for: the size of the arguments to a power of two, the modes of module and autograd."""
    size = 0
    for x in args:
        if isinstance(x, Tensor):
            size += x.numel()
    return size.bit_length(), attributes["training"], _is_grad_enabled()


class _Trial:
    """Times of the first calls of a kind: original and rewritten in turn."""

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
        return min(self.rewritten) < _CLEARLY * min(self.original)


class _State:
    """Of one module. ``choices``: by kind of call, True for rewritten, False for the original, or a trial."""

    def __init__(self, original: type[nn.Module]) -> None:
        self.original = original
        self.always = False
        self.inner: list[Any] = []  # watched modules within this one
        self.is_parent = False  # watched for the alignments of those only
        self.choices: dict[Any, Any] = {}
        self.rest = self._streak = 0  # calls for which the original is to run without a look at their arguments
        self.reasons: Counter[str] = Counter()
        self.entries: list[AnyEntry] = []
        self.keeper: Any = None
        self._source: Captured | None = None  # what the entries are of

    def __deepcopy__(self, memo: Any) -> _State:
        return _State(self.original)

    def __reduce__(self) -> Any:
        return _State, (self.original,)

    def is_left_alone(self, attributes: dict[str, Any], args: tuple[Any, ...]) -> bool:
        """Whether the original was chosen for a kind of call. After some such calls only every 64th is looked at."""
        if self.choices.get(_kind(attributes, args)) is not False:
            self._streak = 0
            return False
        self.rest = self._streak = min(self._streak + 1, _UNSEEN)
        return True

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.original.forward(module, *args, **kwargs)

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Any, choice: Any) -> Any:
        reason = _unsuited()
        if reason is not None:
            self.reasons[reason] += 1
            return self.forward(module, *args, **kwargs)
        captured = self._captured()
        entry = captured.find(module, args, kwargs, self.entries)
        if entry is None and len(self.entries) >= _MOST:
            self.reasons[_TOO_MANY] += 1
            return self.forward(module, *args, **kwargs)
        if entry is not None and not are_current(entry.forwards):
            self.reasons[_REPLACED] += 1
            return self.forward(module, *args, **kwargs)
        if self.is_parent and entry is None and not self._continues(module):
            return self.forward(module, *args, **kwargs)
        if entry is None:
            found = self._capture(captured, module, args, kwargs)
            if isinstance(found, str):
                if self.is_parent:
                    _restore(module)
                    return self.forward(module, *args, **kwargs)
                self.reasons[found] += 1
                if found == _LOOPS or (not captured.is_open and not any(e.graph.is_fused for e in captured.entries)):
                    self.choices[kind] = False
                return self.forward(module, *args, **kwargs)
            entry = found
        if self.is_parent and not any(found.kind == "context" for found in entry.graph.found):
            _restore(module)
            return self.forward(module, *args, **kwargs)
        if entry not in self.entries:
            if self.keeper is None:
                self.keeper = _new_keeper()
            self.entries.append(entry)
            return self._run(entry, module, args, kwargs)
        if not entry.graph.is_fused:
            self.choices.setdefault(kind, False)
            self.reasons[entry.graph.why()] += 1
            return self.forward(module, *args, **kwargs)
        if choice is True or self.always:
            return self._run(entry, module, args, kwargs)
        return self._try(entry, module, args, kwargs, kind, choice)

    def _continues(self, module: Any) -> bool:
        """Whether modules within a parent return alignments, as far as is known; where they do not, it is let go."""
        inner = [_state_of(other) for other in self.inner if isinstance(other, Watched)]
        if any(not state.is_known for state in inner):
            return False
        if any(found.kind == "alignments" for state in inner for e in state.entries for found in e.graph.found):
            return True
        _restore(module)
        return False

    def _run(self, entry: AnyEntry, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rewritten graph, with what this module keeps."""
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
        if any(isinstance(x, Tensor) and not x.is_cpu for x in args):  # where a call returns before it is done
            self.choices[kind] = True
            return self._run(entry, module, args, kwargs)
        if trial is None:
            trial = self.choices[kind] = _Trial()
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
        if captured is None or captured.forward is not self.original.forward:  # which may have been replaced since
            from .graph.capture import Captured

            captured = _captured[self.original] = Captured(self.original.forward, self.original.__name__)
        if self._source is not captured:
            self._source, self.entries = captured, []
        return captured

    def _capture(
        self, captured: Captured, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AnyEntry | str:
        inner = [_state_of(other) for other in self.inner if isinstance(other, Watched)]
        if any(not state.is_known for state in inner):
            return _WAITING  # this very call makes it known
        if any(state.what() for state in inner) and _has_loops(module):
            return "its attention is computed by modules within it"
        if captured.entries and _has_loops(module) and not any(e.graph.is_fused for e in captured.entries):
            return _LOOPS
        return captured.capture(module, args, kwargs, in_parts=not (self.is_parent or _has_loops(module)))

    @property
    def is_known(self) -> bool:
        return bool(self.entries or self.reasons)

    def what(self) -> str:
        """What was found, or "" for nothing."""
        kinds = [
            found.kind + (f" in {found.where}" if found.where else "")
            for entry in self.entries
            for found in entry.graph.found
        ]
        return ", ".join(dict.fromkeys(kinds))

    def why_not(self) -> str:
        reasons = [entry.graph.why() for entry in self.entries] + [r for r in self.reasons if r != _WAITING]
        return "; ".join(dict.fromkeys(reasons)) or "it was not called yet"


_NO_WORDS = "its code has neither a tanh nor a softmax, and so no attention"
_TOO_MANY = f"{_MOST} kinds of calls were captured"
_REPLACED = "the forward of the class of a module within it was replaced after the capture"
_LOOPS = "it has loops, and no attention was found in the graph of its first call"
_WAITING = "modules within it come first"


def _state_of(module: Any) -> _State:
    state = module.__dict__.get(_STATE)
    if state is None:
        state = module.__dict__[_STATE] = _State(module._attn_kernels_original)
    return state


def _new_keeper() -> Any:
    from .graph.kept import Keeper

    return Keeper()


def _unsuited() -> str | None:
    """Why a call cannot be one of a captured graph, whatever the module."""
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func"
    if forward_ad._current_level >= 0:
        return "derivatives in forward mode"
    if _has_any_global_hook():
        return "hooks on the calls of all modules"
    if functions_are_replaced():  # a graph would call by its name what has been put in its place
        return "a function of PyTorch was replaced"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors, as activation checkpointing has"
    return None


def _rebuild(original: type[nn.Module], function: Callable[..., Any], *arguments: Any) -> Any:
    """An empty module of a fused class, for pickle and copy."""
    return function(_watched_class(original), *arguments)


# Which modules may compute attention ----------------------------------------------------------------------------------


def _contains(module: nn.Module, other: nn.Module) -> bool:
    return any(part is other for part in module.modules())


_WORDS = frozenset(("tanh", "tanh_", "Tanh", "softmax", "Softmax"))  # one of them is in the code of attention


def _may_attend(module: nn.Module) -> bool:
    """Whether a module computes a tanh or a softmax, by its code or with a layer that is one."""
    cls = type(module)
    if not _is_foreign(module):
        return False
    if any(isinstance(part, (nn.Tanh, nn.Softmax)) for part in _layers(module)):
        return True
    if any(getattr(value, "__name__", "") in _WORDS for value in module.__dict__.values()):
        return True
    seen: set[Any] = set()
    return any(
        _mentions(function, seen)
        for base in cls.__mro__
        if base.__module__.partition(".")[0] != "torch" and base is not object
        for function in vars(base).values()
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Children, and those of PyTorch's containers among them."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _layers(child)
        yield child


def _mentions(function: Any, seen: set[Any], depth: int = 3) -> bool:
    function = getattr(function, "__func__", function)
    if isinstance(function, property):
        function = function.fget
    if not isinstance(function, types.FunctionType) or function in seen:
        return False
    seen.add(function)
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *code.co_freevars, *(x for x in code.co_consts if isinstance(x, str))}
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    if not names.isdisjoint(_WORDS):
        return True
    helpers = (function.__globals__.get(name) for name in names)
    return depth > 0 and any(
        _mentions(helper, seen, depth - 1)
        for helper in helpers
        if isinstance(helper, types.FunctionType) and not helper.__module__.startswith("torch")
    )


def _has_loops(module: Any) -> bool:
    """Whether a module's forward has loops: over steps, its graph would be another for every number of them."""
    code = getattr(getattr(module, "_attn_kernels_original", type(module)).forward, "__code__", None)
    return code is not None and any(instruction.opname == "FOR_ITER" for instruction in dis.get_instructions(code))


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module's class is neither PyTorch's nor this package's, and no script."""
    own = type(module).__module__.startswith(("torch.", f"{__package__}."))
    return not own and not isinstance(module, torch.jit.ScriptModule)
