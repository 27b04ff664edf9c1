"""The gradient of a large memory in the loop, if each step of its attention is a separate graph of autograd.

``MemoryGradient`` computes the gradients of keys and values once in each backward pass. The loop runs one pass per
step. So its steps record to the loop, which computes these gradients once after the last pass.
"""

from __future__ import annotations

import threading
from weakref import ReferenceType, ref

from torch import Tensor

from ...memory import Memory
from ...memory_gradient import MemoryGradient, PendingSteps, Record


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


# Weak references: the graphs of the steps hold the gradients, and release them with their other saved tensors.
Gradients = tuple["ReferenceType[CollectedGradient]", ...]


def with_collected_gradients(memory: Memory) -> tuple[tuple[Tensor, ...], Gradients]:
    """Makes the steps on a memory of leaves record to the loop.

    Returns the anchors, and the gradients: that of the memory, and that of ``keys_alone`` if the keys require one.
    """
    memories = [x for x in (memory, memory.keys_alone()) if x.keys.requires_grad or x.values.requires_grad]
    gradients = [CollectedGradient(x.keys, x.values) for x in memories]
    for x, gradient in zip(memories, gradients, strict=True):
        object.__setattr__(x, "_gradient", gradient)
    return tuple(x.anchor for x in gradients), tuple(map(ref, gradients))


class Collector:
    """A context, for one pass or more at a time, that collects their records, and the gradients from all of them."""

    def __init__(self, gradients: Gradients) -> None:
        self.pending: list[PendingSteps] = [PendingSteps() for _ in gradients]
        self.used: list[tuple[CollectedGradient | None, PendingSteps]] = [
            (x(), steps) for x, steps in zip(gradients, self.pending, strict=True)
        ]
        self.before: list[PendingSteps | None] = []

    def __enter__(self) -> None:
        self.before = [None if gradient is None else gradient.collect(steps) for gradient, steps in self.used]

    def __exit__(self, *raised: object) -> None:
        for (gradient, _), before in zip(self.used, self.before, strict=True):
            if gradient is not None:
                gradient.collect(before)

    def gradients(self) -> list[Tensor | None]:
        """dkeys and dvalues from all records."""
        found: list[Tensor | None] = [None, None]
        for n, records in enumerate(self.pending):
            dkeys, dvalues = records.joined_gradients() if records else (None, None)
            found[0] = plus(found[0], dkeys)
            if n == 0:
                found[1] = dvalues  # those of ``keys_alone`` have no columns
        return found


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b; None counts as 0."""
    return a if b is None else b if a is None else a + b
