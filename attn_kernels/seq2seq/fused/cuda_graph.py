"""A sequence of decoder steps on a GPU as CUDA graphs: one graph launch replaces all kernel launches.

A graph is captured for fixed shapes and uses static buffers. Shapes are bucketed, so that few graphs serve all batches:
S is padded with steps that are not attended, T with steps whose results are not used. Inputs are copied into the
buffers and results out of them, so that a replay has no state. Several forwards may run before their backwards, and a
graph may be replayed while results of an earlier replay are still in use.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...memory import Memory
from .inputs import Axes, Inputs, flatten, step_axes, unflatten
from .sequence import backward, forward

_RESULTS: tuple[Axes, ...] = ({-2: "T"}, {-2: "T", -1: "S"})  # attentional vectors and alignments

# Runs a function once and captures it. Returns a function that replays it in the same buffers, and the result buffers.
Capture = Callable[[Callable[[], list[Any]]], tuple[Callable[[], object], list[Any]]]


def find_graph(inputs: Inputs) -> SequenceGraph | None:
    """The graph for these shapes; None if there is none and the steps have to be launched one by one."""
    keys = inputs.memory.keys
    capture = _capturer(keys)
    if capture is None:
        return None
    inputs = _with_lengths(inputs)
    tensors, structure = flatten(inputs)
    sizes = {name: bucket(size) for name, size in _sizes(inputs).items()}
    axes = step_axes(inputs)
    shapes = [None if x is None else _shape(x, of, sizes) for x, of in zip(tensors, axes, strict=True)]
    dtypes = tuple(None if x is None else x.dtype for x in tensors)
    key = (structure, keys.device, _stream(keys), tuple(shapes), dtypes)
    return graphs.find(key, lambda: SequenceGraph(capture, structure, tensors, shapes, axes, sizes))


def bucket(steps: int) -> int:
    """The padded size for ``steps``: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ..."""
    unit = 1 << max(0, (steps - 1).bit_length() - 3)
    return -(-steps // unit) * unit


def _with_lengths(inputs: Inputs) -> Inputs:
    """Adds lengths to a memory that has none, because bucketing adds padding after them."""
    memory, lengths = inputs.memory, inputs.memory.memory_lengths
    if lengths is None:
        keys = memory.keys
        lengths = torch.full((keys.shape[0],), keys.shape[1], dtype=torch.int64, device=keys.device)
    return inputs._replace(memory=Memory(memory.keys, memory.values, lengths, memory.mask))


def _shape(x: Tensor, axes: Axes, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of x, with the axes named in ``axes`` set to their ``sizes``."""
    return tuple(sizes[axes[i]] if (i := n - x.dim()) in axes else x.shape[n] for n in range(x.dim()))


