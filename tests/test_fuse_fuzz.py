"""fuse(model) on randomly generated attention code: the result never changes, and attention is almost always found."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels import fuse
from fuse_zoo import A, Draw, H, M, Sizes
from fuse_zoo.run import assert_same, results


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.__trace")
    disabled, logger.disabled = logger.disabled, True
    yield
    logger.disabled = disabled


Way = Callable[..., Tensor]

# Each table: ways to write one step. q: (B, Tq, A), k: (B, Tk, A), pairs: (B, Tq, Tk, A), e: (B, Tq, Tk).
PAIRS: dict[str, Way] = {
    "broadcast": lambda q, k: q[:, :, None] + k[:, None],
    "reversed": lambda q, k: k.unsqueeze(1) + q.unsqueeze(2),
    "expand": lambda q, k: q.unsqueeze(2).expand(-1, -1, k.size(1), -1) + k.unsqueeze(1).expand(-1, q.size(1), -1, -1),
    "repeat": lambda q, k: q.unsqueeze(2).repeat(1, 1, k.size(1), 1) + k.unsqueeze(1).repeat(1, q.size(1), 1, 1),
    "interleave": lambda q, k: (q.repeat_interleave(k.size(1), 1) + k.repeat(1, q.size(1), 1)).view(
        q.size(0), q.size(1), k.size(1), -1
    ),
    "subtract": lambda q, k: k[:, None] - (-q)[:, :, None],
    "turned": lambda q, k: (q.transpose(0, 1)[:, :, None] + k).transpose(0, 1),
    "flat": lambda q, k: (
        (q.unsqueeze(2) + k.unsqueeze(1)).reshape(-1, k.size(2)).view(q.size(0), q.size(1), k.size(1), k.size(2))
    ),
}
SCORES: dict[str, Way] = {
    "matmul": lambda x, v: x @ v,
    "column": lambda x, v: torch.matmul(x, v.unsqueeze(1)).squeeze(-1),
    "sum": lambda x, v: (x * v).sum(-1),
    "keepdim": lambda x, v: (v.view(1, 1, 1, -1) * x).sum(3, keepdim=True)[..., 0],
    "linear": lambda x, v: F.linear(x, v[None]).squeeze(3),
    "einsum": lambda x, v: torch.einsum("bqta,a->bqt", x, v),
    "tensordot": lambda x, v: torch.tensordot(x, v, dims=([3], [0])),
    "rows": lambda x, v: torch.mm(x.reshape(-1, x.size(-1)), v[:, None]).view(x.shape[:-1]),
    "bmm": lambda x, v: torch.bmm(x.flatten(1, 2), v.expand(x.size(0), -1).unsqueeze(2)).view(
        x.size(0), x.size(1), x.size(2)
    ),
}
PRODUCTS: dict[str, Way] = {
    "bmm": lambda q, k: torch.bmm(q, k.transpose(1, 2)),
    "matmul": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("bqa,bka->bqk", q, k),
    "pairs": lambda q, k: (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1),
    "turned": lambda q, k: torch.matmul(k, q.transpose(1, 2)).transpose(1, 2),
    "root": lambda q, k: torch.bmm(q / math.sqrt(q.size(2)), k.permute(0, 2, 1)),
    "size": lambda q, k: torch.bmm(q, k.mT) / math.sqrt(k.size(1)),
    "heads": lambda q, k: (
        torch.matmul(q.unsqueeze(1).transpose(0, 1), k.unsqueeze(1).permute(1, 0, 3, 2)).transpose(0, 1).squeeze(1)
    ),
}
MASKS: dict[str, Way] = {
    "none": lambda e, p: e,
    "fill": lambda e, p: e.masked_fill(p[:, None], -torch.inf),
    "finite": lambda e, p: e.masked_fill(p.unsqueeze(1).expand_as(e), -1e9),
    "where": lambda e, p: torch.where(p[:, None], torch.full_like(e, -1e12), e),
    "kept": lambda e, p: torch.where(~p[:, None], e, -1e18),
    "float": lambda e, p: e.masked_fill(((~p).to(e.dtype) == 0)[:, None], torch.finfo(e.dtype).min),
    "added": lambda e, p: e + p.to(e.dtype)[:, None] * -1e9,
}
SOFTMAXES: dict[str, Way] = {
    "last": lambda e: e.softmax(-1),
    "function": lambda e: F.softmax(e, dim=2),
    "turned": lambda e: e.transpose(1, 2).softmax(1).transpose(1, 2),
    "flat": lambda e: torch.softmax(e.reshape(-1, e.size(2)), 1).view(e.size(0), e.size(1), e.size(2)),
}
CONTEXTS: dict[str, Way] = {
    "bmm": torch.bmm,
    "matmul": lambda a, x: a @ x,
    "einsum": lambda a, x: torch.einsum("bqt,btm->bqm", a, x),
    "sum": lambda a, x: (a.unsqueeze(3) * x.unsqueeze(1)).sum(2),
    "turned": lambda a, x: torch.bmm(x.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2),
    "weights": lambda a, x: a,
}


class Spelled(nn.Module):
    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        pick = lambda table: choose.choice(sorted(table))  # noqa: E731
        self.names = [pick(table) for table in (PAIRS, SCORES, MASKS, SOFTMAXES, CONTEXTS)]
        self.joined = choose.random() < 0.25
        self.q, self.k = nn.Linear(H, A, bias=choose.random() < 0.5), nn.Linear(M, A, bias=choose.random() < 0.5)
        self.join = nn.Linear(H + M, A)
        self.v = nn.Parameter(torch.randn(A))
        self.scale = choose.choice((1.0, 0.5, 3.0))
        self.products = pick(PRODUCTS) if choose.random() < 0.4 else None

    def forward(self, query: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        pairs, scores = self.names[:2]
        if self.products is not None:
            e = PRODUCTS[self.products](self.q(query), self.k(memory))
            return self.attend(e, memory, padding)
        if self.joined:
            rows = query.unsqueeze(2).expand(-1, -1, memory.size(1), -1)
            columns = memory.unsqueeze(1).expand(-1, query.size(1), -1, -1)
            x = self.join(torch.cat((rows, columns), -1))
        else:
            x = PAIRS[pairs](self.q(query), self.k(memory))
        return self.attend(SCORES[scores](torch.tanh(x), self.v), memory, padding)

    def attend(self, e: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        _, _, mask, softmax, context = self.names
        e = MASKS[mask](e * self.scale if self.scale != 1.0 else e, padding)
        return CONTEXTS[context](SOFTMAXES[softmax](e), memory)


def arguments(sizes: Sizes, seed: int) -> tuple[Any, ...]:
    draw = Draw(seed)
    return draw(sizes.B, sizes.Tq, H), draw(sizes.B, sizes.Tk, M), draw.padding(sizes.B, sizes.Tk)


def check(seed: int) -> None:
    class One(Spelled):
        """A class of its own, so that nothing was captured for it."""

    torch.manual_seed(seed)
    original = One(random.Random(seed)).double()
    module = copy.deepcopy(original)
    report = fuse(module, always=True)
    for sizes in (Sizes(2, 3, 4), Sizes(4, 2, 5)):
        ours, theirs = (results(m, arguments(sizes, seed)) for m in (module, original))
        assert_same(ours, theirs, 1e-11)
    assert report.fused, f"{original.names}, joined: {original.joined}, {original.products}: {report.skipped}"


@pytest.mark.parametrize("seed", range(4))
def test_random_spellings(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 104))
def test_many_random_spellings(seed: int) -> None:
    check(seed)
