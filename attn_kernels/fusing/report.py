"""The report of ``fuse``, and its table."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import nn

from ..patching.report import MODULE_HEAD, Fallback, Report, Skipped, fallback_text, module_row, table
from .candidates import NO_TANH_OR_SOFTMAX
from .state import State, is_watched, state_of


class FusedModule(NamedTuple):
    """A module whose attention runs on an op of this package: its qualified name, its class, and what was found."""

    name: str
    cls: type[nn.Module]
    what: str


class FuseReport:
    """The report of :func:`fuse`; complete once the model was called, in training and in evaluation mode.

    fused: modules whose attention was found, with the part that an op computes: "context" (scores, softmax and weighted
    sum in one op), "alignments" (scores and softmax), "scores", or the library's adapter. skipped: modules that may
    compute attention and run unchanged, with the reason. fallbacks: calls of fused modules that ran the original
    forward. ``print(report)`` shows a table.
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
            skipped._replace(reason=NO_TANH_OR_SOFTMAX) if skipped.reason == "no adapter for its class" else skipped
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

    def _states(self) -> list[tuple[str, Any, State]]:
        states = []
        for name, reference in self._watched:
            module = reference()
            if is_watched(module):
                states.append((name, module, state_of(module)))
        return states

    def __str__(self) -> str:
        rows = [module_row(name, cls, f"fused: {what}") for name, cls, what in self.fused]
        rows += [module_row(name, cls, f"as it was: {reason}") for name, cls, reason in self.skipped]
        rows += [module_row(*fallback[:2], fallback_text(fallback)) for fallback in self.fallbacks]
        if not rows:
            return "attn_kernels.fuse: nothing in this model looks like attention"
        return table(MODULE_HEAD, rows)

    __repr__ = __str__
