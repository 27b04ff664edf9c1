"""The gradients of large memories in the loop, if each step of its attention is a separate graph of autograd.

``MemoryGradient`` computes the gradients of keys and values once in each backward pass. The loop runs one pass per
step. So its steps record to the loop, which computes these gradients once after the last pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import chain
from weakref import ReferenceType, ref

from torch import Tensor

from ...memory import Memory
from ...memory_gradient import MemoryGradient, PendingSteps, Record, plus


class CollectedGradient(MemoryGradient):
    """keys, values: leaves of the graphs of all steps. The anchor is a leaf, too: passes must request its gradient."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._of_thread = threading.local()
        super().__init__(keys, values)

    def _make_anchor(self) -> Tensor:
        return self.memory[0].new_empty(0).requires_grad_()

    def is_needed(self) -> bool:
        return True

    def collect(self, steps: PendingSteps | None) -> PendingSteps | None:
        """Adds the records of this thread to ``steps`` from now on. Returns the ``steps`` of the call before."""
        before: PendingSteps | None = getattr(self._of_thread, "steps", None)
        self._of_thread.steps = steps
        return before

    def record(self, step: Record, dkeys: Tensor | None = None) -> None:
        steps: PendingSteps = self._of_thread.steps
        steps.append(step)
        if dkeys is not None:
            steps.add(dkeys)


# For each memory its gradient, and that of ``keys_alone`` if the keys require one. The references are weak:
# the graphs of the steps hold the gradients, and release them with their other saved tensors.
Gradients = tuple[tuple["ReferenceType[CollectedGradient]", ...], ...]


def with_collected_gradients(memories: Iterable[Memory]) -> tuple[tuple[Tensor, ...], Gradients]:
    """Makes the steps on memories of leaves record to the loop. Returns the anchors and the gradients."""
    anchors: list[Tensor] = []
    of_memories = []
    for memory in memories:
        read = [x for x in (memory, memory.keys_alone()) if x.keys.requires_grad or x.values.requires_grad]
        gradients = [CollectedGradient(x.keys, x.values) for x in read]
        for x, gradient in zip(read, gradients, strict=True):
            object.__setattr__(x, "_gradient", gradient)
        anchors += (x.anchor for x in gradients)
        of_memories.append(tuple(map(ref, gradients)))
    return tuple(anchors), tuple(of_memories)


class Collector:
    """A context, for one pass or more at a time, that collects their records, and the gradients from all of them."""

    def __init__(self, gradients: Gradients) -> None:
        self.pending: list[list[PendingSteps]] = [[PendingSteps() for _ in of_memory] for of_memory in gradients]
        self.used: list[tuple[CollectedGradient | None, PendingSteps]] = [
            (x(), steps) for x, steps in zip(chain(*gradients), chain(*self.pending), strict=True)
        ]
        self.before: list[PendingSteps | None] = []

    def __enter__(self) -> None:
        self.before = [None if gradient is None else gradient.collect(steps) for gradient, steps in self.used]

    def __exit__(self, *raised: object) -> None:
        for (gradient, _), before in zip(self.used, self.before, strict=True):
            if gradient is not None:
                gradient.collect(before)

    def gradients(self) -> list[Tensor | None]:
        """dkeys and dvalues of each memory, from all records."""
        found: list[Tensor | None] = []
        for of_memory in self.pending:
            dkeys = dvalues = None
            for n, records in enumerate(of_memory):
                more_keys, more_values = records.joined_gradients() if records else (None, None)
                dkeys = plus(dkeys, more_keys)
                if n == 0:
                    dvalues = more_values  # those of ``keys_alone`` have no columns
            found += [dkeys, dvalues]
        return found
