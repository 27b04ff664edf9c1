"""OpenNMT-py 3.5.1: its GlobalAttention, original against patched."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch

FOUND = importlib.util.find_spec("onmt")
if FOUND is None:
    pytest.skip("OpenNMT-py is not installed: see tests/peers/requirements.txt", allow_module_level=True)
for name in ("onmt", "onmt.modules", "onmt.utils"):  # packages that import all of OpenNMT-py's dependencies
    package = types.ModuleType(name)
    package.__path__ = [str(Path(FOUND.origin).parent.joinpath(*name.split(".")[1:]))]
    sys.modules.setdefault(name, package)

from onmt.modules.global_attention import GlobalAttention

from attn_kernels import patch
from steps import check_copies, check_nothing_is_stale, compare

TYPES = ("dot", "general", "mlp")


def decode(module, memory, queries, lengths=None):
    return [x for query in queries for x in module(query, memory, lengths)]


def teacher_forced(module, memory, queries, lengths=None):
    return [*module(queries, memory, src_len=lengths), *module(queries[:, :1], memory, src_len=lengths)]


@pytest.mark.parametrize("attn_type", TYPES)
@pytest.mark.parametrize("seed", range(6))
def test_steps(attn_type, seed):
    torch.manual_seed(seed)
    batch, steps, dim = (int(torch.randint(1, n, ())) for n in (6, 20, 40))
    memory = torch.randn(batch, steps, dim).double()
    lengths = {} if seed % 3 == 0 else {"lengths": torch.randint(1, steps + 1, (batch,))}
    module = GlobalAttention(dim, attn_type=attn_type)
    queries = torch.randn(3, batch, dim).double()
    assert compare(module, decode, {"memory": memory, "queries": queries, **lengths}) == []
    queries = torch.randn(batch, 5, dim).double()
    assert compare(module, teacher_forced, {"memory": memory, "queries": queries, **lengths}) == []


@pytest.mark.parametrize("attn_type", TYPES)
def test_gradients_that_are_gathered(attn_type):
    """A memory large enough for its gradients to be made once for all steps."""
    torch.manual_seed(0)
    inputs = {
        "memory": torch.randn(16, 40, 100).double(),
        "queries": torch.randn(4, 16, 100).double(),
        "lengths": torch.randint(1, 41, (16,)),
    }
    assert compare(GlobalAttention(100, attn_type=attn_type), decode, inputs) == []


@pytest.mark.parametrize("attn_type", TYPES)
def test_a_sentence_of_length_0(attn_type):
    torch.manual_seed(0)
    lengths = torch.tensor([3, 0, 7])
    inputs = {"memory": torch.randn(3, 7, 6).double(), "queries": torch.randn(2, 3, 6).double(), "lengths": lengths}
    assert compare(GlobalAttention(6, attn_type=attn_type), decode, inputs) == ["a row with nothing to attend"]


@pytest.mark.parametrize("attn_type", TYPES)
def test_lengths_beyond_the_memory(attn_type):
    torch.manual_seed(0)
    lengths = torch.tensor([3, 9, 7])
    inputs = {"memory": torch.randn(3, 7, 6).double(), "queries": torch.randn(2, 3, 6).double(), "lengths": lengths}
    (reason,) = compare(GlobalAttention(6, attn_type=attn_type), decode, inputs)
    assert "memory_lengths must be in 0..Tk" in reason


@pytest.mark.parametrize("attn_type", TYPES)
def test_coverage_writes_to_the_memory_as_before(attn_type):
    torch.manual_seed(0)
    original = GlobalAttention(6, coverage=True, attn_type=attn_type)
    patched = copy.deepcopy(original)
    report = patch(patched)
    query, memory, coverage = torch.randn(3, 6), torch.randn(3, 7, 6), torch.rand(3, 7)
    results = []
    for module in (original, patched):
        mine = memory.clone()
        with torch.no_grad():
            results.append([*module(query, mine, coverage=coverage), mine])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert not torch.equal(results[1][2], memory)
    assert [f.reason for f in report.fallbacks] == ["coverage"]


def test_sparsemax_is_left_alone():
    report = patch(GlobalAttention(6, attn_func="sparsemax"))
    assert not report.replaced and report.skipped[0].reason == "attn_func='sparsemax'"


def test_its_own_test_passes_patched(monkeypatch):
    reports = []

    def patched_attention(*args):
        module = GlobalAttention(*args)
        reports.append(patch(module))
        return module

    monkeypatch.setattr(sys.modules["onmt"], "modules", sys.modules["onmt.modules"], raising=False)
    monkeypatch.setattr(sys.modules["onmt.modules"], "GlobalAttention", patched_attention, raising=False)
    tests = unittest.defaultTestLoader.loadTestsFromName("onmt.tests.test_attention")
    result = unittest.TestResult()
    tests.run(result)
    assert result.testsRun == 1 and result.wasSuccessful(), result.errors + result.failures
    assert len(reports) == 1 and reports[0].replaced and not reports[0].fallbacks


@pytest.mark.parametrize("attn_type", TYPES)
def test_nothing_stale(attn_type):
    torch.manual_seed(0)
    inputs = {
        "memory": torch.randn(3, 7, 6),
        "queries": torch.randn(1, 3, 6),
        "lengths": torch.tensor([7, 2, 5]),
    }
    module = GlobalAttention(6, attn_type=attn_type)
    check_nothing_is_stale(module, decode, inputs, lambda given: given["lengths"][1].fill_(6))


@pytest.mark.parametrize("attn_type", TYPES)
def test_copies_pickles_and_back(attn_type):
    torch.manual_seed(0)
    check_copies(
        GlobalAttention(6, attn_type=attn_type),
        decode,
        torch.randn(3, 7, 6),
        torch.randn(2, 3, 6),
        torch.tensor([7, 2, 5]),
    )
