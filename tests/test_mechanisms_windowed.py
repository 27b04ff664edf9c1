"""WindowedAttention: a mechanism in windows that follow its alignments, separately for each row and hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import BahdanauAttention, LuongAttention, memory_gradient
from attn_kernels.mechanisms import (
    DynamicConvolutionAttention,
    ForwardAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    MultiHeadAttention,
    NormalizedAttention,
    PointerAttention,
    WindowedAttention,
    reorder_state,
)
from attn_kernels.seq2seq import Seq2Seq

pytestmark = pytest.mark.usefixtures("one_thread")

B, TK, Q, M, UNITS, STEPS = 4, 9, 6, 12, 7, 5
F64: Any = {"dtype": torch.float64}
LENGTHS = torch.tensor([9, 0, 4, 1])
START = [1, 0, 1, 0]
MAKE: dict[str, Callable[[], Any]] = {
    "bahdanau": lambda: BahdanauAttention(Q, M, UNITS, **F64),
    "luong": lambda: LuongAttention(Q, M, **F64),
    "smoothing": lambda: NormalizedAttention(BahdanauAttention(Q, M, UNITS, **F64), "sigmoid"),
    "location": lambda: LocationSensitiveAttention(Q, M, UNITS, 2, 3, cumulative=True, **F64),
    "forward": lambda: ForwardAttention(Q, M, UNITS, True, **F64),
    "monotonic": lambda: MonotonicAttention(Q, M, UNITS, **F64),
    "dynamic-convolution": lambda: DynamicConvolutionAttention(Q, M, UNITS, 2, 3, 2, 3, 4, **F64),
}
mechanisms = pytest.mark.parametrize("mechanism", MAKE)


def make(mechanism: str, behind: int = 1, ahead: int = 2, **options: Any) -> WindowedAttention:
    torch.manual_seed(0)
    module = WindowedAttention(MAKE[mechanism](), behind, ahead, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1.5)
    return module


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries, outputs = (torch.randn(B, n, m, generator=generator, **F64) for n, m in ((STEPS, Q), (TK, M)))
    return queries, outputs


def by_hand(module: WindowedAttention, queries: Tensor, outputs: Tensor) -> list[list[Tensor]]:
    """Sentence by sentence, by the mechanism on the memory with a mask that is counted out. Alignments."""
    inner, rows = module.attention, []
    for b, length in enumerate(LENGTHS.tolist()):
        place, state, row = START[b], None, []
        for query in queries[b]:
            allow = torch.tensor(
                [[place - module.behind <= j <= place + module.ahead and j < length for j in range(TK)]]
            )
            memory = inner.memory(outputs[b : b + 1], LENGTHS[b : b + 1])
            if hasattr(inner, "initial_state"):
                state = inner.initial_state(memory) if state is None else state
                memory = inner.memory(outputs[b : b + 1], mask=allow)
                _, alignments, state = inner(query[None], memory, state)
            else:
                alignments = inner(query[None], inner.memory(outputs[b : b + 1], mask=allow)).alignments
            row.append(alignments[0])
            place = int(alignments[0].argmax()) if alignments.sum() > 0 else place
        rows.append(row)
    return rows


@mechanisms
def test_windows_follow_the_alignments(mechanism: str) -> None:
    module, (queries, outputs) = make(mechanism).eval(), inputs()
    memory = module.memory(outputs, LENGTHS)
    first = (torch.tensor(START)[:, None, None], *module.initial_state(memory)[1:])
    context, alignments, state = module.sequence(queries, memory, first)
    expected = torch.stack([torch.stack(row) for row in by_hand(module, queries, outputs)])
    torch.testing.assert_close(alignments, expected)
    torch.testing.assert_close(context, alignments @ memory.values)
    assert (alignments[0] > 0).sum(1).max() <= 4
    most = alignments[:, -1].argmax(1)
    assert torch.equal(state[0].flatten()[LENGTHS > 0], most[LENGTHS > 0]) or mechanism == "monotonic"
    assert (alignments[0].argmax(1) != START[0]).any(), "the window was to move"


@mechanisms
def test_gradients_are_gathered(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (queries, outputs) = make(mechanism, in_training=True), inputs()
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(memory_gradient, "_MIN_BYTES", least)
        leaf = outputs.clone().requires_grad_()
        memory = module.memory(leaf, LENGTHS)
        context, _, _ = module.sequence(queries, memory)
        found.append(torch.autograd.grad(context.sin().sum(), (leaf, *module.parameters()), allow_unused=True))
        assert ("_gradient" in vars(memory)) == (least == 0 and mechanism != "smoothing")
    torch.testing.assert_close(*found)


def test_training_and_positions_of_ones_own() -> None:
    module, (queries, outputs) = make("bahdanau", 0, 0), inputs()
    memory = module.memory(outputs, mask=torch.arange(TK) >= torch.tensor([[0], [3], [8], [9]]))
    state = module.initial_state(memory)
    assert state[0].flatten().tolist() == [0, 3, 8, 0] and len(state) == 1
    torch.testing.assert_close(module(queries[:, 0], memory, state)[1], module.attention(queries[:, 0], memory)[1])
    module.eval()
    assert module(queries[:, 0], memory, state)[1].argmax(1).tolist() == [0, 3, 8, 0]
    others = torch.tensor([5, 2, 8, 1])[:, None, None]
    _, alignments, state = module(queries[:, 0], memory, (others, *state[1:]))
    assert alignments.sum(1).tolist() == [1, 0, 1, 0] and alignments[0, 5] == 1
    assert torch.equal(state[0], others)


@pytest.mark.parametrize("mechanism", ["bahdanau", "location", "monotonic"])
def test_search(mechanism: str) -> None:
    """A hypothesis has the alignments and the score of its own teacher forcing: its window moved with it."""
    torch.manual_seed(0)
    model = Seq2Seq(11, 9, 5, Q, attention=make(mechanism), **F64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    source, lengths = torch.randint(3, 11, (5, 7)), torch.tensor([7, 5, 1, 3, 6])
    for options in ({}, {"beam_size": 4}):
        found = model.generate(source, lengths, max_length=6, **options)
        for i, hypotheses in enumerate(found):
            for tokens, score, alignments in hypotheses:
                output = torch.tensor([tokens if len(tokens) == 6 else [*tokens, 2]])
                logits, expected = model(source[i : i + 1, : lengths[i]], lengths[i : i + 1], output)
                torch.testing.assert_close(alignments, expected[0, : len(tokens)].detach())
                assert score == pytest.approx(logits.log_softmax(-1).gather(2, output[..., None]).sum().item())
                assert ((alignments > 0).sum(1) <= 4).all()


def test_hypotheses_have_windows_of_their_own() -> None:
    module, (queries, outputs) = make("location").eval(), inputs()
    memory = module.memory(outputs, LENGTHS)
    state = module.initial_state(memory, 2)
    state = (torch.tensor([[0, 6]]).expand(B, 2)[..., None], *state[1:])
    _, alignments, state = module(queries[:, :2], memory, state)
    assert (alignments[0, 0, 3:] == 0).all() and (alignments[0, 1, :5] == 0).all()
    swapped = reorder_state(state, torch.tensor([[1, 0]]).expand(B, 2))
    both = module(queries[:, 2:4], memory, state), module(queries[:, [3, 2]], memory, swapped)
    torch.testing.assert_close(both[0].alignments, both[1].alignments.flip(1))


def test_errors() -> None:
    refused: list[Any] = [nn.Linear(2, 2), PointerAttention(Q, M, 3), LocalAttention(Q, M, 3), make("luong")]
    for module in [*refused, MultiHeadAttention(Q, M, 3)]:
        with pytest.raises(
            TypeError, match=f"WindowedAttention: attention must be a mech.*got {type(module).__name__}"
        ):
            WindowedAttention(module)
    with pytest.raises(ValueError, match="WindowedAttention: ahead must be an integer of at least 0, got -1"):
        WindowedAttention(MAKE["luong"](), ahead=-1)
    module, (queries, outputs) = make("luong"), inputs()
    memory = module.memory(outputs)
    with pytest.raises(TypeError, match=r"the first tensor of state must be positions, \(B, K, 1\) int64, got .*float"):
        module(queries[:, 0], memory, (torch.zeros(B, 1, 1),))
    with pytest.raises(TypeError, match=r"memory must be a Memory, made by WindowedAttention\.memory"):
        module(queries[:, 0], outputs, module.initial_state(memory))
    assert "behind=1, ahead=2" in repr(module) and module.reset_parameters() is None
