"""JoeyNMT 2.3.0: its attention, decoder and search, original against patched."""

from __future__ import annotations

import copy
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("joeynmt", reason="JoeyNMT is not installed: see tests/peers/requirements.txt")
# What its search and decoder name and do not use: modules that need tensorboard, sentencepiece and more.
for name, attribute in (
    ("torch.utils.tensorboard", "SummaryWriter"),
    ("joeynmt.vocabulary", "Vocabulary"),
    ("joeynmt.batch", "Batch"),
):
    stub = types.ModuleType(name)
    setattr(stub, attribute, object)
    sys.modules.setdefault(name, stub)

from joeynmt.attention import BahdanauAttention, LuongAttention
from joeynmt.decoders import RecurrentDecoder
from joeynmt.search import beam_search, greedy

from attn_kernels import patch
from steps import CountLinear, check_copies, compare

MECHANISMS = ("bahdanau", "luong")
EOS = 3


def make(mechanism: str, hidden: int, size: int) -> nn.Module:
    return BahdanauAttention(hidden, size, hidden) if mechanism == "bahdanau" else LuongAttention(hidden, size)


def twice(mechanism: str, hidden: int, size: int) -> tuple[nn.Module, nn.Module]:
    """The original, and the same patched."""
    original = make(mechanism, hidden, size)
    patched = copy.deepcopy(original)
    patch(patched)
    return original, patched


def some_mask(batch: int, steps: int) -> Tensor:
    return (torch.arange(steps) < torch.randint(1, steps + 1, (batch,))[:, None])[:, None]


def decode(module, memory, queries, mask):
    """Several steps on keys projected once; also what the original leaves in its attributes."""
    module.compute_proj_keys(memory)
    outputs = [x for query in queries.unbind(1) for x in module(query[:, None], mask, memory)]
    left = [module.proj_query] if isinstance(module, BahdanauAttention) else []
    return [*outputs, module.proj_keys, *left]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("seed", range(6))
def test_steps(mechanism, seed):
    torch.manual_seed(seed)
    batch, steps, hidden, size = (int(torch.randint(1, n, ())) for n in (6, 20, 40, 30))
    mask = some_mask(batch, steps)
    if seed % 3 == 1:
        mask = mask.long()
    inputs = {
        "memory": torch.randn(batch, steps, size).double(),
        "queries": torch.randn(batch, 3, hidden).double(),
        "mask": mask,
    }
    assert compare(make(mechanism, hidden, size), decode, inputs) == []


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients_that_are_gathered(mechanism):
    """A memory large enough for its gradients to be made once for all steps; another mask in a step of them."""

    def two_masks(module, memory, queries, mask, other):
        module.compute_proj_keys(memory)
        masks = (mask, mask, other, mask)
        return [x for q, m in zip(queries.unbind(1), masks, strict=True) for x in module(q[:, None], m, memory)]

    torch.manual_seed(0)
    inputs = {"memory": torch.randn(8, 40, 200).double(), "queries": torch.randn(8, 4, 150).double()}
    inputs |= {name: some_mask(8, 40) for name in ("mask", "other")}
    assert compare(make(mechanism, 150, 200), two_masks, inputs) == []


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_row_without_a_word(mechanism):
    torch.manual_seed(0)
    mask = some_mask(3, 7)
    mask[1] = False
    inputs = {"memory": torch.randn(3, 7, 6).double(), "queries": torch.randn(3, 2, 5).double(), "mask": mask}
    assert compare(make(mechanism, 5, 6), decode, inputs) == ["a row with nothing to attend"]
    module = make(mechanism, 5, 6)
    patch(module)
    context, alignments = decode(module, *(x.float() if x.is_floating_point() else x for x in inputs.values()))[:2]
    assert context[1].isnan().all() and alignments[1].isnan().all() and not context[0].isnan().any()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_errors_are_the_originals(mechanism):
    module = make(mechanism, 5, 6)
    patch(module)
    query, mask, memory = torch.randn(3, 1, 5), some_mask(3, 7), torch.randn(3, 7, 6)
    with pytest.raises(AssertionError, match="pre-computed"):
        module(query, mask, memory)
    module.compute_proj_keys(memory)
    with pytest.raises(AttributeError):
        module(query, None, memory)
    for wrong in ((query[:2], mask, memory), (query, mask[:, :, :6], memory), (query, mask, memory[:, :, :5])):
        with pytest.raises(AssertionError):
            module(*wrong)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_bfloat16_autocast(mechanism):
    torch.manual_seed(0)
    original, patched = twice(mechanism, 16, 24)
    memory, queries, mask = torch.randn(3, 9, 24), torch.randn(3, 2, 16), some_mask(3, 9)
    for inputs in ((memory, queries, mask), (memory.clone(), queries, mask)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for ours, expected in zip(decode(patched, *inputs), decode(original, *inputs), strict=True):
                assert ours.dtype == expected.dtype
                torch.testing.assert_close(ours.float(), expected.float(), rtol=0.03, atol=0.03)
    with torch.no_grad():  # the same rows in float32: no projection of autocast
        patched.compute_proj_keys(inputs[0])
        assert patched.proj_keys.dtype == torch.float32


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_nothing_stale(mechanism):
    """Whatever is written to or replaced between two calls, the result is the original's."""
    torch.manual_seed(0)
    modules = original, patched = twice(mechanism, 8, 6)
    memory, queries, mask = torch.randn(4, 7, 6), torch.randn(4, 1, 8), some_mask(4, 7)

    def check():
        for gradients in (False, True, False):
            with torch.set_grad_enabled(gradients):
                expected, ours = (decode(m, memory, queries, mask) for m in modules)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b)
                assert a.requires_grad == b.requires_grad

    check()
    memory[0, 0] += 1
    check()
    mask[:, :, 0] = ~mask[:, :, 0]
    mask[:, :, 1] = True
    check()
    with torch.no_grad():
        for module in modules:
            module.key_layer.weight.mul_(2)
    check()
    for module in modules:
        module.key_layer.weight.data = module.key_layer.weight.detach() + 1
    check()
    for module in modules:
        module.key_layer.weight = nn.Parameter(torch.ones(8, 6))
    check()
    for module in modules:
        module.key_layer.register_forward_hook(lambda layer, args, result: result + 1)
    check()
    memory = torch.randn(2, 9, 6)
    queries, mask = queries[:2], some_mask(2, 9)
    check()
    with torch.no_grad():
        for module in modules:
            module.compute_proj_keys(memory)
            module.proj_keys.mul_(3)
        torch.testing.assert_close(patched(queries, mask, memory), original(queries, mask, memory))
        for module in modules:
            module.compute_proj_keys(memory)
        torch.testing.assert_close(patched(queries, mask, memory), original(queries, mask, memory))


