"""Helpers for tests of Seq2Seq: sentences, losses, and results and gradients by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_kernels.seq2seq import Seq2Seq

SOURCE, TARGET = 11, 13  # sizes of vocabularies

Batch = tuple[Tensor, ...]  # source (B, S), lengths (B,), target (B, T)
Loss = Callable[[Tensor, Tensor], Tensor]


def random_batch(lengths: Tensor, source: int, steps: int, generator: torch.Generator) -> Batch:
    """A random batch. lengths: (B,), at most ``source``."""
    return (
        torch.randint(3, SOURCE, (len(lengths), source), generator=generator),
        lengths,
        torch.randint(3, TARGET, (len(lengths), steps), generator=generator),
    )


def weighted(x: Tensor) -> Tensor:
    """A weighted sum with a different weight for every element."""
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)).sum()


LOSSES: dict[str, Loss] = {
    "both": lambda logits, alignments: weighted(logits) + weighted(alignments),
    "logits": lambda logits, alignments: weighted(logits),
    "alignments": lambda logits, alignments: weighted(alignments),
}


def run(model: Seq2Seq, data: Batch, loss: Loss = LOSSES["both"]) -> dict[str, Tensor | None]:
    """Logits, alignments, and the gradients of a loss by name; None if the loss does not depend on a parameter."""
    logits, alignments = model(*data)
    model.zero_grad()
    loss(logits, alignments).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "alignments": alignments.detach(), **gradients}


def check_each_alone(model: Seq2Seq, source: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Each sentence must have the same results alone and in a batch. Returns logits and alignments of the batch."""
    logits, alignments = model(source, lengths, target)
    for i, length in enumerate(lengths.tolist()):
        alone = model(source[i : i + 1, :length], lengths[i : i + 1], target[i : i + 1])
        torch.testing.assert_close(logits[i], alone[0][0])
        torch.testing.assert_close(alignments[i, :, :length], alone[1][0])
        assert (alignments[i, :, length:] == 0).all()
    return logits, alignments
