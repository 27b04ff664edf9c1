"""The loop of a decoder on a GPU as CUDA graphs: all of its launches as one.

A graph is made for fixed shapes and computes in memory of its own. Shapes come in buckets: S and T are padded with
steps that are not attended to and steps whose results are not used, so that few graphs serve all batches. Inputs are
copied in and results copied out, so that to autograd a replay is a function like any other: several forwards may come
before their backwards, and a graph may be used again while results of it are alive.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sequence import Inputs, Settings, differentiate, evaluate

# Which axes are T or S steps, counted from the last.
_AXES: dict[str, dict[int, str]] = {
    "embedded": {-2: "T"},
    "keys": {-2: "S"},
    "values": {-2: "S"},
    "mask": {-1: "S"},
}
_FACTORS = {-3: "T"}  # of dropout
_RESULTS: tuple[dict[int, str], ...] = ({-2: "T"}, {-2: "T", -1: "S"})  # attentional vectors and alignments

# Runs a function once and records it: returns what computes it again, in the same memory, and its results there.
Capture = Callable[[Callable[[], list[Any]]], tuple[Callable[[], object], list[Any]]]


def find_graph(settings: Settings, tensors: Sequence[Tensor | None]) -> SequenceGraph | None:
    """The graph for these shapes; None where the loop is better computed without."""
    capture = _capturer(tensors[0]) if settings.replays else None
    if capture is None:
        return None
    tensors = _as_padded(tensors)
    axes = [_AXES.get(name, {}) for name in Inputs._fields]
    axes += [_FACTORS] * settings.layers + [{}] * (len(tensors) - len(axes) - settings.layers)
    inputs = Inputs(*tensors[: len(Inputs._fields)])
    sizes = {"T": bucket(inputs.embedded.shape[1]), "S": bucket(inputs.keys.shape[1])}
    shapes = [None if x is None else _shape(x, of, sizes) for x, of in zip(tensors, axes, strict=True)]
    dtypes = tuple(None if x is None else x.dtype for x in tensors)
    key = (settings, inputs.keys.device, _stream(inputs.keys), tuple(shapes), dtypes)
    return graphs.find(key, lambda: SequenceGraph(capture, settings, tensors, shapes, axes))


def bucket(steps: int) -> int:
    """The size that ``steps`` are padded to: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ..."""
    unit = 1 << max(0, (steps - 1).bit_length() - 3)
    return -(-steps // unit) * unit


def _as_padded(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """With lengths: padding is beyond."""
    inputs = Inputs(*tensors[: len(Inputs._fields)])
    batch, source = inputs.keys.shape[:2]
    lengths = inputs.memory_lengths
    if lengths is None:
        lengths = torch.full((batch,), source, dtype=torch.int64, device=inputs.keys.device)
    return [*inputs._replace(memory_lengths=lengths), *tensors[len(Inputs._fields) :]]


def _shape(x: Tensor, axes: dict[int, str], sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of x with the axes that ``axes`` names as long as ``sizes`` tells."""
    return tuple(sizes[axes[i]] if (i := n - x.dim()) in axes else x.shape[n] for n in range(x.dim()))