def test_rows_are_projected_once_under_no_grad():
    torch.manual_seed(0)
    module = make("bahdanau", 8, 6)
    patch(module)
    memory = torch.randn(3, 7, 6)

    def check(rows, calls):
        """The keys are right, and took that many calls of the layer."""
        with CountLinear() as count:
            module.compute_proj_keys(rows)
        assert count.calls == calls
        torch.testing.assert_close(module.proj_keys, module.key_layer(rows))

    with torch.no_grad():
        check(memory, 1)
        check(memory, 0)
        beam = memory.repeat_interleave(2, 0)
        check(beam, 0)
        for rows in ([1, 0, 2, 2, 5, 4], [2, 3, 5, 4], [0, 1]):
            beam = beam[rows]
            check(beam, 0)
        other = beam.clone()
        other[0, 3, 1] += 1  # where no element that is looked at first differs
        check(other, 1)
    check(other, 1)
    check(other, 1)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_copies_pickles_and_back(mechanism):
    torch.manual_seed(0)
    check_copies(make(mechanism, 8, 6), decode, torch.randn(3, 7, 6), torch.randn(3, 2, 8), some_mask(3, 7))


class Model(nn.Module):
    """What the searches use of JoeyNMT's model: an embedding and the decoder."""

    bos_index, eos_index, pad_index, unk_index, sep_index = 2, EOS, 1, 0, None
    lang_tags: tuple = ()
    specials: tuple = ()

    def __init__(self, mechanism: str, hidden: int, size: int, cell: str = "gru", vocabulary: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 12)
        encoder = SimpleNamespace(output_size=size)
        self.decoder = RecurrentDecoder(cell, 12, hidden, encoder, mechanism, 1, vocabulary)
        self.lang_tags = []

    def forward(self, return_type, trg_input, decoder_hidden=None, att_vector=None, **arguments):
        assert return_type == "decode"
        embedded = self.embedding(trg_input)
        return self.decoder(embedded, hidden=decoder_hidden, prev_att_vector=att_vector, **arguments)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("seed", range(4))
def test_searches(mechanism, seed):
    """Greedy and beam search; sentences end at different steps, and leave the batch."""
    torch.manual_seed(seed)
    original = Model(mechanism, 24, 32, "lstm" if seed % 2 else "gru").double().eval()
    nn.init.uniform_(original.decoder.output_layer.weight, -1, 1)
    nn.init.uniform_(original.decoder.bridge_layer.weight, -1, 1)
    model = copy.deepcopy(original)
    report = patch(model)
    assert [r.name for r in report.replaced] == ["decoder.attention"]
    memory, last, mask = torch.randn(6, 11, 32).double(), torch.randn(6, 32).double(), some_mask(6, 11)
    for search, options in ((greedy, {}), (beam_search, {"beam_size": 4, "alpha": 1.0, "n_best": 2})):
        arguments = {"encoder_output": memory, "encoder_hidden": last, "src_mask": mask, "return_prob": "hyp"}
        arguments |= {"max_output_length": 15, **options}
        with torch.no_grad():
            hypotheses, scores, alignments = search(model=model, **arguments)
            expected = search(model=original, **arguments)
        assert torch.equal(hypotheses, expected[0])
        torch.testing.assert_close(scores, expected[1])
        if alignments is not None:
            torch.testing.assert_close(alignments, expected[2])
    assert not report.fallbacks


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_training_the_decoder(mechanism):
    """Two losses in a row, on memories of the same values: nothing of the first is in the second."""
    torch.manual_seed(0)
    original = Model(mechanism, 40, 64).double()
    model = copy.deepcopy(original)
    patch(model)
    inputs = {"encoder_hidden": torch.randn(16, 64).double(), "src_mask": some_mask(16, 30), "unroll_steps": 6}
    inputs["trg_input"] = torch.randint(4, 40, (16, 6))
    memory = torch.randn(16, 30, 64).double()
    for _ in range(2):
        gradients = []
        for m in (original, model):
            leaf = memory.clone().requires_grad_()
            logits, _, alignments, _ = m("decode", encoder_output=leaf, **inputs)
            m.zero_grad()
            (logits.logsumexp(2).sum() + (alignments**2).sum()).backward()
            gradients.append([leaf.grad, *(p.grad for p in m.parameters())])
            with torch.no_grad():
                for parameter in m.parameters():
                    parameter.sub_(0.01 * parameter.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
