"""Embedded tokens as rows of distinct tokens: products with a weight are computed once for each distinct token.

In the batches of models of characters and phonemes each token occurs many times. Without dropout between the embedding
and a layer, equal tokens have equal products. The gradients of equal tokens are summed before the products of the
backward: the same sums, in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...stock import is_plain, is_stock, runs_eagerly

MIN_REPEATS = 2.0


class Distinct(NamedTuple):
    rows: Tensor  # (U, E), the embedded distinct tokens
    token_rows: Tensor  # int64, of the shape of the tokens: the row of each token


def embed_distinct(embedding: nn.Module, dropout: nn.Module, tokens: Tensor) -> Distinct | None:
    """``dropout(embedding(tokens))`` on the CPU as distinct rows.

    None if a module is not stock or is random, or if tokens occur fewer than MIN_REPEATS times on average.
    """
    if not (runs_eagerly(tokens.device.type) and tokens.is_cpu and is_plain(tokens) and tokens.numel() > 0):
        return None
    if not (is_stock(embedding) and isinstance(embedding, nn.Embedding) and is_stock(dropout)):
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return None
    if not isinstance(dropout, nn.Dropout) or (dropout.training and dropout.p > 0):
        return None
    distinct, index = torch.unique(tokens, return_inverse=True)
    if MIN_REPEATS * distinct.shape[0] > tokens.numel():
        return None
    return Distinct(embedding(distinct), index)


def gather(products: Tensor, index: Tensor | None) -> Tensor:
    """(U, G) -> (N, G): the products of each token. index: (N,); None: the products as they are."""
    return products if index is None else products.index_select(0, index)


def sum_by_row(gradients: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """(N, G) -> (U, G): the gradients of the distinct rows. index: (N,); None: the gradients as they are."""
    if index is None:
        return gradients
    return gradients.new_zeros(rows, gradients.shape[1]).index_add_(0, index, gradients)