class SequenceGraph:
    """``evaluate`` and ``differentiate`` for tensors of some shapes, replayed."""

    def __init__(
        self,
        capture: Capture,
        settings: Settings,
        tensors: Sequence[Tensor | None],
        shapes: Sequence[tuple[int, ...] | None],
        axes: Sequence[dict[int, str]],
    ) -> None:
        self.capture = capture
        self.axes = axes
        # A replay and the copies around it belong together, whatever other threads do with the same graph.
        self.lock = threading.Lock()
        self.inputs = [None if x is None else x.new_zeros(shape) for x, shape in zip(tensors, shapes, strict=True)]
        self.sizes = {"T": self.inputs[0].shape[1], "S": self.inputs[2].shape[1]}
        self.backwards: dict[tuple[bool, ...], tuple[Callable[[], object], list[Any], list[Any]]] = {}
        _copy_padded(self.inputs, tensors)  # numbers as they come, for the run before the recording

        def run() -> list[Tensor]:
            self.parts, *results, kept = evaluate(settings, self.inputs)
            return [*results, *kept]

        self.replay, self.results = capture(run)

    def forward(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Attentional vectors, alignments and what ``backward`` is to be given."""
        with self.lock:
            _copy_padded(self.inputs, _as_padded(tensors))
            self.replay()
            sizes = _sizes(tensors)
            cut = [_unpad(x, axes, sizes) for x, axes in zip(self.results, _RESULTS, strict=False)]
            return [x.clone(memory_format=torch.contiguous_format) for x in (*cut, *self.results[2:])]

    def backward(
        self, tensors: Sequence[Tensor | None], kept: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of ``tensors``."""
        sizes = _sizes(tensors)
        with self.lock:
            _copy_padded(self.inputs, _as_padded(tensors))
            _copy_padded(self.results[2:], kept)
            replay, given, results = self._backward_of(gradients)
            _copy_padded(given, gradients)
            replay()
            return [
                None if x is None else _unpad(x, axes, sizes).clone(memory_format=torch.contiguous_format)
                for x, axes in zip(results, self.axes, strict=True)
            ]

    def _backward_of(self, gradients: Sequence[Tensor | None]) -> tuple[Callable[[], object], list[Any], list[Any]]:
        """What replays the backward, the gradients that it reads and those that it makes."""
        which = tuple(x is not None for x in gradients)
        if which not in self.backwards:
            given = [
                None if x is None else x.new_zeros(_shape(x, axes, self.sizes))
                for x, axes in zip(gradients, _RESULTS, strict=True)
            ]
            _copy_padded(given, gradients)
            replay, results = self.capture(lambda: differentiate(self.parts, self.inputs, self.results[2:], given))
            self.backwards[which] = replay, given, results
        return self.backwards[which]


def _sizes(tensors: Sequence[Tensor | None]) -> dict[str, int]:
    inputs = Inputs(*tensors[: len(Inputs._fields)])
    return {"T": inputs.embedded.shape[1], "S": inputs.keys.shape[1]}


def _unpad(x: Tensor, axes: dict[int, str], sizes: dict[str, int]) -> Tensor:
    """The part of x that is no padding."""
    return x[tuple(slice(size) for size in _shape(x, axes, sizes))]


def _copy_padded(into: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> None:
    """Copies; what is beyond a smaller tensor becomes 0: of what was there before, NaN would be NaN times 0, too."""
    same_into, same = [], []
    for static, x in zip(into, tensors, strict=True):
        if static is None:
            continue
        if static.shape != x.shape:
            static.zero_()
            static[tuple(slice(size) for size in x.shape)].copy_(x)
        else:
            same_into.append(static)
            same.append(x)
    if same:
        torch._foreach_copy_(same_into, same)


class Graphs:
    """Those used last. To make one takes as long as several runs, so that shapes must come again to get theirs."""

    capacity = 16
    min_calls = 2
    min_calls_to_replace = 16  # with ``capacity`` in use

    def __init__(self) -> None:
        self.made: OrderedDict[Hashable, SequenceGraph] = OrderedDict()
        self.calls: dict[Hashable, int] = {}
        self.lock = threading.Lock()

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


graphs = Graphs()


def _capturer(x: Tensor) -> Capture | None:
    """None where nothing can be recorded, as on a CPU, or while the caller captures a graph of her own."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return functools.partial(_capture, x.device)


def _stream(x: Tensor) -> int:
    """A graph's memory is used in the order of one stream."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _capture(device: torch.device, function: Callable[[], list[Any]]) -> tuple[Callable[[], object], list[Any]]:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # kernels are compiled and libraries take their memory: neither may happen in a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Errors for what this thread does: others, as those of a data loader, may go on allocating.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = function()
        except Exception as error:
            message = (
                "Seq2Seq: the decoder's loop could not be captured as a CUDA graph; cuda_graph=False does without: "
            )
            raise RuntimeError(f"{message}{error}") from error
    return graph.replay, results
