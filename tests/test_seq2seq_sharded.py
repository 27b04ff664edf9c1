"""Seq2Seq under ``fully_shard`` (FSDP2), in processes with the Gloo backend, against the unsharded model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from attn_kernels.seq2seq import Seq2Seq

SENTENCES = 4


def _shard(model: Seq2Seq, which: str, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    modules: dict[str, list[nn.Module]] = {
        "apart": [model.encoder, model.decoder],
        "nested": [model.decoder.attention, model.encoder, model.decoder, model],
    }
    for module in modules[which]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _process(rank: int, world: int, which: str, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Seq2Seq(11, 13, 5, 6, 7, dtype=torch.float64, num_layers=2)
    plain = copy.deepcopy(model)
    _shard(model, which, world)
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 11, (SENTENCES, 7), generator=generator)
    lengths = torch.tensor([7, 5, 3, 1])
    target = torch.randint(3, 13, (SENTENCES, 6), generator=generator)
    own = slice(rank * SENTENCES // world, (rank + 1) * SENTENCES // world)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for _ in range(2):
        expected = plain(source, lengths, target)
        got = model(source[own], lengths[own], target[own])
        torch.testing.assert_close(got, tuple(x[own] for x in expected))
        for (logits, alignments), factor in ((expected, 1), (got, world)):  # the processes' gradients are averaged
            (factor * (logits.square().sum() + alignments.square().sum())).backward()
        for (name, x), y in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(x.grad.full_tensor(), y.grad, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for training in (True, False):  # searches of different lengths
            options = {"max_length": 3 + 4 * rank, "beam_size": 2}
            found, others = (m.train(training).generate(source, lengths, **options) for m in (model, plain))
            assert [[h.tokens for h in of] for of in found] == [[h.tokens for h in of] for of in others]
        model.train(), plain.train()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long(25)
@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without Gloo")
@pytest.mark.parametrize(("which", "world"), [("apart", 1), ("apart", 2), ("nested", 2)])
def test_sharded(which: str, world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (world, which, str(tmp_path / "store")), nprocs=world)
