"""The inputs of a sequence of decoder steps, as a tree of tensors, and how it is flattened for autograd.

B sentences, T steps, S source steps, E embedding_size, H hidden_size, M memory_size, A units, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...mechanisms import HeadsMemory
from ...mechanisms.location_features import AlignmentFilters
from ...memory import Memory
from ...scores import Score

Axes = dict[int, str]  # the axes of a tensor that run over T or S, counted from the last axis


class Query(NamedTuple):
    """How a state becomes a query: ``AttentionModule.make_query`` as tensors and numbers."""

    weight: Tensor | None  # (A, H); None if the state is not projected
    factor: Tensor | None  # (), multiplies the query
    eps: float | None  # the query is divided by its length if that is above eps; only with a factor


class CellWeights(NamedTuple):
    """The parameters of an LSTM or GRU layer; G = 4 H or 3 H."""

    x: Tensor  # (G, n)
    h: Tensor  # (G, H)
    bias_x: Tensor  # (G,)
    bias_h: Tensor  # (G,)

    @property
    def is_lstm(self) -> bool:
        return self.h.shape[0] == 4 * self.h.shape[1]


class CalledAttention(NamedTuple):
    """An attention that each step calls."""

    module: nn.Module
    records: bool  # whether gradients are enabled
    parameters: tuple[Tensor, ...]  # those that require a gradient
    state: tuple[Tensor, ...] | None  # before the first step; None for an attention without a state


class Inputs(NamedTuple):
    """All inputs of a sequence, or the gradients of all inputs."""

    embedded: Tensor  # (B, T, E), or (U, E) with token_rows
    token_rows: Tensor | None  # (B, T), the row of ``embedded`` of each step: see distinct.py
    # A Memory; a HeadsMemory, too, if the attention is called. Its mask has the shape (B, S), or if called, (B, 1, S).
    memory: Any
    dropout: tuple[Tensor | None, ...]  # (T, B, H), factors: of the layers below the top, then of attentional vectors
    feed: Tensor  # (B, H), the attentional vector before the first step
    hidden: tuple[Tensor, ...]  # (B, H), the first states, L of them
    cell: tuple[Tensor, ...]  # the same; empty for a GRU
    weights: tuple[CellWeights, ...]
    score: Score | None  # None if the attention is called
    query: Query
    attentional_weight: Tensor  # (H, M + H)
    called: CalledAttention | None
    filters: AlignmentFilters | None  # of a stateful attention, with its state before the first step
    backend: str  # of the attention

    @property
    def steps(self) -> int:
        """T."""
        return (self.embedded if self.token_rows is None else self.token_rows).shape[1]

    @property
    def context_size(self) -> int:
        """M."""
        rows, columns = self.attentional_weight.shape
        return columns - rows


def memories(memory: Memory | HeadsMemory) -> tuple[Memory, ...]:
    """The memories of all heads; the memory itself if it has no heads."""
    return memory.heads if isinstance(memory, HeadsMemory) else (memory,)


def with_memories(memory: Memory | HeadsMemory, parts: Iterable[Memory]) -> Memory | HeadsMemory:
    """A memory of the same type with other ``memories``."""
    made = tuple(parts)
    return HeadsMemory(made) if isinstance(memory, HeadsMemory) else made[0]


def keys_and_values(memory: Memory | HeadsMemory) -> tuple[Tensor, ...]:
    """Keys and values of the first head, then of the second, and so on."""
    return tuple(x for part in memories(memory) for x in (part.keys, part.values))


def step_axes(inputs: Inputs) -> list[Axes]:
    """For each tensor that ``flatten`` finds in the inputs, which have no token_rows, its axes that run over steps."""
    memory: list[Axes] = [{-2: "S"}, {-2: "S"}, {}, {-1: "S"}]
    axes: list[Axes] = [{-2: "T"}, {}, *memory, *({-3: "T"} for _ in inputs.dropout)]
    state: list[Axes] = [] if inputs.filters is None else [{-1: "S"}, {-1: "S"}]
    return axes + [{}] * (len(flatten(inputs)[0]) - len(axes) - len(state)) + state


def flatten(tree: Any) -> tuple[list[Tensor | None], Any]:
    """The tensors in a tree of tuples and memories, in order, and the structure of the tree, which is hashable.

    None counts as a tensor, so that a tree of gradients has the structure of the tree of inputs.
    """
    tensors: list[Tensor | None] = []
    return tensors, _flatten(tree, tensors)


def _flatten(tree: Any, tensors: list[Tensor | None]) -> Any:
    if tree is None or isinstance(tree, Tensor):
        tensors.append(tree)
        return None
    if isinstance(tree, Memory):
        tensors += (tree.keys, tree.values, tree.memory_lengths, tree.mask)
        return Memory
    if isinstance(tree, tuple):
        return (type(tree), *[_flatten(child, tensors) for child in tree])
    return tree  # a number or a name


def unflatten(structure: Any, tensors: Iterator[Tensor | None]) -> Any:
    """The inverse of ``flatten``: the tree with this structure and these tensors."""
    if structure is None:
        return next(tensors)
    if structure is Memory:
        fields: list[Any] = [next(tensors) for _ in range(4)]  # keys, values, lengths, mask; None in gradients
        return Memory(*fields)
    if isinstance(structure, tuple):
        return tuple.__new__(structure[0], [unflatten(child, tensors) for child in structure[1:]])
    return structure
