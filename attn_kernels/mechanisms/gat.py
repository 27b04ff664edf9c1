"""GATv2 on a dense adjacency matrix: additive attention of each node to its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_activation, check_device, check_size, check_tensor
from ..errors import ArgumentTypeError, ArgumentValueError
from ..functional import additive_attention
from ..types import Attention, alignments_of
from .recompute import recompute

_LARGE = 1 << 20  # pairs of nodes from which the alignments of several heads are recomputed, not saved


class DenseGATv2(nn.Module):
    r"""A GATv2 layer for a graph given as a dense adjacency matrix.

    .. math::
        scores_{hij} = a_h \cdot leakyrelu(W^l_h x_i + W^r_h x_j), \quad
        alignments_{hi} = softmax_{j \in N(i)}(scores_{hij}), \quad
        y_{hi} = \sum_{j \in N(i)} alignments_{hij} \, W^r_h x_j

    The heads are concatenated (``concat``) or averaged, and a bias is added.

    Source: Brody, Alon, Yahav, "How attentive are graph attention networks?", 2022, equation 7, with the sum and heads
    of Velickovic et al., "Graph attention networks", 2018, equations 4-6.

    Each head is a call of :func:`attn_kernels.additive_attention`: the (N, N, heads, out_size) tensor of the broadcast
    form is never stored. For large graphs without ``need_weights``, each head is recomputed in the backward, so that
    only the alignments of one head are stored at a time.

    Args:
        in_size: size of the nodes' features.
        out_size: A, size of each head.
        heads: H, the number of heads.
        concat: True for a result of H * out_size; False for the mean of the heads.
        negative_slope: of the leaky relu.
        self_loops: make every node a neighbour of itself.
        share_weights: :math:`W^r = W^l`.
        bias: add a bias to the result. The projections have none: equation 7 has no bias before the leaky relu.
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; the features must have the same.

    Parameters: ``query_projection.weight`` (:math:`W^l`) and, unless shared, ``memory_projection.weight``
    (:math:`W^r`), each (H * out_size, in_size); ``a`` (H, out_size); ``bias``.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        self_loops: bool = True,
        share_weights: bool = False,
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        self.in_size: int = check_size(self._name, "in_size", in_size)
        self.out_size: int = check_size(self._name, "out_size", out_size)
        self.heads: int = check_size(self._name, "heads", heads)
        self.negative_slope: float = check_activation(self._name, "leaky_relu", negative_slope)[1]
        self.concat = concat
        self.self_loops = self_loops
        self.share_weights = share_weights
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = self.heads * self.out_size
        self.query_projection: nn.Linear = nn.Linear(self.in_size, width, bias=False, **factory)
        self.memory_projection: nn.Linear | None = (
            None if share_weights else nn.Linear(self.in_size, width, bias=False, **factory)
        )
        self.a: nn.Parameter = nn.Parameter(torch.empty(self.heads, self.out_size, **factory))
        self.bias: nn.Parameter | None = (
            nn.Parameter(torch.empty(width if concat else self.out_size, **factory)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters as the constructor does: Glorot uniform, and 0 for the bias."""
        nn.init.xavier_uniform_(self.query_projection.weight)
        if self.memory_projection is not None:
            nn.init.xavier_uniform_(self.memory_projection.weight)
        nn.init.xavier_uniform_(self.a)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, adjacency: Tensor, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The new features of the nodes.

        x: (N, in_size), or (B, N, in_size) for several graphs of N nodes, padding among them.
        adjacency: (N, N) bool, or (B, N, N); [i, j] is True where node i attends to node j, an edge from j to i.
        need_weights: return (features, alignments), the latter (H, N, N) or (B, H, N, N).

        Returns (N, H * out_size) or (N, out_size), or (B, N, *). A node with nothing to attend gets the bias alone.
        A node that no node attends, itself included, contributes nothing: it may hold NaN.

        Raises ValueError or TypeError if x or adjacency do not fit the module or each other.
        """
        self._check(x, adjacency)
        batched = x.dim() == 3
        nodes = x if batched else x[None]
        allowed = adjacency if adjacency.dim() == 3 else adjacency[None]
        if self.self_loops:
            allowed = allowed | torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
        # The op ignores padding, but the gradient of a projection sums over it: 0 * NaN would be NaN.
        queries = self.query_projection(nodes.masked_fill(~allowed.any(2, keepdim=True), 0.0))
        project = self.query_projection if self.memory_projection is None else self.memory_projection
        keys = project(nodes.masked_fill(~allowed.any(1)[..., None], 0.0))
        mask = allowed.expand(nodes.shape[0], -1, -1)

        def attend(q: Tensor, k: Tensor, a: Tensor) -> Attention:
            options: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": self.negative_slope}
            options |= {"mask": mask, "need_weights": need_weights, "backend": self.backend}
            result = additive_attention(q, k, k, a, **options)
            return Attention(result.context, result.alignments)

        def sum_alone(q: Tensor, k: Tensor, a: Tensor) -> Tensor:
            return attend(q, k, a).context

        heads = zip(self._heads(queries), self._heads(keys), self.a, strict=True)
        if need_weights or self.heads == 1 or mask.numel() < _LARGE:
            results = [attend(*head) for head in heads]
        else:  # the op would save the alignments of every head for its backward
            results = [Attention(recompute(sum_alone, *head), None) for head in heads]
        contexts = [result.context for result in results]
        features = torch.cat(contexts, dim=-1) if self.concat else torch.stack(contexts).mean(0)
        if self.bias is not None:
            features = features + self.bias
        features = features if batched else features[0]
        if not need_weights:
            return features
        alignments = torch.stack([alignments_of(result) for result in results], dim=1)
        return features, alignments if batched else alignments[0]

    if TYPE_CHECKING:
        __call__ = forward

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        heads: tuple[Tensor, ...] = x.unflatten(-1, (self.heads, self.out_size)).unbind(-2)
        return heads

    def _check(self, x: Tensor, adjacency: Tensor) -> None:
        check_tensor(self._name, "x", x)
        check_tensor(self._name, "adjacency", adjacency)
        if x.dim() not in (2, 3) or x.shape[-1] != self.in_size:
            expected = f"(N, in_size) or (B, N, in_size), in_size = {self.in_size}"
            raise ArgumentValueError(f"{self._name}: x must have shape {expected}, got {tuple(x.shape)}")
        if adjacency.dtype != torch.bool:
            raise ArgumentTypeError(f"{self._name}: adjacency must be bool (True = attend), got {adjacency.dtype}")
        count = x.shape[-2]
        shapes = [(count, count)] + ([(x.shape[0], count, count)] if x.dim() == 3 else [])
        if tuple(adjacency.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ArgumentValueError(
                f"{self._name}: adjacency must have shape {expected}, got {tuple(adjacency.shape)}"
            )
        check_device(self._name, "adjacency", adjacency, x=x)

    def extra_repr(self) -> str:
        settings: dict[str, Any] = {
            "in_size": self.in_size,
            "out_size": self.out_size,
            "heads": self.heads,
            "concat": self.concat,
        }
        settings |= {"self_loops": self.self_loops, "share_weights": self.share_weights}
        settings["negative_slope"] = self.negative_slope
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
