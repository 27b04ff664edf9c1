"""``fuse(model)``: runs the attention of any model on this package's ops, whatever class computes it.

Modules of known libraries are patched (patching/). Other modules are watched if their code may compute attention. The
first call of each kind is captured as a graph (graph/capture.py), and attention in it is replaced by the ops
(graph/rewrite.py). The new graph is compared with the old one (graph/check.py), and both are timed; from then on the
faster one runs. A module keeps its parameters, buffers, hooks and state; only its class changes, as in ``patch``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..patching import Fused, Replaced, Skipped, check_model, named_modules, patch, unpatch_modules
from ..patching.classes import change_class
from .candidates import contains, has_loops, is_foreign, layers_of, may_attend
from .report import FusedModule, FuseReport
from .state import restore_class, state_of
from .watched import Watched, watched_class
from .watched import rebuild as _rebuild  # the name in pickles of earlier versions

__all__ = ["FuseReport", "FusedModule", "Watched", "_rebuild", "fuse", "fused", "unfuse"]


def fuse(model: nn.Module, *, always: bool = False) -> FuseReport:
    """Computes the attention of any model with this package's ops: same parameters, same results, no adapter.

    Attention is recognised by its operations, not by names: additive, dot or general, batch- or time-major, one query
    or many, any mask, conv or linear projections, of concatenated or summed inputs. Modules are changed in place, by
    replacing their class: parameters, ``state_dict``, hooks and attributes stay as they are, and ``isinstance`` still
    holds. Values that depend only on the memory and on weights are computed once for all steps on that memory. First
    :func:`patch` is called, for the libraries that it knows.

    The first call of each kind (train or eval, mask or none, dtype) takes about a second. It is captured, and compared
    with the original on its arguments and on random ones, in values and gradients. If the rewritten graph of a module
    differs by more than rounding, the module runs unchanged, and the report gives the reason. The next calls are timed;
    if the original is faster, it runs.

    Args:
        model: any module.
        always: True to run the rewritten graph even if the original is faster, so that results do not depend on
            measured times.

    Returns:
        :class:`FuseReport`: ``fused``, ``skipped`` and ``fallbacks``, complete after the first calls.

    Raises:
        TypeError: model is not a module.
    """
    check_model("fuse", model)
    patched = patch(model)
    watched: list[tuple[str, Any]] = []
    for name, module in named_modules(model):
        if isinstance(module, Watched):
            watched.append((name, module))
        elif not isinstance(module, Fused) and may_attend(module):
            if "forward" in module.__dict__:
                patched.skipped = [skipped for skipped in patched.skipped if skipped.name != name]
                patched.skipped.append(Skipped(name, type(module), "its forward was replaced"))
                continue
            change_class(module, watched_class(type(module)))
            watched.append((name, module))
    watched += [(name, _watch_parent(parent)) for name, parent in _parents(model, [m for _, m in watched])]
    for _, module in watched:
        state = state_of(module)
        state.always = always
        state.inner = [other for _, other in watched if other is not module and contains(module, other)]
    return FuseReport(patched, watched)


def _parents(model: nn.Module, modules: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The parents of modules, which may compute a context from the alignments that those modules return."""
    found = []
    for name, parent in named_modules(model):
        if isinstance(parent, (Watched, Fused)) or "forward" in parent.__dict__ or not is_foreign(parent):
            continue
        if any(child is module for child in layers_of(parent) for module in modules) and not has_loops(parent):
            found.append((name, parent))
    return found


def _watch_parent(parent: nn.Module) -> nn.Module:
    change_class(parent, watched_class(type(parent)))
    state_of(parent).is_parent = True
    return parent


def unfuse(model: nn.Module) -> list[Replaced]:
    """Restores the original class of all modules that :func:`fuse` or :func:`patch` changed, and returns the modules.

    Raises ValueError in the same cases as :func:`unpatch`.
    """
    check_model("unfuse", model)
    return _unfuse("unfuse", model, set())


@contextlib.contextmanager
def fused(model: nn.Module, *, always: bool = False) -> Iterator[FuseReport]:
    """``with fused(model) as report:`` fuses the model for a block. Modules fused or patched before stay so."""
    check_model("fused", model)
    swapped = (Watched, Fused)
    before = {id(module) for _, module in named_modules(model) if isinstance(module, swapped)}
    report = fuse(model, always=always)
    try:
        yield report
    finally:
        _unfuse("fused", model, before)


def _unfuse(function: str, model: nn.Module, keep: set[int]) -> list[Replaced]:
    """Restores all changed modules except those whose ids are in ``keep``."""
    modules = [(n, m) for n, m in named_modules(model) if isinstance(m, Watched) and id(m) not in keep]
    for name, module in modules:
        if type(module) is not watched_class(module._attn_kernels_original):
            changed = type(module).__name__
            raise ValueError(f"{function}: {name or 'model'} was fused and then made a {changed}: undo that first")
    replaced = unpatch_modules(function, model, keep)
    for name, module in modules:
        state = state_of(module)
        if state.entries or not state.is_parent:
            replaced.append(Replaced(name, module._attn_kernels_original))
        restore_class(module)
    return replaced
