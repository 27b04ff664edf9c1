"""``torch.compile(model, backend="attn_kernels")``: attention by this package's ops, all else by inductor.

For those who compile their models themselves; without torch.compile see :func:`attn_kernels.fuse`. A graph is compared
with the original in its first call, as there. Where they differ, the original runs uncompiled, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import ops
from .graph.capture import Graph


def attn_kernels_backend(
    graph_module: torch.fx.GraphModule, example_inputs: list[Tensor], **options: Any
) -> Callable[..., Any]:
    """A backend of torch.compile: ``options`` are those of inductor.

    Scores with a mask are computed by the op, and their softmax by inductor: whether a row has nothing to attend, which
    the original answers in its own way, is not known while a graph is compiled.
    """
    from torch._inductor.compile_fx import compile_fx

    ops.call_from_inductor()
    graph = Graph(graph_module, branches=False)
    chosen = graph.graph_module if graph.is_fused else graph_module
    compiled = cast("Callable[..., Any]", compile_fx(chosen, example_inputs, **options))
    if not graph.is_fused:
        return compiled
    return _Checked(graph, compiled)


class _Checked:
    """A compiled graph that is compared with the original in its first call."""

    def __init__(self, graph: Graph, compiled: Callable[..., Any]) -> None:
        self._graph, self._compiled, self._is_checked = graph, compiled, False

    def __call__(self, *args: Any) -> Any:
        if not self._is_checked:
            self._graph.settle(args)
            self._is_checked = True
            if not self._graph.is_fused:
                warnings.warn(f"attn_kernels: a graph runs uncompiled: {self._graph.reasons[0]}", stacklevel=2)
                self._compiled = self._graph.original
        return self._compiled(*args)