class SequenceGraph:
    """``forward`` and ``backward`` of a sequence, replayed for inputs with the same structure and shapes that fit."""

    def __init__(
        self,
        capture: Capture,
        structure: Any,
        tensors: Sequence[Tensor | None],
        shapes: Sequence[tuple[int, ...] | None],
        axes: Sequence[Axes],
        sizes: dict[str, int],
    ) -> None:
        self.capture = capture
        self.axes = axes
        self.sizes = sizes
        # A replay and the copies around it must not be interleaved with those of other threads.
        self.lock: threading.Lock = threading.Lock()
        self.tensors: list[Tensor | None] = [
            None if x is None or shape is None else x.new_zeros(shape) for x, shape in zip(tensors, shapes, strict=True)
        ]
        self.inputs: Inputs = unflatten(structure, iter(self.tensors))
        self.backwards: dict[tuple[bool, ...], tuple[Callable[[], object], list[Any], list[Any]]] = {}
        _copy_padded(self.tensors, tensors)  # real data for the run before the capture

        def run() -> list[Tensor | None]:
            *results, saved = forward(self.inputs)
            saved_tensors, self.saved_structure = flatten(saved)
            return [*results, *saved_tensors]

        self.replay: Callable[[], object]
        self.replay, results = capture(run)
        self.results: list[Any] = results[:2]
        self.saved_tensors: list[Any] = results[2:]
        self.saved: Any = unflatten(self.saved_structure, iter(self.saved_tensors))

    def forward(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor | None]]:
        """Attentional vectors and alignments; and the saved tensors, which are an argument of ``backward``."""
        with self.lock:
            _copy_padded(self.tensors, flatten(_with_lengths(inputs))[0])
            self.replay()
            sizes = _sizes(inputs)
            results = [_copy(_unpad(x, axes, sizes)) for x, axes in zip(self.results, _RESULTS, strict=True)]
            return results, [None if x is None else _copy(x) for x in self.saved_tensors]

    def backward(
        self, inputs: Inputs, saved: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of the inputs, flattened."""
        sizes = _sizes(inputs)
        with self.lock:
            _copy_padded(self.tensors, flatten(_with_lengths(inputs))[0])
            _copy_padded(self.saved_tensors, saved)
            replay, given, results = self._backward_of(gradients)
            _copy_padded(given, gradients)
            replay()
            pairs = zip(results, self.axes, strict=True)
            return [None if x is None else _copy(_unpad(x, axes, sizes)) for x, axes in pairs]

    def _backward_of(self, gradients: Sequence[Tensor | None]) -> tuple[Callable[[], object], list[Any], list[Any]]:
        """A function that replays the backward, the gradients that it reads and the gradients that it computes."""
        which = tuple(x is not None for x in gradients)
        if which not in self.backwards:
            given = [
                None if x is None else x.new_zeros(_shape(x, axes, self.sizes))
                for x, axes in zip(gradients, _RESULTS, strict=True)
            ]
            _copy_padded(given, gradients)
            replay, results = self.capture(lambda: flatten(backward(self.inputs, self.saved, *given))[0])
            self.backwards[which] = replay, given, results
        return self.backwards[which]


def _sizes(inputs: Inputs) -> dict[str, int]:
    return {"T": inputs.steps, "S": inputs.memory.keys.shape[1]}


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _unpad(x: Tensor, axes: Axes, sizes: dict[str, int]) -> Tensor:
    """The part of x that is not padding."""
    return x[tuple(slice(size) for size in _shape(x, axes, sizes))]


def _copy_padded(into: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> None:
    """Copies into static buffers, and zeroes their padding: a stale NaN there would survive multiplication by 0."""
    same_into: list[Tensor] = []
    same: list[Tensor] = []
    for static, x in zip(into, tensors, strict=True):
        if static is None:
            continue
        assert x is not None  # the inputs have the structure of the graph's buffers
        if static.shape != x.shape:
            static.zero_()
            static[tuple(slice(size) for size in x.shape)].copy_(x)
        else:
            same_into.append(static)
            same.append(x)
    if same:
        torch._foreach_copy_(same_into, same)


class Graphs:
    """An LRU cache of graphs. A capture takes as long as several runs, so only repeated shapes get a graph."""

    capacity = 16
    min_calls = 2
    min_calls_to_replace = 16  # with ``capacity`` in use

    def __init__(self) -> None:
        self.made: OrderedDict[Hashable, SequenceGraph] = OrderedDict()
        self.calls: dict[Hashable, int] = {}
        self.lock: threading.Lock = threading.Lock()

    def find(self, key: Hashable, make: Callable[[], SequenceGraph]) -> SequenceGraph | None:
        with self.lock:
            if key in self.made:
                self.made.move_to_end(key)
                return self.made[key]
            if len(self.calls) > 1024:
                self.calls.clear()
            calls = self.calls[key] = self.calls.get(key, 0) + 1
            full = len(self.made) >= self.capacity
            if calls < (self.min_calls_to_replace if full else self.min_calls):
                return None
            if full:
                self.made.popitem(last=False)
            self.made[key] = make()
            del self.calls[key]
            return self.made[key]


graphs: Graphs = Graphs()


def _capturer(x: Tensor) -> Capture | None:
    """None if nothing can be captured: on a CPU, or while the caller captures a graph."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return functools.partial(_capture, x.device)


def _stream(x: Tensor) -> int:
    """The current stream, which is part of the key: the buffers of a graph are ordered by one stream."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _capture(device: torch.device, function: Callable[[], list[Any]]) -> tuple[Callable[[], object], list[Any]]:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles kernels and allocates workspaces of libraries, which a capture does not allow
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are checked: other threads, such as a data loader's, may allocate meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = function()
        except Exception as error:
            message = (
                "Seq2Seq: the decoder's loop could not be captured as a CUDA graph; cuda_graph=False does without: "
            )
            raise RuntimeError(f"{message}{error}") from error
    return graph.replay, results
