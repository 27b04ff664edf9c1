"""``torch.compile(model, backend="attn_kernels")``: attention runs on this package's ops, the rest on Inductor.

It is for users who compile their models; without torch.compile see :func:`attn_kernels.fuse`. As there, the first call
of a graph is compared with the original. If the results differ, the original runs uncompiled, with a warning.
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
    """A backend of torch.compile: ``options`` are those of Inductor.

    With a mask, the op computes only the scores, and Inductor their softmax: models differ in their result for a row
    with nothing to attend, and a graph is compiled before it is known whether there is one.
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
    """A compiled graph whose first call is compared with the original."""

    def __init__(self, graph: Graph, compiled: Callable[..., Any]) -> None:
        self._graph, self._compiled, self._is_checked = graph, compiled, False

    def __call__(self, *args: Any) -> Any:
        if not self._is_checked:
            self._graph.settle(args)
            self._is_checked = True
            if not self._graph.is_fused:
                warnings.warn(
                    f"attn_kernels: a graph is not fused and runs in eager mode: {self._graph.reasons[0]}", stacklevel=2
                )
                self._compiled = self._graph.original
        return self._compiled(*args)
