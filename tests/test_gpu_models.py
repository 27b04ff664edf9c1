"""Features built on the ops, on the device of a backend: searches, patched models, autocast, DistributedDataParallel.

With a GPU they run on it. Without one the same code runs the kernels in the emulator and in Triton's interpreter, and
uses gloo in place of NCCL. First contact with a GPU (bench/gpu/first.py) also runs CHECKS.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attn_kernels import BahdanauAttention, LuongAttention, additive_attention, patch, patching
from attn_kernels.patching import Fused, adapter, adapts, registry
from attn_kernels.seq2seq import Seq2Seq
from matrix import device_of, is_slow, slow_interpreted

SOURCE_VOCAB, TARGET_VOCAB = 11, 9
LENGTHS = torch.tensor([7, 3, 5])


def make(backend: str | None, *, sharp: float = 6.0, **options: object) -> Seq2Seq:
    """float64, so that no near tie of two tokens is decided by a rounding."""
    torch.manual_seed(0)
    settings = dict(embedding_size=8, hidden_size=8, units=8, dtype=torch.float64)
    model = Seq2Seq(SOURCE_VOCAB, TARGET_VOCAB, **(settings | options), backend=backend)
    with torch.no_grad():  # outputs vary, and sentences end at different steps
        for parameter in model.parameters():
            parameter.mul_(sharp)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, SOURCE_VOCAB, (len(LENGTHS), 7), generator=generator)
    return source, LENGTHS, torch.randint(2, TARGET_VOCAB, (len(LENGTHS), 5), generator=generator)


def search(backend: str, device: str, **choice: int) -> None:
    """The tokens of the reference on the CPU, with their scores and alignments."""
    models = ({}, {"attention": "luong-general", "cell": "gru"})
    for options in models[: 1 if is_slow(backend) else 2]:
        expected_model, model = make("reference", **options), make(backend, **options).to(device)
        source, lengths, _ = batch()
        expected = expected_model.generate(source, lengths, max_length=12, **choice)
        got = model.generate(source.to(device), lengths.to(device), max_length=12, **choice)
        for ours, theirs in zip(got, expected, strict=True):
            assert [h.tokens for h in ours] == [h.tokens for h in theirs]
            for a, b in zip(ours, theirs, strict=True):
                assert abs(a.score - b.score) < 1e-6
                torch.testing.assert_close(a.alignments.cpu(), b.alignments, atol=1e-6, rtol=1e-5)


def greedy_search(backend: str, device: str) -> None:
    search(backend, device)


def beam_search(backend: str, device: str) -> None:
    search(backend, device, beam_size=3)


class Additive(nn.Module):
    """An attention as others write it."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False)

    def forward(self, state: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory)))[..., 0]
        alignments = scores.masked_fill(~mask, -torch.inf).softmax(1)
        return (alignments[:, None] @ memory)[:, 0], alignments


def patched_model(backend: str, device: str) -> None:
    """patch(model) on the device: results and gradients of the original on the CPU, through the kernels."""
    ran = []

    class FusedAdditive(Fused):
        def attend(self, state: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            ran.append(state.device.type)
            v = self.v.weight[0]
            return tuple(additive_attention(self.W(state), self.U(memory), memory, v, mask=mask, backend=backend))

    torch.manual_seed(0)
    original = nn.ModuleDict({"attention": Additive()})
    model = copy.deepcopy(original).to(device)
    given = torch.randn(3, 8), torch.randn(3, 7, 8), torch.arange(7) < LENGTHS[:, None]
    with pytest.MonkeyPatch.context() as monkeypatch:
        patching.adapters()  # files of libraries register once, when imported: not in the copy, which is lost
        monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
        monkeypatch.setattr(adapter, "min_products", lambda module: 0)
        adapts(Additive)(FusedAdditive)
        assert patch(model).replaced
        results = []
        for module, there in ((original, "cpu"), (model, device)):
            outputs = module["attention"](*(x.to(there) for x in given))
            loss = outputs[0].square().sum() + outputs[1].square().sum()
            results.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()))])
    assert ran == [torch.device(device).type]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-4)


def modules_under_autocast(backend: str, device: str) -> None:
    """bfloat16 results near those in float32 on the CPU, float32 gradients of the parameters."""
    for make_module in (lambda **k: BahdanauAttention(8, 8, 8, **k), lambda **k: LuongAttention(8, 8, **k)):
        torch.manual_seed(0)
        plain = make_module(backend="reference")
        module = make_module(backend=backend)
        module.load_state_dict(plain.state_dict())
        module.to(device)
        query, memory = torch.randn(3, 2, 8), torch.randn(3, 7, 8)
        expected = plain(query, plain.memory(memory, LENGTHS))
        with torch.autocast(device, torch.bfloat16):
            got = module(query.to(device), module.memory(memory.to(device), LENGTHS.to(device)))
        assert got.context.dtype == torch.bfloat16
        torch.testing.assert_close(got.context.float().cpu(), expected.context, atol=0.05, rtol=0.05)
        wanted = torch.autograd.grad(expected.context.square().sum(), list(plain.parameters()))
        gradients = torch.autograd.grad(got.context.float().square().sum(), list(module.parameters()))
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.cpu(), theirs, atol=0.1 * theirs.abs().max().item(), rtol=0.1)


def data_parallel(backend: str, device: str) -> None:
    """DistributedDataParallel over NCCL (gloo on the CPU), a group of one: the losses of training without it."""
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        group = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(group, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            for decoder in ("loop", "steps")[: 1 if is_slow(backend) else 2]:
                models = (make("reference", sharp=1.0, decoder=decoder), make(backend, sharp=1.0, decoder=decoder))
                expected = losses(models[0], "cpu")
                wrapped = DistributedDataParallel(models[1].to(device))
                torch.testing.assert_close(losses(wrapped, device), expected, atol=1e-8, rtol=1e-7)
        finally:
            dist.destroy_process_group()


def losses(model: nn.Module, device: str, steps: int = 2) -> list[float]:
    source, lengths, target = (x.to(device) for x in batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(steps):
        logits, _ = model(source, lengths, target)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    return found


CHECKS: dict[str, Callable[[str, str], None]] = {
    "greedy search": greedy_search,
    "beam search": beam_search,
    "patched model": patched_model,
    "modules under autocast": modules_under_autocast,
    "DistributedDataParallel": data_parallel,
}


@slow_interpreted(*list(CHECKS.values())[:2])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_as_on_the_cpu(check: Callable[[str, str], None], fused: str) -> None:
    check(fused, device_of(fused))
